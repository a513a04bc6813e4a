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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, islice
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from attnkit.constants import constant
from attnkit.first_order import first_order
from attnkit.kernel import Gradients, KernelCall, pack_stats, unpack_stats
from attnkit.planner.blocks import Block, span
from attnkit.planner.candidates import Zone
from attnkit.planner.plan import Launch, Plan

__all__ = ["Answer", "Launcher", "Ranges", "Rows", "run_merged", "steps_of"]

Ranges = tuple[tuple[int, int], ...]

_WHOLE = Zone(())


@dataclass(frozen=True, eq=False)
class Answer:
    """What one forward call returned, and what its backward needs to repeat it."""

    out: Tensor
    peak: Tensor
    total: Tensor
    random: tuple[int, int, int] = (0, 0, 0)


class Launcher(Protocol):
    """The two things a fused backend can do with a call on packed tensors."""

    def forward(self, call: KernelCall, tensors: dict[str, Tensor | None]) -> Answer:
        """Make the call."""

    def backward(
        self, call: KernelCall, tensors: dict[str, Tensor | None], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Make the call's grad call, with statistics and output of the merged softmax."""


@dataclass(frozen=True)
class Rows:
    """Which tokens the sequences of a call are, as ranges of the request's token axis."""

    ranges: Ranges

    @cached_property
    def span(self) -> slice | None:
        """Where the tokens lie if they follow each other, so that nothing has to be gathered."""
        found = span(self.ranges)
        return None if found is None else slice(*found)

    def take(self, tokens: Tensor) -> Tensor:
        """Return the tokens in the call's order: a view where that is possible."""
        if self.span is not None:
            return tokens[self.span]
        return tokens.index_select(0, _index(self.ranges, tokens.device))

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add rows in the call's order back to the tokens; a token may occur twice."""
        if self.span is not None:
            total[self.span] += part
        else:
            total.index_add_(0, _index(self.ranges, total.device), part.to(total.dtype))


@constant
def _index(ranges: Ranges, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(a, b, device=device) for a, b in ranges])


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


def query_rows(blocks: Sequence[Block], starts: Sequence[int]) -> Rows:
    """Return which query tokens a call's blocks are; `starts` is where batch elements begin."""
    ranges = tuple((starts[k.batch] + k.i0, starts[k.batch] + k.i1) for k in blocks)
    return Rows(ranges)


def key_rows(blocks: Sequence[Block], starts: Sequence[int]) -> Rows:
    """Return which key tokens a call's blocks are."""
    ranges = tuple((starts[k.batch] + k.j0, starts[k.batch] + k.j1) for k in blocks)
    return Rows(ranges)


def layers(rows: Rows, offsets: Sequence[int]) -> list[tuple[Rows, list[tuple[int, int]]]]:
    """Split a call's sequences into layers in which no token occurs twice.

    Each layer comes with where its sequences are in the call's own rows.
    """
    out: list[tuple[list[tuple[int, int]], list[tuple[int, int]], int]] = []
    order = sorted(range(len(rows.ranges)), key=lambda k: rows.ranges[k])
    for k in order:
        a, b = rows.ranges[k]
        own = (offsets[k], offsets[k] + b - a)
        for n, (taken, owns, end) in enumerate(out):
            if end <= a:
                out[n] = ([*taken, (a, b)], [*owns, own], b)
                break
        else:
            out.append(([(a, b)], [own], b))
    return [(Rows(tuple(taken)), owns) for taken, owns, _ in out]


