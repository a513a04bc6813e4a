"""`recover`: the structure of a tensor, a function or row bounds, found and proven.

The source is read cell by cell, a few rows at a time, and its region is built from exactly the
cells that were read: that is the proof. (A function that compares rows with keys is called once,
with indices that note the comparisons.) A name is then given only to a composition whose region is
equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from attnkit.arguments import check_int
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks.base import Full, Mask
from attnkit.masks.composite import leaves
from attnkit.masks.dense import Dense
from attnkit.masks.naming import complexity, name
from attnkit.masks.per_head import PerHead
from attnkit.masks.predicate import MaskFunction, Predicate
from attnkit.masks.slices import Slices
from attnkit.masks.sources import Source, source_of
from attnkit.masks.trace import Progress, count_slices
from attnkit.progress import progress as shown

__all__ = ["Recovered", "recover", "written_with"]

Sourcelike = Mask | torch.Tensor | np.ndarray[Any, Any] | MaskFunction | Sequence[Any]


@dataclass(frozen=True)
class Recovered:
    """What `recover` found: a mask with exactly the source's cells, and why it has this form.

    `exact`: every cell was read and the cells form a small region; `regions[batch][head]` is it
    (one entry where batch elements, or heads, are alike). `named`: the mask is a composition of
    named families, so it is the shortest way to write that region that was found. Without
    `exact` the mask holds the source as it was given. `reason` is the sentence for people.
    The mask equals the source at these lengths; a named one also exists at others.

    >>> from attnkit import masks
    >>> found = masks.recover([(0, 1), (0, 2), (1, 3)], kv_len=3)
    >>> found.mask, found.exact, found.named, found.region.area
    (SlidingWindow(2), True, True, 5)
    """

    mask: Mask
    regions: tuple[tuple[Region, ...], ...]
    exact: bool
    named: bool
    reason: str
    q_len: int
    kv_len: int

    @property
    def region(self) -> Region:
        """The region, where all batch elements and heads share one."""
        found = {region for per_head in self.regions for region in per_head}
        if len(found) == 1:
            return found.pop()
        told = (
            f"{len(found)} regions differ by batch element or head; read regions[batch][head]"
            if found
            else f"the source is not a small region: {self.reason}"
        )
        raise CompositionError(f"{self.mask!r} at {self.q_len} x {self.kv_len}: {told}")

    def __str__(self) -> str:
        return f"{self.mask!r}: {self.reason}"

    def _repr_html_(self) -> str:
        """Return the mask and why it has this form, for a notebook."""
        from attnkit.masks.shown import page_of

        name = "Recovered, a named mask" if self.named else "Recovered"
        return page_of(name, self.mask, [self.reason], (self.q_len, self.kv_len))


@untraced(MASK_IN_GRAPH)
def recover(
    source: Sourcelike,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    keep: bool = True,
    batch: int | None = None,
    heads: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    device: torch.device | str | None = None,
    max_slices: int | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Find the mask behind a tensor, a function, row bounds or another mask.

    `source` is one of

    - a bool tensor or array [Sq, Skv], [N, Sq, Skv] or [B, N, Sq, Skv];
    - a function ``fn(b, h, i, j)``: FlexAttention's `mask_mod`, or a mask function of
      transformers (the same four indices). `q_len` and `kv_len` are needed, and `batch` or `heads`
      if it tells them apart. `q_offset` is added to i and `kv_offset` to j, as transformers does
      with a cache; `device` is where its indices live;
    - row bounds: for row i the keys ``start <= j < stop``, as a list with one (start, stop), or one
      list of such pairs, per row; or an integer tensor [Sq, 2] or [Sq, R, 2]. `kv_len` is needed;
      ``stop <= start`` is no keys;
    - a mask, whose simplest equal form is then sought.

    `keep` says what True means in a tensor or from a function: allowed (True, the default, as in
    torch's SDPA, FlexAttention and transformers) or masked out (False, as in
    `nn.MultiheadAttention` and the fused kernel).

    A function that compares numbers of rows with numbers of keys is called once, with indices that
    note what it does, and a few rows are evaluated to compare. Of everything else every cell is
    evaluated once, in chunks of rows of about a million cells, those outside of a mask's `outer`
    bound left out. `progress(rows, all_rows)` is called after each chunk. Where the
    region needs more than `max_slices` (default 64 + 4 * max(q_len, kv_len)) the source stays as
    it is, and `reason` says so.

    >>> import torch
    >>> from attnkit import masks
    >>> print(masks.recover(torch.ones(8, 8).tril().bool()))
    Causal(): all 64 cells read (True = allowed); the region (1 slice) equals Causal()
    >>> masks.recover(lambda b, h, i, j: (i >= j) & ((i - j < 16) | (j < 4)), 96, 96).mask
    Causal() & (Prefix(4) | SlidingWindow(16))
    >>> masks.recover([(0, 2), (0, 2), (2, 4), (2, 4)], kv_len=4).mask
    Chunked(2)
    >>> masks.recover([[(0, 1), (3, 5)], [(2, 3)]], kv_len=5).mask
    Slices(((0, 1, 0, 1, 0, 0), (0, 1, 3, 5, 3, 4), (1, 2, 2, 3, 1, 1)), 2, 5)
    """
    given = source_of(source, q_len, kv_len, keep, batch, heads, q_offset, kv_offset, device)
    if max_slices is None:
        max_slices = 64 + 4 * max(given.q_len, given.kv_len)
    check_int("max_slices", max_slices, 1)
    found: list[Region] = []
    batches, heads = (count or 1 for count in given.counts)
    places = list(product(range(batches), range(heads)))
    with shown("reading a mask") as bar:
        for n, place in enumerate(places):

            def tell(done: int, rows: int, before: int = n) -> None:
                bar.at(before * rows + done, len(places) * rows)
                if progress is not None:
                    progress(before * rows + done, len(places) * rows)

            region = given.region(*place, max_slices, tell)
            if isinstance(region, str):
                return _as_given(given, *place, region)
            found.append(region)
    with shown("naming a mask"):
        regions = [tuple(found[n : n + heads]) for n in range(0, len(found), heads)]
        return _write(given, tuple(regions))


