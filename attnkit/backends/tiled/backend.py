"""The tiled backend: every mask at the cost of the cells it needs, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.arranged import arranged
from attnkit.backends.base import (
    AttentionOutput,
    Kept,
    Operands,
    Partial,
    Stats,
    register,
    untransformed,
    without_cells,
    without_shares,
)
from attnkit.backends.dropout import drawn_seed
from attnkit.backends.graph import run_held
from attnkit.backends.partials import OnStatistics
from attnkit.backends.rows import maxima
from attnkit.backends.selected_tiles import run_tiles, selected_refusals
from attnkit.backends.tiled.bias import Bound, bind
from attnkit.backends.tiled.call import Attend, Grads, compute, differentiate
from attnkit.backends.tiled.classes import in_classes, saves
from attnkit.backends.tiled.few import Few, is_few
from attnkit.backends.tiled.job import DEVICE_CELLS, Job
from attnkit.backends.tiled.schedule import RowBlock, Schedule
from attnkit.backends.tiled.tiles import steps
from attnkit.errors import Refusal
from attnkit.masks.selection import Selection
from attnkit.planner import Plan, Request
from attnkit.planner.price import time_in_tiles, time_of_definition

__all__ = ["Tiled", "TiledPlan"]


class TiledPlan(Plan):
    """A plan with its schedule: which blocks of rows meet which runs of keys, and how."""

    @property
    def schedule(self) -> Schedule:
        """The blocks, as data."""
        return self.job.schedule

    @cached_property
    def few(self) -> Few | None:
        """The same without a schedule, where it has few rows that see runs of keys."""
        if isinstance(self.request.mask, Selection):
            return None
        found = Few(self.request) if is_few(self.request) else None
        return found if found is not None and found.sights is not None else None

    @property
    def of_any_length(self) -> bool:
        """Whether nothing of it was laid out for a mask; elsewhere a mask decides who runs it."""
        own = self.few is not None and self.request.share is None
        return own and self.request.device == "cpu"

    def _at(self, request: Request) -> Plan | None:
        found = replace(self, request=request)
        return found if found.few is not None else None

    @cached_property
    def job(self) -> Job:
        """What its calls have in common; made anew from the request where a copy needs it."""
        return Job.of(self.in_order or self.request)


class Tiled(OnStatistics):
    """Computes blocks of query rows over the key runs that hold allowed cells, and no others.

    Exact for every composition; memory beyond inputs and outputs is a few tiles, whatever the
    length, unless the bias is of a family that is nothing but its matrix. In 16 bits, masks whose
    rows see many keys are computed on float32 copies of the operands. Derivatives of derivatives,
    and the largest score of each row where somebody asks for it, come from the definition, a
    block of rows at a time. Dropout draws one number from torch's generator per call.

    Tuned for the CPU, whose fused kernel of torch it takes for plain pieces. On other devices it
    is torch's operators alone, and none that waits for the device. There it looks at no number, so
    what the CPU does for huge ones only where there are some is done always.
    """

    name = "tiled"
    auto = 30
    plan_type = TiledPlan
    saves_lse = True

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        if isinstance(request.mask, Selection):
            reasons = untransformed(request, self.name) + selected_refusals(request, self.name)
            return reasons + without_shares(request, self.name)
        reasons = untransformed(request, self.name) + without_cells(request, self.name)
        if request.score_trains:
            reason = (
                "score_fn reads a tensor that asks for a gradient, and tiles pass on gradients of "
                "scores alone; what trains as a bias (pse=) trains here"
            )
            reasons.append(Refusal("score-gradient", reason, self.name))
        return reasons

    def plan(self, request: Request) -> TiledPlan:
        """Return the plan; the schedule is made here, once per request."""
        plan = TiledPlan(self.name, request)
        if plan.few is not None or isinstance(request.mask, Selection) or request.share:
            return plan
        other = in_classes(request, plan.schedule.computed)
        sorted_ = None if other is None else TiledPlan(self.name, request, in_order=other)
        if sorted_ is None or not saves(sorted_.schedule.computed, plan.schedule.computed):
            return plan
        return sorted_

    def yields(self, plan: Plan) -> Refusal | None:
        """Return why whole score matrices are cheaper, on a device where each operator is launched.

        Tiles save masked cells, and cost launches. Matrices larger than a tile may be are no
        choice: then it is the memory that tiles are for.
        """
        request = plan.request
        if isinstance(request.mask, Selection):
            return None
        if isinstance(plan, TiledPlan) and plan.few is not None:
            return None
        job = _job(plan)
        cells = request.num_heads * sum(q_len * kv_len for q_len, kv_len in request.sequences)
        if request.device in ("cpu", "meta") or cells > DEVICE_CELLS:
            return None
        tiles = sum(
            len(item.chunks)
            for lane in job.schedule.lanes
            for item in lane.items
            if isinstance(item, RowBlock)
            for _ in steps(lane, item, job.group)
        )
        ours, plainly = (
            time_in_tiles(request, job.schedule.computed, tiles),
            time_of_definition(request),
        )
        if ours <= plainly:
            return None
        reason = (
            f"{tiles:,} tiles would take {ours / 1e3:,.0f} microseconds by estimate, and whole "
            f"score matrices {plainly / 1e3:,.0f}; backend='tiled' makes them all the same"
        )
        return Refusal("dearer", reason, self.name)

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Walk the plan's schedule; autograd records it as one function."""
        query = operands.query
        # A fake tensor has no memory to walk, and what is kept for later calls must be real.
        if isinstance(query, FakeTensor):
            return run_held(plan, operands)
        if isinstance(plan.request.mask, Selection):
            return run_tiles(plan, operands)
        if plan.in_order is not None:
            return _in_order(self, plan, plan.in_order, operands)
        few = plan.few if isinstance(plan, TiledPlan) else None
        if few is not None:
            return _of_few(few, operands)
        job, pse, leaves = _job(plan), operands.pse, operands.leaves
        seed = drawn_seed(job.request, query.device)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
            output, lse = Attend.apply(job, pse, seed, *leaves)  # type: ignore[no-untyped-call]
        else:
            output, lse = compute(job, bind(job.request, pse, query.device), seed, *leaves[:4])
        return _answer(plan, operands, output, lse)

    def compute(self, plan: Plan, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Walk the schedule without recording a graph."""
        if isinstance(plan.request.mask, Selection) or plan.in_order is not None:
            return super().compute(plan, operands, seed)
        if isinstance(plan, TiledPlan) and plan.few is not None:
            return _of_few(plan.few, operands)
        job, leaves = _job(plan), operands.leaves[:4]
        terms = bind(job.request, operands.pse, operands.query.device)
        return _answer(plan, operands, *compute(job, terms, seed, *leaves))

    def gradients(
        self, plan: Plan, operands: Operands, kept: Kept, wanted: tuple[bool, ...]
    ) -> Grads:
        """Walk the schedule again, on the statistics of the forward pass."""
        if isinstance(plan.request.mask, Selection) or plan.in_order is not None:
            return super().gradients(plan, operands, kept, wanted)
        lse, grad_lse = kept.lse, kept.grad_lse
        # A graph sends zeros where nothing arrived, and the fastest ways know no such gradient.
        if grad_lse is not None and grad_lse.device.type == "cpu" and not grad_lse.any():
            grad_lse = None
        if kept.grad is None and grad_lse is None:
            return (None,) * len(wanted)
        if plan.request.seqlens is not None:
            lse = lse.transpose(0, 1)[None]
            grad_lse = None if grad_lse is None else grad_lse.transpose(0, 1)[None]
        query, _, _, _, *carried = operands.leaves
        job, kept = _job(plan), kept._replace(lse=lse, grad_lse=grad_lse)
        bias = Bound(job.request, operands.pse, carried, wanted[4:], query.device)
        return differentiate(job, bias, operands.leaves[:4], kept)

    def partial(self, plan: Plan, operands: Operands, seed: Tensor | None) -> Partial:
        """Walk the schedule of a share; a few rows read their keys as they are."""
        if isinstance(plan, TiledPlan) and plan.few is not None:
            made = _of_few(plan.few, operands)
            return Partial(made.output, made.stats.lse)
        return super().partial(plan, operands, seed)


def _in_order(backend: Tiled, plan: Plan, other: Request, operands: Operands) -> AttentionOutput:
    """Run the plan of sorted tokens, and put its rows back."""

    def run(inner: Plan, given: Operands) -> AttentionOutput:
        made = backend.run(inner, given)
        # The largest scores are looked for when somebody asks, and not here.
        return AttentionOutput(made.output, Stats(made.stats.lse, made.stats.lse))

    output, stats = arranged(run, plan, other, operands)
    return AttentionOutput(output, Stats(stats.lse, partial(maxima, plan.request, operands)))


def _job(plan: Plan) -> Job:
    return plan.job if isinstance(plan, TiledPlan) else Job.of(plan.request)


def _of_few(few: Few, operands: Operands) -> AttentionOutput:
    by_head = operands.by_head(few.request)
    with torch.no_grad():
        output, stats = few.run(*by_head, operands.pse, operands.sink)
    return AttentionOutput(few.request.layout_of.restore(output), stats)


def _answer(plan: Plan, operands: Operands, output: Tensor, lse: Tensor) -> AttentionOutput:
    """Return results whose largest scores are computed when somebody looks."""
    if plan.request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    return AttentionOutput(output, Stats(lse, partial(maxima, plan.request, operands)))


register(Tiled())
