"""The tiled backend: every mask at the cost of the cells it needs, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.base import AttentionOutput, Backend, Operands, Stats, register, untransformed
from attnkit.backends.graph import hold, run_in_graph
from attnkit.backends.rows import maxima
from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.function import Kept, attend, bound, first_derivatives, run
from attnkit.backends.tiled.schedule import Schedule
from attnkit.backends.tiled.scores import Job
from attnkit.errors import Refusal
from attnkit.planner import Plan, Request

__all__ = ["Tiled", "TiledPlan"]


@dataclass(frozen=True)
class TiledPlan(Plan):
    """A plan with its schedule: which blocks of rows meet which runs of keys, and how."""

    def __hash__(self) -> int:
        return super().__hash__()

    @property
    def schedule(self) -> Schedule:
        """The blocks, as data."""
        return self.job.schedule

    @cached_property
    def job(self) -> Job:
        """What its calls have in common; made anew from the request where a copy needs it."""
        return Job(self.request, schedule(self.request))


class Tiled(Backend):
    """Computes blocks of query rows over the key runs that hold allowed cells, and no others.

    Exact for every composition; memory beyond inputs and outputs is a few tiles, whatever the
    length, unless the bias is of a family that is nothing but its matrix. In 16 bits, masks whose
    rows see many keys are computed on float32 copies of the operands. Derivatives of derivatives,
    and the largest score of each row where somebody asks for it, come from the definition, a
    block of rows at a time. Dropout draws one number from torch's generator per call. Runs on the
    CPU.
    """

    name = "tiled"
    auto = 30
    plan_type = TiledPlan
    saves_lse = True

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        reasons = untransformed(request, self.name)
        if request.device not in ("cpu", "meta"):
            reason = (
                f"the tensors are on device {request.device!r}, and the tiled backend is written "
                "for the CPU"
            )
            reasons.append(Refusal("tiled-device", reason, self.name))
        return reasons

    def plan(self, request: Request) -> TiledPlan:
        """Return the plan; the schedule is made here, once per request."""
        plan = TiledPlan(self.name, request)
        _ = plan.job
        return plan

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Walk the plan's schedule."""
        # A fake tensor has no memory to walk, and what is kept for later calls must be real.
        if isinstance(operands.query, FakeTensor):
            return run_in_graph(hold(plan, operands.pse), operands, return_stats=True)
        query, key, value, sink = operands.query, operands.key, operands.value, operands.sink
        output, lse = attend(_job(plan), query, key, value, sink, operands.pse)
        return _answer(plan, operands, output, lse)

    def compute(self, plan: Plan, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Walk the schedule without recording a graph."""
        query, key, value, sink = operands.query, operands.key, operands.value, operands.sink
        job = bound(_job(plan), operands.pse, query.device)
        return _answer(plan, operands, *run(job, seed, query, key, value, sink))

    def gradients(
        self,
        plan: Plan,
        operands: Operands,
        seed: Tensor | None,
        results: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Walk the schedule again, on the statistics of the forward pass."""
        pse = operands.pse
        lse, grad_lse = results[1], grads[1]
        if plan.request.seqlens is not None:
            lse = lse.transpose(0, 1)[None]
            grad_lse = None if grad_lse is None else grad_lse.transpose(0, 1)[None]
        if grads[0] is None and grad_lse is None:
            return (None,) * len(wanted)
        tensors = (operands.query, operands.key, operands.value, operands.sink)
        kept = Kept(seed, results[0], lse, grads[0], grad_lse, *tensors)
        carried = pse.tensors if pse is not None else ()
        return first_derivatives(_job(plan), pse, wanted, kept, carried)


def _job(plan: Plan) -> Job:
    return plan.job if isinstance(plan, TiledPlan) else Job(plan.request, schedule(plan.request))


def _answer(plan: Plan, operands: Operands, output: Tensor, lse: Tensor) -> AttentionOutput:
    """Return results whose largest scores are computed when somebody looks."""
    if plan.request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    return AttentionOutput(output, Stats(lse, partial(maxima, plan.request, operands)))


register(Tiled())
