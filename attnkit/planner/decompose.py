"""A region that no single call computes without a full mask, as a few calls that are merged.

Each score matrix is parted by rows into segments that gather all of their keys (see
`staircases`); or it is split into its diagonal blocks, each of which is cut into segments whose
keys lie side by side (see `cuts`). Segments with a common window are packed into one TND call (see
`grouping`). Where a row is in several segments the partial outputs are merged by their softmax
statistics. Several ways are tried; the price chooses. A learnable sink takes part in the merge,
not in the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from math import inf
from typing import Any, NamedTuple

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import AttenMask
from attnkit.kernel.stats import COPIES
from attnkit.planner.biases import Arguments, anchor_in, part_arguments
from attnkit.planner.bounds import Work, dearer
from attnkit.planner.calls import Launch, bare_call, diagonal_blocks
from attnkit.planner.cuts import cuts
from attnkit.planner.grouping import MOST_WINDOWS, Segment, Window, group
from attnkit.planner.in_place import in_place
from attnkit.planner.request import Request
from attnkit.planner.sequences import Block
from attnkit.planner.staircases import partitions

__all__ = [
    "Search",
    "decompositions",
    "head_groups",
    "kv_heads_of",
    "most_bytes",
    "partings",
]

_MOST_CUTS = 8
_MOST_PARTITIONS = 4
_MOST_GROUPINGS = 4
_MOST_CELLS = 1024
_MOST_CALLS = 8
# What the contract takes (rules batch-limit, length-limit and prefix-batch).
_MOST_SEQUENCES = 2048
_MOST_TOKENS = 1_000_000
_MOST_PREFIXES = 32
_NOTHING = Region.empty()


@dataclass(eq=False)
class Search:
    """What one search finds on its way: its zones share it, and those for requests close by.

    `covers` are the sets of calls that are merged, by request and groups of heads. Keys are
    gathered from several places unless `gathers` says otherwise.
    """

    gathers: bool = True
    block_sparse: bool | Refusal = False
    """Whether calls of the block-sparse op are among the rivals, or why they are not."""

    cuts: dict[Region, tuple[tuple[Slice, ...], ...]] = field(default_factory=dict)
    partitions: dict[Region, tuple[tuple[Segment, ...], ...]] = field(default_factory=dict)
    covers: dict[Any, Any] = field(default_factory=dict)
    regions: dict[Any, Region] = field(default_factory=dict)

    def region(self, one: Segment | None) -> Region:
        """Return what a segment is to compute: those of a packed batch are alike."""
        if one is None:
            return _NOTHING
        shape = (one.block.sizes, one.lo, one.hi)
        if shape not in self.regions:
            self.regions[shape] = Region.of(one.target)
        return self.regions[shape]

    def all_partitions(
        self, region: Region, by_keys: bool = False
    ) -> tuple[tuple[Segment, ...], ...]:
        """Return the ways to part a region by rows, or by keys, the first few."""
        if by_keys:
            turned = self.all_partitions(region.transpose())
            return tuple(tuple(one.transposed for one in way) for way in turned)
        if region not in self.partitions:
            ways = list(islice(partitions(region), _MOST_PARTITIONS))
            ways = list(dict.fromkeys([*ways, *map(in_place, ways)]))
            # In the order of their rows, which may then be where the call has them.
            found = tuple(tuple(sorted(way, key=lambda one: one.block.ends)) for way in ways)
            self.partitions[region] = found if region else ((),)
        return self.partitions[region]

    def all_cuts(self, region: Region) -> tuple[tuple[Slice, ...], ...]:
        """Return the ways to cut a region, the first few."""
        if region not in self.cuts:
            self.cuts[region] = tuple(islice(cuts(region), _MOST_CUTS))
        return self.cuts[region]

    def cut(self, region: Region, depth: int) -> tuple[Slice, ...]:
        """Return a region cut in the `depth`-th way, or the last one, where it has fewer."""
        return self.all_cuts(region)[: depth + 1][-1]


Pieces = tuple[tuple[Segment, ...], ...]
"""The segments that make up a request, for each group of heads."""


def partings(
    request: Request,
    groups: Sequence[tuple[int, ...]] | None = None,
    search: Search | None = None,
    by_keys: bool = False,
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield sets of calls that have every row once, with all of its keys, or why there is none.

    Or every key once, with all of its rows, where that is asked. Not where the calls have a bias:
    its positions are those of the call. Otherwise as `decompositions`.
    """
    search = search or Search()
    if request.bias or not search.gathers or not request.matrices.exact:
        return
    # Zones of distances are many, and mostly one slice each: gathered, these save next to nothing.
    if groups is not None and _in_slices(request, groups):
        return
    groups = head_groups(request) if groups is None else groups
    planes = [request.matrices.regions(heads[0]) for heads in groups]
    known = {region: search.all_partitions(region, by_keys) for own in planes for region in own}
    for depth in range(max(map(len, known.values()), default=0) if all(known.values()) else 0):
        pieces = tuple(
            tuple(
                replace(one, block=replace(one.block, batch=b)) if b else one
                for b, region in enumerate(regions)
                for one in known[region][: depth + 1][-1]
            )
            for regions in planes
        )
        yield from _packings(request, groups, pieces, search)


