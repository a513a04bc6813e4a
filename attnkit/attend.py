"""The one way from what is asked and the tensors of a call to a plan, and through it.

`Attention`, `MultiHeadAttention` and the functional forms say what they want as `Asked`. Then
`plan_of` puts the composition together, reads the request off the tensors and plans it, and
`attend` runs the plan.

While `torch.compile` traces, the tracer must not follow the planner, and a graph must hold for what
is new in each step. So masks, biases and `SeqLens` go into the graph by their handles, which are
tensors, and it is planned when it runs. What else is asked for is a constant, and a guard of the
graph: another layout, dtype, backend, mode or number of heads compiles again.

What `torch.export` makes leaves the process, where handles mean nothing: there masks, biases and
lengths are texts, and constants of the graph as everything else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.backends import AttentionOutput, Operands, make_plan, run_plan
from attnkit.backends.graph import Terms, run_terms, written
from attnkit.errors import CompositionError
from attnkit.handles import number_of
from attnkit.kept_plans import KeptPlans
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask, SelectedBlocks
from attnkit.parallel.graph import without_maximum
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.shards import Shards
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.planner.repeats import strict
from attnkit.planner.request import is_transformed
from attnkit.planner.scoring import SCORE_IN_GRAPH, SCORE_IN_PROGRAM, ScoreFunction, trains
from attnkit.pse import Pse

__all__ = [
    "Asked",
    "any_length",
    "attend",
    "is_exporting",
    "is_tracing",
    "key_of",
    "plan_again",
    "plan_of",
    "sharded_plan_again",
    "sharded_plan_of",
]

is_exporting = torch.compiler.is_exporting

_WHOLE = Full()


def is_tracing() -> bool:
    """Tell whether a graph is recorded, by `torch.compile` or by `torch.export`."""
    return torch.compiler.is_dynamo_compiling() or is_exporting()


class Asked(NamedTuple):
    """What is asked of a call besides its tensors; masks intersect and biases add up.

    A tuple of pieces and not a `Composition`: a tracer must not add up what it knows by handles.
    """

    masks: tuple[Mask | None, Mask | None] = (None, None)
    biases: tuple[Pse | None, Pse | None] = (None, None)
    layout: str = "BSND"
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    training: bool = True
    backend: str = "auto"
    score_fn: ScoreFunction | None = None
    deterministic: bool = False
    memory_limit: int | None = None

    @property
    def mask(self) -> Mask:
        """The intersection of the masks."""
        own, added = self.masks
        if added is None:
            return _WHOLE if own is None else own
        return added if own is None or isinstance(own, Full) else own & added

    @property
    def pse(self) -> Pse | None:
        """The sum of the biases."""
        own, added = self.biases
        return added if own is None else own if added is None else own + added

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the biases."""
        own, added = self.biases
        found = () if own is None else own.tensors
        return found if added is None else (*found, *added.tensors)

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The tensors of a mask that comes with the call."""
        own, added = self.masks
        found = () if own is None else own.tensors
        return found if added is None else (*found, *added.tensors)


def plan_of(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
) -> Plan:
    """Return the plan of what is asked for these tensors; nothing of their content is read."""
    return make_plan(_request(asked, (query, key, value), sink, seqlens), asked.backend)


def sharded_plan_of(
    asked: Asked, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, shards: Shards
) -> ParallelPlan:
    """Return the plan of all ranks for what is asked for the tensors of this one."""
    whole = shards.whole(layouts.get(asked.layout), query, key, value)
    request = _request(asked, whole, sink, shards.seqlens)
    return shards.plan(request, asked.pse, asked.backend)


def _request(
    asked: Asked, tensors: Sequence[Tensor], sink: Tensor | None, seqlens: SeqLens | None
) -> Request:
    numbers = (asked.scale, asked.dropout, asked.softcap)
    query, key, value = tensors
    return read_request(
        Composition(asked.mask, asked.pse, asked.layout, *numbers, *asked[11:]),
        query,
        key,
        value,
        num_heads=asked.num_heads,
        num_kv_heads=asked.num_kv_heads,
        head_dim=asked.head_dim,
        seqlens=seqlens,
        sink=sink,
        training=asked.training,
    )


def key_of(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: object,
) -> Hashable:
    """Return what a module's plan depends on; None where arguments are not what they should be.

    What the module was built with is not part of it, but its tensors are: a bias or a sink may
    be frozen or moved between two calls. So is whether it enters at all: a step of a cache gives
    its mask and bias in place of the module's.
    """
    bias, facts = asked.biases[1], []
    carried = asked.tensors if sink is None else (*asked.tensors, sink)
    for t in (query, key, value, *carried):
        if not isinstance(t, Tensor) or t.is_nested:
            return None
        facts.append((t.shape, t.dtype, t.device, t.requires_grad))
    if seqlens is not None and not isinstance(seqlens, SeqLens):
        return None
    return (
        tuple(facts),
        None if asked.masks[1] is None else asked.masks[1].form,
        None if bias is None else bias.key(),
        seqlens,
        asked.layout,
        asked.training,
        torch.is_grad_enabled(),
        is_transformed(),
        trains(asked.score_fn, query),
        strict(),
        (asked.masks[0] is None, asked.biases[0] is None),
    )


def any_length(known: Hashable, layout: str) -> tuple[Hashable, int] | None:
    """Return of a `key_of` what a plan for every mask and number of keys depends on, and these.

    Of packed sequences that is every number of tokens. None where key and value differ in length,
    or packed ones from what their lengths say.
    """
    if known is None:
        return None
    (query, key, value, *carried), _, _, seqlens, *rest = cast("tuple[Any, ...]", known)
    axes, packed = layouts.get(layout).axes, layouts.get(layout).packed
    at = axes.index("t" if packed else "s")
    if len(key[0]) <= at or key[0][at : at + 1] != value[0][at : at + 1]:
        return None
    if packed != (seqlens is not None):
        return None
    if packed and (query[0][at : at + 1], key[0][at]) != ((seqlens.total_q,), seqlens.total_kv):
        return None
    sides = [(shape[:at], shape[at + 1 :], *facts) for shape, *facts in (query, key, value)]
    of_query = sides[0] if packed else query
    return (of_query, *sides[1:], tuple(facts[2:] for facts in carried), *rest), key[0][at]


def plan_again(
    plans: KeptPlans,
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
) -> Plan:
    """Return the plan that a module has for such a call, or make it and keep it there."""
    known = key_of(asked, query, key, value, sink, seqlens)
    found: Plan | None = plans.get(known)
    if found is not None:
        return found
    # A decoding step has one key more than the last, a training step other lengths of sequences:
    # such plans are for any number of them.
    step = any_length(known, asked.layout)
    # The plan that they are made of becomes the newest, so that steps do not drop it.
    alike: Plan | None = None if step is None else plans.renewed(step[0])
    if alike is not None and step is not None:
        found = alike.at(asked.mask.form, asked.pse, step[1], seqlens)
    if found is None:
        alike = None
        found = plan_of(asked, query, key, value, sink, seqlens)
        if step is not None and found.of_any_length:
            plans.keep(step[0], found)
    if known is not None:
        plans.keep(known, found, alike)
    return found


def sharded_plan_again(
    plans: KeptPlans,
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    shards: Shards,
) -> ParallelPlan:
    """Return the plan of all ranks that a module has for such a call, or make it and keep it."""
    known = key_of(asked, query, key, value, sink, shards.seqlens)
    found: ParallelPlan | None = plans.get((known, shards))
    if found is None:
        found = sharded_plan_of(asked, query, key, value, sink, shards)
        if known is not None:
            plans.keep((known, shards), found)
    return found


def attend(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
    carried: Sequence[Tensor] | None = None,
    return_stats: bool = True,
    shards: Shards | None = None,
) -> AttentionOutput:
    """Attend as asked.

    In a graph, `carried` are the tensors that the biases have now, if not those that they were
    built with, and statistics come only with `return_stats`.
    """
    if is_tracing():
        now = list(asked.tensors if carried is None else carried)
        return _in_graph(asked, query, key, value, sink, seqlens, now, return_stats, shards)
    operands = Operands(query, key, value, asked.pse, sink, given=asked.given)
    if shards is not None:
        shards.lengths(seqlens)
        found = sharded_plan_of(asked, query, key, value, sink, shards)
        return shards.attend(found, operands)
    return run_plan(plan_of(asked, query, key, value, sink, seqlens), operands)


def _in_graph(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
    carried: list[Tensor],
    return_stats: bool,
    shards: Shards | None,
) -> AttentionOutput:
    """Attend by one operator of the graph: what differs in each step is a tensor to it."""
    # Those of the call come last: a plan is remembered with the last one.
    pse, call_pse = asked.biases
    known = [None if isinstance(one, SelectedBlocks) else one for one in asked.masks]
    words = [one.words for one in asked.masks if isinstance(one, SelectedBlocks)]
    parts: tuple[tuple[str, Any], ...]
    parts = (("m", known[0]), ("b", pse), ("m", known[1]), ("b", call_pse), ("s", seqlens))
    if shards is not None:
        parts = (*parts[:-1], ("x", shards))
    some = [(role, one) for role, one in parts if one is not None] or [("m", _WHOLE)]
    tensors = [query, key, value, *([] if sink is None else [sink]), *carried, *asked.given]
    records = torch.is_grad_enabled()
    roles, values, texts = _handed(asked.score_fn, some, records, query.device)
    text = _words(
        roles,
        asked.layout,
        (asked.num_heads, asked.num_kv_heads, asked.head_dim),
        (_hex(asked.scale), _hex(asked.dropout), _hex(asked.softcap)),
        asked.training,
        sink is not None,
        [records and one.requires_grad for one in tensors],
        asked.backend,
        asked.deterministic,
        asked.memory_limit,
        words[0] if words else None,
        texts,
    )
    drops = bool(asked.training and asked.dropout)
    found = run_terms(text, tensors, values, drops, return_stats)
    return found if shards is None else without_maximum(found)


def _handed(
    score_fn: ScoreFunction | None, some: list[tuple[str, Any]], records: bool, device: torch.device
) -> tuple[str, list[Tensor], list[str] | None]:
    """Return roles and handles of what is asked for; of a graph that leaves the process texts."""
    roles = "".join([role for role, _ in some])
    if is_exporting():
        if score_fn is not None:
            raise CompositionError(SCORE_IN_PROGRAM)
        # An empty list does not survive AOTInductor, which hands on None in its place.
        none = [torch.zeros(1, dtype=torch.int64, device="cpu")]
        return roles, none, [written(role, one) for role, one in some]
    values = [one._handle for _, one in some]
    if score_fn is None:
        return roles, values, None
    number = _function(score_fn, records, device)  # a constant, by identity: it is code
    return "f" + roles, [torch.full((1,), number, dtype=torch.int64, device="cpu"), *values], None


def _function(score_fn: ScoreFunction, records: bool, device: torch.device) -> int:
    with torch.set_grad_enabled(records):
        if trains(score_fn, torch.empty(0, device=device)):
            raise CompositionError(SCORE_IN_GRAPH)
    return number_of(score_fn)


def _hex(number: float | None) -> str | None:
    # A number would be left open, too: as digits, which say it exactly, it is not.
    return None if number is None else float(number).hex()


def _words(
    roles: str,
    layout: str,
    heads: tuple[int | None, int | None, int | None],
    numbers: tuple[str | None, str | None, str | None],
    training: bool,
    sink: bool,
    grads: Sequence[bool],
    backend: str,
    deterministic: bool,
    memory_limit: int | None,
    selected: tuple[int, int, bool, bool, bool] | None,
    texts: list[str] | None,
) -> str:
    """Return what a graph is of in words, which are a constant of it."""
    scale, dropout, softcap = (None if h is None else float.fromhex(h) for h in numbers)
    terms = Terms(
        roles,
        layout,
        *heads,
        scale,
        dropout or 0.0,
        softcap,
        training,
        sink,
        tuple(grads),
        backend,
        deterministic,
        memory_limit,
        selected,
        None if texts is None else tuple(texts),
    )
    return terms.text()


# All that `torch.compiler.assume_constant_result` does, but it loads the compiler, for seconds.
_words._dynamo_marked_constant = True  # type: ignore[attr-defined]
_function._dynamo_marked_constant = True  # type: ignore[attr-defined]
