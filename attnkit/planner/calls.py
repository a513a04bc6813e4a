"""`Launch`: one kernel call and where its rows and keys lie, from the search to execution.

The search makes launches, the proof proves them, the price prices them, a plan holds them and
a backend runs them. What follows from a launch (its cells, its price, the tokens it gathers) is
kept on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import torch

from attnkit.arguments import Anchor
from attnkit.geometry import Region
from attnkit.kernel import KernelCall, TensorSpec
from attnkit.planner.bias_pass import BiasPass
from attnkit.planner.price import Price, heads_of, price_call
from attnkit.planner.request import Request, state_of
from attnkit.planner.sequences import Block
from attnkit.ranges import Ranges
from attnkit.strips import diagonal_chain

__all__ = [
    "MERGE_LAUNCHES",
    "Block",
    "Launch",
    "Parts",
    "Solution",
    "Tokens",
    "Zone",
    "bare_call",
    "by_heads",
    "copied_before",
    "diagonal_blocks",
    "tile_whole",
    "widened",
]

# What follows from a launch's call and blocks alone.
_OF_CELLS = ("computed", "distinct", "keys", "queries")


MERGE_LAUNCHES = 6
"""The elementwise kernels that merge the rows of one part."""
# Those that write its output, maximum and sum, where no other part has these rows.
_WRITE_LAUNCHES = 3


@dataclass(frozen=True)
class Tokens:
    """The tokens that the sequences of a call are, as ranges of the request's token axis.

    >>> Tokens((range(2, 5), range(5, 7))).span, Tokens((range(2, 5), range(6, 7))).span
    (slice(2, 7, None), None)
    """

    ranges: Ranges

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # The key of a kept index, on the call path.
        return hash(self.ranges)

    __getstate__ = state_of

    @classmethod
    def of(cls, starts: Sequence[int], blocks: Iterable[tuple[int, Ranges]]) -> Tokens:
        """Return the positions of batch elements whose tokens begin at `starts`."""
        return cls(
            tuple(
                range(one.start + starts[batch], one.stop + starts[batch], one.step)
                for batch, ranges in blocks
                for one in ranges
            )
        )

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    @cached_property
    def span(self) -> slice | None:
        """Where the tokens lie if they follow each other, so that a view will do."""
        if any(one.step != 1 for one in self.ranges):
            return None
        if any(a.stop != b.start for a, b in pairwise(self.ranges)):
            return None
        return slice(self.ranges[0].start, self.ranges[-1].stop) if self.ranges else slice(0, 0)

    @cached_property
    def layers(self) -> tuple[tuple[Tokens, Tokens], ...]:
        """The sequences in layers in which no token occurs twice, and where the call has them."""
        if any(abs(one.step) > 1 for one in self.ranges):
            return self._layers_of_steps
        ends = pairwise(accumulate(map(len, self.ranges), initial=0))
        lies = sorted(
            (min(one[0], one[-1]), max(one[0], one[-1]), k, range(*own))
            for k, (one, own) in enumerate(zip(self.ranges, ends, strict=True))
        )
        out: list[tuple[int, list[range], list[range]]] = []
        for first, last, k, own in lies:
            home = next((n for n, layer in enumerate(out) if layer[0] < first), len(out))
            if home == len(out):
                out.append((last, [], []))
            out[home][1].append(self.ranges[k])
            out[home][2].append(own)
            out[home] = (last, *out[home][1:])
        return tuple((Tokens(tuple(there)), Tokens(tuple(own))) for _, there, own in out)

    @cached_property
    def _layers_of_steps(self) -> tuple[tuple[Tokens, Tokens], ...]:
        """The layers of ranges between whose tokens others may lie."""
        count = max(max(one[0], one[-1]) for one in self.ranges) + 1
        out: list[tuple[bytearray, list[range], list[range]]] = []
        at = 0
        for one in self.ranges:
            way = one if one.step > 0 else one[::-1]
            there = slice(way.start, way.stop, way.step)
            home = next((k for k, layer in enumerate(out) if 1 not in layer[0][there]), len(out))
            if home == len(out):
                out.append((bytearray(count), [], []))
            out[home][0][there] = bytes([1]) * len(one)
            out[home][1].append(one)
            out[home][2].append(range(at, at + len(one)))
            at += len(one)
        return tuple((Tokens(tuple(some)), Tokens(tuple(own))) for _, some, own in out)

    @property
    def are_distinct(self) -> bool:
        """Whether no token occurs twice."""
        return len(self.layers) <= 1


@dataclass(frozen=True)
class Zone:
    """Cells at some distances ``j - i'``, whose calls are given the same of a bias (`routes`).

    `spans` are ``(anchor, first, last)``, and a cell's distance lies in each of them. In the
    calls of a zone the query's dimensions in `turned`, ranges ``[start, stop)``, change sign,
    and every score adds the row `row` of the bias's table, at the merge.
    """

    spans: tuple[tuple[Anchor, int, int], ...]
    turned: tuple[tuple[int, int], ...] = ()
    row: int | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel call: what it is, where its sequences lie, which cells they are, what it costs.

    Its sequences are `blocks` of the request's score matrices, whose queries and keys begin at
    `starts` on the token axes, and it is to compute `targets`, a region of each block. A call that
    is `partial` answers parts of rows, of some heads perhaps: tokens are gathered and outputs
    merged around it. Any other answers whole rows, in the order of the request's tokens. `zone` is
    what a bias that goes around the call asks of it. `copied_bytes` are moved around the call to
    bring its tensors into order and back, by `small_launches` elementwise kernels.
    """

    label: str
    call: KernelCall
    blocks: tuple[Block, ...]
    targets: tuple[Region, ...]
    starts: tuple[tuple[int, ...], tuple[int, ...]]
    partial: bool = False
    heads: tuple[int, ...] | None = None
    """The query heads of the call, where it does not have all of them, and its key heads."""
    kv_heads: tuple[int, ...] | None = None
    zone: Zone | None = None
    copied_bytes: int = 0
    small_launches: int = 0

    __getstate__ = state_of

    @property
    def is_opaque(self) -> bool:
        """Whether the cells of the call's mask are known only when it runs."""
        return self.call.atten_mask is not None and self.call.atten_mask.is_opaque

    def regions(self, head: int) -> tuple[Region, ...]:
        """Return what the call computes for a head, block by block."""
        return self.computed[head if len(self.computed) > 1 else 0]

    def packs(self, request: Request) -> bool:
        """Whether tensors are packed around the call, whose layout is not the request's."""
        return not self.partial and self.call.input_layout != request.layout

    @cached_property
    def queries(self) -> Tokens:
        """The query tokens of the call."""
        return Tokens.of(self.starts[0], ((block.batch, block.rows) for block in self.blocks))

    @cached_property
    def keys(self) -> Tokens:
        """The key tokens of the call."""
        return Tokens.of(self.starts[1], ((block.batch, block.keys) for block in self.blocks))

    @cached_property
    def distinct(self) -> frozenset[tuple[tuple[int, int], Region]]:
        """The different ``((q_len, kv_len), target)`` pairs of the blocks."""
        return frozenset(zip((block.sizes for block in self.blocks), self.targets, strict=True))

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some row of a block with keys allows none of them."""
        return any(kv_len > 0 and t.empty_rows(q_len) for (q_len, kv_len), t in self.distinct)

    @cached_property
    def computed(self) -> tuple[tuple[Region, ...], ...]:
        """What the call computes in each block: for each head, or once where heads are alike."""
        visited, planes = self.call.visited(), map(self.call.regions, heads_of(self.call))
        if visited is None:
            return tuple(planes)
        return tuple(
            tuple(region & box for region, box in zip(plane, visited, strict=True))
            for plane in planes
        )

    @cached_property
    def price(self) -> Price:
        """What the call costs; counted when somebody asks, for a packed batch is many regions."""
        return price_call(self.call, self.copied_bytes, self.small_launches)

    def as_part(self, rows: int | None = None) -> Launch:
        """Return the launch as one of several, with what is gathered and merged around it.

        Where every row is in one sequence of them only, so that nothing is merged, `rows` counts
        those of the request: they are written to their places, or are there already.
        """
        gathered = [] if self.queries.span else [self.call.query]
        gathered += [] if self.keys.span else [self.call.key, self.call.value]
        # Gathered tokens are read and written; every part's rows are merged in float32.
        copied = 2 * sum(prod(spec.shape) * spec.dtype.itemsize for spec in gathered)
        each, around = self.call.dtype.itemsize + 2 * 4, MERGE_LAUNCHES
        if rows is not None:
            in_place = self.queries.span == slice(0, rows)
            each, around = (0, 0) if in_place else (2 * self.call.dtype.itemsize, _WRITE_LAUNCHES)
        copied += each * prod(self.call.output.shape)
        found = replace(
            self, partial=True, copied_bytes=copied, small_launches=len(gathered) + around
        )
        vars(found).update((name, vars(self)[name]) for name in _OF_CELLS if name in vars(self))
        return found

    def in_zone(self, zone: Zone) -> Launch:
        """Return the launch as one of a zone."""
        found = replace(self, zone=zone)
        if not zone.turned:
            return found
        query = self.call.query
        return replace(
            found,
            label=f"{self.label}, signs turned",
            copied_bytes=self.copied_bytes + 2 * prod(query.shape) * query.dtype.itemsize,
            small_launches=self.small_launches + 1,
        )

    def after_copies(self, request: Request, told: str, launches: int) -> Launch:
        """Return the launch before which query and key of a request are copied."""
        return replace(
            self,
            label=f"{self.label}, {told}",
            copied_bytes=self.copied_bytes + copied_before(request),
            small_launches=self.small_launches + launches,
        )


def copied_before(request: Request) -> int:
    """Return the bytes that are moved where query and key are copied before a call."""
    return 2 * request.dtype.itemsize * sum(prod(shape) for shape in request.shapes()[:2])


@dataclass(frozen=True)
class Solution:
    """Kernel calls that compute a request together: one, or several whose outputs merge.

    And the pass that makes the gradient of a bias beside them, if it takes one.
    """

    launches: tuple[Launch, ...]
    bias_pass: BiasPass | None = None

    __getstate__ = state_of

    @property
    def label(self) -> str:
        """The calls' names, equal ones counted."""
        counts = Counter(launch.label for launch in self.launches)
        labels = [f"{n} x {label}" if n > 1 else label for label, n in counts.items()]
        return " + ".join([*labels, *([str(self.bias_pass)] if self.bias_pass else [])])

    @cached_property
    def price(self) -> Price:
        """The sum of the calls' prices and the pass's; calls share one compressed mask.

        One runs after the other, so that the most memory is that of the largest.
        """
        masks: set[object] = set()
        prices = [] if self.bias_pass is None else [self.bias_pass.price]
        for launch in self.launches:
            price, mask = launch.price, launch.call.atten_mask
            prices.append(replace(price, mask_bytes=0) if mask in masks else price)
            masks.add(mask)
        return replace(Price.total(prices), peak_bytes=max(price.peak_bytes for price in prices))


