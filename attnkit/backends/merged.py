"""Running several kernel calls as one attention: gather, launch, merge; and the way back.

Forward: every call answers some rows over some keys, with its softmax maximum m_c and sum
l_c. With ``m = max(m_c)`` and ``w_c = l_c exp(m_c - m)`` the merged row is
``sum w_c out_c / sum w_c``; a learnable sink is one more part, of weight ``exp(sink - m)``
and no value. Backward: each call's own grad op, given the merged maximum, sum and output,
returns its exact share of the gradients; of those of the log-sum-exp, too, which another grad
call computes where somebody asks for them.

Calls may differ in what they are given of a bias (`planner.routes`). Where the bias has
another sign, so have some dimensions of the call's query, and of its gradient.

A call may add a logit t per head to all of its scores (a level of the bias):
its maximum becomes ``m_c + t``, and its grad op is given the merged maximum minus t. The
logit's gradient is the sum of those of its scores, which over one row is
``w_c / sum w * (dO . out_c - dO . O)``: what the part weighs, times how its answer differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.tokens import add_to, put, taken
from attnkit.constants import constant
from attnkit.first_order import first_order
from attnkit.kernel import Gradients, KernelCall, pack_stats, unpack_stats
from attnkit.planner import Launch
from attnkit.planner.calls import Parts, Tokens

__all__ = ["Answer", "BackwardCalls", "Drawn", "Launcher", "Merged", "backward_of", "by_token"]

Drawn = tuple[int, int, int]
"""The seed, the offset and the number of decisions of a forward call."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What one forward call returned, and what its backward needs to repeat it."""

    out: Tensor
    peak: Tensor
    total: Tensor
    random: Drawn = (0, 0, 0)


