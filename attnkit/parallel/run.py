"""A parallel plan on the tensors of one rank: what it computes and exchanges, forward and back.

A rank goes through its stages. While it computes over the keys of one, those of the next are on
their way. Its rows' answers are merged in the order of the stages, in the dtype of the statistics,
and rounded once. Backward, keys are fetched again (or were kept), the gradients of each share
follow from the statistics of whole rows, and those of received keys go back to their owners, who
add them in the order of stages and ranks: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from attnkit.backends import AttentionOutput, Operands, Stats
from attnkit.backends.base import BACKENDS, Kept, Partial, stats_dtype
from attnkit.backends.partials import Merging
from attnkit.errors import CompositionError
from attnkit.first_order import first_order
from attnkit.layouts import Sizes
from attnkit.parallel.course import Course, Task
from attnkit.parallel.drawn import read, tensors_of, written
from attnkit.parallel.exchange import Keys, Sums, stages
from attnkit.parallel.heads import Item, RankTurn
from attnkit.parallel.messages import room, taken
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.statements import statement_of
from attnkit.parallel.wires import Wires
from attnkit.planner import Request

__all__ = ["Attended", "attend", "backward", "forward", "no_maximum"]

Grads = tuple[Tensor | None, ...]
Arrived = tuple[Tensor | None, Tensor | None]
"""The gradients of output and log-sum-exp; one that is None is one of zeros."""


class Attended(NamedTuple):
    """What a rank's rows answer over all keys, and what its backward pass needs beside that.

    `output` is in the request's layout and dtype, `lse` as in `Stats`, both contiguous. `kept`
    are the operands with heads in place of tokens and what they answered, if they were turned;
    the keys and values of remote stages, if the plan keeps them; and what was drawn.
    """

    output: Tensor
    lse: Tensor
    kept: tuple[Tensor, ...]


def attend(
    plan: ParallelPlan, rank: int, wires: Wires, operands: Operands, seed: Tensor | None = None
) -> AttentionOutput:
    """Attend the rows of a rank; all ranks do so, each with its own tokens, and in this order.

    Query, key and value have the rank's tokens as the plan's shardings say; bias and sink are
    those of the whole. Their gradients are shares: the sum over all ranks is that of one
    process. `seed` is the same on all ranks, ``[1]`` in int64 on the host, where there is dropout.
    A gradient that reaches any result begins an exchange: all ranks run backward, in one order.
    """
    given = (plan, rank, wires, seed, *operands.leaves)
    output, lse = _OneRank.apply(*given)  # type: ignore[no-untyped-call]
    return AttentionOutput(output, Stats(lse, no_maximum))


def no_maximum() -> NoReturn:
    """Raise: ranks exchange no maximum."""
    raise CompositionError(
        "the largest score of each row is not exchanged between ranks; use stats.lse"
    )


# -- forward ---------------------------------------------------------------------------------------


def forward(
    plan: ParallelPlan, rank: int, wires: Wires, operands: Operands, seed: Tensor | None
) -> Attended:
    """Return what a rank's rows answer; nothing is recorded. See `attend`."""
    drawn = seed if plan.dropout == "global" else None  # elsewhere each rank draws its own
    wires.begin(statement_of(plan, "forward"), _in_words(drawn))
    course = Course.of(plan, rank)
    with torch.no_grad(), _plainly(operands.query.device):
        if course.turn is None:
            return _through_stages(course, wires, operands, seed)
        return _turned(course, course.turn, wires, operands, seed)


def _named(wanted: Sequence[bool]) -> str:
    names = ["query", "key", "value", "sink", *(f"bias {k}" for k in range(len(wanted) - 4))]
    return " and ".join(name for name, want in zip(names, wanted, strict=True) if want)


def _in_words(seed: Tensor | None) -> tuple[tuple[str, int], ...]:
    return () if seed is None else (("dropout seed", int(seed)),)


