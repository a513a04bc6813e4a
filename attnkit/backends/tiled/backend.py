"""The tiled backend: every mask at the cost of the cells it needs, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.base import AttentionOutput, Backend, Deferred, Operands, Stats, register
from attnkit.backends.tiled.bias import bind, given_tensors, outline
from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.compiled import HANDLES, tiled
from attnkit.backends.tiled.function import attend, new_seed
from attnkit.backends.tiled.schedule import Schedule
from attnkit.backends.tiled.scores import Job
from attnkit.errors import Refusal
from attnkit.planner import Plan, Request

__all__ = ["Tiled", "TiledPlan"]


@dataclass(frozen=True)
class TiledPlan(Plan):
    """A plan with its schedule: which blocks of rows meet which runs of keys, and how."""

    job: Job | None = None
    outline: Job | None = None
    handle: int = -1

    @property
    def schedule(self) -> Schedule:
        """The blocks, as data."""
        return schedule(self.request)


class Tiled(Backend):
    """Computes blocks of query rows over the key runs that hold allowed cells, and no others.

    Exact for every composition; memory beyond inputs and outputs is a few tiles, whatever the
    length, unless the bias is of a family that is nothing but its matrix. In 16 bits, masks whose
    rows see many keys are computed on float32 copies of the operands. Statistics come as
    ``max = lse`` and ``sum = 1`` (0 in a row without keys). Dropout draws one number from torch's
    generator per call. Runs on the CPU.
    """

    name = "tiled"
    traceable = True

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        reasons = []
        if request.device not in ("cpu", "meta"):
            reason = (
                f"the tensors are on device {request.device!r}, and the tiled backend is written "
                "for the CPU"
            )
            reasons.append(Refusal("tiled-device", reason, self.name))
        return reasons

    def plan(self, request: Request) -> TiledPlan:
        """Return the plan; the schedule is made here, once per request."""
        job = Job(request, schedule(request))
        known = replace(job, terms=outline(request))
        return TiledPlan(self.name, request, job=job, outline=known, handle=HANDLES.add(known))

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Walk the plan's schedule."""
        # A fake tensor has no memory to walk, and what is kept for later calls must be real.
        if torch.compiler.is_compiling() or isinstance(operands.query, FakeTensor):
            return _run_in_graph(cast(TiledPlan, plan), operands)
        request, query = plan.request, operands.query
        job = cast(TiledPlan, plan).job or Job(request, schedule(request))
        if operands.pse is not None:
            job = replace(job, terms=bind(request, operands.pse, query.device))
        output, lse = attend(job, query, operands.key, operands.value, operands.sink)
        return AttentionOutput(output, Deferred(partial(_stats, lse, job)))


def _run_in_graph(plan: TiledPlan, operands: Operands) -> AttentionOutput:
    """Run as one operator of a graph that is being compiled."""
    request, query = plan.request, operands.query
    given = given_tensors(request, operands.pse, query.device)
    seed = new_seed(query.device) if request.dropout else None
    output, lse = tiled(
        query, operands.key, operands.value, operands.sink, given, seed, plan.handle
    )
    lse = lse.detach()
    if request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    return AttentionOutput(output, Stats(lse, (lse > -torch.inf).to(lse.dtype)))


def _stats(lse: Tensor, job: Job) -> Stats:
    """Return ``max = lse`` and a sum of 1 for every row, 0 for rows that see nothing."""
    lse = lse.detach()
    if job.request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    if job.request.sink or not job.schedule.bare:
        return Stats(lse, _one(lse.dtype, lse.device).expand(lse.shape))
    return Stats(lse, (lse > -torch.inf).to(lse.dtype))


@lru_cache(maxsize=16)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=dtype, device=device)


register(Tiled())