def decompositions(
    request: Request,
    groups: Sequence[tuple[int, ...]] | None = None,
    search: Search | None = None,
    least: float = inf,
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield sets of calls whose cells are disjoint and make up the request, or why there is none.

    The keys of a sequence lie side by side. Only requests whose score matrices are regions are
    cut; heads that differ get calls of their own. `groups` are heads that do not differ, where a
    caller knows which are to stay together. `least` is what is known to be possible, in
    nanoseconds: cuts that cannot be cheaper are not tried.
    """
    if not request.matrices.exact:
        reason = f"{request.mask!r} is not a region that could be cut into pieces"
        yield Refusal("cut-region", reason, "several calls")
        return
    groups = head_groups(request) if groups is None else groups
    search = search or Search()
    seen = set()
    for pieces in _cut(request, groups, search, least):
        if isinstance(pieces, Refusal):
            yield pieces
        elif pieces not in seen and any(pieces):
            seen.add(pieces)
            yield from _packings(request, groups, pieces, search)


def _in_slices(request: Request, groups: Sequence[tuple[int, ...]]) -> bool:
    """Whether each diagonal block is one slice, and so one sequence as it is."""
    inside = {own for heads in groups for _, own in _diagonal(request, heads[0])}
    hulls = [(own, own.bounds) for own in inside]
    return all(hull is None or Region.of(hull) == own for own, hull in hulls)


def first_decomposition(
    request: Request, groups: Sequence[tuple[int, ...]], search: Search
) -> tuple[Launch, ...] | None:
    """Return the calls of the first cut, in as few windows as there can be; None if it has none."""
    inside = [_diagonal(request, heads[0]) for heads in groups]
    pieces = tuple(_segments(search, some, 0, request.needs_grad) for some in inside)
    found = next(_packings(request, groups, pieces, search), None)
    return found if isinstance(found, tuple) else None


def _cut(
    request: Request,
    groups: Sequence[tuple[int, ...]],
    search: Search,
    least: float,
) -> Iterator[Pieces | Refusal]:
    """Yield the ways to cut every score matrix into pieces whose keys lie side by side.

    Those that a few numbers of theirs show to be too dear are refused.
    """
    counts = [(len(heads), len(kv_heads_of(request, heads))) for heads in groups]
    planes = [request.matrices.regions(heads[0]) for heads in groups]
    for with_keys in (False, True) if least < inf else ():
        works = [Work.total(Work.of_region(one, with_keys) for one in plane) for plane in planes]
        if (refusal := dearer(request, counts, planes, works, least)) is not None:
            yield refusal
            return
    inside = [_diagonal(request, heads[0]) for heads in groups]
    depths = max((len(search.all_cuts(own)) for some in inside for _, own in some), default=0)
    for depth in range(depths):
        if least < inf:
            works = [
                Work.of_slices(part for _, own in some for part in search.cut(own, depth))
                for some in inside
            ]
            if (refusal := dearer(request, counts, planes, works, least)) is not None:
                yield refusal
                continue
        # The grad op takes no packed window of width 1: such bands are single cells in training.
        for cells in (True,) if request.needs_grad else (False, True):
            yield tuple(_segments(search, some, depth, cells) for some in inside)


def _packings(
    request: Request, groups: Sequence[tuple[int, ...]], pieces: Pieces, search: Search
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield the calls that compute some segments, for each choice of windows, or why not."""
    groups, pieces = _narrowed(request, groups, pieces)
    choices = [group(some)[:_MOST_GROUPINGS] for some in pieces]
    if any(some and not options for some, options in zip(pieces, choices, strict=True)):
        reason = f"its pieces ask for more than {MOST_WINDOWS} windows, and each is another call"
        yield Refusal("cut-windows", reason, "several calls")
        return
    for n in range(max(map(len, choices))):
        parts = [
            part
            for heads, some, options in zip(groups, pieces, choices, strict=True)
            for window, chosen in (options[min(n, len(options) - 1)] if options else [])
            for part in _Maker(request, heads, window, search).calls([some[k] for k in chosen])
        ]
        refused = [part for part in parts if isinstance(part, Refusal)]
        yield from refused
        if not refused:
            yield tuple(part for part in parts if isinstance(part, Launch))


def _narrowed(
    request: Request, groups: Sequence[tuple[int, ...]], pieces: Pieces
) -> tuple[Sequence[tuple[int, ...]], Pieces]:
    """Split groups of heads whose longest segment alone takes more memory than is allowed."""
    if request.memory_limit is None:
        return groups, pieces
    size = request.num_heads // request.num_kv_heads
    found: list[tuple[tuple[int, ...], tuple[Segment, ...]]] = []
    for heads, some in zip(groups, pieces, strict=True):
        most = max((most_bytes(request, one.block.sizes, heads) for one in some), default=0)
        room = _room(request, some)
        by_key = [tuple(own) for _, own in groupby(heads, lambda head: head // size)]
        each = max(1, int(len(by_key) * room / most)) if most > room else len(by_key)
        for start in range(0, len(by_key), each):
            found.append((tuple(chain(*by_key[start : start + each])), some))
    return [heads for heads, _ in found], tuple(some for _, some in found)


def _room(request: Request, segments: Sequence[Segment]) -> float:
    """Return the memory that is left for sequences beside the mask of a call."""
    if request.memory_limit is None:
        return inf
    full = all(one.lo is None and one.hi is None for one in segments)
    return request.memory_limit - (0 if full else AttenMask.causal().cells)


def most_bytes(request: Request, sizes: tuple[int, int], heads: tuple[int, ...]) -> int:
    """Return the memory that a sequence of a call takes at most: operands, answer, statistics."""
    (rows, keys), width = sizes, request.head_dim + request.value_dim
    kv_heads = len(kv_heads_of(request, heads))
    item = request.dtype.itemsize
    # Queries, the answer, what writes or merges it, and the statistics.
    answer = width * item + request.value_dim * max(item, (item + 8) // 2) + 2 * COPIES * 4
    return len(heads) * rows * answer + kv_heads * keys * width * item


def head_groups(request: Request) -> list[tuple[int, ...]]:
    """Return the heads that have equal masks, together."""
    planes = request.matrices.planes
    if len(planes) == 1:
        return [tuple(range(request.num_heads))]
    alike: dict[object, list[int]] = {}
    for head, plane in enumerate(planes):
        alike.setdefault(plane, []).append(head)
    return [tuple(heads) for heads in alike.values()]


def kv_heads_of(request: Request, heads: tuple[int, ...]) -> tuple[int, ...]:
    """Return the key heads that a call on some query heads reads, repeated only where it must."""
    size = request.num_heads // request.num_kv_heads
    wanted = tuple(head // size for head in heads)
    distinct = tuple(dict.fromkeys(wanted))
    each = len(wanted) // len(distinct)
    even = tuple(head for head in distinct for _ in range(each))
    return distinct if wanted == even else wanted


def _diagonal(request: Request, head: int) -> tuple[tuple[Block, Region], ...]:
    """Return the diagonal blocks with rows and keys, and the region of each from its corner."""
    return tuple(
        (block, region.cut(block.ends[:2], block.ends[2:]))
        for b, region in enumerate(request.matrices.regions(head))
        for block in diagonal_blocks(region, *request.sequences[b], b)
        if all(block.sizes)
    )


def _segments(
    search: Search, inside: tuple[tuple[Block, Region], ...], depth: int, cells: bool
) -> tuple[Segment, ...]:
    """Cut every block in its `depth`-th way."""
    return tuple(
        Segment.of(block.batch, cell)
        for block, region in inside
        for part in search.cut(region, depth)
        for cell in _split(part.shift(block.ends[0], block.ends[2]), cells)
    )


def _split(part: Slice, cells: bool) -> Iterator[Slice]:
    """Split a band of width 1 into its cells, where that is wanted and they are not too many."""
    rows = part.i1 - part.i0
    if part.lo < part.hi or rows == 1 or rows > _MOST_CELLS or not cells:
        yield part
        return
    for i in range(part.i0, part.i1):
        yield Slice(i, i + 1, i + part.lo, i + part.lo + 1)


class _Maker(NamedTuple):
    """Makes the calls for segments that share a window, for some heads."""

    request: Request
    heads: tuple[int, ...]
    window: Window
    search: Search

    def calls(self, segments: list[Segment]) -> Iterator[Launch | Refusal]:
        """Make packed calls, unless a bias says otherwise.

        Slopes go with packed segments that have as many queries as keys and one start. A matrix
        goes with segments of equal sizes, as the batch elements of a dense call.
        """
        if not self.request.bias:
            if len(segments) > _MOST_CALLS * _MOST_SEQUENCES:
                reason = f"{len(segments):,} pieces are too small for calls of {_MOST_SEQUENCES:,}"
                yield Refusal("batch-limit", reason, f"several calls, {self.label}")
                return
            yield from map(self.packed, self._in_calls(segments))
            return
        term = self.request.bias[0]
        sloped: dict[int, list[Segment]] = {}
        tables: dict[tuple[int, int], list[Segment]] = {}
        for one in segments:
            if len(self.request.bias) == 1 and term.sloped and one.rows == one.keys:
                sloped.setdefault(anchor_in(self.request, one.block, term), []).append(one)
            else:
                tables.setdefault((one.rows, one.keys), []).append(one)
        yield from map(self.packed, sloped.values())
        for some in tables.values():
            yield self.launch("BSND", [one.block for one in some], some)

    def _in_calls(self, segments: list[Segment]) -> Iterator[list[Segment]]:
        """Yield as many segments at a time as a call may have, and as memory is allowed for."""
        limited = self.request.memory_limit is not None
        some, held, room = list[Segment](), 0, _room(self.request, segments)
        rows = keys = 0
        for one in segments:
            size = most_bytes(self.request, one.block.sizes, self.heads) if limited else 0
            longest = max(rows + one.block.sizes[0], keys + one.block.sizes[1])
            many = len(some) == _MOST_SEQUENCES or longest > _MOST_TOKENS
            if some and (many or held + size > room):
                yield some
                some, held, rows, keys = [], 0, 0, 0
            some.append(one)
            held, rows, keys = held + size, rows + one.block.sizes[0], keys + one.block.sizes[1]
        yield some

    def packed(self, segments: list[Segment]) -> Launch | Refusal:
        """Return the TND call whose sequences are the segments; with a bias, they have one start.

        Where no key occurs twice, they come in the order of their keys, with a sequence without
        queries for the keys between two of them: then keys and values need no copy.
        """
        own = [one.block for one in segments]
        # A bias does not go with an empty sequence.
        blocks = None if self.request.bias else _in_place(self.request, own)
        most = _MOST_PREFIXES if self.window.mode == 6 else _MOST_SEQUENCES
        if blocks is None or len(blocks) > most:
            blocks = own
        return self.launch("TND", blocks, segments)

    def launch(self, layout: str, blocks: list[Block], segments: list[Segment]) -> Launch | Refusal:
        """Return the call whose sequences are blocks: those of the segments, and empty ones."""
        request, heads, window, search = self
        bias = part_arguments(request, blocks, len(heads), packed=layout == "TND")
        if isinstance(bias, Refusal):
            return bias
        known = {one.block: one for one in segments}
        found = [known.get(block) for block in blocks]
        targets = tuple(search.region(one) for one in found)
        prefix = (
            window.prefix(one) if one else block.sizes[1]
            for one, block in zip(found, blocks, strict=True)
        )
        kv_heads = kv_heads_of(request, heads)
        call = bare_call(request, layout, blocks, (len(heads), len(kv_heads)))
        return Launch(
            self.label,
            replace(call, **_mask_arguments(window, prefix), **bias),
            tuple(blocks),
            targets,
            request.token_starts,
            heads=heads if len(heads) < request.num_heads else None,
            kv_heads=kv_heads,
        ).as_part()

    @property
    def label(self) -> str:
        """The window in words."""
        return "no mask" if self.window.mode is None else f"mode {self.window.mode}"


def _mask_arguments(window: Window, prefix: Iterable[int]) -> Arguments:
    if window.mode is None:
        return {}
    if window.mode == 6:
        return {"atten_mask": AttenMask.prefix(), "sparse_mode": 6, "prefix": tuple(prefix)}
    mask: Arguments = {"atten_mask": AttenMask.causal(), "sparse_mode": window.mode}
    if window.mode == 4:
        mask |= {"pre_tokens": window.pre, "next_tokens": window.next}
    return mask


def _in_place(request: Request, blocks: list[Block]) -> list[Block] | None:
    """Return blocks in the order of their keys, those between them filled in.

    None where a key occurs twice, or the keys of a block lie in several places.
    """
    if not all(block.is_rectangle for block in blocks):
        return None
    first, *rest = sorted(blocks, key=lambda block: (block.batch, *block.ends[2:]))
    out = [first]
    for block in rest:
        last, begin = out[-1], block.ends[2]
        if last.batch == block.batch and last.ends[3] > begin:
            return None
        for b in range(last.batch, block.batch + 1):
            start = last.ends[3] if b == last.batch else 0
            stop = begin if b == block.batch else request.sequences[b][1]
            if start < stop:
                out.append(Block(b, (), (range(start, stop),)))
        out.append(block)
    return out