def _through_stages(
    course: Course, wires: Wires, operands: Operands, seed: Tensor | None
) -> Attended:
    """Return what the rows of some heads answer over all keys."""
    request = course.plan.request
    rows: Merging | None = None
    held: list[Tensor] = []
    drawn: list[Sequence[Tensor]] = []
    own = operands.key, operands.value
    for leg, keys in stages(course, wires, own, "forward"):
        for task in leg.tasks:
            asked = _of_task(course, task, operands, keys)
            part = BACKENDS[task.plan.backend].partial(task.plan, asked, seed)
            drawn.append(tensors_of(part.random))
            if rows is None and task.rows is None and part.random is None:
                # The first, which covers all of them, and of which nothing else is kept.
                rows = Merging(request.layout, part.output, part.lse)
                continue
            rows = rows or Merging(request.layout, *_nothing(course, operands.query)[:2])
            rows.add(part, task.rows)
        if course.plan.keep and leg.number and leg.size:
            held += keys
    rows = rows or Merging(request.layout, *_nothing(course, operands.query)[:2])
    sink = None if operands.sink is None or not course.heads[0] else operands.sink
    made = rows.answer(None if sink is None else _of_heads(course, sink))
    output = made.output.to(request.dtype).contiguous()
    return Attended(output, made.lse.contiguous(), (*held, *written(drawn)))


def _turned(
    course: Course, turn: RankTurn, wires: Wires, operands: Operands, seed: Tensor | None
) -> Attended:
    """Return what a rank's rows answer, whose heads are computed by several ranks."""
    request = course.plan.request
    items = [Item(t, k > 0) for k, t in enumerate(operands.by_head(request))]
    three = turn.to_heads(wires, items, "tokens for heads (forward)")
    own = [_in_layout(request, one) for one in three]
    inner = replace(operands, query=own[0], key=own[1], value=own[2])
    made = _through_stages(course, wires, inner, seed)
    answer = [Item(t, False) for t in _by_head(request, made.output, made.lse)]
    counts = request.num_heads, request.num_heads
    output, lse = turn.to_tokens(wires, answer, counts, "heads for tokens (forward)")
    return Attended(
        _in_layout(request, output).contiguous(),
        _as_stats(request, lse).contiguous(),
        (*own, made.output, made.lse, *made.kept),
    )


# -- backward --------------------------------------------------------------------------------------


def backward(
    plan: ParallelPlan,
    rank: int,
    wires: Wires,
    operands: Operands,
    attended: Attended,
    arrived: Arrived,
    wanted: Sequence[bool],
    seed: Tensor | None,
) -> Grads:
    """Return the gradients of the `leaves` of operands that are wanted, in their dtypes.

    Whether keys or values want one is the same on all ranks.
    """
    wires.begin(statement_of(plan, "backward", (("gradients of", _named(wanted)),)))
    course = Course.of(plan, rank)
    with torch.no_grad(), _plainly(attended.output.device):
        back = _back if course.turn is None else _turned_back
        found = back(course, wires, operands, attended, arrived, wanted, seed)
    pairs = zip(found, operands.leaves, wanted, strict=True)
    return tuple(_share_of(g, leaf) if want else None for g, leaf, want in pairs)


def _share_of(grad: Tensor | None, leaf: Tensor) -> Tensor:
    """Return a gradient in the dtype of its leaf; a rank that adds nothing to it adds zeros.

    Whoever adds up the gradients of parameters over ranks waits for one of each.
    """
    return torch.zeros_like(leaf) if grad is None else grad.to(leaf.dtype)


def _back(
    course: Course,
    wires: Wires,
    operands: Operands,
    attended: Attended,
    arrived: Arrived,
    wanted: Sequence[bool],
    seed: Tensor | None,
) -> Grads:
    """Return the gradients of the leaves for the rows of some heads, wide."""
    held, drawn = read(course, attended.kept)
    whole = Kept(seed, attended.output, attended.lse, *arrived)
    asked = (*wanted[:3], False, *wanted[4:])
    sums, own = Sums(course, wires, operands, wanted), (operands.key, operands.value)
    for leg, keys in stages(course, wires, own, "backward", held):
        of_keys = sums.begin(leg, keys)
        for task in leg.tasks:
            given = _of_task(course, task, operands, keys), _of_rows(course, task, whole)
            backend = BACKENDS[task.plan.backend]
            slopes = backend.partial_gradients(task.plan, *given, asked, next(drawn))
            sums.add(task, of_keys, slopes)
        sums.end(leg, of_keys)
    return sums.found(_of_sink(course, operands, attended, arrived) if wanted[3] else None)


