"""Run a case on a backend and compare every number with the oracle's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, register
from tests.backends.flex.eager import EagerFlex
from tests.campaign import case as data
from tests.campaign.case import Case, Spec, bias_text, text
from tests.campaign.oracle import (
    Answer,
    Problem,
    answer,
    cotangent,
    into_layout,
    second_answer,
)

Wrap = Callable[[ak.Attention], Callable[..., Any]]
NAMES = {
    "M": masks, "pse": pse, "cells": data.cells, "numbers": data.numbers,
    "lowest_rows": data.lowest_rows, "weighted": data.weighted,
    **{fn.__name__: fn for fn in data.FUNCTIONS},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What came of one case on one backend: "agrees", "refused", or what is wrong with it."""

    outcome: str
    detail: str = ""
    codes: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        return self.outcome in ("differs", "crash", "lse-detached", "second-differs")


def use(backend: str) -> str:
    """Return a backend's name, known to attnkit; flex is its eager code, which compiles nothing."""
    if backend == "flex":
        if EagerFlex.name not in BACKENDS:
            register(EagerFlex())
        return EagerFlex.name
    return backend


# -- the composition, built ----------------------------------------------------------------------


@dataclass
class Built:
    """A case as attnkit's objects, and its tensors as leaves in the case's layout."""

    case: Case
    mask: masks.Mask
    biases: list[pse.Pse]
    leaves: dict[str, Tensor]
    dy: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Built:
        case, given = problem.case, problem.given
        biases = [made(bias_text(spec)) for spec in case.bias]
        named = (("dq", given.query), ("dk", given.key), ("dv", given.value))
        leaves = {name: _placed(case, t, name != "dq") for name, t in named}
        if given.sink is not None:
            leaves["dsink"] = given.sink.clone()
        for n, part in enumerate(biases):
            for tensor in part.tensors:
                if tensor.requires_grad:
                    # A cut of a matrix holds a view of the tensor that trains.
                    leaf = tensor if tensor.is_leaf else tensor._base
                    leaves[f"dbias{n}"] = tensor if leaf is None else leaf
        for leaf in leaves.values():
            leaf.requires_grad_()
        dy = into_layout(case, given.dy, False)
        return cls(
            case, made(text(case.mask)), biases, leaves, dy, into_layout(case, given.dlse, False)
        )

    def call(
        self, backend: str, leaves: dict[str, Tensor] | None = None, wrap: Wrap | None = None
    ) -> ak.AttentionOutput:
        """Attend, by the functional form or by a module with its mask and bias in two parts.

        `wrap` gets the module and gives what is called instead, such as its compiled form.
        """
        case = self.case
        leaves = leaves or self.leaves
        seqlens = ak.SeqLens(case.q_lens, case.kv_lens or ()) if case.q_lens else None
        biases = self.biases
        if leaves is not self.leaves:
            biases = [_rebound(part, leaves.get(f"dbias{n}")) for n, part in enumerate(biases)]
        tensors = leaves["dq"], leaves["dk"], leaves["dv"]
        if wrap is not None or (case.module and leaves is self.leaves):
            return self._module(backend, tensors, seqlens, wrap)
        return ak.attention(
            *tensors,
            mask=self.mask,
            pse=_sum(biases),
            layout=case.layout,
            seqlens=seqlens,
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            scale=case.scale,
            sink=leaves.get("dsink"),
            softcap=case.softcap,
            backend=backend,
            return_stats=True,
        )

    def layer(self, backend: str) -> ak.Attention:
        """The composition as a module; what a call adds is left out."""
        case = self.case
        first, _ = self._parts()
        layer = ak.Attention(
            case.heads,
            case.dim,
            num_kv_heads=case.kv_heads,
            mask=made(text(first)),
            pse=self.biases[0] if self.biases else None,
            layout=case.layout,
            scale=case.scale,
            sink=case.sink,
            softcap=case.softcap,
            backend=backend,
        )
        if layer.sink is not None:
            layer.sink = torch.nn.Parameter(self.leaves["dsink"].detach().clone())
            self.leaves["dsink"] = layer.sink
        return layer

    def _parts(self) -> tuple[Spec, Spec | None]:
        mask = self.case.mask
        return (mask[1], mask[2]) if mask[0] == "&" else (mask, None)

    def _module(
        self, backend: str, tensors: Any, seqlens: Any, wrap: Wrap | None
    ) -> ak.AttentionOutput:
        layer = self.layer(backend)
        call = layer if wrap is None else wrap(layer)
        _, rest = self._parts()
        return call(
            *tensors,
            mask=None if rest is None else made(text(rest)),
            pse=_sum(self.biases[1:]),
            seqlens=seqlens,
            return_stats=True,
        )


