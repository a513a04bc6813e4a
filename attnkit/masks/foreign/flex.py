"""FlexAttention's masks as sets: a `BlockMask`, or a `mask_mod` alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from attnkit.arguments import check_int, check_readable, describe
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.predicate import MaskFunction, evaluate_at, function_name
from attnkit.masks.recover import Recovered, recover, written_with
from attnkit.masks.runs import Runs
from attnkit.masks.sources import indices_used
from attnkit.masks.symbolic import symbolic
from attnkit.masks.symbols import Extent
from attnkit.masks.trace import CHUNK_CELLS
from attnkit.strips import Canonical

__all__ = ["from_flex", "is_block_mask"]

_ENDLESS = 1 << 30  # the block size of FlexAttention's own mask for "no mask"

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@untraced(MASK_IN_GRAPH)
def from_flex(
    block_mask: object,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
) -> Lifted:
    """Return the mask that a `BlockMask`, or a function ``mask_mod(b, h, q_idx, kv_idx)``, is.

    Of a `BlockMask` the cells are those of its full blocks, and what `mask_mod` allows in its
    partial ones: what FlexAttention's compiled kernels compute. (Its eager path asks `mask_mod`
    everywhere, and never looks at the blocks.) A `mask_mod` that compares numbers of rows with
    numbers of keys is read as a set (`masks.recover`); another is evaluated in the partial blocks.

    `q_len` and `kv_len` are needed for a function; a `BlockMask` has them. `batch` and `heads` are
    those of the call: needed where `mask_mod` tells them apart and the blocks do not. Reads the
    blocks, which waits for a device.

    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> def window(b, h, i, j): return (i >= j) & (i - j < 200)
    >>> print(from_flex(create_block_mask(window, 1, 1, 512, 512, device="cpu")))
    SlidingWindow(200), of a BlockMask 512 x 512: blocks of 128 x 128, 0 full and 9 partial; \
window read as comparisons of rows with keys
    >>> from_flex(lambda b, h, i, j: (i - j).abs() <= 3, 8, 8).mask
    Band(3, 3)
    """
    for name, said, least in (
        ("q_len", q_len, 0), ("kv_len", kv_len, 0), ("batch", batch, 1), ("heads", heads, 1)
    ):  # fmt: skip
        if said is not None:
            check_int(f"from_flex {name}", said, least)
    if not is_block_mask(block_mask):
        if not callable(block_mask) or isinstance(block_mask, torch.Tensor):
            raise CompositionTypeError(
                f"from_flex takes a BlockMask or a function mask_mod(b, h, q_idx, kv_idx), got "
                f"{describe(block_mask)}"
            )
        return _of_function(block_mask, q_len, kv_len, batch, heads)
    given: Any = block_mask
    if min(given.BLOCK_SIZE) >= _ENDLESS:
        return _of_function(given.mask_mod, q_len, kv_len, batch, heads)
    lengths = tuple(map(int, given.seq_lengths))
    for name, said, own in zip(("q_len", "kv_len"), (q_len, kv_len), lengths, strict=True):
        if said not in (None, own):
            raise CompositionError(
                f"from_flex got a BlockMask of {lengths[0]} x {lengths[1]} and {name}={said}; a "
                "BlockMask is for its lengths: make another, or cut the mask: mask[a:b, c:d]"
            )
    return _BlockTables.of(given).lift(batch, heads)


def is_block_mask(value: object) -> bool:
    """Whether something has the fields of FlexAttention's `BlockMask`."""
    fields = ("kv_num_blocks", "kv_indices", "BLOCK_SIZE", "mask_mod", "seq_lengths")
    return all(hasattr(value, name) for name in fields)


def _of_function(
    fn: MaskFunction, q_len: int | None, kv_len: int | None, batch: int | None, heads: int | None
) -> Lifted:
    name = function_name(fn)
    if name == "noop_mask":
        q_len, kv_len = q_len or 1, kv_len or 1
    if q_len is None or kv_len is None:
        raise CompositionError(
            f"from_flex got the function {name} and q_len={q_len}, kv_len={kv_len}; a function "
            "knows no lengths: say both"
        )
    used = indices_used(fn)
    apart = [_told(what, said, what in used, name) for what, said in _of_call(batch, heads)]
    found = recover(fn, q_len, kv_len, batch=apart[0], heads=apart[1])
    read = 0 if found.reason.startswith("comparisons") else q_len * kv_len
    return Lifted(found.mask, f"the mask_mod {name}", (found.reason,), read)