class _Merged(torch.autograd.Function):
    """Merged attention over packed tensors ``[t n d]``: output, log-sum-exp and maximum."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        logits: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        rows, heads = query.shape[:2]
        out = query.new_zeros(rows, heads, value.shape[-1], dtype=wide)
        if sink is None:
            peak = query.new_full((rows, heads), -torch.inf, dtype=wide)
            total = torch.zeros_like(peak)
        else:
            peak = sink.to(wide).expand(rows, heads).clone()
            total = torch.ones_like(peak)
        random: list[tuple[int, int, int]] = []
        kept: list[Tensor] = []
        for step, bias in zip(job.steps, job.biases, strict=True):
            answer = job.launcher.forward(step.call, step.tensors(query, key, value, bias))
            random.append(answer.random)
            shift = step.shift(logits)
            own = step.by_token(answer)
            _merge(step, own, out, peak, total, shift)
            if shift is not None and ctx.needs_input_grad[5]:
                kept += own
        out /= total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        result = out.to(query.dtype)
        lse = peak + total.log()
        ctx.save_for_backward(query, key, value, sink, logits, result, peak, total, *kept)
        ctx.job, ctx.random = job, random
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak)
        return result, lse, peak

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, sink, logits, out, peak, total, *kept = ctx.saved_tensors
        given = Given(query, key, value, sink, logits)
        empty = total == 0
        # Rows that no call computes are never gathered; the values only have to be finite.
        merged = Answer(out, peak.masked_fill(empty, 0.0), total.masked_fill(empty, 1.0))

        def make() -> tuple[Tensor | None, ...]:
            way = _Back(ctx.job, given, merged, peak.dtype)
            if dy is not None:
                way.through(dy, ctx.random, kept)
            if dlse is not None:
                way.through_lse(dlse, kept)
            return way.found(ctx.needs_input_grad[4])

        return (None, *first_order(make, dy, dlse, *given))


class Given(NamedTuple):
    """The tensors of a merged attention that may want a gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None
    logits: Tensor | None


