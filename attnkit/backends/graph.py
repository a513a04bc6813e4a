"""Any backend's plan as one operator that `torch.compile` takes into its graph whole.

What the operator does is not traced, so it may be a launch of a kernel or a hundred small ops.
A graph holds tensors and words: the masks, biases and lengths of a call go in as tensors, by their
handles (`attnkit.handles`), and the plan is made, or found again, when the operator runs. So one
graph serves every mask, and lengths that are new in each step. A graph that leaves the process has
their texts among its words instead (`Terms.written`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add, and_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.backends.base import (
    BACKENDS,
    AttentionOutput,
    Kept,
    Operands,
    Stats,
    reached,
    stats_dtype,
)
from attnkit.backends.choose import make_plan
from attnkit.constants import constant
from attnkit.errors import LONGEST, BackendRefused, CompositionError, Refusal, clipped
from attnkit.handles import memory_of, number_of, told
from attnkit.layouts import SeqLens
from attnkit.masks import Full
from attnkit.masks import parse as parse_mask
from attnkit.masks.selection import Selection
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.planner.repeats import strict
from attnkit.planner.request import read_sizes
from attnkit.pse import Pse
from attnkit.pse import parse as parse_pse
from attnkit.pse.base import rebound

__all__ = [
    "Held",
    "Terms",
    "hold",
    "read_terms",
    "run_held",
    "run_terms",
    "stand_in",
    "without_memory",
    "written",
]


class Terms(NamedTuple):
    """What a graph is of, as words and numbers: all of a request that is no data of a step.

    `roles` says what each handle is, a letter for each: "m" a mask, "b" a bias, "s" the lengths of
    a packed batch, "f" a score function; "p" is a plan with its bias, "x" the shards of tokens that
    are spread over processes, which know the lengths. `grads` says which tensors ask for a
    gradient.
    """

    roles: str
    layout: str
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    training: bool = True
    sink: bool = False
    grads: tuple[bool, ...] = ()
    backend: str = "auto"
    deterministic: bool = False
    memory_limit: int | None = None
    selected: tuple[int, int, bool, bool, bool] | None = None
    """`SelectedBlocks.words` of a mask whose tensors come last, if there is one."""
    written: tuple[str, ...] | None = None
    """What `written` says of each role, where there are no handles."""

    def text(self) -> str:
        """Return the words that a graph holds."""
        return json.dumps(self)

    @classmethod
    def read(cls, text: str) -> Terms:
        """Return what such words say."""
        return cls(*json.loads(text))


def written(role: str, value: Any) -> str:
    """Return the text of a mask, a bias or lengths; `CompositionError` where none says it.

    The tensors of a bias come with the call, so that its text need not hold them.
    """
    if role == "s":
        return json.dumps((value.q, value.kv))
    text = str(value)
    try:
        made = _READERS[role](text) if role in _READERS else None
        if role == "b" and made is not None:
            made, value = (rebound(one, value.tensors).key() for one in (made, value))
    except CompositionError:
        made = None
    if made is None or made != value:
        raise CompositionError(
            f"torch.export: {clipped(text, LONGEST)} has no text that another process could read; "
            "what holds a function, a tensor of its own or processes is not exported"
        )
    return text


written._dynamo_marked_constant = True  # type: ignore[attr-defined]


@constant
def _read(role: str, text: str) -> Any:
    return _READERS[role](text)


def _lengths(text: str) -> SeqLens:
    return SeqLens(*json.loads(text))


_READERS: dict[str, Callable[[str], Any]] = {"m": parse_mask, "b": parse_pse, "s": _lengths}


@dataclass(frozen=True, eq=False)
class Held:
    """A plan with its bias, whose tensors are put in at run time."""

    plan: Plan
    pse: Pse | None

    def operands(self, tensors: list[Tensor]) -> Operands:
        """Return operands from the tensors among their leaves: there may be no sink."""
        sink = () if self.plan.request.sink else (None,)
        return Operands.of(self.pse, [*tensors[:3], *sink, *tensors[3:]])

    @property
    def saves_lse(self) -> bool:
        """Whether `gradients` needs the log-sum-exp of the forward pass."""
        return BACKENDS[self.plan.backend].saves_lse

    def compute(self, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Run the plan on random numbers that follow from `seed`; nothing is recorded."""
        return BACKENDS[self.plan.backend].compute(self.plan, operands, seed)

    def gradients(
        self, operands: Operands, kept: Kept, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves that are wanted."""
        return BACKENDS[self.plan.backend].gradients(self.plan, operands, kept, wanted)


def hold(plan: Plan, pse: Pse | None) -> Held:
    """Return a plan with a kind of bias; the plan keeps it."""
    kinds: dict[object, Held] = plan.__dict__.setdefault("_held", {})
    kind = None if pse is None else pse.key()
    if kind not in kinds:
        kinds[kind] = Held(plan, without_memory(pse))  # not with tensors of the first who asked
    return kinds[kind]


def without_memory(pse: Pse | None) -> Pse | None:
    """Return a bias like one, on stand-ins for its tensors."""
    if pse is None:
        return None
    facts = ((t.shape, t.dtype, t.device, t.requires_grad) for t in pse.tensors)
    return rebound(pse, [stand_in(*known) for known in facts])


def stand_in(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> Tensor:
    """Return a tensor with such properties, and one number of memory."""
    cell = torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))
    return cell.requires_grad_(requires_grad)  # inside of an operator nothing hands it on


def run_terms(
    text: str, tensors: list[Tensor], values: list[Tensor], drops: bool, return_stats: bool
) -> AttentionOutput:
    """Attend as `Terms` in words say, by one operator of the graph that is being recorded.

    `tensors` are query, key, value, the sink if there is one, and those of biases and mask;
    `values` are handles. It `drops` where it has dropout. Without `return_stats` there are no
    statistics, since some backends compute them only where they are looked at.
    """
    # Drawn in the graph and on the host, which no device has to wait for.
    seed = torch.randint(2**63 - 1, (1,)) if drops else None
    output, lse, peak = _attend(tensors, seed, values, text, return_stats)
    return AttentionOutput(output, Stats(lse, peak))


def run_held(plan: Plan, operands: Operands) -> AttentionOutput:
    """Run a plan on fake tensors, which have shapes alone: as the operator, with statistics."""
    request, tensors = plan.request, [leaf for leaf in operands.leaves if leaf is not None]
    heads = request.num_heads, request.num_kv_heads, request.head_dim
    text = Terms("p", request.layout, *heads).text()
    number = number_of(hold(plan, operands.pse))
    value = torch.full((1,), number, dtype=torch.int64, device="cpu")
    return run_terms(text, tensors, [value], request.dropout > 0, True)


_TRANSFORMS = (
    "FuncTorchBatched",
    "FuncTorchBatchedDecomposition",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchVmapMode",
)


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Compute in the dtype of the tensors, as autocast does not reach inside.

    `torch.vmap` does: it asks the functions of masks for their cells.
    """
    with torch.autocast(device.type, enabled=False), reached(*_TRANSFORMS):
        yield


# -- from what the graph holds to a plan ---------------------------------------------------------


def _found(tensors: list[Tensor], values: list[Tensor], text: str) -> Held:
    """Return the plan for tensors and what handles stand for, as found before or made now."""
    memory = memory_of(values[-1])
    if memory is None:
        terms = Terms.read(text)
        if terms.written is not None:
            return _planned(tensors, values, terms)
        return cast(Held, told(values[-1]))
    facts = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    key = (text, strict(), *map(int, values), *facts)
    known = memory.found.get(key)
    held = None if known is None else known()
    if held is None:
        held = _planned(tensors, values, Terms.read(text))
        memory.remember(key, held)
    return cast(Held, held)


def _planned(tensors: list[Tensor], values: list[Tensor], terms: Terms) -> Held:
    told_by = map(told, values) if terms.written is None else map(_read, terms.roles, terms.written)
    given = list(zip(terms.roles, told_by, strict=True))
    for role, spread in given:
        if role == "x":  # it knows the plan of all ranks, and how one of them runs
            held: Held = spread.held(terms, given, tensors)
            return held
    request, pse = read_terms(terms, given, tensors)
    return hold(make_plan(request, terms.backend), pse)


def read_terms(
    terms: Terms,
    given: Sequence[tuple[str, Any]],
    tensors: Sequence[Tensor],
    whole: Callable[..., Sequence[Tensor]] = lambda *local: local,
    seqlens: SeqLens | None = None,
) -> tuple[Request, Pse | None]:
    """Return the request that a graph makes, and its bias, from what its handles stand for.

    Of tokens that are spread over processes, `whole` puts query, key and value of all in place of
    those of one, and `seqlens` are the lengths.
    """
    with torch.set_grad_enabled(any(terms.grads)):
        facts = zip(tensors, terms.grads, strict=True)
        known = [stand_in(t.shape, t.dtype, t.device, grad) for t, grad in facts]
        query, key, value = whole(*known[:3])
        carried = known[3:]
        sink = carried.pop(0) if terms.sink else None
        masks, biases, lengths, functions = (
            [one for role, one in given if role == r] for r in "mbsf"
        )
        if terms.selected is not None:
            selection, carried = _selection(terms.selected, carried)
            masks = [*(one for one in masks if not isinstance(one, Full)), selection]
        pse = rebound(reduce(add, biases), carried) if biases else None
        request = read_request(
            Composition(
                reduce(and_, masks) if masks else Full(),
                pse,
                terms.layout,
                terms.scale,
                terms.dropout,
                terms.softcap,
                functions[0] if functions else None,
                terms.deterministic,
                terms.memory_limit,
            ),
            query,
            key,
            value,
            num_heads=terms.num_heads,
            num_kv_heads=terms.num_kv_heads,
            head_dim=terms.head_dim,
            seqlens=lengths[0] if lengths else seqlens,
            sink=sink,
            training=terms.training,
        )
    return request, pse


def _selection(
    words: tuple[int, int, bool, bool, bool], carried: list[Tensor]
) -> tuple[Selection, list[Tensor]]:
    """Return what is selected, by the words of a graph, and the tensors before its own."""
    first = len(carried) - 1 - sum(words[3:])
    b, heads, q_blocks, k = carried[first].shape
    return Selection((b, heads, q_blocks, k), *words), carried[:first]


def _sizes(tensors: list[Tensor], terms: Terms) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the shapes of the output and of the statistics; sizes may be symbols.

    What is wrong with the shapes is an error here, and so while a graph is traced.
    """
    heads = terms.num_heads, terms.num_kv_heads, terms.head_dim
    layout, query = layouts.get(terms.layout), tensors[0]
    q, _, v = read_sizes(layout, (query, tensors[1], tensors[2]), *heads)
    width = q.heads * v.dim if layout.merges_heads else v.dim
    axes = layout.axes
    shape = [width if "d" in axis else size for axis, size in zip(axes, query.shape, strict=True)]
    rows = (q.length, q.heads) if layout.packed else (q.batch, q.heads, q.length)
    return tuple(shape), rows


# -- the operators, what they make of shapes alone, and their derivatives ----------------------


def _forward(
    tensors: list[Tensor],
    seed: Tensor | None,
    values: list[Tensor],
    text: str,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    held, kept = _found(tensors, values, text), return_stats or any(Terms.read(text).grads)
    operands = held.operands(tensors)
    with _alone(operands.query.device):
        output, stats = held.compute(operands, seed)
        output = output.contiguous()
        lse = peak = output.new_empty(0)
        if return_stats or (kept and held.saves_lse):
            lse = stats.lse.contiguous()
        elif kept:
            lse = output.new_zeros(
                _sizes(tensors, Terms.read(text))[1], dtype=stats_dtype(output.dtype)
            )
        # Without keys both statistics may be one tensor, which an operator must not return twice.
        peak = stats.max.contiguous().clone() if return_stats else output.new_empty(0)
    return output, lse, peak


def _forward_shapes(
    tensors: list[Tensor],
    seed: Tensor | None,
    values: list[Tensor],
    text: str,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    terms, query = Terms.read(text), tensors[0]
    shape, rows = _sizes(tensors, terms)
    lse, peak = (
        query.new_empty(rows if asked else 0, dtype=stats_dtype(query.dtype))
        for asked in (return_stats or any(terms.grads), return_stats)
    )
    return query.new_empty(shape), lse, peak


def _backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    tensors: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    wanted: list[bool],
    values: list[Tensor],
    text: str,
) -> list[Tensor]:
    """Return the gradients of the tensors that are wanted, and empty tensors for the others."""
    held = _found(tensors, values, text)
    operands = held.operands(tensors)
    kept = Kept(seed, output, lse, grad, grad_lse)
    asked = iter(wanted)
    every = tuple(leaf is not None and next(asked) for leaf in operands.leaves)
    with _alone(output.device):
        found = held.gradients(operands, kept, every)
    slopes = (g for g, leaf in zip(found, operands.leaves, strict=True) if leaf is not None)
    return [
        (torch.zeros_like(t) if g is None else g.contiguous()) if want else t.new_empty(0)
        for t, g, want in zip(tensors, slopes, wanted, strict=True)
    ]


def _backward_shapes(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    tensors: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    wanted: list[bool],
    *unused: Any,
) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, seed, values, ctx.text, _ = inputs
    ctx.wanted = [tensor.requires_grad for tensor in tensors]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed, *output[:2], *tensors, *values)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    seed, output, lse, *rest = ctx.saved_tensors
    tensors, values = rest[: len(ctx.wanted)], rest[len(ctx.wanted) :]
    kept = seed, output, lse, ctx.wanted, values, ctx.text
    made = _attend_backward(grad, grad_lse, tensors, *kept)
    slopes = [g if want else None for g, want in zip(made, ctx.wanted, strict=True)]
    return slopes, None, [None] * len(values), None, None


def _refuse(ctx: Any, *unused: Any) -> None:
    reason = (
        "a compiled attention has no second derivatives; without torch.compile, backend='tiled' "
        "and backend='reference' compute them"
    )
    raise BackendRefused(reason, [Refusal("second-derivative", reason)])


_attend = torch.library.custom_op(
    "attnkit::attend",
    _forward,
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor? seed, Tensor[] values, str text, bool return_stats) "
    "-> (Tensor, Tensor, Tensor)",
)
_attend_backward = torch.library.custom_op(
    "attnkit::attend_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_lse, Tensor[] tensors, Tensor? seed, Tensor output, "
    "Tensor lse, bool[] wanted, Tensor[] values, str text) -> Tensor[]",
)
_attend.register_fake(_forward_shapes)
_attend_backward.register_fake(_backward_shapes)
_attend.register_autograd(_differentiate, setup_context=_setup_context)
_attend_backward.register_autograd(_refuse)
