"""Around the calls of a plan: the pass that makes the gradients of a bias that calls only read.

The calls are run with the bias detached. What they answer is handed on by a function whose
backward walks the tiles of the mask (`attnkit.backends.tiled.of_bias`), from the output and the
statistics that the calls gave, and from the cells that they dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Kept, Operands, Stats
from attnkit.backends.calling import Caller, Made, Noted
from attnkit.backends.merged import Drawn
from attnkit.backends.tiled.bias import Bound
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.of_bias import bias_gradients
from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.first_order import first_order
from attnkit.geometry import Region, Slice
from attnkit.planner import Launch, Plan
from attnkit.planner.bias_pass import BiasPass
from attnkit.planner.request import bias_terms
from attnkit.pse import Pse
from attnkit.pse.base import rebound

if TYPE_CHECKING:
    from attnkit.backends.fused import Fused

__all__ = ["PassedPlan", "pass_gradients", "with_bias_gradient", "with_frozen"]

Bits = Callable[[Tensor], Tensor]
"""Whether cells survive, from their numbers (int64) among the decisions of a call."""


class PassedPlan(Plan):
    """A plan of calls with a pass beside them, whose tiles are laid out once."""

    @cached_property
    def job(self) -> Job:
        """The tiles of the pass."""
        return Job.of(self.request, wholes=False)


def _job(plan: Plan) -> Job:
    return plan.job if isinstance(plan, PassedPlan) else Job.of(plan.request, wholes=False)


def with_bias_gradient(
    backend: Fused,
    run: Callable[[Caller, Plan, Operands], AttentionOutput],
    plan: Plan,
    operands: Operands,
) -> AttentionOutput:
    """Run the calls of a plan, and hand on what they answer with the gradient of the bias."""
    if plan.bias_pass is None or operands.pse is None:
        raise ArithmeticError("a plan without a pass for its bias runs by itself")
    launcher, trained = Noted(backend), _by_tensor(operands.pse, plan.bias_pass.terms)
    tensors = operands.pse.tensors
    output, stats = run(Made(launcher), plan.inner, with_frozen(plan.bias_pass, operands))
    left = _Left(backend, plan, _job(plan), operands.pse, trained, launcher.random)
    carried = [t if own else t.detach() for t, own in zip(tensors, trained, strict=True)]
    output, lse = _Passed.apply(  # type: ignore[no-untyped-call]
        left, operands.query, operands.key, operands.value, output, stats.lse, *carried
    )
    return AttentionOutput(output, Stats(lse, lambda: stats.max))


def with_frozen(found: BiasPass, operands: Operands) -> Operands:
    """Return operands whose bias has no gradient where a pass makes it."""
    if operands.pse is None:
        return operands
    trained = _by_tensor(operands.pse, found.terms)
    tensors = zip(operands.pse.tensors, trained, strict=True)
    apart = [t.detach() if own else t for t, own in tensors]
    return replace(operands, pse=rebound(operands.pse, apart))


def pass_gradients(
    backend: Fused,
    plan: Plan,
    operands: Operands,
    kept: Kept,
    wanted: Sequence[bool],
    random: Iterable[Drawn],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the bias's tensors that the pass of a plan makes, None for others.

    `kept` has the output and the log-sum-exp of whole rows, and what arrives for them.
    """
    if plan.bias_pass is None or operands.pse is None:
        raise ArithmeticError("a plan without a pass for its bias has no gradients of one")
    trained = _by_tensor(operands.pse, plan.bias_pass.terms)
    drawn = list(islice(random, len(plan.steps)))
    left = _Left(backend, plan, _job(plan), operands.pse, trained, drawn)
    wide = operands.query.dtype
    output, grad = (None if t is None else t.to(wide) for t in (kept.output, kept.grad))
    saved = (operands.query, operands.key, operands.value, output, kept.lse, *operands.pse.tensors)
    given = [None if t is None else t.detach() for t in saved]
    return left.gradients(given, (grad, kept.grad_lse), wanted)


def _by_tensor(pse: Pse, terms: Sequence[int]) -> list[bool]:
    """Return which tensors of a bias belong to some of its addends."""
    return [k in terms for k, part in enumerate(pse.parts) for _ in part.tensors]