class _Back:
    """Gradients while they are summed up, in the dtype of the statistics."""

    def __init__(self, job: Job, given: Given, merged: Answer, wide: torch.dtype) -> None:
        self.job, self.given, self.merged, self.wide = job, given, merged, wide
        self.sums = [torch.zeros_like(t, dtype=wide) for t in given[:3]]
        self.sink = None if given.sink is None else torch.zeros_like(given.sink, dtype=wide)
        self.logits = None if given.logits is None else torch.zeros_like(given.logits)

    def through(
        self, dy: Tensor, random: Sequence[tuple[int, int, int]], kept: Sequence[Tensor]
    ) -> None:
        """Add what flows through the output."""
        parts = iter(kept)
        for step, bias, drawn in zip(self.job.steps, self.job.biases, random, strict=True):
            peak, total = self._stats(step)
            if kept and step.zone.row is not None and self.logits is not None:
                own, m, sums = islice(parts, 3)
                weight = sums * (m - peak).exp() / total
                apart = own.to(self.wide) - step.queries.take(self.merged.out).to(self.wide)
                slope = (step.queries.take(dy).to(self.wide) * apart).sum(-1)
                self.logits[step.zone.row] += (weight * slope).sum(0)
            answer = step.of_call(step.queries.take(self.merged.out), peak, total, drawn)
            found = self._launch(step, step.call, self.given.value, bias, dy, answer)
            step.keys.add(self.sums[2], step.join(found.value))
        self._to_sink((dy * self.merged.out).to(self.wide).sum(-1).neg())

    def through_lse(self, dlse: Tensor, kept: Sequence[Tensor]) -> None:
        """Add what flows through the log-sum-exp, whose gradient by a score is its weight.

        The grad op computes ``weight * (dy.v - dy.out)``: of values that are 1 in one dimension, an
        output of 0 and a dy that has dlse there, that is ``weight * dlse``. Dropout has no part.
        """
        parts = iter(kept)
        value, out = torch.zeros_like(self.given.value), torch.zeros_like(self.merged.out)
        value[..., 0] = 1.0
        dy = torch.zeros_like(out)
        dy[..., 0] = dlse
        for step, bias in zip(self.job.steps, self.job.biases, strict=True):
            peak, total = self._stats(step)
            if kept and step.zone.row is not None and self.logits is not None:
                _, m, sums = islice(parts, 3)
                weight = sums * (m - peak).exp() / total
                self.logits[step.zone.row] += (weight * step.queries.take(dlse)).sum(0)
            answer = step.of_call(step.queries.take(out), peak, total, (0, 0, 0))
            self._launch(step, replace(step.call, keep_prob=1.0), value, bias, dy, answer)
        self._to_sink(dlse)

    def _stats(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the merged maximum and sum for the rows of a call, without its own logit."""
        peak, total = (step.queries.take(t) for t in (self.merged.peak, self.merged.total))
        shift = step.shift(self.given.logits)
        return peak if shift is None else peak - shift, total

    def _launch(
        self,
        step: Step,
        call: KernelCall,
        value: Tensor,
        bias: Tensor | None,
        dy: Tensor,
        answer: Answer,
    ) -> Gradients:
        """Make one grad call, and add what it gives to query and key."""
        tensors = step.tensors(self.given.query, self.given.key, value, bias)
        slope = step.split(step.queries.take(dy), call.q_len).contiguous()
        found = self.job.launcher.backward(call, tensors, slope, answer)
        step.queries.add(self.sums[0][..., : call.head_dim], step.turn(step.join(found.query)))
        step.keys.add(self.sums[1][..., : call.head_dim], step.join(found.key))
        return found

    def _to_sink(self, slope: Tensor) -> None:
        """Add the gradient of the sink, whose weight is that of one more score."""
        if self.given.sink is not None and self.sink is not None:
            share = (self.given.sink.to(self.wide) - self.merged.peak).exp() / self.merged.total
            self.sink += (share * slope).sum(0)

    def found(self, wants_sink: bool) -> tuple[Tensor | None, ...]:
        """Return the gradients in the dtypes of their tensors."""
        typed = [g.to(t.dtype) for g, t in zip(self.sums, self.given[:3], strict=True)]
        sink = None
        if self.sink is not None and self.given.sink is not None and wants_sink:
            sink = self.sink.to(self.given.sink.dtype)
        return (*typed, sink, self.logits)


@dataclass(frozen=True)
class Step:
    """One call with its rows, laid out once per plan."""

    call: KernelCall
    queries: Rows
    keys: Rows
    layers: tuple[tuple[Rows, tuple[tuple[int, int], ...]], ...]
    zone: Zone = _WHOLE

    @classmethod
    def of(cls, launch: Launch, q_starts: Sequence[int], kv_starts: Sequence[int]) -> Step:
        """Lay out a launch; starts are those of batch elements, with the total last."""
        blocks, call = launch.form.blocks, launch.call
        queries = query_rows(blocks, q_starts)
        keys = key_rows(blocks, kv_starts)
        offsets = tuple(accumulate((q_len for q_len, _ in call.sequences), initial=0))[:-1]
        split = tuple((rows, tuple(own)) for rows, own in layers(queries, offsets))
        return cls(call, queries, keys, split, launch.form.zone or _WHOLE)

    def shift(self, logits: Tensor | None) -> Tensor | None:
        """Return the logit [n] that the call adds to its scores; None where it adds none."""
        return None if logits is None or self.zone.row is None else logits[self.zone.row]

    def turn(self, query: Tensor) -> Tensor:
        """Change the sign of the query's dimensions (or of their gradient) that the zone turns."""
        turned = self.zone.turned
        if not turned:
            return query
        return query * _signs(query.shape[-1], turned, query.dtype, query.device)

    def split(self, tokens: Tensor, length: int) -> Tensor:
        """Return the call's tokens [t n d] in its layout: as they are, or [b s n d]."""
        return (
            tokens if self.call.is_packed else rearrange(tokens, "(b s) ... -> b s ...", s=length)
        )

    def join(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the call's layout as tokens [t n d]."""
        return tensor if self.call.is_packed else tensor.flatten(0, 1)

    def tensors(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gather the tensors of the call."""
        mask, dim = self.call.atten_mask, self.call.head_dim
        q_len, kv_len = self.call.q_len, self.call.kv_len
        return {
            "query": self.split(self.turn(self.queries.take(query[..., :dim])), q_len),
            "key": self.split(self.keys.take(key[..., :dim]), kv_len),
            "value": self.split(self.keys.take(value), kv_len),
            "atten_mask": None if mask is None else mask.build(query.device),
            "pse": bias,
            "sink": None,
        }

    def by_token(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
        """Return output [t n d], maximum and sum [t n] of what the call answered."""
        peak, total = (unpack_stats(self.call, stat) for stat in (answer.peak, answer.total))
        if not self.call.is_packed:
            peak, total = (rearrange(stat, "b n s -> (b s) n") for stat in (peak, total))
        return self.join(answer.out), peak, total

    def of_call(
        self, out: Tensor, peak: Tensor, total: Tensor, random: tuple[int, int, int]
    ) -> Answer:
        """Return output [t n d], maximum and sum [t n] as the call would have answered."""
        length = self.call.q_len
        if not self.call.is_packed:
            peak, total = (rearrange(s, "(b s) n -> b n s", s=length) for s in (peak, total))
        peak, total = (pack_stats(self.call, stat) for stat in (peak, total))
        return Answer(self.split(out, length), peak, total, random)


@dataclass(frozen=True, eq=False)
class Job:
    """What `_Merged` needs beside tensors."""

    steps: tuple[Step, ...]
    launcher: Launcher
    biases: tuple[Tensor | None, ...]


def _merge(
    step: Step,
    part: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    peak: Tensor,
    total: Tensor,
    shift: Tensor | None,
) -> None:
    """Merge the rows of one call into the running maximum, sum and weighted output."""
    answers, peaks, totals = part
    peaks = peaks if shift is None else peaks + shift
    for rows, own in step.layers:
        mine = Rows(own)
        m_new, l_new, o_new = (mine.take(t) for t in (peaks, totals, answers))
        m_old, l_old, o_old = (rows.take(t) for t in (peak, total, out))
        m = torch.maximum(m_old, m_new)
        # A row that nothing has answered yet has weight 0: exp(-inf - m) is 0, m is finite.
        keep, weight = (m_old - m).exp(), l_new * (m_new - m).exp()
        rows_put(rows, peak, m)
        rows_put(rows, total, l_old * keep + weight)
        rows_put(rows, out, o_old * keep.unsqueeze(-1) + o_new * weight.unsqueeze(-1))


def rows_put(rows: Rows, tokens: Tensor, values: Tensor) -> None:
    """Write rows, none of which occurs twice, back to the tokens."""
    if rows.span is not None:
        tokens[rows.span] = values
    else:
        tokens.index_copy_(0, _index(rows.ranges, tokens.device), values.to(tokens.dtype))


@lru_cache(maxsize=256)
def steps_of(plan: Plan, heads: tuple[int, ...] | None = None) -> tuple[Step, ...]:
    """Lay out the calls of a plan that are for some heads; done once per plan."""
    q_starts, kv_starts = plan.request.token_starts
    return tuple(
        Step.of(launch, q_starts, kv_starts) for launch in plan.steps if launch.form.heads == heads
    )


def run_merged(
    steps: tuple[Step, ...],
    launcher: Launcher,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: tuple[Tensor | None, ...],
    sink: Tensor | None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend packed tensors ``[t n d]``, with a bias per step: output, log-sum-exp, maximum.

    The output is ``[t n d]``, the statistics are ``[t n]``. A row that no call answers has
    output 0, log-sum-exp and maximum -inf (with a sink: the sink's).
    """
    out: tuple[Tensor, Tensor, Tensor] = _Merged.apply(  # type: ignore[no-untyped-call]
        Job(steps, launcher, biases), query, key, value, sink, logits
    )
    return out
