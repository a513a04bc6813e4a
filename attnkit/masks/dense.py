"""`Dense`: a mask from a boolean tensor, with the region recovered where there is one."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from attnkit.arguments import check_readable, describe
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.trace import enclosed

__all__ = ["Dense", "boolean_cells", "packed_cells", "unpacked_cells"]

_MOST_CELLS = 1 << 33  # a GiB of bits

_SHAPE = re.compile(r"(?:(\d{1,18})x)?(\d{1,18})x(\d{1,18})x(\d{1,18})")

_Shape = tuple[int, int, int, int]


@MASKS.register("dense")
@dataclass(frozen=True, repr=False, eq=False)
class Dense(Mask):
    """The cells of a boolean tensor; the caller says which ones True marks.

    ``Dense.keep(t)``: True = allowed (torch's SDPA, transformers). ``Dense.drop(t)``: True =
    masked out (`nn.MultiheadAttention`, the fused kernel). Shapes [Sq, Skv] and [B or 1, N or 1,
    Sq or 1, Skv]: an axis of 1 serves all. [N, Sq, Skv] is one matrix per head; where there are as
    many batch elements it is refused, for it may mean these. The tensor is copied, one bit per
    cell: a later write to it does not change the mask. Where its cells form a small union of
    slices, the mask knows its region, and is planned as if it had been named. It holds at most
    2**33 cells.

    >>> import torch
    >>> causal = Dense.keep(torch.ones(4, 4).tril().bool())
    >>> causal.region(4, 4)
    Region.of(Slice(i0=0, i1=4, j0=0, j1=4, lo=-3, hi=0))
    """

    packed: str

    def __post_init__(self) -> None:
        given: object = self.packed
        if isinstance(given, torch.Tensor | np.ndarray):
            raise CompositionTypeError(
                f"Dense got {describe(given)}, and does not guess what True means: "
                "Dense.keep(tensor) where True marks allowed cells, Dense.drop(tensor) where it "
                "marks masked ones"
            )
        if not isinstance(given, str):
            raise CompositionTypeError(
                f"Dense got packed={describe(given)}; build one with Dense.keep(tensor) or "
                "Dense.drop(tensor)"
            )
        self._content  # noqa: B018 -- text that is not a mask is an error now

    @cached_property
    def _content(self) -> tuple[_Shape, bytes]:
        """The shape, and the cells packed into bits."""
        return unpacked_cells(self.packed)

    @cached_property
    def _enclosures(self) -> dict[tuple[int, int], Enclosure]:
        """What was recovered so far, by (batch, head); lives as long as the mask."""
        return {}

    @property
    def _unread(self) -> int:
        return prod(self._content[0]) * (not self._enclosures)

    @classmethod
    def keep(cls, tensor: torch.Tensor) -> Dense:
        """Build from a tensor where True marks an allowed cell."""
        return cls(packed_cells(boolean_cells(tensor, "keep"), True))

    @classmethod
    def drop(cls, tensor: torch.Tensor) -> Dense:
        """Build from a tensor where True marks a cell that is masked out.

        >>> import torch
        >>> Dense.drop(torch.tensor([[False, True]])).region(1, 2).area
        1
        """
        return cls(packed_cells(boolean_cells(tensor, "drop"), False))

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The region itself where it is small, else a hull of the cells."""
        plane = self._plane_index(batch, head)
        _, _, rows, keys = self._content[0]
        if plane not in self._enclosures:
            whole = Rectangle((0, rows), (0, keys), rows, keys, *plane)
            self._enclosures[plane] = enclosed(
                lambda i0, i1: self._cells(whole._replace(rows=(i0, i1)), "cpu"),
                rows,
                keys,
                max_runs=8 * (rows + keys) + 64,
            )
        known = self._enclosures[plane]
        if rows == 1 != q_len:
            each = Region.of(*(Slice(0, q_len, *run) for run in known.inner.row(0)))
            known = Enclosure(each, each)  # one row is always a region
        return known

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also refuse three axes that may mean batch elements."""
        if self.heads is not None and self._axes == 3 and self.heads == batch:
            raise CompositionError(
                f"{self!r} was given with three axes, the first of which counts heads, and there "
                f"are {batch} batch elements too; write tensor[:, None] for one matrix per batch "
                "element, tensor[None] for one per head"
            )
        super().check(q_len, kv_len, batch, heads)

    @property
    def _axes(self) -> int:
        return self.packed[:80].partition(":")[0].count("x") + 1

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        if device is None:
            device = torch.get_default_device()
        (_, n, q_len, kv_len), bits = self._content
        batch, head = self._plane_index(at.batch, at.head)
        # The bit where each row begins, and the bytes around its keys: no others are unpacked.
        first = ((batch * n + head) * q_len + np.arange(*at.rows)) * kv_len + at.keys[0]
        around = first[:, None] // 8 + np.arange(-(-(at.shape[1] + 7) // 8))
        cells = np.zeros(at.shape, dtype=np.bool_)
        if cells.size:
            read = np.unpackbits(np.frombuffer(bits, np.uint8).take(around, mode="clip"), axis=1)
            for start in np.unique(first % 8).tolist():
                own = first % 8 == start
                cells[own] = read[own, start : start + at.shape[1]]
        return torch.from_numpy(cells).to(device)

    def _of_heads(self, start: int, stop: int) -> Mask:
        (batch, _, q_len, kv_len), _ = self._content
        whole = Rectangle((0, q_len), (0, kv_len), q_len, kv_len)
        planes = [
            self._cells(whole._replace(batch=b, head=h), "cpu")
            for b in range(batch)
            for h in range(start, stop)
        ]
        return Dense.keep(torch.stack(planes).view(batch, stop - start, q_len, kv_len))

    def _plane_index(self, batch: int, head: int) -> tuple[int, int]:
        b, n, _, _ = self._content[0]
        return (batch if b > 1 else 0, head if n > 1 else 0)

    def _value(self) -> Hashable:
        # Not the text: another zlib packs the same cells differently.
        return self._axes, self._content

    @property
    def batches(self) -> int | None:
        """As the tensor's; 1 serves every batch element."""
        count = self._content[0][0]
        return count if count > 1 else None

    @property
    def heads(self) -> int | None:
        """As the tensor's; 1 serves every head."""
        count = self._content[0][1]
        return count if count > 1 else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The tensor's lengths; one row serves any number of queries."""
        _, _, q_len, kv_len = self._content[0]
        return None if q_len == 1 else q_len, kv_len

    @property
    def anchored(self) -> bool:
        """Unless it is a row that serves every query."""
        return self._content[0][2] != 1

    def __repr__(self) -> str:
        shape, bits = self._content
        allowed = int.from_bytes(bits, "big").bit_count()
        return f"<masks.Dense {'x'.join(map(str, shape[-self._axes :]))}, {allowed} allowed>"


def boolean_cells(tensor: object, name: str) -> torch.Tensor:
    """Return a tensor that `Dense.keep` and `Dense.drop` take, checked."""
    if isinstance(tensor, torch.Tensor):
        check_readable(f"Dense.{name}", tensor)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
        raise CompositionTypeError(
            f"Dense.{name} takes a bool tensor, got {describe(tensor)}; compare first (t == 0, "
            "t > -1), and give an additive bias to pse.Dense"
        )
    if not 2 <= tensor.dim() <= 4:
        raise CompositionError(
            f"Dense.{name} got shape {tuple(tensor.shape)}; it takes [Sq, Skv], [N, Sq, Skv] or "
            "[B or 1, N or 1, Sq or 1, Skv]"
        )
    if 0 in tensor.shape[:-2]:
        raise CompositionError(
            f"Dense.{name} got shape {tuple(tensor.shape)}, which holds no score matrix; give at "
            "least one batch element and head"
        )
    return tensor


@untraced(MASK_IN_GRAPH)
def packed_cells(tensor: torch.Tensor, keep: bool) -> str:
    """Return ``BxNxSqxSkv:`` (without B of three axes) and the bits, deflated, in base 64."""
    if tensor.numel() > _MOST_CELLS:  # nothing is allocated before
        raise CompositionError(
            f"a dense mask of shape {tuple(tensor.shape)} would have {tensor.numel()} cells; it "
            f"holds at most {_MOST_CELLS} (name its parts, or give masks.Predicate)"
        )
    cells = (tensor if keep else ~tensor).detach().cpu().numpy()
    # Only three axes leave open what the first one counts, if it counts anything.
    shape = cells.shape if cells.ndim == 3 < 2 + len(cells) else (1, 1, *cells.shape)[-4:]
    bits = zlib.compress(np.packbits(cells).tobytes(), level=1)
    return "x".join(map(str, shape)) + ":" + base64.b64encode(bits).decode()


def unpacked_cells(packed: str, owner: str = "Dense") -> tuple[_Shape, bytes]:
    """Return the four sizes of packed cells, and their bits."""
    try:
        head, _, body = packed.partition(":")
        found = _SHAPE.fullmatch(head)
        if found is None:
            raise ValueError("it begins with a shape, BxNxSqxSkv:")
        b, n, q_len, kv_len = (int(size or 1) for size in found.groups())
        cells = b * n * q_len * kv_len
        if min(b, n) < 1 or cells > _MOST_CELLS:
            raise ValueError(f"a shape has 1 to {_MOST_CELLS} cells, or no rows or keys")
        deflated, size = base64.b64decode(body, validate=True), -(-cells // 8)
        stream = zlib.decompressobj()
        # No more than `size` is ever unpacked, and nothing is packed to less than a thousandth.
        likely = size <= 1100 * len(deflated) + 64
        bits = stream.decompress(deflated, size + 1) if likely else b""
        if not likely or len(bits) != size or not stream.eof or stream.unused_data:
            raise ValueError("the number of bits does not fit the shape")
        if cells % 8 and bits[-1] & (0xFF >> cells % 8):
            raise ValueError("bits are set beyond the last cell")
    except (ValueError, zlib.error) as error:
        raise CompositionError(
            f"{owner} got packed={packed[:40]!r}, not a packed mask ({error}); build one with "
            + ("Dense.keep(tensor) or Dense.drop(tensor)" if owner == "Dense" else "a bool tensor")
        ) from None
    return (b, n, q_len, kv_len), bits
