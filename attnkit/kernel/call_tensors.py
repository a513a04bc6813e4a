"""The tensors of a kernel call, and how the emulator cuts their score matrices.

Tensors are views, ordered [b, n, s, d] whatever the layout; keys are never repeated for
grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnkit import layouts
from attnkit.errors import KernelContractError, KernelContractTypeError
from attnkit.kernel.call import KernelCall
from attnkit.kernel.sizes import TensorSpec

__all__ = [
    "CallTensors",
    "CellRange",
    "MatrixGroup",
    "check_devices",
    "check_tensors",
    "matrix_groups",
]

# Tiles are at most 1024 on a side, because the compressed masks can be read at any diagonal
# only up to there. These sizes keep a tile of scores (1 MiB in float32) in a core's cache and
# waste little on the diagonal; how many heads share a tile follows from the budget of cells.
_TILE_ROWS, _TILE_COLUMNS = 128, 512
_TILE_CELLS = 2**18

# What a backward is given of its forward, in the codes of errors.
_GRAD_CODES = ("grad-shape", "grad-dtype")
_STATS_CODES = ("stats-shape", "stats-dtype")
_OTHER_CODES = ("tensor-shape", "tensor-dtype")
_OF = {
    "dy": _GRAD_CODES,
    "attention_in": _GRAD_CODES,
    "softmax_max": _STATS_CODES,
    "softmax_sum": _STATS_CODES,
}


class CellRange(NamedTuple):
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
class CallTensors:
    """A call and the tensors that it reads: query, key and value as [b, n, s, d] views."""

    call: KernelCall
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    atten_mask: torch.Tensor | None = None
    pse: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    dropout_mask: torch.Tensor | None = None

    @classmethod
    def of(cls, call: KernelCall, *tensors: Any) -> CallTensors:
        """Make it from tensors in the order of the fields, in the call's layout."""
        layout = layouts.get(call.layout)
        heads = (call.num_heads, call.num_kv_heads, call.num_kv_heads)
        views = (layout.view(t, n) for t, n in zip(tensors, heads, strict=False))
        return cls(call, *views, *tensors[3:])

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of the computation."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MatrixGroup:
    """Score matrices computed together: some batch elements x some key heads.

    They have equal sizes and equal mode arguments. Those of a packed call belong to one sequence.
    """

    sequence: int
    tokens: tuple[slice, slice]
    batch: slice
    kv_heads: slice
    queries_per_key_head: int
    first_decision: int

    @property
    def q_len(self) -> int:
        """The number of queries."""
        return int(self.tokens[0].stop - self.tokens[0].start)

    @property
    def kv_len(self) -> int:
        """The number of keys."""
        return int(self.tokens[1].stop - self.tokens[1].start)

    @property
    def heads(self) -> slice:
        """The query heads that read the key heads."""
        each = self.queries_per_key_head
        return slice(self.kv_heads.start * each, self.kv_heads.stop * each)

    def rows(self, tensor: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        """Return the view [b, n, i1 - i0, ...] of some rows of a [b, n, s, ...] tensor."""
        return tensor[self.batch, self.heads, self.tokens[0]][:, :, rows[0] : rows[1]]

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view [b, n_kv, kv_len, ...] of a [b, n_kv, s, ...] tensor of keys."""
        return tensor[self.batch, self.kv_heads, self.tokens[1]]

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Cut the rows."""
        for i0 in range(0, self.q_len, _TILE_ROWS):
            yield i0, min(i0 + _TILE_ROWS, self.q_len)

    def cell_ranges(self, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[CellRange]:
        """Cut the visited keys of some rows."""
        for j0 in range(columns[0], columns[1], _TILE_COLUMNS):
            yield CellRange(*rows, j0, min(j0 + _TILE_COLUMNS, columns[1]))


def matrix_groups(call: KernelCall) -> Iterator[MatrixGroup]:
    """Cut a call into groups whose tiles stay within the budget of cells."""
    if not call.is_packed:
        tokens = (slice(0, call.q_len), slice(0, call.kv_len))
        yield from _groups(call, 0, tokens, call.batch, 0)
        return
    q0 = kv0 = decision = 0
    for b, (q_len, kv_len) in enumerate(call.sequences):
        tokens = (slice(q0, q0 + q_len), slice(kv0, kv0 + kv_len))
        yield from _groups(call, b, tokens, 1, decision)
        q0, kv0 = q0 + q_len, kv0 + kv_len
        decision += call.num_heads * q_len * kv_len


def _groups(
    call: KernelCall, sequence: int, tokens: tuple[slice, slice], batch: int, decision: int
) -> Iterator[MatrixGroup]:
    q_len, kv_len = (t.stop - t.start for t in tokens)
    if not q_len or not kv_len:
        return
    kv_heads, each = call.num_kv_heads, call.num_heads // call.num_kv_heads
    cells = min(q_len, _TILE_ROWS) * min(kv_len, _TILE_COLUMNS) * each
    heads = max(1, min(kv_heads, _TILE_CELLS // cells))
    rows = max(1, _TILE_CELLS // (cells * heads)) if heads == kv_heads else 1
    for b0 in range(0, batch, rows):
        for n0 in range(0, kv_heads, heads):
            some = slice(b0, min(b0 + rows, batch)), slice(n0, min(n0 + heads, kv_heads))
            yield MatrixGroup(sequence, tokens, *some, each, decision)


def check_tensors(
    given: Mapping[str, torch.Tensor | None], expected: Mapping[str, TensorSpec | None]
) -> None:
    """Refuse tensors that are not the ones a call describes, or that its forward leaves."""
    for name, tensor in given.items():
        found, wanted = tensor if tensor is None else TensorSpec.of(tensor, name), expected[name]
        if found != wanted:
            about_dtype = found and wanted and found.shape == wanted.shape
            kind = KernelContractTypeError if about_dtype else KernelContractError
            described = wanted or "none; put a TensorSpec of it into the KernelCall"
            words = f"{name} is {found or 'missing'}; the call describes {described}"
            code = _OF.get(name, _OTHER_CODES)[bool(about_dtype)]
            raise kind(words, [code])
    check_devices(given)


def check_devices(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse tensors that are not in one place."""
    given = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in given.items())
        words = f"the tensors are on different devices: {places}; move them together"
        raise KernelContractError(words, ["device"])