def made(code: str) -> Any:
    """Evaluate the code of a mask or bias: what is judged is what a report prints."""
    return eval(code, dict(NAMES))


def _placed(case: Case, tensor: Tensor, keys: bool) -> Tensor:
    found = into_layout(case, tensor, keys).detach()
    if not case.strided:
        return found.contiguous().clone()
    # The same numbers behind other strides: every second element of a wider tensor.
    wide = found.new_zeros((*found.shape[:-1], 2 * found.shape[-1]))
    view = wide[..., ::2] if case.seed % 20 else wide[..., : found.shape[-1]]
    view.copy_(found)
    return view


def _sum(biases: list[pse.Pse]) -> pse.Pse | None:
    return None if not biases else biases[0] if len(biases) == 1 else pse.Sum(biases)


def _rebound(part: pse.Pse, tensor: Tensor | None) -> pse.Pse:
    if tensor is None:
        return part
    from attnkit.pse.base import rebound

    return rebound(part, [tensor])


# -- judgement -------------------------------------------------------------------------------------


def judge(
    problem: Problem,
    meant: Answer,
    backend: str,
    skip: frozenset[str] = frozenset(),
    wrap: Wrap | None = None,
) -> Verdict:
    """Compare output, statistics and first derivatives; a refusal is a verdict, too.

    `skip` names what is not compared.
    """
    case = problem.case
    if backend == "flex" and case.dtype == "float64":
        return Verdict("refused", codes=("flex-dtype",))
    try:
        built = Built.of(problem)
        found = built.call(use(backend), wrap=wrap)
        values = {"output": found.output, "lse": found.stats.lse, "max": found.stats.max}
        loss = (found.output * built.dy).sum()
        detached = ""
        if case.lse:
            lse = values["lse"]
            if lse.requires_grad or not bool(lse.isfinite().any()):
                loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * built.dlse).sum()
            else:
                detached = "lse carries no gradient, and nothing said so"
        if detached:
            # What is not asked for can still be judged.
            return Verdict("lse-detached", detached)
        names = list(built.leaves)
        leaves = [built.leaves[name] for name in names]
        grads = (
            torch.autograd.grad(loss, leaves, allow_unused=True)
            if loss.requires_grad
            else [None] * len(leaves)
        )
    except ak.BackendRefused as refused:
        return Verdict("refused", codes=tuple(sorted({r.code for r in refused.refusals})))
    except ak.CompositionError as error:
        return Verdict("refused", str(error)[:300], ("composition:" + type(error).__name__,))
    except Exception as error:
        if wrap is not None and "BackendRefused" in str(error):
            return Verdict("refused", codes=("while tracing: BackendRefused",))
        return Verdict("crash", _told(error))
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        values[name] = torch.zeros_like(leaf) if grad is None else grad
    wrong = list(_differences(meant, values, skip))
    return Verdict("differs", "; ".join(wrong)) if wrong else Verdict("agrees")


