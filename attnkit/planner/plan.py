"""`Plan`: a backend, the kernel calls that compute a request, their price, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.errors import KernelContractError, Refusal
from attnkit.kernel import KernelCall
from attnkit.planner.candidates import Form
from attnkit.planner.price import Price
from attnkit.planner.proof import disprove_cover
from attnkit.planner.request import Request

__all__ = ["Launch", "Plan"]


@dataclass(frozen=True)
class Launch:
    """One kernel call of a plan: what it is, where its sequences lie, what it costs."""

    label: str
    call: KernelCall
    form: Form
    price: Price


@dataclass(frozen=True)
class Plan:
    """How a request runs, and the proof that it runs right.

    `steps` are the kernel calls in order; a backend that computes the composition by itself
    (the reference) has none. `refusals` are the candidates that were dropped, `passed_over`
    the reasons of the backends that "auto" asked before this one; `alternatives` are calls
    that would compute the same, but dearer.
    """

    backend: str
    request: Request
    steps: tuple[Launch, ...] = ()
    alternatives: tuple[Launch, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    passed_over: tuple[Refusal, ...] = ()

    @property
    def calls(self) -> tuple[KernelCall, ...]:
        """The kernel calls in order."""
        return tuple(step.call for step in self.steps)

    @property
    def price(self) -> Price | None:
        """What the plan costs; None where no kernel call is made."""
        return self.steps[0].price if self.steps else None

    def verify(self) -> None:
        """Check the certificate: disjoint sets, union equal to the request, nothing averaged.

        Raises `KernelContractError` that names the cells. Cost follows slices, not cells.
        """
        if not self.steps:
            return
        wrong = disprove_cover(self.request, [(step.call, step.form.blocks) for step in self.steps])
        averaged = any(
            rows
            for call in self.calls
            if call.atten_mask is None or not call.atten_mask.is_opaque
            for h in (range(call.num_heads) if _per_head(call) else (None,))
            for rows in call.averaged_rows(h)
        )
        if wrong is None and averaged:
            wrong = Refusal("mean-of-values", "rows without a key would get the mean of V")
        if wrong is not None:
            raise KernelContractError(
                f"this plan does not compute {self.request.mask!r}: {wrong.reason}; this is a "
                "bug in attnkit, please report it with the plan's explain()",
                [wrong.code],
            )

    def explain(self) -> str:
        """Return a short report: what was understood, what will run, what it costs, and why."""
        from attnkit.planner.explain import explain

        return explain(self)

    def __str__(self) -> str:
        return self.explain()


def _per_head(call: KernelCall) -> bool:
    mask = call.atten_mask
    return mask is not None and len(mask.shape) == 4 and mask.shape[1] > 1
