"""Blocks that are selected at run time, as calls whose lengths are known before it.

How many keys a query block sees follows from sizes alone (`Selection.sights`), so a packed call
with one sequence for each batch element, folded head and query block has lengths that every
selection shares. Heads that select apart are folded into the token axis; each sequence's keys are
the selected blocks in any order, and then its own: without causality all are seen, with it the
last keys by the bottom-right triangle. Which blocks they are is data of one gather.

Gates are a channel: ``q' = [q, 1]``, ``k' = [k, gate / scale]``. Selections that are counted have
room for the largest number; keys behind the count have a channel that takes all weight from them.

The proof is for every selection of different blocks before a query block's own: the sequences are
all of them, each once; a sequence's call computes, by its numbers of rows and keys, all keys of
the selected blocks and the own keys up to each query. Which cells these are, the indices say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import TYPE_CHECKING

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.layouts import SeqLens
from attnkit.masks import Causal, Full
from attnkit.masks.selection import BlockSight, Selection
from attnkit.planner.calls import Launch
from attnkit.planner.candidates import candidates, whole_calls
from attnkit.planner.plan import Plan, disprove_calls_of
from attnkit.planner.proof import reasons_against
from attnkit.planner.request import Request

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Folding", "GatheredCall", "SelectedPlan", "select"]

MOST_SEQUENCES = 2048
MOST_TOKENS = 1_000_000
MOST_BYTES = 1 << 30
"""Of keys and values that are gathered for one call; more are several calls, on disjoint rows."""

_LEAST_SHIFT = 1e4  # what takes all weight from a key: exp of minus this is 0
_SHIFTS = {torch.float16: 2.0**14}  # whose squares are products of the query's dtype
_SHIFT = 2.0**20
_GATHER_LAUNCHES = 12  # the elementwise kernels around a call: indices, gathers, channels


@dataclass(frozen=True)
class Folding:
    """How heads are folded into the token axis, and what a token has of them.

    Batch element b and folded head f are fold ``b * heads + f``; each has `queries` query heads,
    and `keys` key heads, or one that several folds share.
    """

    folds: int
    heads: int
    queries: int
    keys: int

    @classmethod
    def of(cls, request: Request, selection: Selection) -> Folding:
        """Return the folding of as few heads as the selection tells apart."""
        heads = selection.shape[1]
        each = max(1, request.num_kv_heads // heads)
        return cls(request.batch * heads, heads, request.num_heads // heads, each)


@dataclass(frozen=True)
class GatheredCall:
    """Some folds and some query blocks, ``[start, stop)``, as one call on gathered tokens."""

    folds: tuple[int, int]
    blocks: tuple[int, int]
    launch: Launch


@dataclass(frozen=True)
class SelectedPlan(Plan):
    """A plan of calls around which blocks are gathered by the indices of each call.

    `steps` are the calls of its parts, on their own packed tokens.
    """

    gathers: tuple[GatheredCall, ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @property
    def selection(self) -> Selection:
        """What is selected."""
        return selection_of(self.request)

    @property
    def folding(self) -> Folding:
        """How heads are folded."""
        return Folding.of(self.request, self.selection)

    @property
    def inner(self) -> Self:
        """The plan itself: what is done around its calls is done by their parts."""
        return self

    def _disproof(self) -> Refusal | None:
        """Return why the parts do not compute every selection; None if they do."""
        refusals = refusals_of(self.request)
        if refusals:
            return refusals[0]
        if self.steps != tuple(part.launch for part in self.gathers) or not self.gathers:
            return Refusal("misplaced", "the calls are not those of its parts")
        if any(one is not None for one in (self.in_order, self.route, self.bias_pass)):
            return Refusal("other-route", "nothing else goes around calls on selected blocks")
        found = _uncovered(self.request, self.gathers)
        each = (_wrong_part(self.request, part) for part in self.gathers)
        return found or next(filter(None, each), None)


def selection_of(request: Request) -> Selection:
    """Return what a request selects; `ArithmeticError` for one that selects nothing."""
    if not isinstance(request.mask, Selection):
        raise ArithmeticError("only a selection of blocks is planned as one")
    return request.mask


def select(request: Request) -> Plan:
    """Return the calls for a request whose mask is a `Selection`, or why there are none."""
    refusals = refusals_of(request)
    if refusals:
        return Plan("", request, refusals=refusals)
    parts: list[GatheredCall] = []
    for folds, blocks in _rectangles(request):
        found = _launch(packed(request, folds[1] - folds[0], blocks))
        if not isinstance(found, Launch):
            return Plan("", request, refusals=tuple(found))
        parts.append(GatheredCall(folds, blocks, _with_gathers(request, found)))
    return SelectedPlan("", request, tuple(part.launch for part in parts), gathers=tuple(parts))


def refusals_of(request: Request) -> tuple[Refusal, ...]:
    """Return why fused calls cannot have a selection, whatever it is."""
    selection, found = selection_of(request), []
    if request.seqlens is not None:
        reason = "blocks are selected in dense layouts, where all texts are equally long"
        found.append(Refusal("selected-packed", reason))
    if request.bias:
        told = " + ".join(term.text for term in request.bias)
        reason = f"{told}: positions are lost where keys are gathered; the reference computes it"
        found.append(Refusal("selected-bias", reason))
    heads, own = request.num_kv_heads, selection.shape[1]
    if heads % own and own % heads:
        reason = f"{own} heads select and {heads} have keys; one must be a multiple of the other"
        found.append(Refusal("selected-heads", reason))
    shift = abs(request.scale) * shift_of(request.dtype) ** 2
    if selection.counted and shift < _LEAST_SHIFT:
        reason = f"scale={request.scale:g} is too small for a channel that takes all weight"
        found.append(Refusal("selected-scale", reason))
    if selection.gated and not request.scale:
        reason = "a gate is a channel of the scores before the scale, which is 0"
        found.append(Refusal("selected-scale", reason))
    return tuple(found)


def shift_of(dtype: torch.dtype) -> float:
    """Return a number whose square, with the scale, is more than any score."""
    return _SHIFTS.get(dtype, _SHIFT)


def pieces_of(dtype: torch.dtype) -> int:
    """Return in how many numbers of a dtype a gate is written, which add up to it."""
    return 1 if dtype in (torch.float32, torch.float64) else 2


def channels_of(request: Request) -> int:
    """Return how many dimensions query and key have more, for gates and for counts."""
    selection = selection_of(request)
    return pieces_of(request.dtype) * selection.gated + selection.counted


def unit_of(request: Request) -> int:
    """Return the tokens of a unit: blocks, own keys and the place of either are whole units."""
    selection = selection_of(request)
    if not selection.causal:
        return selection.kv_block
    offset = request.kv_len - request.q_len
    return gcd(gcd(selection.kv_block, selection.q_block), offset)


def keys_of(selection: Selection, sight: BlockSight) -> int:
    """Return how many keys a query block with such a sight has."""
    return sight.blocks * selection.kv_block + sight.stop - sight.start


def packed(request: Request, folds: int, blocks: tuple[int, int]) -> Request:
    """Return what a call is asked for: folds times query blocks, as packed sequences."""
    selection = selection_of(request)
    folding = Folding.of(request, selection)
    sights = selection.sights(request.kv_len)[slice(*blocks)]
    keys = [keys_of(selection, sight) for sight in sights] * folds
    lengths = SeqLens([selection.q_block] * len(keys), keys)
    return replace(
        request,
        mask=Causal() if selection.causal else Full(),
        bias=(),
        layout="TND",
        batch=len(keys),
        q_len=lengths.total_q,
        kv_len=lengths.total_kv,
        num_heads=folding.queries,
        num_kv_heads=folding.keys,
        head_dim=max(request.head_dim + channels_of(request), request.value_dim),
        sink=False,
        seqlens=lengths,
    )


def _rectangles(request: Request) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield folds and query blocks that are one call each: as many as it may have."""
    selection = selection_of(request)
    folding = Folding.of(request, selection)
    each = [keys_of(selection, sight) for sight in selection.sights(request.kv_len)]
    width = request.head_dim + channels_of(request) + request.value_dim
    per_key = folding.keys * width * request.dtype.itemsize
    most = max(1, min(MOST_TOKENS, MOST_BYTES // per_key))
    runs, start, held = [], 0, 0
    for i, keys in enumerate(each):
        rows = (i + 1 - start) * selection.q_block
        full = i - start == MOST_SEQUENCES or rows > MOST_TOKENS or held + keys > most
        if full and i > start:
            runs.append((start, i))
            start, held = i, 0
        held += keys
    runs.append((start, len(each)))
    for blocks in runs:
        count, keys = blocks[1] - blocks[0], sum(each[slice(*blocks)])
        rows = count * selection.q_block
        room = max(1, min(MOST_SEQUENCES // count, most // keys, MOST_TOKENS // rows))
        for fold in range(0, folding.folds, room):
            yield (fold, min(fold + room, folding.folds)), blocks


def _launch(request: Request) -> Launch | list[Refusal]:
    """Return the cheapest call that is proven to compute a packed request, or why there is none."""
    refusals: list[Refusal] = []
    for bare in whole_calls(request):
        for one in candidates(request, bare, full_masks=False):
            against = [one] if isinstance(one, Refusal) else reasons_against(request, one)
            if isinstance(one, Launch) and not against:
                return one
            refusals += against
    return refusals


def _with_gathers(request: Request, launch: Launch) -> Launch:
    """Return a call with what is copied around it: keys, values, and tokens by folded heads."""
    call = launch.call
    specs = (call.query, call.key, call.value, call.output)
    copied = 2 * sum(prod(spec.shape) for spec in specs) * request.dtype.itemsize
    label = f"{launch.label}, selected blocks gathered"
    return replace(launch, label=label, copied_bytes=copied, small_launches=_GATHER_LAUNCHES)


# -- the proof -------------------------------------------------------------------------------


def _uncovered(request: Request, parts: tuple[GatheredCall, ...]) -> Refusal | None:
    """Check that every query block of every fold is in one part."""
    selection = selection_of(request)
    folds, blocks = Folding.of(request, selection).folds, selection.shape[2]
    found = [place for part in parts for place in product(range(*part.folds), range(*part.blocks))]
    if len(found) != folds * blocks or set(found) != set(product(range(folds), range(blocks))):
        return Refusal("misplaced", "a query block is in no call, or in several")
    return None


def _wrong_part(request: Request, part: GatheredCall) -> Refusal | None:
    """Check a call: that it is the packed request's, and computes what its sequences may see."""
    first, last = part.folds
    asked = packed(request, last - first, part.blocks)
    return disprove_calls_of(asked, part.launch) or _wrong_sights(request, part)


def _wrong_sights(request: Request, part: GatheredCall) -> Refusal | None:
    """Check sequence by sequence that all selected keys are seen, and own ones up to each query.

    Selected keys stand first, in the order of the indices. The cells follow from the definition
    here, and from the call's mode and lengths there.
    """
    selection, (start, stop) = selection_of(request), part.blocks
    first = request.kv_len - request.q_len
    known: dict[tuple[BlockSight, int], Region] = {}
    sights = selection.sights(request.kv_len)[start:stop]
    positions = (first + i * selection.q_block for i in range(start, stop))
    each = list(zip(sights, positions, strict=True)) * (part.folds[1] - part.folds[0])
    for place, region in zip(each, part.launch.regions(0), strict=True):
        if place not in known:
            known[place] = _asked_for(selection, *place)
        if known[place] != region:
            reason = f"a sequence of {selection} does not see its selected blocks and own keys"
            return Refusal("wrong-cells", reason)
    return None


def _asked_for(selection: Selection, sight: BlockSight, position: int) -> Region:
    """Return the cells of a query block over its keys: ``[selected blocks, own keys]``."""
    rows, chosen = selection.q_block, sight.blocks * selection.kv_block
    parts = [Slice(0, rows, 0, chosen)] if chosen else []
    if selection.causal:  # own key j is at start + j - chosen, query r at position + r
        own = sight.stop - sight.start
        parts.append(Slice(0, rows, chosen, chosen + own, hi=position - sight.start + chosen))
    return Region.of(*parts)
