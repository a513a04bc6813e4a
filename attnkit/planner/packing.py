"""Calls whose sequences are some segments: as few as their windows and memory allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from math import inf
from typing import NamedTuple

from attnkit.errors import Refusal
from attnkit.kernel import AttenMask
from attnkit.kernel.stats import COPIES
from attnkit.planner.biases import Arguments, anchor_in, part_arguments
from attnkit.planner.calls import Launch, bare_call
from attnkit.planner.grouping import MOST_WINDOWS, Segment, Window, group
from attnkit.planner.request import Request
from attnkit.planner.search import Search
from attnkit.planner.sequences import Block

__all__ = ["Pieces", "head_groups", "kv_heads_of", "most_bytes", "packings"]

_MOST_GROUPINGS = 4
_MOST_CALLS = 8
# What the contract takes (rules batch-limit, length-limit and prefix-batch).
_MOST_SEQUENCES = 2048
_MOST_TOKENS = 1_000_000
_MOST_PREFIXES = 32

Pieces = tuple[tuple[Segment, ...], ...]
"""The segments that make up a request, for each group of heads."""


def packings(
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
