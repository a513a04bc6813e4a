"""The walk over a schedule, and the score tiles that forward and backward make on it.

    score = scale * q.k, with a soft-cap c * tanh(score / c);  + bias
    score = score_fn(score, b, h, i, j), where there is one;  masked: -inf

Tiles hold ``score * log2(e)``: powers of two are several times cheaper than powers of e. A score
function is given the score itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log2

import torch
from torch import Tensor

from attnkit.backends.dropout import chances_of
from attnkit.backends.numbers import bounded, usable_cap
from attnkit.backends.tiled.bias import Bias
from attnkit.backends.tiled.cells import Bits
from attnkit.backends.tiled.dropout import Decisions, Dropout
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.modify import Modify
from attnkit.backends.tiled.schedule import KeyChunk, RowBlock, Whole
from attnkit.backends.tiled.terms import Term
from attnkit.backends.tiled.tiles import Step, Strided, Workspace, steps
from attnkit.backends.tiled.whole import WholeCall, calls_of, pattern_mask
from attnkit.backends.unseen import without_unseen

__all__ = ["LN2", "LOG2E", "Walk", "bias_of", "guarded"]

# From this on a factor is kept out of matrix products.
HUGE = 1024.0

LOG2E = log2(2.718281828459045)
LN2 = 1.0 / LOG2E


class Walk(ABC):
    """One pass over the schedule of a job, on ``[b n s d]`` tensors of any strides.

    Forward and backward say what they do with a step of a block, with a call of torch's kernel,
    and with rows that see nothing; what they share, the score tiles, is here.
    """

    def __init__(
        self,
        job: Job,
        terms: tuple[Term, ...],
        tensors: tuple[Tensor, Tensor, Tensor],
        seed: Tensor | None,
    ) -> None:
        request = job.request
        self.job, key, value = guarded(job, *tensors[1:])
        self.tensors = (tensors[0], key, value)
        self.query, self.key, self.value = (Strided(tensor) for tensor in self.tensors)
        self.wide, self.scale = job.wide, request.scale
        self.work = Workspace.lent(tensors[0])
        self.cap = None if request.softcap is None else usable_cap(request.softcap, self.wide)
        self.modify = None if request.score_fn is None else Modify(request.score_fn)
        per_score = LOG2E if self.modify is None else 1.0
        unit = per_score if self.cap is None else 1.0 / self.cap
        # Products that are multiplied by a huge number before they are added up may overflow.
        self.unit = unit if unit > HUGE else None
        self.alpha = bounded(request.scale * (1.0 if self.unit else unit), self.wide)
        self.per_score = per_score
        self.bias = bias_of(job, terms, self.work)
        self.dropout: Decisions | None = None
        chances = chances_of(request, seed, key.device)
        if chances is not None:
            self.dropout = Dropout(chances)
        self._edges: dict[int, Tensor] = {}
        self._patches: dict[Bits, Tensor] = {}

    def go(self) -> None:
        """Walk the schedule: every block in its tiles, every whole piece, every blank row."""
        for lane in self.job.schedule.lanes:
            for item in lane.items:
                if isinstance(item, Whole):
                    for call in calls_of(lane, item, self.job.group):
                        self.whole(call)
                    continue
                for step in steps(lane, item, self.job.group):
                    self.step(step, item)
            for start, stop in lane.blank:
                rows = slice(lane.origin[0] + start, lane.origin[0] + stop)
                self.blank((slice(*lane.batches), slice(*lane.heads), rows))
        self.last()
        self.work.give_back()

    def last(self) -> None:
        """Do what follows the last tile, while no other thread has the buffers."""
        return

    @abstractmethod
    def step(self, step: Step, block: RowBlock) -> None:
        """Compute one tile of rows against all of their keys."""

    @abstractmethod
    def whole(self, call: WholeCall) -> None:
        """Make one call of torch's kernel, and put its results in place."""

    @abstractmethod
    def blank(self, rows: tuple[slice, slice, slice]) -> None:
        """Answer rows ``[b n s]`` that see nothing."""

    # -- score tiles ---------------------------------------------------------------------------

    def scores(self, step: Step, chunk: KeyChunk, query: Tensor, key: Tensor) -> Tensor:
        """Return the masked scores of a tile, ``[g r w]``, times log2(e)."""
        tile = self.bent(step, chunk, query, key)
        self.finish(tile, step, chunk)
        return tile

    def bent(self, step: Step, chunk: KeyChunk, query: Tensor, key: Tensor) -> Tensor:
        """Return unmasked scores times log2(e); with a soft-cap, ``tanh(scale * q.k / c)``."""
        group, rows, _ = query.shape
        tile = self.work.take("scores", self.wide, group, rows, chunk.width)
        joined = self.bias is not None and self.cap is None
        if self.bias is not None and joined:
            self.bias.put(self.by_head(tile, step, chunk), step, chunk, self.per_score)
        beta = 1.0 if joined else 0.0
        tile.baddbmm_(query, key.transpose(1, 2), beta=beta, alpha=self.alpha)
        if self.unit is not None:
            tile.mul_(self.unit)
        return tile if self.cap is None else tile.tanh_()

    def finish(self, tile: Tensor, step: Step, chunk: KeyChunk) -> None:
        """Make the masked scores of a tile from what `bent` returned."""
        if self.cap is not None:
            tile.mul_(self.cap * self.per_score)
            if self.bias is not None:
                cells = self.by_head(tile, step, chunk)
                self.bias.put(cells, step, chunk, self.per_score, more=True)
        if self.modify is not None:
            self.modify.put(self.by_head(tile, step, chunk), step, chunk)
            tile.mul_(LOG2E)
        if step.lane.opaque:
            self._mask_cells(tile, step, chunk)
            return
        cells = tile.view(-1, step.block.rows, chunk.width)
        for column, pattern in chunk.patches:
            if id(pattern) not in self._edges:
                self._edges[id(pattern)] = pattern_mask(pattern, tile.dtype, tile.device, torch.inf)
            edges, edge = self._edges[id(pattern)], cells
            if pattern.others:
                first = step.batch - step.lane.batches[0]
                edges, edge = edges[first : first + step.batches], self.by_head(tile, step, chunk)
            elif pattern.width != chunk.width:
                edge = cells[:, :, column : column + pattern.width]
            self._mask(edge, edges)

    def by_head(self, tile: Tensor, step: Step, chunk: KeyChunk) -> Tensor:
        """View a ``[g r w]`` tile as ``[b h i j]``; its block is not repeated."""
        return tile.view(step.batches, step.heads, step.block.rows, chunk.width)

    def _mask_cells(self, tile: Tensor, step: Step, chunk: KeyChunk) -> None:
        """Mask a ``[g r w]`` tile by the cells of a mask that is not a region."""
        patch = self.job.cells.patch(step, chunk, tile, self._patches)
        self._mask(tile.view(step.batches, step.repeats, step.heads, *patch.shape[-2:]), patch)

    def _mask(self, cells: Tensor, patch: Tensor) -> None:
        """Leave the scores where a patch is inf, and put -inf where it is that."""
        # A minimum, where a sum would leave the NaN of inf - inf. It is as fast, and several times
        # faster than filling by a boolean mask.
        if self.modify is None:
            cells.clamp_(max=patch)
        else:  # a function may return NaN where it is masked, and so would a minimum with it
            cells.masked_fill_(patch < 0, -torch.inf)


