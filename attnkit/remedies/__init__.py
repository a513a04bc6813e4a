"""What every code of a refusal or a contract error means, and what to do about it.

docs/reference/refusals.md is made of these, and `Refusal.remedy` reads them. A plug-in adds its
own: ``REMEDIES.add("no-stairs", Remedy("backend", "...", "..."))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnkit.registry import Registry
from attnkit.remedies import backends, calls, parallel, planner, proofs

__all__ = ["KINDS", "REMEDIES", "Remedy"]

KINDS = {
    "backend": (
        "A backend does not run the composition. Asked by name it raises `BackendRefused`; "
        '`backend="auto"` takes the next one and keeps the reason in `plan.passed_over`.'
    ),
    "candidate": (
        "One way to compute a request with the fused kernel fell out. The plan took another one, "
        "so there is nothing to do, unless no way is left: then the code is among the reasons of "
        "the backend. `plan.explain()` lists them as refused."
    ),
    "rule": (
        "Arguments that the fused kernel rejects or would compute wrongly. `fusion_attention` "
        "raises `KernelContractError` before it computes anything; in a plan it is why a "
        "candidate fell out."
    ),
    "call": (
        "Tensors or arguments of a call of the op, or of what reads such calls, that say nothing "
        "that could be computed: `KernelContractError`."
    ),
    "proof": (
        "A plan that does not compute what it says: `plan.verify()` raises, `plan.disprove()` "
        "returns it. Plans that attnkit makes are proven before they run, so a plan was changed, "
        "or this is a defect."
    ),
    "parallel": (
        "About plans over several processes: a way to exchange that such sizes do not have, or a "
        "`ParallelPlan` that does not compute what it says."
    ),
}
"""What a code is about, and where it is met."""


@dataclass(frozen=True)
class Remedy:
    """What a code means, and what to do about it; `kind` is one of `KINDS`."""

    kind: str
    meaning: str
    remedy: str


REMEDIES: Registry[Remedy] = Registry("code")
"""Every code, with what it means; the contract's rules add theirs as they are made."""


def _add(kind: str, table: Mapping[str, tuple[str, str]]) -> None:
    for code, (meaning, remedy) in table.items():
        REMEDIES.add(code, Remedy(kind, meaning, remedy))


_add("backend", backends.TOLD)
_add("candidate", planner.TOLD)
_add("call", calls.TOLD)
_add("proof", proofs.TOLD)
_add("parallel", parallel.TOLD)
