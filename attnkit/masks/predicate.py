"""`Predicate`: a mask from a function of indices, in FlexAttention's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnkit.arguments import check_int, describe
from attnkit.errors import (
    LONGEST,
    AttnkitError,
    CompositionError,
    CompositionTypeError,
    clipped,
    shown,
)
from attnkit.geometry import Region
from attnkit.masks.base import Enclosure, Mask, Rectangle
from attnkit.masks.trace import row_blocks

__all__ = ["MaskFunction", "Predicate", "evaluate", "evaluate_at", "function_name"]

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class Predicate(Mask):
    """Cells where ``fn(b, h, i, j)`` is true: FlexAttention's `mask_mod` signature.

    `fn` is asked for one cell: its four integers come as tensors without axes, and it returns a
    bool tensor without axes. Many cells are asked for at once by `torch.vmap`, as FlexAttention
    does, so whatever `fn` computes for a pair, ``(feat[i] * feat[j]).sum() > 0``, it computes for
    each pair. `batch` and `num_heads` say how many batch elements and heads it tells apart (None:
    it ignores b, or h). A function is opaque: it equals only itself, has no text that
    `masks.parse` reads, and its region is not known. So its cells are read, inside of the bounds
    of what it is joined with: write what you can as named masks and the plan gets better. Plans
    keep what they read: tensors that `fn` looks at must not change; for others make another mask.

    >>> even = Predicate(lambda b, h, i, j: (i + j) % 2 == 0)
    >>> print(even.show(2, 4))
    #.#.
    .#.#
    """

    fn: MaskFunction
    batch: int | None = None
    num_heads: int | None = None
    anchored = False  # a function of indices knows no lengths

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise CompositionTypeError(
                f"Predicate takes a function fn(b, h, i, j), got {describe(self.fn)}"
            )
        for name in ("batch", "num_heads"):
            if getattr(self, name) is not None:
                check_int(f"Predicate {name}", getattr(self, name), 1)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Nothing is known of a function."""
        return Enclosure(Region.empty(), Region.full(q_len, kv_len))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        (top, bottom), j = at.rows, torch.arange(*at.keys, device=device)
        cells = torch.empty(at.shape, dtype=torch.bool, device=device)
        # Filled: a tensor of a number is copied from the host, which waits for a device.
        places = (at.batch, at.head)
        b, h = (torch.full((), one, dtype=torch.int64, device=device) for one in places)
        for start, stop in row_blocks(top, bottom, len(j)):
            i = torch.arange(start, stop, device=device)
            cells[start - top : stop - top] = evaluate(self.fn, b, h, i, j)
        return cells

    @property
    def batches(self) -> int | None:
        """As said by `batch`."""
        return self.batch

    @property
    def heads(self) -> int | None:
        """As said by `num_heads`."""
        return self.num_heads

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"<masks.Predicate {function_name(self.fn)}>"


def evaluate(
    fn: MaskFunction, b: torch.Tensor, h: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Return ``fn(b, h, i, j)`` for rows i [R] and keys j [K], as a bool tensor [R, K].

    The function is called once; each cell is computed as if it were alone.
    """
    if not (rows.numel() and keys.numel()):
        return torch.zeros(len(rows), len(keys), dtype=torch.bool, device=rows.device)
    return evaluate_at(fn, b, h, rows[None], keys[None])[0]


def evaluate_at(
    fn: MaskFunction, b: torch.Tensor, h: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Return ``fn(b, h, i, j)`` for blocks of rows [P, R] and keys [P, K], as bools [P, R, K]."""
    name = f"the mask function {function_name(fn)}"

    def cell(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = fn(b, h, i, j)
        if not isinstance(allowed, torch.Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, torch.Tensor) else type(allowed).__name__
            raise CompositionTypeError(
                f"{name} returned {kind}; fn(b, h, i, j) returns a bool tensor, True = allowed"
            )
        if allowed.dim():
            raise CompositionError(
                f"{name} returned shape {tuple(allowed.shape)} for one cell; b, h, i and j come as "
                "single integers, and the answer is a single bool (reduce over the other axes)"
            )
        return allowed

    try:
        with torch.no_grad():
            row = torch.vmap(cell, in_dims=(None, 0))
            block = torch.vmap(row, in_dims=(0, None))
            return torch.vmap(block)(rows, keys)
    except AttnkitError:
        raise
    except Exception as error:  # whatever the author's function does
        raise CompositionError(
            f"{name} cannot be asked for many cells at once ({clipped(str(error), LONGEST)}); "
            "write it with torch operations on single integers, without `if` and .item(), as "
            "FlexAttention needs it"
        ) from error


def function_name(fn: Callable[..., torch.Tensor]) -> str:
    """Return the name by which messages call a function."""
    name = getattr(fn, "__qualname__", None)
    return clipped(name, LONGEST) if isinstance(name, str) else shown(fn)