def _turned_back(
    course: Course,
    wires: Wires,
    operands: Operands,
    attended: Attended,
    arrived: Arrived,
    wanted: Sequence[bool],
    seed: Tensor | None,
) -> Grads:
    """Return the gradients of the leaves, where several ranks compute the heads of these rows."""
    request, turn = course.plan.request, course.turn
    if turn is None:
        raise CompositionError("this plan exchanges no tokens for heads")
    given = [Item(t, False) for t in _slopes(request, attended, arrived)]
    grad, grad_lse = turn.to_heads(wires, given, "gradients of the answer")
    query, key, value, output, lse, *kept = attended.kept
    inner = replace(operands, query=query, key=key, value=value)
    slopes = _in_layout(request, grad), _as_stats(request, grad_lse)
    made = Attended(output, lse, tuple(kept))
    found = _back(course, wires, inner, made, slopes, wanted, seed)
    if not any(wanted[:3]):
        return found
    items = []
    for k, (slope, leaf) in enumerate(zip(found[:3], (query, key, value), strict=True)):
        # Of heads that several ranks have, nothing is rounded before it is added up.
        dtype = stats_dtype(request.dtype) if k and turn.adds else request.dtype
        slope = torch.zeros_like(leaf, dtype=dtype) if slope is None else slope.to(dtype)
        dim = request.value_dim if k == 2 else request.head_dim
        items.append(Item(_view(request, slope, course.heads[k > 0], dim), k > 0))
    counts = request.num_heads, request.num_kv_heads, request.num_kv_heads
    back = turn.to_tokens(wires, items, counts, "gradients of query, key and value")
    return (*(_in_layout(request, one) for one in back), *found[3:])


def _of_sink(
    course: Course, operands: Operands, attended: Attended, arrived: Arrived
) -> Tensor | None:
    """Return this rank's share of the sink's gradient: ``sum_i p_i (dlse_i - sum(dO_i O_i))``.

    ``p_i = exp(sink - lse_i)`` is its weight in a row.
    """
    sink, request = operands.sink, course.plan.request
    if sink is None:
        return None
    grad, grad_lse = _slopes(request, attended, arrived)
    output, lse = _by_head(request, attended.output, attended.lse)
    own = _of_heads(course, sink).to(lse.dtype)
    empty = lse == -torch.inf
    weight = (own[:, None, None] - lse.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)
    through = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1, keepdim=True)
    found = torch.zeros_like(sink, dtype=lse.dtype)
    _of_heads(course, found).copy_((weight * (grad_lse - through)).sum((0, 2, 3)))
    return found


# -- between a rank's tensors and those of a share -----------------------------------------------


def _of_task(course: Course, task: Task, operands: Operands, keys: Keys) -> Operands:
    """Return the operands of a share."""
    axis = course.plan.request.layout_of.length_axis
    query = taken(operands.query, task.rows, axis)
    key, value = (taken(t, task.keys, axis) for t in keys)
    carried = () if operands.pse is None else operands.pse.tensors
    return Operands.of(task.bias, (query, key, value, None, *carried))


def _of_rows(course: Course, task: Task, whole: Kept) -> Kept:
    """Return what is kept of the rows of a share."""
    if task.rows is None:
        return whole
    request = course.plan.request
    axis, of_stats = request.layout_of.length_axis, 0 if request.layout_of.packed else 2

    def some(tensor: Tensor | None, axis: int) -> Any:
        return None if tensor is None else taken(tensor, task.rows, axis)

    return Kept(
        whole.seed,
        some(whole.output, axis),
        some(whole.lse, of_stats),
        some(whole.grad, axis),
        some(whole.grad_lse, of_stats),
    )


