"""Partial results of the same rows over disjoint keys, and how they are merged to that over all.

    lse = log(sum_i exp(lse_i)),  output = sum_i exp(lse_i - lse) * output_i

Merging is associative, as FlashInfer says of the states that its `merge_state` joins and vLLM's
`merge_attn_states` does (section 2.2 of https://www.arxiv.org/pdf/2501.01005).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.arguments import check_float_dtype, check_tensor
from attnkit.backends.base import (
    AttentionOutput,
    Backend,
    Kept,
    Operands,
    Partial,
    Stats,
    of_whole_rows,
    stats_dtype,
    unrounded,
)
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import Layout
from attnkit.planner import Plan
from attnkit.ranges import Ranges, span

__all__ = ["Merging", "OnStatistics", "Part", "merge"]

Part = tuple[Tensor, Tensor] | AttentionOutput | Partial
"""An output and the log-sum-exp of its rows."""


def merge(
    parts: Sequence[Part], *, layout: str = "BSND", sink: Tensor | None = None
) -> AttentionOutput:
    """Merge what the same queries answer over disjoint keys: the answer over all of these keys.

    ``lse = log(sum_i exp(lse_i))`` and ``output = sum_i exp(lse_i - lse) * output_i``. Each part is
    an output in `layout`, ``[b s n d]`` by default, with its log-sum-exp ``[b n s]`` (packed:
    ``[t n]``): a pair of both, or what ``attention(..., return_stats=True)`` returns. A `sink`
    ``[n]`` is one more score of each row, without a value: it joins here, once, and in no part.

    A row that sees no key of a part has lse = -inf there, and that part's output counts for
    nothing, whatever it holds; a row that sees no key of any has output 0 and lse -inf. Gradients
    flow to outputs, lse and sink, and so do their derivatives; those of empty rows are 0. Computed
    in the dtype of the statistics; the output is in that of the parts' outputs. The largest
    score is known if all parts have it.

    Raises `CompositionError` (or its TypeError form) for parts that are not of the same rows.

    >>> import torch
    >>> import attnkit as ak
    >>> q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    >>> whole = ak.attention(q, k, v)
    >>> halves = [
    ...     ak.attention(q, k[:, a:b], v[:, a:b], return_stats=True) for a, b in ((0, 3), (3, 8))
    ... ]
    >>> torch.allclose(ak.merge(halves).output, whole, atol=1e-6)
    True
    """
    form = layouts.get(layout)
    outputs, lses, peaks = _read(parts)
    heads = _check(form, outputs, lses, sink)
    if form.packed:
        lses = [lse.mT[None] for lse in lses]
    wide = reduce(torch.promote_types, (t.dtype for t in lses), stats_dtype(outputs[0].dtype))
    lse, weights = _weighed([one.to(wide) for one in lses], sink)
    made = []
    for output, own, weight in zip(outputs, lses, weights, strict=True):
        seen = form.view(output, heads).to(wide).masked_fill((own == -torch.inf)[..., None], 0.0)
        made.append(seen * weight[..., None])
    whole = form.restore(sum(made[1:], made[0]).to(outputs[0].dtype))

    def peak() -> Tensor:
        return _largest(peaks, sink, form.packed)

    return AttentionOutput(whole, Stats(lse[0].mT if form.packed else lse, peak))


def _weighed(lses: Sequence[Tensor], sink: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the log-sum-exp ``[b n s]`` of some, and what share of it each of them is.

    Where all are -inf these are 0, and nothing here has a gradient that is NaN. The sum of one
    and of nothing is that one to the bit.
    """
    logit = None if sink is None else sink.to(lses[0].dtype)[:, None]
    every = [*lses] if logit is None else [*lses, logit.expand(lses[0].shape)]
    peak = reduce(torch.maximum, (one.detach() for one in every))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = [torch.exp(one - peak) for one in every]
    total = sum(weights[1:], weights[0])
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + total.log()).masked_fill(empty, -torch.inf)
    return lse, [weight / total for weight in weights[: len(lses)]]