@dataclass(frozen=True)
class Parts:
    """The calls on some heads that answer their rows together; `heads` is None for all heads.

    `once` says that every row is in one sequence of them at most, so that nothing is merged.
    `back` are the calls by whose grad calls the gradients come, where they are others.
    """

    heads: tuple[int, ...] | None
    launches: tuple[Launch, ...]
    once: bool
    back: tuple[Launch, ...] = ()


def by_heads(launches: Sequence[Launch], back: Sequence[Launch] = ()) -> tuple[Parts, ...]:
    """Return calls by the heads that they have, in the order of the calls."""
    heads = dict.fromkeys(launch.heads for launch in launches)
    forth, turned = (
        {own: tuple(one for one in some if one.heads == own) for own in heads}
        for some in (launches, back)
    )
    return tuple(Parts(own, forth[own], _once(forth[own]), turned[own]) for own in heads)


def _once(launches: Sequence[Launch]) -> bool:
    if any(launch.zone is not None for launch in launches):
        return False
    every = Tokens(tuple(one for launch in launches for one in launch.queries.ranges))
    return every.are_distinct


def widened(request: Request) -> Request:
    """Return the request with heads of query and key as wide as those of values, at least.

    The kernel takes no wider values. What query and key are given more is 0, so scores stay.
    """
    if request.value_dim <= request.head_dim:
        return request
    return request.like(replace(request, head_dim=request.value_dim))