def written_with(
    regions: tuple[tuple[Region, ...], ...], q_len: int, kv_len: int, said: str
) -> Recovered:
    """Return the mask of known regions, ``regions[batch][head]``; `said` is where they are from."""
    return _write(Source(None, q_len, kv_len, said), regions)


def _as_given(given: Source, b: int, h: int, why: str) -> Recovered:
    mask = given.mask
    where = [f"batch element {b}"] * (mask.batches is not None)
    where += [f"head {h}"] * (mask.heads is not None)
    told = f" of {', '.join(where)}" if where else ""
    reason = f"stays {mask!r}: the cells{told} are no small union of slices ({why})"
    return Recovered(mask, (), False, False, reason, given.q_len, given.kv_len)


def _write(given: Source, regions: tuple[tuple[Region, ...], ...]) -> Recovered:
    """Choose the form: a name, else literal slices; of a mask, its own form if it is simpler."""
    if len(set(regions)) == 1:
        regions = regions[:1]
    if all(len(set(row)) == 1 for row in regions):
        regions = tuple(row[:1] for row in regions)
    columns = list(zip(*regions, strict=True))  # for each head, the regions of the batch
    written = {column: _one_head(column, given) for column in dict.fromkeys(columns)}
    masks = [written[column] for column in columns]
    mask = masks[0] if len(masks) == 1 else PerHead(masks)
    if given.written and not _measure(mask) < _measure(given.mask):
        mask = given.mask
    elif any(
        region != mask.region(given.q_len, given.kv_len, b, h)
        for b, row in enumerate(regions)
        for h, region in enumerate(row)
    ):  # a fault of the search
        raise CompositionError(f"{mask!r} was found for a source, but its cells differ")
    size = sum(count_slices(region) for region in {r for row in regions for r in row})
    named = not _measure(mask)[0]
    told = f"the region ({size} slice{'s' * (size != 1)})"
    if given.written and mask == given.mask:
        reason = f"{told} has no simpler form among those tried"
    elif named:
        reason = f"{given.said}; {told} equals {mask!r}"
    else:
        reason = f"{given.said}; {told} equals no named composition that was tried"
    return Recovered(mask, regions, True, named, reason, given.q_len, given.kv_len)


def _measure(mask: Mask) -> tuple[int, tuple[int, int]]:
    """Return a measure to choose the simpler mask by: first, how much of it has no name."""
    nameless = sum(isinstance(part, Slices | Dense | Predicate) for part in leaves(mask))
    return nameless, complexity(mask)


def _one_head(regions: tuple[Region, ...], given: Source) -> Mask:
    different = regions if len(set(regions)) > 1 else regions[0]
    literal = Slices.of(different, given.q_len, given.kv_len)
    named = name(regions, given.q_len, given.kv_len)
    if named is None or (len(str(named)) > len(str(literal)) and not isinstance(named, Full)):
        return literal
    return named
