"""`diff`: whether two masks, or two stacks of layers, allow the same cells, and where they do not.

Sets are compared as regions, whatever the lengths; only what is no region is read cell by cell, in
blocks of rows inside of its bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from attnkit.arguments import check_int, describe
from attnkit.display import Told
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import Full, Mask, Rectangle
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.trace import row_blocks

__all__ = ["Difference", "FirstCell", "diff"]

_AROUND = 4  # rows and keys that a picture shows on each side


@dataclass(frozen=True)
class FirstCell(Told):
    """The first cell that one of two masks allows and the other does not.

    First in the order of layers, batch elements, heads, rows and keys. `allowed_by` is "a" or "b".
    `cells` counts all that differ in this score matrix. The picture shows the neighbourhood of the
    cell in a and in b: ``#`` allowed, ``.`` masked.
    """

    layer: str
    batch: int
    head: int
    i: int
    j: int
    allowed_by: str
    cells: int
    picture: str

    def __str__(self) -> str:
        other = "b" if self.allowed_by == "a" else "a"
        return (
            f"{self.layer}batch element {self.batch}, head {self.head}: query {self.i} sees key "
            f"{self.j} in {self.allowed_by} and not in {other} ({self.cells:,} cells of this "
            f"matrix differ)\n{self.picture}"
        )


@dataclass(frozen=True)
class Difference(Told):
    """What `diff` found: `first` is None where the two are equal, which is proven.

    `differing` names the layers that differ, `layers` counts all; `read` counts cells that had to
    be read because a mask is no region. `message` says it in words.

    >>> from attnkit import masks
    >>> found = masks.diff(masks.SlidingWindow(3), masks.Band(2, 0), 8, 8)
    >>> found.equal, found.message
    (True, 'equal: 1 layer at 8 x 8, proven')
    """

    first: FirstCell | None
    layers: int
    differing: tuple[str, ...]
    read: int
    message: str

    @property
    def equal(self) -> bool:
        """Whether both allow the same cells everywhere."""
        return self.first is None

    def __bool__(self) -> bool:
        raise CompositionTypeError(
            "the truth of a Difference is not defined (are two masks different, or equal?); ask "
            "found.equal"
        )

    def __str__(self) -> str:
        return self.message


@untraced(MASK_IN_GRAPH)
def diff(
    a: object,
    b: object,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
) -> Difference:
    """Prove that two masks, or two stacks of them, are equal, or show the first cell that differs.

    `a` and `b` are each

    - a mask (or a `Lifted`);
    - a list of masks, one per layer, or a mapping from the names of layers to masks; None in
      either is no mask. Layers go together in order: names are for messages;
    - an `nn.Module`: its submodules that have a `mask`, in order of their names.

    `q_len` and `kv_len` are the lengths to compare at (kv_len is q_len where it is not said); they
    may be left out where masks have their own. `batch` and `heads` are needed where one mask tells
    apart what the other does not and counts matter; else they are the masks' own. Raises
    `CompositionError` where the stacks have different numbers of layers, or masks do not fit.

    >>> from attnkit import masks
    >>> print(masks.diff([masks.Causal()] * 2, [masks.Causal(), masks.SlidingWindow(3)], 6))
    1 of 2 layers differ (1); first: layer 1, batch element 0, head 0: query 3 sees key 0 in a and \
