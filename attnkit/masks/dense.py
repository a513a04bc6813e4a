"""`Dense`: a mask from a boolean tensor, with the region recovered where there is one."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Enclosure, Mask

__all__ = ["Dense"]


@MASKS.register("dense")
@dataclass(frozen=True, repr=False)
class Dense(Mask):
    """The cells of a boolean tensor; the caller says which ones True marks.

    ``Dense.keep(t)``: True = allowed (torch's SDPA, transformers). ``Dense.drop(t)``: True =
    masked out (`nn.MultiheadAttention`, the fused kernel). Shapes [Sq, Skv], [N, Sq, Skv] and
    [B or 1, N or 1, Sq, Skv]. The tensor is copied, one bit per cell: a later write to it does
    not change the mask. Where its cells form a small union of slices, the mask knows its
    region, and is planned as if it had been named.

    >>> import torch
    >>> causal = Dense.keep(torch.ones(4, 4).tril().bool())
    >>> causal.region(4, 4) == Region.of(Slice(0, 4, 0, 4, hi=0))
    True
    """

    packed: str
    _bits: bytes = field(init=False, compare=False)
    _shape: tuple[int, int, int, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        shape, bits = _unpack(self.packed)
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "_bits", bits)

    @classmethod
    def keep(cls, tensor: torch.Tensor) -> Dense:
        """Build from a tensor where True marks an allowed cell."""
        return cls(_pack(_boolean(tensor, "keep")))

    @classmethod
    def drop(cls, tensor: torch.Tensor) -> Dense:
        """Build from a tensor where True marks a cell that is masked out."""
        return cls(_pack(~_boolean(tensor, "drop")))

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The region itself where it is small, else a hull of the cells."""
        return _recover(self, *self._plane(batch, head))

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        b, h = self._plane(batch, head)
        return torch.from_numpy(_array(self)[b, h].astype(bool)).to(device or "cpu")

    def _plane(self, batch: int, head: int) -> tuple[int, int]:
        return (batch if self._shape[0] > 1 else 0, head if self._shape[1] > 1 else 0)

    @property
    def batches(self) -> int | None:
        """As the tensor's; 1 serves every batch element."""
        return self._shape[0] if self._shape[0] > 1 else None

    @property
    def heads(self) -> int | None:
        """As the tensor's; 1 serves every head."""
        return self._shape[1] if self._shape[1] > 1 else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The tensor's lengths."""
        return self._shape[2], self._shape[3]

    def __repr__(self) -> str:
        shape = "x".join(str(n) for n in self._shape)
        return f"<masks.Dense {shape}, {int(_array(self).sum())} allowed>"


def _boolean(tensor: object, name: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CompositionTypeError(
            f"Dense.{name} takes a bool tensor, got {kind}; compare first (t == 0, t > -1), and "
            "give an additive bias to pse.Dense"
        )
    if not 2 <= tensor.dim() <= 4:
        raise CompositionError(
            f"Dense.{name} got shape {tuple(tensor.shape)}; it takes [Sq, Skv], [N, Sq, Skv] or "
            "[B or 1, N or 1, Sq, Skv]"
        )
    return tensor


def _pack(tensor: torch.Tensor) -> str:
    """Return ``BxNxSqxSkv:`` and the bits, deflated, in base 64."""
    cells = tensor.detach().cpu().reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape)).numpy()
    bits = zlib.compress(np.packbits(cells).tobytes(), level=1)
    return "x".join(map(str, cells.shape)) + ":" + base64.b64encode(bits).decode()


def _unpack(packed: str) -> tuple[tuple[int, int, int, int], bytes]:
    try:
        head, body = packed.split(":")
        b, n, q_len, kv_len = (int(part) for part in head.split("x"))
        bits = zlib.decompress(base64.b64decode(body, validate=True))
        if len(bits) != -(-b * n * q_len * kv_len // 8):
            raise ValueError("the number of bits does not fit the shape")
    except (ValueError, AttributeError, zlib.error) as error:
        raise CompositionError(
            f"Dense got packed={str(packed)[:40]!r}, which is no packed mask ({error}); build one "
            "with Dense.keep(tensor) or Dense.drop(tensor)"
        ) from None
    return (b, n, q_len, kv_len), bits


@lru_cache(maxsize=8)
def _array(mask: Dense) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    b, n, q_len, kv_len = mask._shape
    flat = np.unpackbits(np.frombuffer(mask._bits, dtype=np.uint8), count=b * n * q_len * kv_len)
    return flat.reshape(mask._shape)


@lru_cache(maxsize=256)
def _recover(mask: Dense, batch: int, head: int) -> Enclosure:
    """Trace the runs of each row; give up on what is no small union of slices."""
    cells = _array(mask)[batch, head]
    q_len, kv_len = cells.shape
    edges = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    few = 8 * (q_len + kv_len) + 64
    if len(rows) > few:
        hull = Region.of(
            Slice(int(rows[0]), int(rows[-1]) + 1, int(starts.min()), int(stops.max()))
        )
        return Enclosure(Region.empty(), hull)
    bounds = np.searchsorted(rows, np.arange(q_len + 1))
    region = Region.from_rows(
        [
            tuple(zip(starts[a:b].tolist(), stops[a:b].tolist(), strict=True))
            for a, b in pairwise(bounds.tolist())
        ]
    )
    return Enclosure(region, region)