def _of_heads(course: Course, sink: Tensor) -> Tensor:
    """Return the part of a tensor ``[n]`` that is of the heads of a rank."""
    heads = course.plan.heads(course.rank)
    return sink[heads.start : heads.stop]


def _nothing(course: Course, like: Tensor) -> Partial:
    """Return what rows answer that have seen no key so far."""
    request = course.plan.request
    batch = 1 if request.layout_of.packed else request.batch
    sizes = Sizes(batch, course.rows, course.heads[0], request.value_dim)
    output = room(request.layout_of, sizes, like, stats_dtype(like.dtype)).zero_()
    lse = output.new_full((*output.shape[:3], 1), -torch.inf)
    return Partial(_in_layout(request, output), _as_stats(request, lse))


def _slopes(request: Request, attended: Attended, arrived: Arrived) -> tuple[Tensor, Tensor]:
    """Return the gradients that arrive, as `_by_head`; zeros where there are none."""
    pairs = zip(arrived, attended[:2], strict=True)
    grad, grad_lse = (torch.zeros_like(of) if one is None else one for one, of in pairs)
    return _by_head(request, grad, grad_lse)


def _by_head(request: Request, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output ``[b n s d]`` and a log-sum-exp ``[b n s 1]``."""
    lse = lse.mT[None] if request.layout_of.packed else lse
    return _view(request, output, lse.shape[1], request.value_dim), lse[..., None]


def _as_stats(request: Request, lse: Tensor) -> Tensor:
    """Return a log-sum-exp ``[b n s 1]`` as `Stats` has it."""
    return lse[0, ..., 0].mT if request.layout_of.packed else lse[..., 0]


def _view(request: Request, tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Return ``[b n s d]``; a merged axis of no heads does not say how wide they are."""
    layout = request.layout_of
    if heads or not layout.merges_heads:
        return layout.view(tensor, heads)
    return tensor.new_empty((request.batch, 0, tensor.shape[layout.length_axis], dim))


def _in_layout(request: Request, tensor: Tensor) -> Tensor:
    """Return a tensor ``[b n s d]`` in the request's layout."""
    return request.layout_of.restore(tensor)


def _plainly(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtype of the tensors: autocast does not reach inside."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


# -- autograd ------------------------------------------------------------------------------------


class _OneRank(torch.autograd.Function):
    """Attends the rows of a rank; its backward exchanges, too."""

    @staticmethod
    def forward(
        ctx: Any, plan: ParallelPlan, rank: int, wires: Wires, seed: Tensor | None, *leaves: Any
    ) -> tuple[Tensor, Tensor]:
        attended = forward(plan, rank, wires, Operands.of(plan.bias, leaves), seed)
        if plan.heads_ways > 1:  # what is kept has the heads that this rank needs
            leaves = (None, None, None, *leaves[3:])
        ctx.terms, ctx.leaves = (plan, rank, wires), len(leaves)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, *leaves, *attended[:2], *attended.kept)
        return attended.output, attended.lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        seed, *saved = ctx.saved_tensors
        leaves, (output, lse, *kept) = saved[: ctx.leaves], saved[ctx.leaves :]
        plan, rank, wires = ctx.terms
        wanted, given = ctx.needs_input_grad[4:], leaves
        if leaves[0] is None:
            leaves = [*kept[:3], *leaves[3:]]
            given = [torch.zeros((), requires_grad=True)]  # in place of those that are not there

        def make() -> Grads:
            operands, attended = Operands.of(plan.bias, leaves), Attended(output, lse, tuple(kept))
            arrived = grad, grad_lse
            with wires.telling():  # what goes wrong here, other ranks would wait for
                return backward(plan, rank, wires, operands, attended, arrived, wanted, seed)

        return (None, None, None, None, *first_order(make, grad, grad_lse, *given))
