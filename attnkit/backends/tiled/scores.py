"""Score tiles, the part that forward and backward share.

    score = scale * q.k, with a soft-cap c * tanh(score / c);  + bias;  masked: -inf

Tiles hold ``score * log2(e)``: powers of two are several times cheaper than powers of e.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import log2

import torch
from torch import Tensor

from attnkit.backends.form import Form, form
from attnkit.backends.numbers import bounded, usable_cap
from attnkit.backends.tiled.bias import Bias
from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.dropout import Dropout
from attnkit.backends.tiled.patches import put_cells, put_patches
from attnkit.backends.tiled.schedule import Chunk, Lane, Schedule
from attnkit.backends.tiled.terms import Term
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.backends.tiled.whole import Part, sole_part
from attnkit.planner import Request

__all__ = ["LN2", "LOG2E", "Job", "Scores"]

# Keys per row up to which blocks cast 16 bits in their tiles: a window of 1,024 and its edges.
FEW_KEYS = 1280

# From this on a factor is kept out of matrix products.
HUGE = 1024.0

LOG2E = log2(2.718281828459045)
LN2 = 1.0 / LOG2E


@dataclass(frozen=True, eq=False)
class Job:
    """One call: what a request and its bias make of the operands."""

    request: Request
    schedule: Schedule
    terms: tuple[Term, ...] = ()

    @property
    def wide(self) -> torch.dtype:
        """The dtype of scores and statistics."""
        return torch.float64 if self.request.dtype == torch.float64 else torch.float32

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch elements (1 if packed), query heads, rows, keys."""
        request = self.request
        batch = 1 if request.seqlens is not None else request.batch
        return batch, request.num_heads, request.q_len, request.kv_len

    @cached_property
    def form(self) -> Form:
        """How the layout of the tensors is seen as ``[b n s d]``."""
        return form(self.request.layout)

    @cached_property
    def sole(self) -> Part | None:
        """The one call of torch's kernel that computes everything, if there is one."""
        return sole_part(self.schedule, self.sizes, self.group)

    @cached_property
    def raised(self) -> Job | None:
        """The same in float32, where that is the better way to compute 16 bits.

        One call of torch's kernel is none better, and blocks that read few keys cast them tile
        by tile. Merges of torch's calls need float32, and many keys are worth casting once.
        """
        request = self.request
        if request.dtype.itemsize > 2 or (self.sole is not None and not request.sink):
            return None
        wide = replace(request, dtype=torch.float32)
        other = schedule(wide)
        batch, heads, rows, _ = self.sizes
        gained = other.fused - self.schedule.fused
        few = other.computed <= FEW_KEYS * batch * heads * rows
        if few and gained <= other.computed / 8:
            return None
        return replace(self, request=wide, schedule=other)

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.request.num_heads // self.request.num_kv_heads


class Scores:
    """Makes the score tiles of one call."""

    def __init__(self, job: Job, seed: Tensor | None, like: Tensor) -> None:
        request = job.request
        self.job = job
        self.wide = job.wide
        self.work = Workspace.lent(like)
        self.cap = None if request.softcap is None else usable_cap(request.softcap, self.wide)
        unit = LOG2E if self.cap is None else 1.0 / self.cap
        # Products that are multiplied by a huge number before they are added up may overflow.
        self.unit = unit if unit > HUGE else None
        self.alpha = bounded(request.scale * (1.0 if self.unit else unit), self.wide)
        self.bias = Bias(job.terms, LOG2E, self.wide, self.work) if job.terms else None
        self.dropout: Dropout | None = None
        if request.dropout and seed is not None:
            self.dropout = Dropout(request.dropout, seed, job.sizes)
        self._planes: tuple[Lane | None, int, Tensor | None] = (None, -1, None)

    def tile(self, step: Step, chunk: Chunk, query: Tensor, key: Tensor) -> Tensor:
        """Return the masked scores of a tile, ``[g r w]``, times log2(e)."""
        scores = self.bent(step, chunk, query, key)
        self.finish(scores, step, chunk)
        return scores

    def bent(self, step: Step, chunk: Chunk, query: Tensor, key: Tensor) -> Tensor:
        """Return unmasked scores times log2(e); with a soft-cap, ``tanh(scale * q.k / c)``."""
        group, rows, _ = query.shape
        scores = self.work.take("scores", self.wide, group, rows, chunk.width)
        joined = self.bias is not None and self.cap is None
        if self.bias is not None and joined:
            self.bias.put(self.by_head(scores, step, chunk), step, chunk)
        beta = 1.0 if joined else 0.0
        scores.baddbmm_(query, key.transpose(1, 2), beta=beta, alpha=self.alpha)
        if self.unit is not None:
            scores.mul_(self.unit)
        return scores if self.cap is None else scores.tanh_()

    def finish(self, scores: Tensor, step: Step, chunk: Chunk) -> None:
        """Make the masked scores of a tile from what `bent` returned."""
        if self.cap is not None:
            scores.mul_(self.cap * LOG2E)
            if self.bias is not None:
                self.bias.put(self.by_head(scores, step, chunk), step, chunk, more=True)
        self.mask(scores, step, chunk)

    def mask(self, scores: Tensor, step: Step, chunk: Chunk) -> None:
        """Set the cells of a tile that are not allowed to -inf."""
        if not step.lane.opaque:
            put_patches(scores, chunk, step.block.rows)
            return
        put_cells(self.by_head(scores, step, chunk), self._cells(step), step, chunk)

    def by_head(self, scores: Tensor, step: Step, chunk: Chunk) -> Tensor:
        """View a ``[g r w]`` tile as ``[b h i j]``; its block is not repeated."""
        return scores.view(step.batches, step.heads, step.block.rows, chunk.width)

    def _cells(self, step: Step) -> Tensor:
        """Return the cells ``[1 | n, i, j]`` of a mask that is no region, for one matrix."""
        lane, matrix, planes = self._planes
        wanted = step.lane.matrix + step.batch - step.lane.batches[0]
        if planes is None or lane is not step.lane or matrix != wanted:
            mask = self.job.request.mask
            batch = wanted if mask.batches is not None else 0
            sizes = step.lane.lengths
            planes = torch.stack(
                [
                    mask._plane(*sizes, batch, head, self.work.device)
                    for head in range(mask.heads or 1)
                ]
            )
            self._planes = (step.lane, wanted, planes)
        return planes