class Merging:
    """The rows of an answer while partial answers come in; nothing is recorded.

    >>> import torch
    >>> rows = Merging("BSND", torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf))
    >>> rows.add(Partial(torch.ones(1, 1, 2, 4), torch.zeros(1, 2, 1)), (range(1, 2),))
    >>> rows.answer().output[0, :, 0, 0], rows.answer().lse[0, 0]
    (tensor([0., 1., 0.]), tensor([-inf, 0., -inf]))
    """

    def __init__(self, layout: str, output: Tensor, lse: Tensor) -> None:
        """Begin with a (wide) output in `layout` and a log-sum-exp, which are overwritten."""
        self.layout, self.output, self.lse = layouts.get(layout), output, lse

    @classmethod
    def of(cls, layout: str, shape: Sequence[int], lse: Sequence[int], like: Tensor) -> Merging:
        """Begin with rows that have seen nothing: an output and an lse of these shapes."""
        wide = stats_dtype(like.dtype)
        return cls(
            layout,
            like.new_zeros(tuple(shape), dtype=wide),
            like.new_full(tuple(lse), -torch.inf, dtype=wide),
        )

    def add(self, part: Partial, rows: Ranges | None = None) -> None:
        """Merge what some rows, all by default, answer over more keys: in place, in this order.

        `rows` are their places, in order.
        """
        output, lse = self._by_head(self.output, self.lse)
        more, more_lse = self._by_head(part.output, part.lse)
        start = 0
        for first, last in ((0, lse.shape[2]),) if rows is None else map(span, rows):
            own, there = slice(start, start + last - first), slice(first, last)
            start = own.stop
            joined, (old, new) = _weighed([lse[..., there], more_lse[..., own]], None)
            lse[..., there] = joined
            some = output[:, :, there].mul_(old[..., None])
            some.addcmul_(more[:, :, own], new[..., None])

    def answer(self, sink: Tensor | None = None) -> Partial:
        """Return what came in, with a sink ``[n]`` as one more score of each row."""
        if sink is None:
            return Partial(self.output, self.lse)
        output, lse = self._by_head(self.output, self.lse)
        joined, (weight,) = _weighed([lse], sink)
        made = self.layout.restore(output * weight[..., None])
        return Partial(made, joined[0].mT if self.layout.packed else joined)

    def _by_head(self, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """See them as ``[b n s d]`` and ``[b n s]``."""
        return self.layout.view(output, lse.shape[1]), lse.mT[None] if self.layout.packed else lse


class OnStatistics(Backend):
    """A backend whose gradients follow from the output and the log-sum-exp that were kept.

    Those of whole rows are as good, so that it answers shares: 16 bits on wide copies of the
    operands, since its kernels round what they return.
    """

    def partial(self, plan: Plan, operands: Operands, seed: Tensor | None) -> Partial:
        """Compute a share as if it were all."""
        with torch.no_grad():
            made = self.compute(plan, unrounded(operands), seed)
            return Partial(made.output, made.stats.lse)

    def partial_gradients(
        self,
        plan: Plan,
        operands: Operands,
        kept: Kept,
        wanted: tuple[bool, ...],
        random: object = None,
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients as if what is kept were the share's own."""
        if kept.grad is None and kept.grad_lse is None:
            return (None,) * len(wanted)
        whole = of_whole_rows(kept, stats_dtype(plan.request.dtype))
        with torch.no_grad():
            return self.gradients(plan, unrounded(operands, wanted), whole, wanted)


# -- what is given -----------------------------------------------------------------------------


def _read(
    parts: Sequence[Part],
) -> tuple[list[Tensor], list[Tensor], list[Callable[[], Tensor] | None]]:
    """Return outputs, log-sum-exps, and what makes the largest scores where that is known."""
    if not isinstance(parts, Sequence) or isinstance(parts, AttentionOutput | Partial | str):
        raise CompositionTypeError(
            f"merge got {shown(parts)}; give a list of parts, each (output, lse) or an "
            "AttentionOutput"
        )
    if not parts:
        raise CompositionError("merge got no part; what is merged are one or more of the same rows")
    outputs: list[Tensor] = []
    lses: list[Tensor] = []
    peaks: list[Callable[[], Tensor] | None] = []
    for k, part in enumerate(parts):
        if not isinstance(part, tuple) or len(part) < 2:
            raise CompositionTypeError(
                f"merge: part {k} is {shown(part)}; a part is (output, lse), or what "
                "attention(..., return_stats=True) returns"
            )
        output, known = part[0], part[1]
        lse = known.lse if isinstance(known, Stats) else known
        _check_floats(f"the output of part {k}", output)
        _check_floats(f"the log-sum-exp of part {k}", lse)
        outputs.append(output)
        lses.append(lse)
        peaks.append(partial(getattr, known, "max") if isinstance(known, Stats) else None)
    return outputs, lses, peaks


def _check(
    form: Layout, outputs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None
) -> int:
    """Return how many heads there are, after checking that all parts are of the same rows."""
    for name, tensors in (("outputs", outputs), ("log-sum-exps", lses)):
        facts = {(tuple(t.shape), t.dtype, t.device) for t in tensors}
        if len(facts) > 1:
            told = " and ".join(sorted(f"{list(s)} of {d} on {at}" for s, d, at in facts))
            raise CompositionError(
                f"merge got {name} {told}; its parts are of the same rows and heads, in one dtype, "
                "on one device"
            )
    output, lse = outputs[0], lses[0]
    if lse.dtype.itemsize < 4 or lse.device != output.device:
        raise CompositionError(
            f"merge got a log-sum-exp of {lse.dtype} on {lse.device} beside an output on "
            f"{output.device}; statistics are float32 or float64, on the same device"
        )
    axes = "[t n]" if form.packed else "[b n s]"
    heads = lse.shape[1] if lse.ndim == len(axes.split()) else 1
    sizes = form.sizes(output.shape, heads if form.merges_heads else None, what="output")
    own = (sizes.length, sizes.heads) if form.packed else (sizes.batch, sizes.heads, sizes.length)
    if tuple(lse.shape) != own:
        raise CompositionError(
            f"merge got an output {list(output.shape)} in layout {form} and a log-sum-exp "
            f"{list(lse.shape)}; the log-sum-exp of its rows is {axes}, {list(own)} here"
        )
    if sink is not None:
        _check_floats("the sink", sink)
        if tuple(sink.shape) != (sizes.heads,) or sink.device != output.device:
            raise CompositionError(
                f"merge got a sink {list(sink.shape)} on {sink.device}; it is one logit per head, "
                f"[{sizes.heads}], on {output.device}"
            )
    return sizes.heads


def _check_floats(name: str, tensor: object) -> None:
    check_tensor(f"merge: {name}", tensor)
    check_float_dtype(f"merge: the dtype of {name}", getattr(tensor, "dtype", None))


def _largest(
    peaks: Sequence[Callable[[], Tensor] | None], sink: Tensor | None, packed: bool
) -> Tensor:
    """Return the largest score of each row, of those of all parts."""
    known = [peak() for peak in peaks if peak is not None]
    if len(known) < len(peaks):
        raise CompositionError(
            "the largest scores of merged rows are not known where a part is a pair (output, lse); "
            "give what attention(..., return_stats=True) returns"
        )
    top = reduce(torch.maximum, known)
    if sink is None:
        return top
    logit = sink.detach().to(top.dtype)
    return torch.maximum(top, logit if packed else logit[:, None])