def judge_second(problem: Problem, meant: Answer, backend: str) -> Verdict:
    """Compare second derivatives, or let them be refused in words."""
    case = problem.case
    try:
        built = Built.of(problem)
        factors = {
            f"{name}*": torch.ones((), dtype=t.dtype, requires_grad=True)
            for name, t in built.leaves.items()
        }
        scaled = {name: leaf * factors[f"{name}*"] for name, leaf in built.leaves.items()}
        found = built.call(use(backend), scaled)
        loss = (found.output * built.dy).sum()
        if case.lse:
            lse = found.stats.lse
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * built.dlse).sum()
        if not loss.requires_grad:
            return Verdict("refused", codes=("no-graph",))
        leaves = built.leaves
        first = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, allow_unused=True
        )
        whole = torch.zeros((), dtype=built.dy.dtype)
        for n, (name, grad) in enumerate(zip(leaves, first, strict=True)):
            if grad is not None:
                weights = _second_weights(problem, name, n).to(grad.dtype)
                whole = whole + (grad * weights).sum()
        wanted = {**leaves, **factors}
        if not whole.requires_grad:
            return Verdict("refused", codes=("no-second-graph",))
        grads = torch.autograd.grad(whole, list(wanted.values()), allow_unused=True)
    except ak.BackendRefused as refused:
        return Verdict("refused", codes=tuple(sorted({r.code for r in refused.refusals})))
    except ak.AttnkitError as error:
        return Verdict("refused", str(error)[:300], ("second:" + type(error).__name__,))
    except Exception as error:
        return Verdict("crash", _told(error))
    values = {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(wanted.items(), grads, strict=True)
    }
    wrong = list(_differences(meant, values))
    return Verdict("second-differs", "; ".join(wrong)) if wrong else Verdict("agrees")


def _second_weights(problem: Problem, name: str, n: int) -> Tensor:
    """The cotangent of a first gradient, the same numbers as the oracle's, in the layout."""
    case, given = problem.case, problem.given
    shapes = {"dq": given.query, "dk": given.key, "dv": given.value}
    if name in shapes:
        weights = cotangent(n, tuple(shapes[name].shape))
        return into_layout(case, weights, name != "dq")
    if name == "dsink":
        return cotangent(n, (case.heads,))
    tensor = problem.addends[int(name.removeprefix("dbias"))].tensor
    assert tensor is not None
    return cotangent(n, tuple(tensor.shape))


def meant_second(problem: Problem) -> Answer:
    """The oracle's second derivatives in the case's layout."""
    found = second_answer(problem)
    for name in ("dq", "dk", "dv"):
        for table in (found.values, found.bounds):
            table[name] = into_layout(problem.case, table[name], name != "dq")
    return found


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "attnkit" in f.filename and "campaign" not in f.filename]
    at = f" at {ours[-1].filename.split('attnkit/', 1)[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{at}: {' '.join(str(error).split())[:200]}"


def _differences(
    meant: Answer, found: dict[str, Tensor], skip: frozenset[str] = frozenset()
) -> Iterator[str]:
    for name, value in meant.values.items():
        if name in skip:
            continue
        if name not in found:
            yield f"{name} is missing"
            continue
        given = found[name].detach()
        if given.shape != value.shape:
            yield f"{name} has shape {list(given.shape)} for {list(value.shape)}"
            continue
        if not value.numel():
            continue
        top = float(torch.finfo(given.dtype).max)
        exact, bound = value, meant.bounds[name].nan_to_num(nan=torch.inf)
        apart = (given.double() - exact).abs().masked_fill(given.double() == exact, 0.0)
        # What may overflow in the dtype says nothing.
        bad = ~(apart <= bound) & ((exact.abs() + bound < top / 4) | exact.isinf())
        if bool(bad.any()):
            at = int(torch.argmax((apart.nan_to_num(nan=1e300) / bound.clamp(min=1e-300)
                                   * bad).flatten()))  # fmt: skip
            yield (
                f"{name}: {int(bad.sum())} of {value.numel()}, worst {_at(given, at):.6g} for "
                f"{_at(exact, at):.6g}, off by {_at(apart, at):.2g} (allowed {_at(bound, at):.2g})"
            )


def _at(tensor: Tensor, flat: int) -> float:
    return float(tensor.flatten()[flat])


# -- the smallest case that is still wrong ---------------------------------------------------