def bare_call(
    request: Request,
    layout: str,
    blocks: Sequence[Block],
    part: tuple[int, int] | None = None,
    head_dim: int | None = None,
) -> KernelCall:
    """Return the call on some blocks that a request describes, but for its mask and its bias.

    A call that is a `part` gathers the tokens of so many query and key heads; any other has all.
    """
    shapes, heads = request.shapes(layout), request.num_heads
    rows, keys = zip(*(block.sizes for block in blocks), strict=True)
    packed = layout == "TND"
    if part is not None:
        heads, kv_heads = part
        tokens = [(sum(n),) if packed else (len(blocks), n[0]) for n in (rows, keys)]
        dim = request.head_dim if head_dim is None else head_dim
        shapes = (
            (*tokens[0], heads, dim),
            (*tokens[1], kv_heads, dim),
            (*tokens[1], kv_heads, request.value_dim),
        )
    wide = torch.float64 if request.dtype == torch.float64 else torch.float32
    sink = TensorSpec((heads,), wide) if request.sink and part is None else None
    query, key, value = (TensorSpec(shape, request.dtype) for shape in shapes)
    return KernelCall(
        query,
        key,
        value,
        head_num=heads,
        input_layout=layout,
        scale=request.scale,
        keep_prob=1.0 - request.dropout,
        actual_seq_qlen=tuple(accumulate(rows)) if packed else None,
        actual_seq_kvlen=tuple(accumulate(keys)) if packed else None,
        sink=sink,
    )


def tile_whole(batch: int, sequences: Sequence[tuple[int, int]]) -> tuple[Block, ...]:
    """Return one block per score matrix, each covering all of it."""
    return tuple(
        Block.at(b, 0, q, 0, kv) for b, (q, kv) in zip(range(batch), sequences, strict=True)
    )


def diagonal_blocks(region: Region, q_len: int, kv_len: int, batch: int) -> tuple[Block, ...]:
    """Split a region into the finest chain of blocks down the diagonal that holds all of it.

    Rows and keys are covered without gaps and in order, as one packed call needs: rows that
    allow nothing get a block without keys, keys that nobody sees one without rows.

    >>> from attnkit import masks
    >>> packed = masks.Documents([2, 3]).region(5, 5)
    >>> [block.sizes for block in diagonal_blocks(packed, 5, 5, 0)]
    [(2, 2), (3, 3)]
    """
    return tuple(Block.at(batch, *ends) for ends in diagonal_chain(region.strips, q_len, kv_len))
