"""The one way from what is asked and the tensors of a call to a plan, and through it.

`Attention`, `MultiHeadAttention` and the functional forms say what they want as `Asked`. Then
`plan_of` puts the composition together, reads the request off the tensors and plans it, and
`attend` runs the plan.

While `torch.compile` traces, the tracer must not follow the planner. So what a plan is read from
leaves the trace as constants, each of them a guard of the graph: other shapes, dtypes, devices,
gradients or modes are another request and compile again. So are another mask, bias or `SeqLens`,
by identity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import index
from typing import Any, NamedTuple, TypeAlias, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.backends import AttentionOutput, Operands, make_plan, run_plan
from attnkit.backends.graph import hold, run_number, stand_in
from attnkit.errors import CompositionError
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.planner import Composition, Plan, read_request
from attnkit.planner.repeats import strict
from attnkit.planner.request import is_transformed
from attnkit.planner.scoring import SCORE_IN_GRAPH, ScoreFunction, trains
from attnkit.pse import Pse
from attnkit.pse.base import rebound

__all__ = ["Asked", "any_length", "attend", "interned", "is_tracing", "key_of", "plan_of"]

is_tracing = torch.compiler.is_dynamo_compiling

Facts: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device, bool]
"""What a request reads off a tensor: shape, dtype, device, whether it asks for a gradient."""

_WHOLE = Full()

# Weak, since a mask may hold a matrix.
_SEEN: WeakValueDictionary[int, Mask] = WeakValueDictionary()


def interned(mask: Mask) -> Mask:
    """Return one object for equal masks, so that equal layers share one graph."""
    known = _SEEN.setdefault(hash(mask), mask)
    return known if known == mask else mask


class Asked(NamedTuple):
    """What is asked of a call besides its tensors; masks intersect and biases add up.

    A tuple of pieces and not a `Composition`: what a tracer meets must be a constant each.
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

    @property
    def mask(self) -> Mask:
        """The intersection of the masks."""
        own, added = self.masks
        if added is None:
            return _WHOLE if own is None else own
        return added if own is None else own & added

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


def plan_of(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
) -> Plan:
    """Return the plan of what is asked for these tensors; nothing of their content is read."""
    numbers = (asked.scale, asked.dropout, asked.softcap)
    request = read_request(
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
    return make_plan(request, asked.backend)


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
    be frozen or moved between two calls.
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
        asked.masks[1],
        None if bias is None else bias.key(),
        seqlens,
        asked.layout,
        asked.training,
        torch.is_grad_enabled(),
        is_transformed(),
        trains(asked.score_fn, query),
        strict(),
    )


def any_length(known: Hashable, layout: str) -> Hashable:
    """Return of a `key_of` what a plan for every mask and number of keys depends on.

    None where key and value differ in length, or the layout is packed.
    """
    if known is None:
        return None
    (query, key, value, *carried), _, _, *rest = cast("tuple[Any, ...]", known)
    axes = layouts.get(layout).axes
    if "s" not in axes:
        return None
    at = axes.index("s")
    if key[0][at : at + 1] != value[0][at : at + 1]:
        return None
    sides = tuple((shape[:at], shape[at + 1 :], *facts) for shape, *facts in (key, value))
    return (query, sides, tuple(facts[2:] for facts in carried), *rest)


def attend(
    asked: Asked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seqlens: SeqLens | None,
    carried: Sequence[Tensor] | None = None,
    return_stats: bool = True,
) -> AttentionOutput:
    """Attend as asked.

    In a graph, `carried` are the tensors that the biases have now, if not those that they were
    built with, and statistics come only with `return_stats`.
    """
    if is_tracing():
        now = list(asked.tensors if carried is None else carried)
        number = _planned(
            *asked.masks,  # objects of ours are constants as arguments, and not inside of tuples
            *asked.biases,
            asked.layout,
            (_hex(asked.scale), _hex(asked.dropout), _hex(asked.softcap)),
            (asked.num_heads, asked.num_kv_heads, asked.head_dim),
            (asked.training, torch.is_grad_enabled(), asked.deterministic),
            asked.backend,
            asked.score_fn,
            (_facts(query), _facts(key), _facts(value)),
            None if sink is None else _facts(sink),
            tuple(_facts(t) for t in now),
            seqlens,
        )
        drops = bool(asked.training and asked.dropout)
        return run_number(number, [query, key, value, sink, *now], drops, return_stats)
    found = plan_of(asked, query, key, value, sink, seqlens)
    return run_plan(found, Operands(query, key, value, asked.pse, sink))


def _facts(tensor: Tensor) -> Facts:
    # A size that the tracer would leave open is asked for by number: a plan is for one size.
    shape = tuple(index(size) for size in tensor.shape)
    return shape, tensor.dtype, tensor.device, tensor.requires_grad


def _hex(number: float | None) -> str | None:
    # A number would be left open, too: as digits, which say it exactly, it is not.
    return None if number is None else float(number).hex()


def _planned(
    mask: Mask | None,
    call_mask: Mask | None,
    pse: Pse | None,
    call_pse: Pse | None,
    layout: str,
    numbers: tuple[str | None, str | None, str | None],
    heads: tuple[int | None, int | None, int | None],
    modes: tuple[bool, bool, bool],
    backend: str,
    score_fn: ScoreFunction | None,
    tensors: tuple[Facts, Facts, Facts],
    sink: Facts | None,
    carried: tuple[Facts, ...],
    seqlens: SeqLens | None,
) -> int:
    """Plan for tensors that have the same properties and no data; return the plan's number.

    Not the plan: the tracer keeps objects that such a function returns for as long as it lives.
    """
    scale, dropout, softcap = (None if h is None else float.fromhex(h) for h in numbers)
    training, grad, repeats = modes
    asked = Asked((mask, call_mask), (pse, call_pse), layout, scale, dropout or 0.0, softcap)
    with torch.set_grad_enabled(grad):
        bias = asked.pse
        bias = None if bias is None else rebound(bias, [stand_in(*known) for known in carried])
        asked = asked._replace(biases=(bias, None))
        asked = Asked(*asked[:6], *heads, training, backend, score_fn, repeats)
        query, key, value = (stand_in(*known) for known in tensors)
        logits = None if sink is None else stand_in(*sink)
        found = plan_of(asked, query, key, value, logits, seqlens)
    if found.request.score_trains:
        raise CompositionError(SCORE_IN_GRAPH)
    # A graph knows its plan by a number. It is guarded on these objects, and dies with any of
    # them: whichever is there keeps the plan, the ones that change most often first.
    keepers: tuple[object, ...] = (seqlens, call_mask, mask, _WHOLE)
    keeper = next(one for one in keepers if one is not None)
    keeper.__dict__.setdefault("_graphs", {})[found] = None
    return hold(found, bias).number


# All that `torch.compiler.assume_constant_result` does, but it loads the compiler, for seconds.
_planned._dynamo_marked_constant = True  # type: ignore[attr-defined]
