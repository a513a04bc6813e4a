"""What the pages of all plans have: score matrices as numbers, refusals, prices, the command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from attnkit.errors import Refusal, clipped
from attnkit.explorer import CellPatch, RegionTable, cost
from attnkit.geometry import Region
from attnkit.planner.placed import Places
from attnkit.planner.request import Request

__all__ = [
    "MOST_NUMBERS",
    "Sheet",
    "command_of",
    "refusals",
    "time_told",
    "unsaid",
]

MOST_NUMBERS = 400_000
"""Of all cells of a page, which has some megabytes then; what is more is left out, and told."""

_LONGEST_MASK = 4_000  # characters that somebody may want to edit


class Sheet:
    """The score matrices of a request, as pages show them: those that are alike once."""

    def __init__(self, request: Request, places: Places) -> None:
        self.request, self.places = request, places

    def data(
        self, views: Sequence[dict[str, Any]], patches: Sequence[Sequence[Sequence[CellPatch]]]
    ) -> dict[str, Any]:
        """Return what pages know of the score matrices, and the views with the cells of calls.

        The first view is the plan's own: batch elements are shown up to `MOST_NUMBERS`, and of
        those that are shown the other views that find room.
        """
        request, regions = self.request, RegionTable()
        masks = [list(self.places.mask(batch)) for batch in range(request.batch)]
        every = [patch for view in patches for call in view for patch in call]
        shown = self._batches([*every, *(patch for own in masks for patch in own)])
        seen: set[Region] = set()
        kept, room = self._kept(shown, masks, patches[0], seen)
        for view, calls in zip(views, patches, strict=True):
            own = [[patch for patch in call if patch.batch in kept] for call in calls]
            if view is not views[0]:
                took = cost((patch for call in own for patch in call), seen)
                if took > room:
                    continue  # its calls have no "patches", which the page tells
                room -= took
            for call, some in zip(view["calls"], own, strict=True):
                call["patches"] = list(map(regions.plain, some))
        queries, keys = request.token_starts
        text = str(request.mask)
        return {
            "title": clipped(f"{request.mask!r}", 200),
            "mask": text if len(text) <= _LONGEST_MASK else "",
            "packed": request.seqlens is not None,
            "sizes": [list(sizes) for sizes in request.sequences],
            "starts": [list(queries), list(keys)],
            "heads": _groups(self._heads([*every, *(p for own in masks for p in own)]), "head"),
            "batches": [[own[0], self._named(own)] for own in shown if own[0] in kept],
            "left_out": [len(shown) - len(kept), len(shown)],
            "allowed": [regions.plain(p) for b in sorted(kept) for p in masks[b]],
            "per_call": request.mask.comes_with_call,
            "views": list(views),
            "regions": regions.strips,
        }

    def _kept(
        self,
        shown: Sequence[Sequence[int]],
        masks: Sequence[Sequence[CellPatch]],
        calls: Sequence[Sequence[CellPatch]],
        seen: set[Region],
    ) -> tuple[set[int], int]:
        """Return the batch elements that find room, one for those alike, and the room left."""
        own: dict[int, list[CellPatch]] = {batch[0]: [*masks[batch[0]]] for batch in shown}
        for call in calls:
            for patch in call:
                if patch.batch in own:
                    own[patch.batch].append(patch)
        kept: set[int] = set()
        room = MOST_NUMBERS
        for batch, patches in own.items():
            room -= cost(patches, seen)
            if room < 0:
                break
            kept.add(batch)
        return kept, max(0, room)

    def _batches(self, patches: Iterable[CellPatch]) -> list[list[int]]:
        """Return the batch elements, those that are alike together; packed sequences are not."""
        if self.request.seqlens is not None:
            return [[batch] for batch in range(self.request.batch)]
        own: list[list[object]] = [[] for _ in range(self.request.batch)]
        for patch in patches:
            own[patch.batch].append(patch[2:])
        return _together(own)

    def _heads(self, patches: Sequence[CellPatch]) -> list[list[int]]:
        """Return the heads, those that are alike together."""
        count = self.request.num_heads
        ends = {0, count} | {end for p in patches for end in (p.heads.start, p.heads.stop)}
        cuts = sorted(ends)
        if len(cuts) == 2:
            return [list(range(count))]
        own: list[list[object]] = [[] for _ in range(count)]
        for patch in patches:
            for start in cuts[cuts.index(patch.heads.start) : cuts.index(patch.heads.stop)]:
                own[start].append((*patch[:2], *patch[3:]))
        for start, stop in pairwise(cuts):
            own[start:stop] = [own[start]] * (stop - start)
        return _together(own)

    def _named(self, batches: Sequence[int]) -> str:
        if self.request.seqlens is None:
            return _named(batches, "batch element")
        q_len, kv_len = self.request.sequences[batches[0]]
        return f"sequence {batches[0] + 1}: {q_len:,} x {kv_len:,}"


def _together(own: Sequence[Sequence[object]]) -> list[list[int]]:
    """Return the numbers of what is equal together, in the order of the first of each."""
    found: dict[tuple[object, ...], list[int]] = {}
    for number, told in enumerate(own):
        found.setdefault(tuple(told), []).append(number)
    return list(found.values())


def _groups(numbers: Sequence[Sequence[int]], name: str) -> list[list[Any]]:
    return [[own[0], _named(own, name)] for own in numbers]


def _named(numbers: Sequence[int], name: str) -> str:
    """Say which numbers are alike: ranges of them, the first few."""
    cuts = [k for k, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    ranges = [numbers[a:b] for a, b in pairwise([0, *cuts, len(numbers)])]
    told = [f"{own[0]}" + (f" to {own[-1]}" if len(own) > 1 else "") for own in ranges[:3]]
    more = ", ..." if len(ranges) > 3 else ""
    return f"{name}{'s' * (len(numbers) > 1)} {', '.join(told)}{more}"


def refusals(every: Iterable[Refusal]) -> list[list[str]]:
    """Return refusals as rows of a table, each once."""
    return [list(row) for row in dict.fromkeys((r.subject, r.reason, r.code) for r in every)]


def time_told(nanoseconds: float) -> str:
    """Say how long something takes, in three digits.

    >>> time_told(52_216.3), time_told(3.2e6)
    ('52.2 us', '3.2 ms')
    """
    if nanoseconds >= 1e6:
        return (
            f"{nanoseconds / 1e6:,.3g} ms" if nanoseconds < 1e9 else f"{nanoseconds / 1e6:,.0f} ms"
        )
    return f"{nanoseconds / 1e3:,.3g} us"


def unsaid(request: Request) -> list[str]:
    """Return what a command line cannot say of a request: a configuration does."""
    some = {
        "the bias": bool(request.bias),
        f"the layout {request.layout}": request.layout not in ("BSND", "TND"),
        f"{request.num_kv_heads} key heads": request.num_kv_heads != request.num_heads,
        f"values of {request.value_dim} dimensions": request.value_dim != request.head_dim,
        "the dropout": bool(request.dropout),
        "the sink": request.sink,
        "the soft-cap": request.softcap is not None,
        "the score function": request.score_fn is not None,
        "the memory limit": request.memory_limit is not None,
        "the scale": request.scale != float(request.head_dim**-0.5),
    }
    return [name for name, there in some.items() if there]


def command_of(request: Request, backend: str) -> Iterator[str]:
    """Yield the command line that plans such a request, but for its mask."""
    yield from ("attnkit", "view")
    sizes: dict[str, object] = {"--q-len": request.q_len, "--kv-len": request.kv_len}
    lens = request.seqlens
    if lens is None:
        sizes |= {"--batch": request.batch}
    else:
        own = (",".join(map(str, some)) for some in (lens.q, lens.kv))
        sizes = dict(zip(("--lengths", "--kv-lengths"), own, strict=True))
    heads = {"--num-heads": request.num_heads, "--head-dim": request.head_dim}
    for name, value in {**sizes, **heads}.items():
        yield from (name, str(value))
    yield from ("--dtype", str(request.dtype).removeprefix("torch."), "--backend", backend)
    if request.needs_grad:
        yield "--train"