class Launcher(Protocol):
    """What makes calls and their grad calls: a backend of the fused kernel."""

    def forward(self, call: KernelCall, tensors: dict[str, Any]) -> Answer:
        """Make one call."""

    def backward(
        self, call: KernelCall, tensors: dict[str, Any], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Make one grad call, with the statistics and output of the whole softmax."""


@dataclass(frozen=True, eq=False)
class BackwardCalls:
    """Calls that are to be differentiated: each with its bias, and with what it drew."""

    launcher: Launcher
    launches: Sequence[Launch]
    biases: Sequence[Tensor | None]
    random: Sequence[Drawn]

    @classmethod
    def of(
        cls,
        launcher: Launcher,
        parts: Parts,
        biases: Sequence[Tensor | None],
        random: Sequence[Drawn],
    ) -> BackwardCalls:
        """Return the calls by whose grad calls the gradients come."""
        if parts.back:  # where nothing was drawn, and no call has a bias
            count = len(parts.back)
            return cls(launcher, parts.back, [None] * count, [(0, 0, 0)] * count)
        return cls(launcher, parts.launches, biases, random)


# -- one call between them ---------------------------------------------------------------------


def _split(call: KernelCall, tokens: Tensor, length: int) -> Tensor:
    """Return a call's tokens [t n d] in its layout: as they are, or [b s n d]."""
    return tokens if call.is_packed else rearrange(tokens, "(b s) ... -> b s ...", s=length)


def _end_to_end(call: KernelCall, tensor: Tensor) -> Tensor:
    """Return a tensor in a call's layout as tokens [t n d]."""
    return tensor if call.is_packed else tensor.flatten(0, 1)


def _turned(launch: Launch, query: Tensor) -> Tensor:
    """Change the sign of the query's dimensions (or of their gradient) that the zone turns."""
    turned = launch.zone.turned if launch.zone is not None else ()
    return query * _signs(query.shape[-1], turned, query.dtype, query.device) if turned else query


@constant
def _signs(
    dim: int, turned: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return -1 for the dimensions in some ranges, 1 for the others."""
    there = torch.arange(dim, device=device)
    signs = torch.ones(dim, dtype=dtype, device=device)
    for start, stop in turned:
        signs = torch.where((start <= there) & (there < stop), -signs, signs)
    return signs


def _level(launch: Launch, logits: Tensor | None) -> Tensor | None:
    """Return the logit [n] that the call adds to its scores; None where it adds none."""
    row = launch.zone.row if launch.zone is not None else None
    return None if logits is None or row is None else logits[row]


def _tensors(
    launch: Launch, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """Gather the tensors of a call."""
    call, dim = launch.call, launch.call.head_dim
    mask, queries, keys = call.atten_mask, launch.queries, launch.keys
    rows = _turned(launch, taken(query[..., :dim], queries))
    columns, values = taken(key[..., :dim], keys), taken(value, keys)
    return {
        "query": _split(call, rows.to(call.dtype), call.q_len),
        "key": _split(call, columns.to(call.dtype), call.kv_len),
        "value": _split(call, values.to(call.dtype), call.kv_len),
        "atten_mask": None if mask is None else mask.build(query.device),
        "pse": bias,
        "sink": None,
    }


def by_token(call: KernelCall, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
    """Return output [t n d], maximum and sum [t n] of what a call answered."""
    peak, total = (unpack_stats(call, stat) for stat in (answer.peak, answer.total))
    if not call.is_packed:
        peak, total = (rearrange(stat, "b n s -> (b s) n") for stat in (peak, total))
    return _end_to_end(call, answer.out), peak, total


def _by_call(call: KernelCall, out: Tensor, peak: Tensor, total: Tensor, random: Drawn) -> Answer:
    """Return output [t n d], maximum and sum [t n] as the call would have answered."""
    if not call.is_packed:
        peak, total = (rearrange(s, "(b s) n -> b n s", s=call.q_len) for s in (peak, total))
    peak, total = (pack_stats(call, stat) for stat in (peak, total))
    return Answer(_split(call, out, call.q_len), peak, total, random)


# -- all calls ---------------------------------------------------------------------------------


class Merged(torch.autograd.Function):
    """Attends packed tensors ``[t n d]``, with a bias per call: output, log-sum-exp, maximum.

    The output is ``[t n d]``, the statistics are ``[t n]``; a sink is ``[n]``, or ``[t n]`` where
    rows have their own. A row that no call answers has output 0, log-sum-exp and maximum -inf
    (with a sink: the sink's).
    """

    @staticmethod
    def forward(
        ctx: Any,
        launcher: Launcher,
        parts: Parts,
        biases: Sequence[Tensor | None],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        logits: Tensor | None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the calls in order, and merge each into the softmax of the rows that it answers.

        Where every row is answered once, and no sink has a part in it, rows are written as they
        come. Otherwise the output is rounded, unless it is to be `wide`.
        """
        rows = _Answered(query, value.shape[-1], sink, parts.once)
        random: list[Drawn] = []
        kept: list[Tensor] = []
        for launch, bias in zip(parts.launches, biases, strict=True):
            answer = launcher.forward(launch.call, _tensors(launch, query, key, value, bias))
            random.append(answer.random)
            own, level = by_token(launch.call, answer), _level(launch, logits)
            rows.take(launch.queries, own, level)
            if level is not None and ctx.needs_input_grad[7]:
                kept += own
        result, peak, total = rows.answer()
        result = result if wide else result.to(query.dtype)
        lse = peak + total.log()
        ctx.save_for_backward(query, key, value, sink, logits, result, peak, total, *kept)
        ctx.calls = BackwardCalls.of(launcher, parts, biases, random)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak)
        return result, lse, peak

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Give every call's own backward the merged maximum, denominator and output."""
        query, key, value, sink, logits, out, peak, total, *kept = ctx.saved_tensors
        leaves = query, key, value, sink, logits

        def make() -> tuple[Tensor | None, ...]:
            whole = Answer(out, peak, total)
            found = backward_of(ctx.calls, leaves, whole, kept, dy, dlse)
            asked = (True, True, True, ctx.needs_input_grad[6], True)
            return tuple(
                g.to(t.dtype) if g is not None and t is not None and wants else None
                for g, t, wants in zip(found, leaves, asked, strict=True)
            )

        return (None, None, None, *first_order(make, dy, dlse, *leaves), None)


class _Answered:
    """The rows of an answer while they come in: output [t n d], maximum and sum [t n]."""

    def __init__(self, query: Tensor, dim: int, sink: Tensor | None, once: bool) -> None:
        self.query, self.dim, self.sink, self.once = query, dim, sink, once and sink is None
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    def take(
        self, queries: Tokens, part: tuple[Tensor, Tensor, Tensor], level: Tensor | None
    ) -> None:
        """Take the rows of one call: as they are, written to their places, or merged."""
        if not self.once:
            self._merge(queries, part, level)
        elif queries.span == slice(0, len(self.query)):
            self.found = part[0], part[1].contiguous(), part[2].contiguous()
        else:
            self.found = self.found or self._none(self.query.dtype)
            for whole, some in zip(self.found, part, strict=True):
                put(whole, queries, some)

    def answer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, and the maximum and the sum of every row."""
        out, peak, total = self.found or self._none(self.wide)
        if not self.once:
            out /= total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        return out, peak, total

    def _none(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return what rows are that nobody has answered yet; a sink alone is a weight of 1."""
        size = self.query.shape[:2]
        out = self.query.new_zeros(*size, self.dim, dtype=dtype)
        if self.sink is None:
            peak = self.query.new_full(size, -torch.inf, dtype=self.wide)
            return out, peak, torch.zeros_like(peak)
        peak = self.sink.to(self.wide).expand(size).clone()
        return out, peak, torch.ones_like(peak)

    def _merge(
        self, queries: Tokens, part: tuple[Tensor, Tensor, Tensor], level: Tensor | None
    ) -> None:
        """Merge rows into the running maximum, sum and weighted output."""
        self.found = out, peak, total = self.found or self._none(self.wide)
        answers, peaks, totals = part
        peaks = peaks if level is None else peaks + level
        for rows, own in queries.layers:
            m_new, l_new, o_new = (taken(t, own) for t in (peaks, totals, answers))
            m_old, l_old, o_old = (taken(t, rows) for t in (peak, total, out))
            m = torch.maximum(m_old, m_new)
            # A row that nothing has answered yet has weight 0: exp(-inf - m) is 0, m is finite.
            keep, weight = (m_old - m).exp(), l_new * (m_new - m).exp()
            put(peak, rows, m)
            put(total, rows, l_old * keep + weight)
            put(out, rows, o_old * keep.unsqueeze(-1) + o_new * weight.unsqueeze(-1))


def backward_of(
    calls: BackwardCalls,
    leaves: Sequence[Tensor | None],
    whole: Answer,
    kept: Sequence[Tensor],
    dy: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, sink and logits, in the dtype of the statistics.

    `whole` has the output ``[t n d]``, the maximum and the sum ``[t n]`` of whole rows, which may
    have more keys than the calls: a row that has none at all has the sum 0. `kept` are the output,
    the maximum and the sum that each call of a level gave, where logits are to have a gradient.
    """
    way = _Back(calls, leaves, whole, kept)
    if dy is not None:
        way.through(dy)
    if dlse is not None:
        way.through_lse(dlse)
    return (*way.sums, way.to_sink, way.to_logits)


class _Back:
    """Gradients while they are summed up, in the dtype of the statistics."""

    def __init__(
        self, calls: BackwardCalls, leaves: Sequence[Any], whole: Answer, kept: Sequence[Tensor]
    ) -> None:
        self.calls, self.kept = calls, kept
        query, key, value, sink, logits = leaves
        self.leaves, self.sink, self.logits = (query, key, value), sink, logits
        empty = whole.total == 0
        # Their scores are all masked, so their weights are 0; the values have to be finite.
        self.merged = Answer(
            whole.out, whole.peak.masked_fill(empty, 0.0), whole.total.masked_fill(empty, 1.0)
        )
        self.wide: torch.dtype = whole.peak.dtype
        self.sums = [torch.zeros_like(t, dtype=self.wide) for t in self.leaves]
        self.to_sink = None if sink is None else torch.zeros_like(sink, dtype=self.wide)
        self.to_logits = None if logits is None else torch.zeros_like(logits)

    def through(self, dy: Tensor) -> None:
        """Add what flows through the output."""
        out = self.merged.out

        def slope(launch: Launch, own: Tensor) -> Tensor:
            apart = own.to(self.wide) - taken(out, launch.queries).to(self.wide)
            return (taken(dy, launch.queries).to(self.wide) * apart).sum(-1)

        for launch, found in self._launched(dy, out, self.leaves[2], self.calls.random, slope):
            add_to(self.sums[2], launch.keys, _end_to_end(launch.call, found.value))
        self._add_to_sink((dy * out).to(self.wide).sum(-1).neg())

    def through_lse(self, dlse: Tensor) -> None:
        """Add what flows through the log-sum-exp, whose gradient by a score is its weight.

        The grad op computes ``weight * (dy.v - dy.out)``: of values that are 1 in one dimension, an
        output of 0 and a dy that has dlse there, that is ``weight * dlse``. Dropout has no part.
        """
        value, out = torch.zeros_like(self.leaves[2]), torch.zeros_like(self.merged.out)
        value[..., 0] = 1.0
        dy = torch.zeros_like(out)
        dy[..., 0] = dlse
        for _ in self._launched(dy, out, value, None, lambda one, _: taken(dlse, one.queries)):
            pass
        self._add_to_sink(dlse)

    def _launched(
        self,
        dy: Tensor,
        out: Tensor,
        value: Tensor,
        random: Sequence[Drawn] | None,
        slope: Callable[[Launch, Tensor], Tensor],
    ) -> Iterator[tuple[Launch, Gradients]]:
        """Make the grad calls, and add what they give to query, key and the logits of levels.

        `slope` is the gradient of one score more or less, by row, where its weight is all of it.
        """
        kept = iter(self.kept)
        made = zip(self.calls.launches, self.calls.biases, strict=True)
        for n, (launch, bias) in enumerate(made):
            call, queries, level = launch.call, launch.queries, _level(launch, self.logits)
            peak, total = (taken(t, queries) for t in (self.merged.peak, self.merged.total))
            if level is not None:
                peak = peak - level
                if self.kept and self.to_logits is not None and launch.zone is not None:
                    own, highest, sums = islice(kept, 3)
                    weight = sums * (highest - peak).exp() / total
                    self.to_logits[launch.zone.row] += (weight * slope(launch, own)).sum(0)
            drawn = (0, 0, 0) if random is None else random[n]
            call = replace(call, keep_prob=1.0) if random is None else call
            answer = _by_call(call, taken(out, queries).to(call.dtype), peak, total, drawn)
            tensors = _tensors(launch, *self.leaves[:2], value, bias)
            there = _split(call, taken(dy, queries).to(call.dtype), call.q_len).contiguous()
            found = self.calls.launcher.backward(call, tensors, there, answer)
            to_query = _turned(launch, _end_to_end(call, found.query))
            add_to(self.sums[0][..., : call.head_dim], queries, to_query)
            add_to(self.sums[1][..., : call.head_dim], launch.keys, _end_to_end(call, found.key))
            yield launch, found

    def _add_to_sink(self, slope: Tensor) -> None:
        """Add the gradient of the sink, whose weight is that of one more score."""
        if self.sink is not None:
            share = (self.sink.to(self.wide) - self.merged.peak).exp() / self.merged.total
            self.to_sink += (share * slope).sum_to_size(self.sink.shape)