def bias_of(job: Job, terms: tuple[Term, ...], work: Workspace) -> Bias | None:
    """Return what a call adds to its scores, if anything."""
    if not terms:
        return None
    return Bias(terms, job.wide, work, job.request.num_heads, job.one_bias)


def guarded(job: Job, key: Tensor, value: Tensor) -> tuple[Job, Tensor, Tensor]:
    """Return the job and its ``[b n s d]`` keys and values such that no tile holds wild ones.

    A masked weight is 0, and 0 times NaN is NaN. Where some number is not finite, or nearly so
    large that products with it are not, tiles with keys of another packed sequence give way to
    others, and keys that nobody sees are put to 0, if tiles reach them at all; and on a device
    that would have to be waited for.
    """
    beside = job.schedule.mixes or job.schedule.strays
    if not beside or (_is_tame(key, job.wide) and _is_tame(value, job.wide)):
        return job, key, value
    if job.schedule.mixes:
        job = job.by_sequence
    if job.schedule.strays:
        key, value = without_unseen(job.request, key, value)
    return job, key, value


def _is_tame(tensor: Tensor, wide: torch.dtype) -> bool:
    if tensor.device.type != "cpu":
        return False
    if not tensor.numel():
        return True
    # No number is larger than the root of the sum of squares, which takes a thirtieth of the time
    # that looking for the largest takes on a CPU.
    bound = torch.linalg.vector_norm(tensor.detach(), dtype=wide)
    return bool(bound < torch.finfo(wide).max ** 0.25)
