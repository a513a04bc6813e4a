"""`Predicate`: a mask from a function of indices, in FlexAttention's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.base import Enclosure, Mask, check_int, describe

__all__ = ["MaskFunction", "Predicate", "evaluate", "function_name"]

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class Predicate(Mask):
    """Cells where ``fn(b, h, i, j)`` is true: FlexAttention's `mask_mod` signature.

    `fn` gets broadcastable integer tensors and returns booleans. `batch` and `num_heads` say
    how many batch elements and heads it tells apart (None: it ignores b, or h). A function is
    opaque: it equals only itself, has no text that `masks.parse` reads, and its region is not
    known, so it runs as a dense mask; write what you can as named masks and the plan gets better.

    >>> even = Predicate(lambda b, h, i, j: (i + j) % 2 == 0)
    >>> print(even.show(2, 4))
    #.#.
    .#.#
    """

    fn: MaskFunction
    batch: int | None = None
    num_heads: int | None = None

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

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        i = torch.arange(q_len, device=device)[:, None]
        j = torch.arange(kv_len, device=device)[None, :]
        b, h = (torch.tensor(value, device=device) for value in (batch, head))
        return evaluate(self.fn, b, h, i, j)

    @property
    def batches(self) -> int | None:
        """As said by `batch`."""
        return self.batch

    @property
    def heads(self) -> int | None:
        """As said by `num_heads`."""
        return self.num_heads

    @property
    def anchored(self) -> bool:
        """A function of indices knows no lengths."""
        return False

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"<masks.Predicate {function_name(self.fn)}>"


def evaluate(
    fn: MaskFunction, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
) -> torch.Tensor:
    """Return ``fn(b, h, i, j)`` as a bool tensor, for rows i [R, 1] and keys j [1, K]."""
    cells = fn(b, h, i, j)
    name = f"the mask function {function_name(fn)}"
    if not isinstance(cells, torch.Tensor) or cells.dtype != torch.bool:
        kind = cells.dtype if isinstance(cells, torch.Tensor) else type(cells).__name__
        raise CompositionTypeError(
            f"{name} returned {kind}; fn(b, h, i, j) returns a bool tensor, True = allowed"
        )
    shape = (i.shape[0], j.shape[1])
    try:
        return cells.expand(shape)
    except RuntimeError:
        raise CompositionError(
            f"{name} returned shape {tuple(cells.shape)}, which does not broadcast to "
            f"{list(shape)}; i comes as {list(i.shape)}, j as {list(j.shape)}, b and h as scalars"
        ) from None


def function_name(fn: MaskFunction) -> str:
    """Return the name by which messages call a function."""
    return str(getattr(fn, "__qualname__", fn))
