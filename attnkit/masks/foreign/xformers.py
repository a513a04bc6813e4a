"""xFormers' mask classes, read as sets by their names and fields; xFormers is not imported.

They are 20 classes, one for each combination. Five cut a score matrix of any lengths; the others
cut it into blocks, of whose keys some may be unused, scattered, or in pages. A subclass of yours is
read as its parent unless it says its cells anew: then they are evaluated.

Source: xformers/ops/fmha/attn_bias.py of version 0.0.35.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from attnkit.arguments import check_int, check_ints, check_readable
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import Full, Mask
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.documents import Documents
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.recover import recover
from attnkit.masks.slices import Slices

__all__ = ["KeyBlocks", "from_xformers", "key_blocks", "xformers_class"]

BIASED = "LowerTriangularMaskWithTensorBias"

_PLAIN: dict[str, Callable[[Any], Mask]] = {
    "LowerTriangularMask": lambda bias: Causal("top_left"),
    "LowerTriangularFromBottomRightMask": lambda bias: Causal(),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda bias: _window(bias),
    "LocalAttentionFromBottomRightMask": lambda bias: _band(bias),
}

_INSIDE: dict[str, Callable[[Any], Mask | None]] = {
    "BlockDiagonalMask": lambda bias: None,
    "BlockDiagonalCausalMask": lambda bias: Causal("top_left"),
    "BlockDiagonalCausalFromBottomRightMask": lambda bias: Causal(),
    "BlockDiagonalCausalLocalAttentionMask": lambda bias: SlidingWindow(
        _window(bias).size, "top_left"
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda bias: _window(bias),
    "BlockDiagonalPaddedKeysMask": lambda bias: None,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: Causal(),
    "BlockDiagonalLocalAttentionPaddedKeysMask": lambda bias: _band(bias),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": lambda bias: _window(bias),
    "BlockDiagonalGappyKeysMask": lambda bias: None,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda bias: Causal(),
    "PagedBlockDiagonalPaddedKeysMask": lambda bias: None,
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: Causal(),
    "PagedBlockDiagonalGappyKeysMask": lambda bias: None,
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": lambda bias: Causal(),
}

# What says the cells of a class: where a subclass has its own, its parent's name says nothing.
_CELLS = ("materialize", "_create_block_mask")


def _window(bias: Any) -> SlidingWindow:
    return SlidingWindow(check_int("xFormers: window_size", bias._window_size, 1))


def _band(bias: Any) -> Band:
    left, right = (check_int(f"xFormers: {n}", getattr(bias, n), 0) for n in _ENDS)
    return Band(left, right)


_ENDS = ("window_left", "window_right")


@dataclass(frozen=True, eq=False)
class KeyBlocks:
    """Blocks of queries, one behind the other, and the keys that each of them has for itself.

    Block b has `q_lens[b]` queries, and the `kv_lens[b]` keys from `starts[b]` on, of `kv_len` in
    all. With pages, `starts` count along the pages of its own row of `table` ``blocks pages``, of
    `page` keys each, and the keys are those of the pages (`kv_len` is None).
    """

    q_lens: tuple[int, ...]
    starts: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_len: int | None
    inside: Mask | None
    table: torch.Tensor | None = None
    page: int = 0

    @property
    def closed(self) -> bool:
        """Whether the blocks' keys are all there are, in order: nothing must be gathered.

        >>> KeyBlocks((2, 1), (0, 4), (4, 1), 5, None).closed
        True
        """
        ends = tuple(accumulate(self.kv_lens, initial=0))
        return self.table is None and self.starts == ends[:-1] and self.kv_len == ends[-1]

    def mask(self) -> Mask:
        """Return the set of cells, as a mask of the whole score matrix.

        >>> KeyBlocks((1, 1), (0, 3), (2, 3), 6, None).mask()
        Documents((1, 0, 1), (2, 1, 3))
        """
        if self.table is not None:
            return self._paged(self.table)
        ends = [a + n for a, n in zip(self.starts, self.kv_lens, strict=True)]
        if all(a <= b for a, b in zip(ends, self.starts[1:], strict=False)):
            return self._in_order(ends)
        return self._placed(
            [[(0, n, a)] for a, n in zip(self.starts, self.kv_lens, strict=True)], self.kv_len or 0
        )

    def _in_order(self, ends: list[int]) -> Mask:
        """Unused keys are documents without queries: nobody sees them."""
        rows: list[int] = []
        keys: list[int] = []
        at = 0
        for q_len, start, kv_len in zip(self.q_lens, self.starts, self.kv_lens, strict=True):
            if start > at:
                rows, keys = [*rows, 0], [*keys, start - at]
            rows, keys, at = [*rows, q_len], [*keys, kv_len], start + kv_len
        if (self.kv_len or 0) > at:
            rows, keys = [*rows, 0], [*keys, (self.kv_len or 0) - at]
        return Documents(rows, keys, inside=self.inside)

    def _placed(self, pieces: list[list[tuple[int, int, int]]], kv_len: int) -> Mask:
        """Put runs ``(first, stop, where)`` of the keys of each block where they lie."""
        inside = Full() if self.inside is None else self.inside
        found, row = [], 0
        for q_len, keys, own in zip(self.q_lens, self.kv_lens, pieces, strict=True):
            cells = inside.region(q_len, keys)
            found += [
                cells.cut((0, q_len), (first, stop)).shift(row, where) for first, stop, where in own
            ]
            row += q_len
        return Slices.of(Region.union(found), row, kv_len)

    def _paged(self, table: torch.Tensor) -> Mask:
        pages, pieces, most = self.pages(table), [], 0
        for start, kv_len, own in zip(self.starts, self.kv_lens, pages, strict=True):
            runs = []
            for n, page in enumerate(own, start // self.page):
                first, stop = max(start, n * self.page), min(start + kv_len, (n + 1) * self.page)
                where = page * self.page + first - n * self.page
                runs.append((first - start, stop - start, where))
                most = max(most, (page + 1) * self.page)
            pieces.append(runs)
        return self._placed(pieces, max(most, (int(table.max()) + 1) * self.page))

    def pages(self, table: torch.Tensor) -> list[list[int]]:
        """Return the pages that each block reads; one that it reads twice is an error."""
        check_readable("xFormers: block_tables", table)
        found = []
        for row, start, kv_len in zip(table.tolist(), self.starts, self.kv_lens, strict=True):
            used = row[start // self.page : -(-(start + kv_len) // self.page)] if kv_len else []
            if len(set(used)) < len(used):
                raise CompositionError(
                    f"xFormers: block_tables lists a page twice in {shown(row)}, so its keys count "
                    "twice, which no set of cells says; give each page once"
                )
            found.append(used)
        return found


def xformers_class(attn_bias: object) -> str | None:
    """Return the name of the xFormers class that says an object's cells, if one does.

    >>> xformers_class(torch.zeros(1)) is None
    True
    """
    for kind in type(attn_bias).__mro__:
        known = kind.__name__ in (*_PLAIN, *_INSIDE, BIASED)
        if known and kind.__module__.rpartition(".")[2] == "attn_bias":
            return kind.__name__
        if any(name in vars(kind) for name in _CELLS):
            return None
    return None


def key_blocks(attn_bias: Any) -> KeyBlocks | None:
    """Return the blocks of a class that has some, else None.

    Raises `CompositionError` for lengths that are not those of blocks.
    """
    name = xformers_class(attn_bias)
    if name not in _INSIDE:
        return None
    queries, keys = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    q_lens = _steps("q_seqinfo", queries.seqstart_py)
    ends = tuple(keys.seqstart_py)
    starts = check_ints("xFormers: k_seqinfo", ends[: len(q_lens)], 0)
    inside = _INSIDE[name](attn_bias)
    own = getattr(keys, "seqlen_py", None)
    lens = _steps("k_seqinfo", ends) if own is None else tuple(own)
    if name.startswith("Paged"):
        if "Gappy" in name:  # there they are where the keys end
            lens = tuple(end - start for start, end in zip(starts, lens, strict=True))
        else:
            starts = (0,) * len(q_lens)
        page = check_int("xFormers: page_size", attn_bias.page_size, 1)
        table = attn_bias.block_tables
        return _checked(KeyBlocks(q_lens, starts, lens, None, inside, table, page))
    return _checked(KeyBlocks(q_lens, starts, lens, ends[-1], inside))


def from_xformers(attn_bias: Any, *, q_len: int | None = None, kv_len: int | None = None) -> Lifted:
    """Return the mask that an `xformers.ops.fmha.attn_bias` object is.

    Masks of any lengths are `Causal`, `SlidingWindow` and `Band`; blocks are `Documents`, in which
    unused keys are documents without queries; keys in pages are literal slices over the pages.
    A class that says its cells itself is evaluated by its `materialize`, for which `q_len` and
    `kv_len` are needed. Raises `CompositionError` for what is no mask: a bias tensor
    (`pse.split_additive`), a `LowerTriangularMaskWithTensorBias`
    (`attnkit.interop.xformers.memory_efficient_attention` takes both).

    >>> kind = type("LowerTriangularMask", (), {"__module__": "xformers.ops.fmha.attn_bias"})
    >>> print(from_xformers(kind()))  # xformers.ops.LowerTriangularMask() itself will do
    Causal(align='top_left'), of xFormers' LowerTriangularMask: its class says so
    """
    name = xformers_class(attn_bias)
    source = f"xFormers' {type(attn_bias).__name__}"
    if name in _PLAIN:
        return Lifted(_PLAIN[name](attn_bias), source, ("its class says so",))
    if name in _INSIDE:
        blocks = key_blocks(attn_bias)
        if blocks is not None:
            return Lifted(blocks.mask(), source, (_told(blocks),))
    if name == BIASED:
        raise CompositionError(
            f"{source} is a causal mask and a bias; give it to attnkit.interop.xformers."
            "memory_efficient_attention, or masks.Causal('top_left') and pse.Dense(its tensor)"
        )
    return _evaluated(attn_bias, source, q_len, kv_len)


def _evaluated(attn_bias: Any, source: str, q_len: int | None, kv_len: int | None) -> Lifted:
    if isinstance(attn_bias, torch.Tensor) or not callable(getattr(attn_bias, "materialize", None)):
        raise CompositionTypeError(
            f"from_xformers takes an object of xformers.ops.fmha.attn_bias, got {shown(attn_bias)} "
            "(a tensor that is added to the scores: pse.split_additive)"
        )
    if q_len is None or kv_len is None:
        raise CompositionError(
            f"{source} is not known, and says its cells for given lengths only; give q_len and "
            "kv_len"
        )
    cells = attn_bias.materialize((q_len, kv_len))
    allowed = cells == 0
    if not bool((allowed | (cells == -torch.inf)).all()):
        raise CompositionError(
            f"{source} adds other values than 0 and -inf to scores, so it is not a mask; give its "
            "materialize(...) to pse.split_additive"
        )
    found = recover(allowed)
    return Lifted(found.mask, source, ("materialize, read cell by cell",), cells.numel())


def _told(blocks: KeyBlocks) -> str:
    count = len(blocks.q_lens)
    keys = "in pages" if blocks.table is not None else "all" if blocks.closed else "with gaps"
    inside = "" if blocks.inside is None else f", inside of each {blocks.inside!r}"
    return f"{count} block{'s' * (count != 1)}, keys {keys}{inside}"


def _steps(name: str, ends: Any) -> tuple[int, ...]:
    found = check_ints(f"xFormers: {name}", ends, 0)
    return tuple(b - a for a, b in pairwise(found))


def _checked(blocks: KeyBlocks) -> KeyBlocks:
    lens = (blocks.q_lens, blocks.starts, blocks.kv_lens)
    ends = [a + n for a, n in zip(blocks.starts, blocks.kv_lens, strict=False)]
    room = blocks.kv_len
    if blocks.table is not None:
        room = blocks.table.shape[1] * blocks.page
    bad = len({len(one) for one in lens}) > 1 or min((*blocks.q_lens, *blocks.kv_lens)) < 0
    if bad or room is None or any(end > room for end in ends):
        raise CompositionError(
            f"xFormers: blocks of {shown(blocks.q_lens)} queries with {shown(blocks.kv_lens)} keys "
            f"from {shown(blocks.starts)} on, of {room}; every block has keys that exist"
        )
    return blocks
