"""`lint_stack`: what a stack of masked layers lets through, composed exactly.

Layer l lets position i read position j where its mask allows (i, j); with the residual stream
every position also keeps its own. Through layers 1 ... L the output at i depends on the input at k
when there is a chain of such steps: the composition of relations. Slices are closed under it:
from ``lo <= j - i <= hi`` and ``lo' <= k - j <= hi'``, with j in a range, eliminating j leaves
bounds on i, k and k - i, tight over the integers. So the reach of a stack is a `Region` that is
computed from slices alone, whatever the lengths.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain

from attnkit.arguments import check_int, describe
from attnkit.display import Text
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import Mask
from attnkit.masks.composite import agree
from attnkit.masks.documents import Documents
from attnkit.masks.finding import Finding
from attnkit.masks.lint import positive_leaves

__all__ = ["StackReport", "compose", "lint_stack"]


@dataclass(frozen=True)
class StackReport:
    """What a stack of layers lets through.

    `reach` holds (i, k) when the output at i may depend on the input at k (any batch element and
    head). `lookback` and `lookahead` are the greatest i - k and k - i in it. `exact` is False when
    some mask is not a union of slices: its outer bound stood in, so the reach may be too large.

    >>> from attnkit import masks
    >>> report = masks.lint_stack([masks.SlidingWindow(3)] * 2, 16, 16)
    >>> report.lookback, report.lookahead, report.exact
    (4, 0, True)
    """

    findings: tuple[Finding, ...]
    reach: Region
    lookback: int
    lookahead: int
    exact: bool

    def __str__(self) -> str:
        head = f"reaches back {self.lookback} and ahead {self.lookahead} positions"
        return "\n".join([head, *map(str, self.findings)])

    def _repr_html_(self) -> str:
        """Return a picture of the reach and the findings, for a notebook."""
        from attnkit.fields import page

        return Text(self)._repr_html_() + page(self.reach)


def compose(first: Region, second: Region) -> Region:
    """Return ``{(i, k): (i, j) in first and (j, k) in second, for some j}``.

    >>> step = Region.of(Slice(0, 8, 0, 8, lo=-2, hi=0))
    >>> compose(step, step) == Region.of(Slice(0, 8, 0, 8, lo=-4, hi=0))
    True
    """
    below = sorted(second.slices, key=lambda s: s.i0)
    starts = [s.i0 for s in below]
    tallest = max((s.i1 - s.i0 for s in below), default=0)
    found: set[Slice] = set()
    for a in first.slices:
        low, high = bisect_right(starts, a.j0 - tallest), bisect_left(starts, a.j1)
        found.update(_through_the_middle(a, b) for b in below[low:high])
    return Region.of(*(part for part in found if part))


def _through_the_middle(a: Slice, b: Slice) -> Slice:
    """Eliminate the middle index: every lower bound of it is at most every upper one."""
    j0, j1 = max(a.j0, b.i0), min(a.j1, b.i1)
    if j0 >= j1:
        return Slice(0, 0, 0, 0)
    return Slice(
        max(a.i0, j0 - a.hi),
        min(a.i1, j1 - a.lo),
        max(b.j0, j0 + b.lo),
        min(b.j1, j1 + b.hi),
        a.lo + b.lo,
        a.hi + b.hi,
    )


def lint_stack(
    stack: Sequence[Mask], q_len: int, kv_len: int | None = None, *, residual: bool = True
) -> StackReport:
    """Report what a stack of layers, the first one first, lets through.

    Looks for the future (an output that depends on a later input), for documents that leak
    through the layers, and for how far back the stack sees. Heads of a layer are joined, batch
    elements are kept apart while composing. `residual`: each layer also passes its input on.
    Layers work on one sequence, so a score matrix is square; with `kv_len` > `q_len` the queries
    are the last positions (as with a cache), and the earlier ones count as inputs.

    >>> from attnkit import masks
    >>> report = masks.lint_stack([masks.SlidingWindow(4)] * 3, 64)
    >>> report.lookback, report.lookahead
    (9, 0)
    >>> print(masks.lint_stack([masks.Causal(), masks.Chunked(4)], 8).findings[0].message)
    the stack lets the future in: output 0 depends on input 3, 3 ahead; layers that look ahead \