def _of_call(batch: int | None, heads: int | None) -> Iterable[tuple[str, int | None]]:
    return ("batch", batch), ("heads", heads)


def _told(what: str, said: int | None, used: bool, name: str) -> int | None:
    """Return how many batch elements or heads a function tells apart."""
    if used and said is None:
        raise CompositionError(
            f"from_flex: the mask_mod {name} looks at {'b' if what == 'batch' else 'h'}, and "
            f"nothing says how many there are; give {what}="
        )
    return said if used else None


# -- blocks ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _BlockTables:
    """The tables of a `BlockMask`: which blocks [b, h, rows, columns] it has, of each kind."""

    full: Flags
    partial: Flags
    size: tuple[int, int]
    lengths: tuple[int, int]
    mask_mod: MaskFunction

    @classmethod
    def of(cls, given: Any) -> _BlockTables:
        """Read them."""
        partial = _table(given.kv_num_blocks, given.kv_indices)
        full = np.zeros_like(partial)
        if getattr(given, "full_kv_num_blocks", None) is not None:
            full = _table(given.full_kv_num_blocks, given.full_kv_indices)
        q_len, kv_len = map(int, given.seq_lengths)
        rows, columns = map(int, given.BLOCK_SIZE)
        if partial.shape[2] * rows < q_len or partial.shape[3] * columns < kv_len:
            raise CompositionError(
                f"from_flex got a BlockMask with {partial.shape[2]} x {partial.shape[3]} blocks of "
                f"{rows} x {columns}, which do not cover {q_len} x {kv_len}; one that was sliced "
                "by queries has lost where they were: slice the mask instead, mask[a:b, :]"
            )
        function = given.mask_mod
        if partial.any() and function_name(function) == "_sliced_mask_mod_error":
            raise CompositionError(
                "from_flex got a BlockMask that was sliced, which drops its mask_mod; lift the "
                "whole one and slice the mask, or set mask_mod again"
            )
        return cls(full, partial, (rows, columns), (q_len, kv_len), function)

    def lift(self, batch: int | None, heads: int | None) -> Lifted:
        """Return the mask, each kind of score matrix read once."""
        used = indices_used(self.mask_mod) if self.partial.any() else set()
        counts, told = self.partial.shape[:2], function_name(self.mask_mod)
        sizes = [
            count if count > 1 else _told(what, said, what in used, told) or 1
            for count, (what, said) in zip(counts, _of_call(batch, heads), strict=True)
        ]
        known: dict[tuple[object, ...], tuple[Region, int]] = {}
        regions: list[Region] = []
        read = 0
        for place in product(*map(range, sizes)):
            table = tuple(at if count > 1 else 0 for at, count in zip(place, counts, strict=True))
            asked = tuple(
                at if what in used else 0
                for at, what in zip(place, ("batch", "heads"), strict=True)
            )
            key = (self.full[table].tobytes(), self.partial[table].tobytes(), *asked)
            if key not in known:
                known[key] = self._region(self.full[table], self.partial[table], *asked)
                read += known[key][1]
            regions.append(known[key][0])
        per_batch = [tuple(regions[k : k + sizes[1]]) for k in range(0, len(regions), sizes[1])]
        found = written_with(tuple(per_batch), *self.lengths, "its blocks")
        return Lifted(found.mask, f"a BlockMask {self._shape}", self._said(read, found), read)

    @property
    def _shape(self) -> str:
        return f"{self.lengths[0]} x {self.lengths[1]}"

    def _said(self, read: int, found: Recovered) -> tuple[str, ...]:
        blocks = f"blocks of {self.size[0]} x {self.size[1]}, {self.full.sum()} full"
        said = [f"{blocks} and {self.partial.sum()} partial"]
        if self.partial.any():
            how = "evaluated in partial blocks" if read else "read as comparisons of rows with keys"
            said.append(f"{function_name(self.mask_mod)} {how}")
        if not found.named:
            said.append("no named composition that was tried")
        return tuple(said)

    def _region(self, full: Flags, partial: Flags, b: int, h: int) -> tuple[Region, int]:
        """Return the cells of a score matrix, and how many of them were evaluated."""
        whole = _covered(full, self.size, self.lengths)
        if not partial.any():
            return whole, 0
        inside = symbolic(self.mask_mod, Extent(*self.lengths), b, h)
        if inside is not None:
            return whole | (_covered(partial, self.size, self.lengths) & inside), 0
        cells, count = self._evaluated(partial, b, h)
        return whole | cells, count

    def _evaluated(self, partial: Flags, b: int, h: int) -> tuple[Region, int]:
        """Evaluate the function in partial blocks, some of them at a time."""
        rows, columns = self.size
        at = np.argwhere(partial)
        some = max(1, CHUNK_CELLS // (rows * columns))
        parts, count = [], 0
        for start in range(0, len(at), some):
            corners = at[start : start + some] * (rows, columns)
            cells = self._cells(corners, b, h)
            count += cells.size
            found = Runs.of_cells(cells.reshape(-1, columns))
            block, row = np.divmod(found.rows, rows)
            first = corners[block, 1]
            parts.append((corners[block, 0] + row, found.starts + first, found.stops + first))
        return _joined(self.lengths[0], *map(np.concatenate, zip(*parts, strict=True))), count

    def _cells(self, corners: np.ndarray[Any, Any], b: int, h: int) -> Flags:
        tops, lefts = (torch.from_numpy(np.ascontiguousarray(side)) for side in corners.T)
        i = tops[:, None] + torch.arange(self.size[0])
        j = lefts[:, None] + torch.arange(self.size[1])
        # Beyond the lengths a function may look up what is not there; its last row and key do.
        (q_len, kv_len), places = self.lengths, (torch.tensor(b), torch.tensor(h))
        clamped = i.clamp(max=q_len - 1), j.clamp(max=kv_len - 1)
        cells = evaluate_at(self.mask_mod, *places, *clamped)
        cells &= (i < q_len)[:, :, None] & (j < kv_len)[:, None, :]
        found: Flags = cells.numpy()
        return found


def _table(counts: torch.Tensor, indices: torch.Tensor) -> Flags:
    """Return the blocks [b, h, rows, columns] that the first `counts` of the indices name."""
    check_readable("from_flex", counts)
    at = indices.detach().cpu().numpy()[(None,) * (4 - indices.dim())]
    number = counts.detach().cpu().numpy()[(None,) * (3 - counts.dim())]
    there = np.arange(at.shape[-1]) < number[..., None]
    table = np.zeros(at.shape, dtype=np.bool_)
    b, h, row, which = np.nonzero(there)
    table[b, h, row, at[b, h, row, which]] = True
    return table


def _covered(table: Flags, size: tuple[int, int], lengths: tuple[int, int]) -> Region:
    """Return the cells of some blocks."""
    out, (rows, columns), (q_len, kv_len) = Canonical(), size, lengths
    for top, blocks in enumerate(table):
        runs = Runs.of_cells(blocks[None])
        ends = zip((runs.starts * columns).tolist(), (runs.stops * columns).tolist(), strict=True)
        row = tuple((a, 0, min(b, kv_len), 0) for a, b in ends if a < kv_len)
        out.add(top * rows, min((top + 1) * rows, q_len), row)
    return Region(tuple(out.strips))


def _joined(height: int, rows: Any, starts: Any, stops: Any) -> Region:
    """Return the region of runs in any order, of which some touch."""
    order = np.lexsort((starts, rows))
    rows, starts, stops = rows[order], starts[order], stops[order]
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = (rows[1:] != rows[:-1]) | (starts[1:] != stops[:-1])
    last = np.roll(first, -1)
    return Runs(height, rows[first], starts[first], stops[last]).region()
