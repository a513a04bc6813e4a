"""The tensors of a kernel call, cut into the pieces that the emulator computes one by one.

A `Piece` is a set of score matrices of equal size and equal mode arguments: some batch
elements and some key heads of a dense call, or some key heads of one packed sequence. Its
tensors are views, ordered [b, n, s, d] whatever the layout; keys are never repeated for
grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange

from attnkit.errors import KernelContractError, KernelContractTypeError
from attnkit.kernel.call import KernelCall, TensorSpec
from attnkit.kernel.sizes import LAYOUTS

__all__ = ["Operands", "Piece", "Tile", "by_head", "check_tensors", "pieces"]

# Tiles are at most 1024 on a side, because the compressed masks can be read at any diagonal
# only up to there. These sizes keep a tile of scores (1 MiB in float32) in a core's cache and
# waste little on the diagonal; how many heads share a tile follows from the budget of cells.
_TILE_ROWS, _TILE_COLUMNS = 128, 512
_TILE_CELLS = 2**18


class Tile(NamedTuple):
    """Rows ``i0 <= i < i1`` and keys ``j0 <= j < j1`` of a score matrix."""

    i0: int
    i1: int
    j0: int
    j1: int

    @property
    def height(self) -> int:
        """The number of rows."""
        return self.i1 - self.i0

    @property
    def width(self) -> int:
        """The number of keys."""
        return self.j1 - self.j0


@dataclass(frozen=True)
class Operands:
    """The tensors that a kernel reads beside query, key and value."""

    atten_mask: torch.Tensor | None = None
    pse: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    dropout_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """Score matrices computed together: batch elements `batch` x key heads `kv_heads`."""

    sequence: int
    q_len: int
    kv_len: int
    tokens: tuple[slice, slice]
    batch: slice
    kv_heads: slice
    group: int
    first_decision: int

    @property
    def heads(self) -> slice:
        """The query heads that read the piece's key heads."""
        return slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view [b, n, q_len, ...] of a [b, n, s, ...] tensor of query rows."""
        return tensor[self.batch, self.heads, self.tokens[0]]

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view [b, n_kv, kv_len, ...] of a [b, n_kv, s, ...] tensor of keys."""
        return tensor[self.batch, self.kv_heads, self.tokens[1]]

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into tiles."""
        for i0 in range(0, self.q_len, _TILE_ROWS):
            yield i0, min(i0 + _TILE_ROWS, self.q_len)

    def column_tiles(self, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[Tile]:
        """Cut the visited keys of some rows into tiles."""
        for j0 in range(columns[0], columns[1], _TILE_COLUMNS):
            yield Tile(*rows, j0, min(j0 + _TILE_COLUMNS, columns[1]))


def by_head(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Return the view [b, n, s, d] of a tensor in an input layout (b = 1 when packed)."""
    if layout == "BNSD":
        return tensor
    if layout == "TND":
        return tensor.transpose(0, 1).unsqueeze(0)
    return rearrange(tensor, f"{LAYOUTS[layout]} -> b n s d", n=heads)


def pieces(call: KernelCall) -> Iterator[Piece]:
    """Cut a call into pieces whose score tiles stay within the budget."""
    group = call.num_heads // call.num_kv_heads
    if call.is_packed:
        q0 = kv0 = decision = 0
        for b, (q_len, kv_len) in enumerate(call.sequences):
            tokens = (slice(q0, q0 + q_len), slice(kv0, kv0 + kv_len))
            if q_len and kv_len:
                yield from _split(call, b, tokens, slice(0, 1), group, decision)
            q0, kv0 = q0 + q_len, kv0 + kv_len
            decision += call.num_heads * q_len * kv_len
    elif call.batch and call.q_len and call.kv_len:
        tokens = (slice(0, call.q_len), slice(0, call.kv_len))
        yield from _split(call, 0, tokens, slice(0, call.batch), group, 0)


def _split(
    call: KernelCall,
    sequence: int,
    tokens: tuple[slice, slice],
    batch: slice,
    group: int,
    decision: int,
) -> Iterator[Piece]:
    q_len, kv_len = (t.stop - t.start for t in tokens)
    cells = min(q_len, _TILE_ROWS) * min(kv_len, _TILE_COLUMNS) * group
    heads = max(1, min(call.num_kv_heads, _TILE_CELLS // cells))
    rows = max(1, _TILE_CELLS // (cells * heads)) if heads == call.num_kv_heads else 1
    for b0 in range(batch.start, batch.stop, rows):
        for n0 in range(0, call.num_kv_heads, heads):
            yield Piece(
                sequence,
                q_len,
                kv_len,
                tokens,
                slice(b0, min(b0 + rows, batch.stop)),
                slice(n0, min(n0 + heads, call.num_kv_heads)),
                group,
                decision,
            )


def check_tensors(
    call: KernelCall, given: dict[str, torch.Tensor | None], expected: dict[str, TensorSpec | None]
) -> None:
    """Refuse tensors that are not the ones the call describes."""
    for name, tensor in given.items():
        wanted = expected[name]
        if tensor is None and wanted is None:
            continue
        if tensor is None:
            raise KernelContractError(f"the call describes {name}={wanted}, but none was given")
        found = TensorSpec.of(tensor)
        if wanted is None:
            raise KernelContractError(
                f"{name} {found} was given, but the call describes none; put a TensorSpec of it "
                "into the KernelCall"
            )
        if found.shape != wanted.shape:
            raise KernelContractError(f"{name} is {found}; the call describes {wanted}")
        if found.dtype != wanted.dtype:
            raise KernelContractTypeError(f"{name} is {found}; the call describes {wanted}")
        if tensor.device != (first := next(t for t in given.values() if t is not None)).device:
            raise KernelContractError(
                f"{name} is on {tensor.device}, query on {first.device}; move them together"
            )