not in b (6 cells of this matrix differ)
           keys 0 to 4
      row  a      b
        0  #....  #....
        1  ##...  ##...
        2  ###..  ###..
    >   3  ####.  .###.
        4  #####  ..###
        5  #####  ...##
    >>> masks.diff(masks.Causal(), ~masks.Band(1, None) | masks.Band(1, 0), 1 << 20).equal
    True
    """
    for name, said, least in (
        ("q_len", q_len, 0), ("kv_len", kv_len, 0), ("batch", batch, 1), ("heads", heads, 1)
    ):  # fmt: skip
        if said is not None:
            check_int(f"diff {name}", said, least)
    stacks = _stack("a", a), _stack("b", b)
    counts = [len(stack) for stack in stacks]
    if counts[0] != counts[1]:
        names = [shown(list(stack)[:8]) for stack in stacks]
        raise CompositionError(
            f"diff got {counts[0]} layers in a ({names[0]}) and {counts[1]} in b ({names[1]}); "
            "layers are compared in order, so there are as many"
        )
    alone = isinstance(a, Mask | Lifted) and isinstance(b, Mask | Lifted)
    pairs = list(zip(stacks[0].items(), stacks[1].items(), strict=True))
    known: dict[tuple[Mask, Mask], tuple[FirstCell | None, int]] = {}
    firsts: list[tuple[str, FirstCell]] = []
    for (name, one), (_, other) in pairs:
        if (one, other) not in known:
            known[one, other] = _Pair.of(one, other, q_len, kv_len, batch, heads).first()
        found = known[one, other][0]
        if found is not None:
            firsts.append((name, found))
    where = _Pair.of(*next(iter(known)), q_len, kv_len, batch, heads) if known else None
    read = sum(count for _, count in known.values())
    return _told(firsts, len(pairs), read, where, alone)


def _told(
    firsts: list[tuple[str, FirstCell]], layers: int, read: int, where: _Pair | None, alone: bool
) -> Difference:
    count = f"{layers} layer{'s' * (layers != 1)}"
    if not firsts:
        at = f" at {where.q_len} x {where.kv_len}" if where else ""
        how = f"{read:,} cells read, the rest proven" if read else "proven"
        return Difference(None, layers, (), read, f"equal: {count}{at}, {how}")
    names = tuple(name for name, _ in firsts)
    name, cell = firsts[0]
    if not alone:
        cell = replace(cell, layer=f"layer {name}, ")
    listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    head = "" if alone else f"{len(names)} of {count} differ ({listed}); first: "
    return Difference(cell, layers, names, read, f"{head}{cell}")


# -- what is compared --------------------------------------------------------------------


def _stack(side: str, given: object) -> dict[str, Mask]:
    """Return the masks of layers by name."""
    if isinstance(given, torch.nn.Module):
        found = {
            name or type(module).__name__: module.mask
            for name, module in given.named_modules()
            if isinstance(getattr(module, "mask", None), Mask)
        }
        if not found:
            raise CompositionError(
                f"diff: no submodule of {side} ({type(given).__name__}) has a mask; give masks by "
                "layer: a list, or a mapping (of a model of transformers: "
                "attnkit.interop.transformers.masks_of(model, **inputs))"
            )
        return found
    if isinstance(given, Mapping):
        return {str(name): _mask(f"{side}[{name!r}]", one) for name, one in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return {str(n): _mask(f"{side}[{n}]", one) for n, one in enumerate(given)}
    return {"0": _mask(side, given)}


def _mask(where: str, given: Any) -> Mask:
    if given is None:
        return Full()
    if isinstance(given, Lifted):
        return given.mask
    if not isinstance(given, Mask):
        raise CompositionTypeError(
            f"diff takes a mask, a list or mapping of masks, or an nn.Module; {where} is "
            f"{describe(given)}"
        )
    return given


@dataclass(frozen=True)
class _Pair:
    """Two masks at some lengths."""

    a: Mask
    b: Mask
    q_len: int
    kv_len: int
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        a: Mask,
        b: Mask,
        q_len: int | None,
        kv_len: int | None,
        batch: int | None,
        heads: int | None,
    ) -> _Pair:
        """Find the lengths, and check that both masks fit them."""
        rows = _agreed("q_len", q_len, a.extent[0], b.extent[0], None)
        keys = _agreed("kv_len", kv_len, a.extent[1], b.extent[1], rows)
        counts = (
            _agreed("batch", batch, a.batches, b.batches, 1),
            _agreed("heads", heads, a.heads, b.heads, 1),
        )
        for mask in (a, b):
            mask.check(rows, keys, *counts)
        told = (a.batches, b.batches), (a.heads, b.heads)
        batches, per_batch = (
            count if any(one) else 1 for count, one in zip(counts, told, strict=True)
        )
        places = tuple(product(range(batches), range(per_batch)))
        return cls(a, b, rows, keys, places)

    def first(self) -> tuple[FirstCell | None, int]:
        """Return the first cell that differs, and how many cells had to be read."""
        read = 0
        for place in self.places:
            both = [
                one.enclosure(
                    self.q_len,
                    self.kv_len,
                    place[0] if one.batches is not None else 0,
                    place[1] if one.heads is not None else 0,
                )
                for one in (self.a, self.b)
            ]
            if all(known.exact for known in both):
                region = both[0].inner ^ both[1].inner
                if region:
                    i = region.strips[0].i0
                    return self._cell(place, i, region.row(i)[0][0], region.area), read
                continue
            found, count = self._read(place, both[0].outer | both[1].outer)
            read += count
            if found is not None:
                return found, read
        return None, read

    def _read(self, place: tuple[int, int], around: Region) -> tuple[FirstCell | None, int]:
        """Compare cell by cell, inside of a region that holds both."""
        at: tuple[int, int] | None = None
        read = cells = 0
        for rows in row_blocks(0, self.q_len, self.kv_len):
            box = around.cut(rows, (0, self.kv_len)).bounds
            if box is None:
                continue
            keys = box.j0, box.j1
            drawn = [self._drawn(one, place, rows, keys) for one in (self.a, self.b)]
            unlike = drawn[0] ^ drawn[1]
            read += unlike.numel()
            cells += int(unlike.sum())
            if at is None and bool(unlike.any()):
                i, j = torch.nonzero(unlike)[0].tolist()
                at = i + rows[0], j + keys[0]
        return (None if at is None else self._cell(place, *at, cells)), read

    def _drawn(
        self, mask: Mask, place: tuple[int, int], rows: tuple[int, int], keys: tuple[int, int]
    ) -> torch.Tensor:
        batch = place[0] if mask.batches is not None else 0
        head = place[1] if mask.heads is not None else 0
        at = Rectangle(rows, keys, self.q_len, self.kv_len, batch, head)
        return mask._read(at, "cpu")

    def _cell(self, place: tuple[int, int], i: int, j: int, cells: int) -> FirstCell:
        rows = max(0, i - _AROUND), min(self.q_len, i + _AROUND + 1)
        keys = max(0, j - _AROUND), min(self.kv_len, j + _AROUND + 1)
        a, b = (self._drawn(one, place, rows, keys) for one in (self.a, self.b))
        by = "a" if bool(a[i - rows[0], j - keys[0]]) else "b"
        picture = "\n".join(_picture(a, b, rows, keys, i))
        return FirstCell("", *place, i, j, by, cells, picture)


def _agreed(
    name: str, said: int | None, one: int | None, other: int | None, default: int | None
) -> int:
    """Return the size that was said, or else the masks' own."""
    known = {size for size in (said, one, other) if size is not None}
    if not known and default is not None:
        return default
    if not known:
        raise CompositionError(f"diff: nothing says {name}; the masks fit any, so give it")
    if said is None and len(known) > 1:
        raise CompositionError(f"diff: the masks are built for {name}={one} and {name}={other}")
    return said if said is not None else known.pop()


def _picture(
    a: torch.Tensor, b: torch.Tensor, rows: tuple[int, int], keys: tuple[int, int], i: int
) -> Iterator[str]:
    wide = max(3, len(str(rows[1] - 1)))
    width = max(1, keys[1] - keys[0])
    yield f"  {'':{wide}}  keys {keys[0]} to {keys[1] - 1}"
    yield f"  {'row':>{wide}}  {'a':{width}}  b"
    for n in range(rows[1] - rows[0]):
        mark = ">" if rows[0] + n == i else " "
        drawn = ("".join(".#"[int(cell)] for cell in one[n].tolist()) for one in (a, b))
        yield f"{mark} {rows[0] + n:>{wide}}  {'  '.join(drawn)}"
