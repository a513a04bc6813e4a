"""Shares of a larger attention on fused calls: partial answers, and gradients of whole rows.

A kernel rounds what it returns to the dtype of the query. So in 16 bits a partial output is rounded
once for each share that a row is in, and gradients once for each call; what joins them is wide.
The result is rounded once more, as everywhere: its error was 1.2 times that of one process in the
mean and 1.5 at worst (the emulated kernel, bfloat16, the masks of the gallery on 4 ranks), where
backends that round nothing before that are at 1.0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnkit.backends.base import (
    AttentionOutput,
    Kept,
    Operands,
    Partial,
    added,
    gradients_of,
    recorded,
    stats_dtype,
)
from attnkit.backends.bias_pass import pass_gradients, with_frozen
from attnkit.backends.calling import Caller, LeavesOut, LeftOut, Made, Noted
from attnkit.backends.merged import Drawn
from attnkit.errors import Refusal
from attnkit.masks.given import GivenCells
from attnkit.masks.selection import Selection
from attnkit.planner import Plan, Request
from attnkit.planner.request import Share

if TYPE_CHECKING:
    from attnkit.backends.fused import Fused

__all__ = ["against_share", "gradients_of_share", "partial_of"]

Attend = Callable[[Caller, Plan, Operands], AttentionOutput]


def against_share(request: Request, name: str) -> list[Refusal]:
    """Return why fused calls cannot run a share of an attention, if it is one."""
    share, found = request.share, []
    if share is None:
        return []
    if request.dropout and not share.local_dropout:
        reason = (
            "the kernel draws its dropout by the number of a cell in its own call, so that the "
            "shares of an attention cannot drop what one process would; dropout='local' lets each "
            "draw for itself, and its backward drops what its forward did"
        )
        found.append(Refusal("dropout-positions", reason, name))
    if isinstance(request.mask, Selection | GivenCells):
        reason = "a mask that comes with each call is no part of a larger one"
        found.append(Refusal("share", reason, name))
    if request.sink:
        reason = "a sink joins where shares are merged, and would count once for each of them"
        found.append(Refusal("share-sink", reason, name))
    return found


def partial_of(
    backend: Fused, attend: Attend, plan: Plan, operands: Operands, seed: Tensor | None
) -> Partial:
    """Run the calls of a share; nothing is recorded.

    What they drew, and what the calls of trained levels answered, is for `gradients_of_share`: as
    tensors, which go through operators of a graph.
    """
    request = plan.request
    own, device = _own_seed(seed, request.share), operands.query.device
    with torch.no_grad(), backend.drawing(own, device) as launcher:
        noted = Noted(launcher, _keeps_answers(plan))
        output, stats = attend(Made(noted), plan, operands)
    drawn = (torch.tensor(noted.random, dtype=torch.int64), *noted.answers)
    random = drawn if request.dropout or noted.keeps else None
    return Partial(output.to(stats_dtype(request.dtype)), stats.lse, random)


def gradients_of_share(
    backend: Fused,
    attend: Attend,
    plan: Plan,
    operands: Operands,
    kept: Kept,
    wanted: Sequence[bool],
    random: Sequence[Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """Return what a share gives to the gradients of its leaves, from the statistics of whole rows.

    Leaves are copied to the dtype of the statistics, which gradients have as well; each call rounds
    what it takes.
    """
    if kept.grad is None and kept.grad_lse is None:
        return (None,) * len(wanted)
    wide = stats_dtype(plan.request.dtype)
    apart = [_leaf(t, wide, want) for t, want in zip(operands.leaves, wanted, strict=True)]
    given, passed = Operands.of(operands.pse, apart), None
    if plan.bias_pass is not None:
        passed = pass_gradients(backend, plan, given, kept, wanted[4:], _drawn(random))
        given = with_frozen(plan.bias_pass, given)
    answers = () if random is None else random[1:]
    left = LeavesOut(backend, plan.request.dtype, _drawn(random), answers)
    with recorded():
        answer = attend(left, plan, given)
    with torch.no_grad():
        found = gradients_of(_through(left.found, answer, kept), apart)
    if passed is not None:
        found = (*found[:4], *map(added, found[4:], (*passed, *found[4 + len(passed) :])))
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


def _leaf(tensor: Tensor | None, wide: torch.dtype, want: bool) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    dtype = torch.promote_types(tensor.dtype, wide)
    return tensor.detach().to(dtype).requires_grad_(want)


def _drawn(random: Sequence[Tensor] | None) -> Iterable[Drawn]:
    """Return what forward calls drew, in their order."""
    if random is None:
        return repeat((0, 0, 0))
    return [(seed, offset, numels) for seed, offset, numels in random[0].tolist()]


def _through(
    left: Sequence[LeftOut], answer: AttentionOutput, kept: Kept
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the inputs of calls with their gradients, in the dtype of the inputs.

    Rows are moved around the calls, and not added up: so what takes their gradients to the calls
    takes the rows themselves there, too.
    """
    output, lse = answer.output, answer.stats.lse
    outs, lses = [one.out for one in left], [one.lse for one in left]
    whole = _moved(output, outs, kept.output), _moved(lse, lses, kept.lse)
    slopes = _moved(output, outs, kept.grad), _moved(lse, lses, kept.grad_lse)
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    for one, *own in zip(left, *whole, *slopes, strict=True):
        for leaf, grad in zip(one.leaves, one.back(*own), strict=True):
            typed = None if leaf is None or grad is None else grad.to(leaf.dtype)
            pairs.append((leaf, typed))
    return pairs


def _moved(end: Tensor, places: Sequence[Tensor], rows: Tensor | None) -> Sequence[Tensor | None]:
    """Take rows from an answer to where each call has its own."""
    if rows is None:
        return [None] * len(places)
    return torch.autograd.grad(end, places, rows.to(end.dtype), retain_graph=True)


def _keeps_answers(plan: Plan) -> bool:
    """Whether the backward needs what calls answered: to tell their levels' gradients apart."""
    route = plan.route
    if route is None or not route.levels:
        return False
    return any(plan.request.bias[part].requires_grad for part in route.stepped.parts)


def _own_seed(seed: Tensor | None, share: Share | None) -> Tensor | None:
    """Return a seed that is this share's: others of the same attention drop other cells."""
    if seed is None or share is None:
        return seed
    place = repr((share.rows, share.keys, share.first_head))
    return torch.tensor([(int(seed) ^ (zlib.crc32(place.encode()) << 24)) % 2**63])