by themselves: 1
    """
    masks = _checked(stack, q_len, kv_len)
    keys = q_len if kv_len is None else kv_len
    if keys < q_len:
        raise CompositionError(
            f"lint_stack got q_len={q_len} and kv_len={keys}; layers pass positions on to each "
            "other, so every query is one of the keys: kv_len >= q_len"
        )
    for mask in masks:
        mask.check(q_len, keys)
    batches = agree("batch sizes", masks, [m.batches for m in masks], "give all one entry each")
    layers = [_layers(masks, q_len, keys, b, residual) for b in range(batches or 1)]
    # The last layer's outputs come first: it reads what the layers before it wrote.
    reaches = [reduce(compose, reversed(relations)) for relations in layers]
    reach = Region.union(dict.fromkeys(reaches))
    hull = reach.bounds
    lookback = max(0, -hull.lo) if hull else 0
    step = Region.union(dict.fromkeys(chain.from_iterable(layers)))
    findings = [
        *_ahead(reach, layers, keys),
        *_leaking(masks, reaches, q_len, keys),
        *_short_sighted(compose(reach, step).bounds, lookback, len(masks), keys),
    ]
    opaque = [mask for mask in masks if not mask.is_region(q_len, keys)]
    if opaque:
        bounded = Finding(
            "stack-is-bounded",
            f"{opaque[0]!r} is not a small union of slices, so its outer bound stood in: the stack "
            "reaches no more than was said, perhaps less",
            "write its opaque parts as named masks where they have a name",
        )
        findings.append(bounded)
    lookahead = max(0, hull.hi) if hull else 0
    return StackReport(tuple(findings), reach, lookback, lookahead, exact=not opaque)


def _checked(stack: object, q_len: int, kv_len: int | None) -> tuple[Mask, ...]:
    check_int("lint_stack q_len", q_len, 1)
    if kv_len is not None:
        check_int("lint_stack kv_len", kv_len, 1)
    if not isinstance(stack, list | tuple) or not stack:
        raise CompositionTypeError(
            f"lint_stack takes a list of masks, one per layer, got {describe(stack)}"
        )
    for mask in stack:
        if not isinstance(mask, Mask):
            raise CompositionTypeError(f"lint_stack takes masks, got {describe(mask)}")
    return tuple(stack)


def _layers(
    masks: tuple[Mask, ...], q_len: int, kv_len: int, batch: int, residual: bool
) -> list[Region]:
    """Return what each layer lets through, as a relation on all positions."""
    past = kv_len - q_len
    kept = Region.of(Slice(0, kv_len if residual else past, 0, kv_len, 0, 0))
    known: dict[Mask, Region] = {}
    for mask in masks:
        if mask not in known:
            heads = [
                mask.enclosure(q_len, kv_len, batch if mask.batches is not None else 0, h).outer
                for h in range(mask.heads or 1)
            ]
            known[mask] = Region.union(dict.fromkeys(heads)).shift(past, 0) | kept
    return [known[mask] for mask in masks]


def _ahead(reach: Region, layers: list[list[Region]], length: int) -> Iterator[Finding]:
    future = Region.of(Slice(0, length, 0, length, lo=1))
    ahead = reach & future
    if not ahead:
        return
    i = ahead.slices[0].i0
    k = ahead.row(i)[-1][1] - 1
    alone = sorted({n for one in layers for n, layer in enumerate(one) if layer & future})
    yield Finding(
        "stack-sees-the-future",
        f"the stack lets the future in: output {i} depends on input {k}, {k - i} ahead; layers "
        f"that look ahead by themselves: {', '.join(map(str, alone))}",
        "intersect these layers with Causal() if outputs predict what comes next",
    )


def _leaking(
    masks: tuple[Mask, ...], reaches: list[Region], q_len: int, kv_len: int
) -> Iterator[Finding]:
    if q_len != kv_len:
        return
    parts = dict.fromkeys(part for mask in masks for part in positive_leaves(mask))
    for part in parts:
        if not isinstance(part, Documents) or part.kv_lengths is not None:
            continue
        for b, reach in enumerate(reaches):
            beyond = reach - part.apart.enclosure(q_len, kv_len, b).inner
            if beyond:
                i = beyond.slices[0].i0
                k = beyond.row(i)[0][0]
                yield Finding(
                    "stack-documents-leak",
                    f"documents of {part!r} leak through the stack: output {i} depends on input "
                    f"{k} of another document",
                    "every layer needs the documents: mask & documents",
                )
                break


def _short_sighted(hull: Slice | None, lookback: int, depth: int, length: int) -> Iterator[Finding]:
    # What stops at the border of a document does so by intent: no layer more would see further.
    if hull is not None and -hull.lo > lookback:
        yield Finding(
            "stack-is-short-sighted",
            f"no output depends on an input more than {lookback} positions back: {depth} "
            f"layers see {lookback + 1} of {length} positions, one more would see "
            f"{1 - hull.lo}",
            "widen a window, or let some layers (or a few global keys) see everything",
        )