def shrunk(case: Case, still_wrong: Callable[[Case], bool], tries: int = 60) -> Case:
    """Take simpler values for one field after the other while the case stays wrong."""
    spent, again = 0, True
    while again:
        again = False
        for simpler in _simpler(case):
            spent += 1
            if spent > tries:
                return case
            try:
                wrong = still_wrong(simpler)
            except Exception:
                wrong = False
            if wrong:
                case, again = simpler, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    defaults = {
        "garbage": "", "sink": False, "softcap": None, "scale": None, "lse": False,
        "module": False, "strided": False, "dtype": "float64",
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    for n in range(len(case.bias)):
        yield replace(case, bias=case.bias[:n] + case.bias[n + 1 :])
    mask = case.mask
    if mask[0] in ("&", "|", "-"):
        yield replace(case, mask=mask[1])
        yield replace(case, mask=mask[2])
        for part in (1, 2):
            if mask[part][0] in ("&", "|", "-"):
                yield replace(
                    case,
                    mask=tuple(mask[part][1] if n == part else one for n, one in enumerate(mask)),
                )
    elif mask[0] == "~":
        yield replace(case, mask=mask[1])
    elif mask != ("Full",):
        yield replace(case, mask=("Full",))
    for q, kv, fits in _shorter(case):
        if fits:
            yield replace(case, q_len=q, kv_len=kv)
    if case.dim > 2:
        yield replace(case, dim=2, scale=case.factor)
    if case.value_dim > 1:
        yield replace(case, value_dim=1)


def _shorter(case: Case) -> Iterator[tuple[int, int, bool]]:
    if case.packed:
        return
    for share in (2, 4):
        for q, kv in (
            (case.q_len - case.q_len // share, case.kv_len - case.kv_len // share),
            (case.q_len - case.q_len // share, case.kv_len),
            (case.q_len, case.kv_len - case.kv_len // share),
        ):
            if (q, kv) != (case.q_len, case.kv_len):
                yield q, kv, True
    for q, kv in ((case.q_len - 1, case.kv_len - 1), (case.q_len - 1, case.kv_len),
                  (case.q_len, case.kv_len - 1)):  # fmt: skip
        if min(q, kv) > 0:
            yield q, kv, True


def code(case: Case, backend: str) -> str:
    """A case as a script that shows what it computes."""
    how = [f"mask={text(case.mask)}"]
    if case.bias:
        how.append(f"pse={' + '.join(map(bias_text, case.bias))}")
    if case.q_lens is not None:
        how.append(f"seqlens=ak.SeqLens({case.q_lens}, {case.kv_lens})")
    for name, skip in (("layout", "BSND"), ("scale", None), ("softcap", None)):
        if getattr(case, name) != skip:
            how.append(f"{name}={getattr(case, name)!r}")
    shapes = [
        tuple(into_layout(case, t, keys).shape)
        for t, keys in _shapes(case)
    ]  # fmt: skip
    return (
        f"# {case!r}\n# q, k, v {shapes} {case.dtype}, {case.heads} heads on {case.kv_heads}\n"
        f"# ak.attention(q, k, v, {', '.join(how)}{', sink=randn(heads)' if case.sink else ''}, "
        f"backend={backend!r})\n"
        f"from tests.campaign.case import Case; from tests.campaign.judge import show\n"
        f"show({case!r}, {backend!r})"
    )


def _shapes(case: Case) -> list[tuple[Tensor, bool]]:
    from tests.campaign.oracle import _longest

    q, kv = _longest(case)
    batch = len(case.sequences)
    sizes = (
        (case.heads, q, case.dim),
        (case.kv_heads, kv, case.dim),
        (case.kv_heads, kv, case.value_dim),
    )
    return [(torch.empty(batch, *size), n > 0) for n, size in enumerate(sizes)]


def show(case: Case, backend: str) -> None:
    """Judge one case and print the verdicts."""
    problem = Problem.of(case)
    print(judge(problem, answer(problem), backend))
    print(judge_second(problem, meant_second(problem), backend))