# -- the pass ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Left:
    """What the calls leave to the pass."""

    backend: Fused
    plan: Plan
    job: Job
    pse: Pse
    trained: Sequence[bool]
    random: Sequence[Drawn]

    def gradients(
        self,
        saved: Sequence[Any],
        slopes: tuple[Tensor | None, Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors of the bias, those of other addends None."""
        query, key, value, output, lse, *carried = saved
        request, (grad, grad_lse) = self.job.request, slopes
        if request.seqlens is not None:
            lse = lse.transpose(0, 1)[None]
            grad_lse = None if grad_lse is None else grad_lse.transpose(0, 1)[None]
        asked = [a and b for a, b in zip(wanted, self.trained, strict=True)]
        # What the bias says of itself, whatever the request says of it.
        told = replace(request, bias=bias_terms(self.pse))
        bias = Bound(told, self.pse, carried, asked, query.device)
        view, heads = request.layout_of.view, request.num_heads
        grad = torch.zeros_like(output) if grad is None else grad
        kept = Kept(None, view(output, heads), lse, view(grad.contiguous(), heads), grad_lse)
        operands = Operands(query, key, value).by_head(request)
        return bias_gradients(self.job, bias, operands, kept, self._kept_cells(query))

    def _kept_cells(self, query: Tensor) -> KeptCells | None:
        """Return which cells the calls of the plan kept; None without dropout."""
        if not self.plan.request.dropout:
            return None
        # Calls are made by groups of heads, in the order in which these appear.
        steps = self.plan.steps
        groups = dict.fromkeys(step.heads for step in steps)
        made = [step for heads in groups for step in steps if step.heads == heads]
        drawn = zip(made, self.random, strict=True)
        bits = [(one, self.backend.decisions(one.call, own, query)) for one, own in drawn]
        return KeptCells(self.plan.request.dropout, bits)


class _Passed(torch.autograd.Function):
    """Hands on output and log-sum-exp; its backward makes the gradients of bias tensors.

    They are copies: what the calls keep for their backward is not to be written to.
    """

    @staticmethod
    def forward(ctx: Any, left: _Left, *given: Tensor) -> tuple[Tensor, Tensor]:
        ctx.left = left
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        return given[3].clone(), given[4].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[6:]
        if dy is None and dlse is None:
            return (None,) * (6 + len(wanted))
        made = first_order(lambda: ctx.left.gradients(saved, (dy, dlse), wanted), dy, dlse, *saved)
        return (None, None, None, None, dy, dlse, *made)


# -- dropout -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbered:
    """A block of a call: its place, its own cells, and where its decisions begin."""

    launch: Launch
    bits: Bits
    number: int
    first: int

    @property
    def ends(self) -> tuple[int, int, int, int]:
        return self.launch.blocks[self.number].ends

    @property
    def target(self) -> Region:
        return self.launch.blocks[self.number].image(self.launch.targets[self.number])


class KeptCells:
    """Which weights survived the dropout of some calls, as tiles of 0 and 1.

    A call numbers its decisions block after block, in each ``[head, query, key]``.
    """

    def __init__(self, dropout: float, launches: Sequence[tuple[Launch, Bits]]) -> None:
        self.kept = 1.0 - dropout
        self._blocks: dict[int, list[_Numbered]] = {}
        for launch, bits in launches:
            first = 0
            for number, block in enumerate(launch.blocks):
                rows, keys = block.sizes
                if rows and keys:
                    one = _Numbered(launch, bits, number, first)
                    self._blocks.setdefault(block.batch, []).append(one)
                first += launch.call.num_heads * rows * keys

    def tile(self, work: Workspace, step: Step, chunk: KeyChunk, dtype: torch.dtype) -> Tensor:
        """Return ``[g r w]`` in `dtype`: 1 where a weight survives, else 0."""
        sizes = (step.batches, step.heads, step.block.rows, chunk.width)
        keep = work.take("keep", dtype, *sizes).zero_()
        batch = step.lane.matrix + step.batch - step.lane.batches[0]
        for column, key, count in step.runs(chunk):
            for k in range(step.batches):
                place = (step.row, step.row + sizes[2], key, key + count)
                self._put(keep[k, :, :, column : column + count], batch + k, step.head, place)
        return keep.view(step.products, step.members * step.block.rows, chunk.width)

    def _put(self, keep: Tensor, batch: int, head: int, place: tuple[int, int, int, int]) -> None:
        """Write the decisions about ``[h r w]`` cells of a score matrix."""
        i, j = place[0], place[2]
        for one, (i0, i1, j0, j1) in self._meeting(batch, place):
            for at, own in _heads_of(one.launch, head, len(keep)):
                there = keep[at, i0 - i : i1 - i, j0 - j : j1 - j]
                bits = _read(one, own, (i0, i1, j0, j1), keep.device)
                if one.launch.partial:  # blocks of several may overlap, where their cells do not
                    bits &= _cells(one.target, (i0, i1, j0, j1), keep.device)
                there.add_(bits)

    def _meeting(
        self, batch: int, place: tuple[int, int, int, int]
    ) -> Iterator[tuple[_Numbered, tuple[int, int, int, int]]]:
        for one in self._blocks.get(batch, ()):
            i0, i1, j0, j1 = one.ends
            rows = max(i0, place[0]), min(i1, place[1])
            keys = max(j0, place[2]), min(j1, place[3])
            if rows[0] < rows[1] and keys[0] < keys[1]:
                yield one, (*rows, *keys)


def _heads_of(launch: Launch, head: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Yield where the heads of a tile are in it, and in a call."""
    if launch.heads is None:
        yield slice(0, count), slice(head, head + count)
        return
    for own, one in enumerate(launch.heads):
        if head <= one < head + count:
            yield slice(one - head, one - head + 1), slice(own, own + 1)


def _read(
    one: _Numbered, heads: slice, place: tuple[int, int, int, int], device: torch.device
) -> Tensor:
    """Return the decisions of some heads of a call about a rectangle, ``[h r w]``."""
    (i0, i1, j0, j1), (row, row_end, key, key_end) = place, one.ends
    h = torch.arange(heads.start, heads.stop, device=device)[:, None, None]
    i = torch.arange(i0 - row, i1 - row, device=device)[:, None]
    j = torch.arange(j0 - key, j1 - key, device=device)
    numbers = (h * (row_end - row) + i) * (key_end - key) + j + one.first
    return one.bits(numbers)


def _cells(region: Region, place: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Return which cells of a rectangle are in a region, ``[r w]``."""
    i0, i1, j0, j1 = place
    i = torch.arange(i0, i1, device=device)[:, None]
    j = torch.arange(j0, j1, device=device)
    found = torch.zeros(i1 - i0, j1 - j0, dtype=torch.bool, device=device)
    for part in (region & Region.of(Slice(i0, i1, j0, j1))).slices:
        here = (part.i0 <= i) & (i < part.i1) & (part.j0 <= j) & (j < part.j1)
        found |= here & (part.lo <= j - i) & (j - i <= part.hi)
    return found
