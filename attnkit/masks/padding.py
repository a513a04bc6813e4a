"""`Padding`: the keys that exist, in a batch of texts of unlike lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from attnkit.arguments import IntsLike, check_ints, check_readable, describe
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import MASKS, Mask
from attnkit.masks.keys import Keys
from attnkit.masks.rectangles import Prefix

__all__ = ["Padding", "padding_of", "runs_of_keys", "told", "written"]

Cells = np.ndarray[Any, np.dtype[np.bool_]]


@MASKS.register("padding")
@dataclass(frozen=True, repr=False, eq=False)
class Padding(Mask):
    """The keys that exist, per batch element: ``j < lengths[batch]``, for side="right".

    With side="left" the padding comes first: ``j >= kv_len - lengths[batch]``, which moves as keys
    are added; `Padding.of` says it from the first key on. A query row beyond its own sequence
    still sees the existing keys; an element of length 0 has empty rows.

    >>> print(Padding([2, 4]).show(2, 4, batch=0))
    ##..
    ##..
    """

    lengths: tuple[int, ...]
    side: Literal["right", "left"] = "right"

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, lengths: IntsLike, side: Literal["right", "left"] = "right") -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", check_ints("Padding lengths", self.lengths, 0))
        if not isinstance(self.side, str) or self.side not in ("right", "left"):
            raise CompositionError(
                f"Padding got side={shown(self.side)}; the padding is at the 'right' or 'left'"
            )

    @staticmethod
    @untraced(MASK_IN_GRAPH)
    def of(attention_mask: torch.Tensor) -> Mask:
        """Return the keys that a tokenizer's ``attention_mask`` [b, s] marks: 1 (True) exists.

        It may be broadcast already, [b, 1, 1, s].

        Where all texts end with the row, the padding is the first keys: ``~Prefix(counts)``, the
        same set however many keys are added, as a cache does. Where all begin with it, a
        `Padding`; else the runs of keys that each has, as `Keys`. The values are read, which
        waits for a device: make it where the batch is made, once. Raises `CompositionError` for
        another shape or other values.

        >>> Padding.of(torch.tensor([[0, 1, 1], [1, 1, 1]]))
        ~Prefix((1, 0))
        >>> Padding.of(torch.tensor([[1, 1, 0], [1, 1, 1]]))
        Padding((2, 3))
        >>> Padding.of(torch.tensor([[1, 0, 1], [1, 1, 1]])).materialize(1, 3, 2)[:, 0, 0].int()
        tensor([[1, 0, 1],
                [1, 1, 1]], dtype=torch.int32)
        """
        return padding_of(_existing(attention_mask))

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also refuse a sequence longer than the score matrix."""
        super().check(q_len, kv_len, batch, heads)
        if max(self.lengths) > kv_len:
            raise CompositionError(
                f"{self!r} has a sequence of {max(self.lengths)} keys, but kv_len is {kv_len}; "
                "lengths count the keys that exist, padding excluded (those of a text that is "
                "still growing: masks.Prefix(lengths))"
            )

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        length = min(self.lengths[batch], kv_len)  # a cut may ask for fewer keys
        start = 0 if self.side == "right" else kv_len - length
        return Region.columns(q_len, [(start, start + length)])

    @property
    def batches(self) -> int | None:
        """One length per batch element."""
        return len(self.lengths)

    @property
    def anchored(self) -> bool:
        """Left padding counts from the last key."""
        return self.side == "left"


def _existing(attention_mask: torch.Tensor) -> Cells:
    """Return what a tokenizer's mask says as booleans [b, s]."""
    if not isinstance(attention_mask, torch.Tensor):
        raise CompositionTypeError(
            f"Padding.of takes a tensor [b, s] of 0 and 1, got {describe(attention_mask)}"
        )
    check_readable("Padding.of", attention_mask)
    if attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1):
        attention_mask = attention_mask[:, 0, 0]  # as it is broadcast over heads and queries
    if attention_mask.ndim != 2 or not len(attention_mask) or attention_mask.is_complex():
        raise CompositionError(
            f"Padding.of got {describe(attention_mask)}; a tokenizer's attention_mask is [b, s], "
            "one row per text (for cells [.., Sq, Skv]: masks.Dense.keep)"
        )
    given = attention_mask.detach().cpu()
    exists = given != 0
    if not bool((exists == given).all()):
        raise CompositionError(
            "Padding.of got values other than 0 and 1; 1 marks a token that exists (a mask that "
            "is added to scores, of 0 and -inf, is a bias: pse.Dense)"
        )
    cells: Cells = exists.numpy()
    return cells


def padding_of(cells: Cells) -> Mask:
    """Return the keys that exist, of a bool array [b, s], as `Padding.of` writes them."""
    return written(*told(cells))


def told(cells: Cells) -> tuple[str, tuple[Any, ...]]:
    """Return what a mask of these keys is written with: the same for the next step of a cache.

    >>> told(np.array([[False, True], [True, True]]))
    ('left', (1, 0))
    """
    for side in ("left", "right"):
        counts = _stretch(cells, side == "left")
        if counts is not None:
            return side, tuple(counts)
    return "runs", tuple(map(tuple, runs_of_keys(cells)))


def written(form: str, each: tuple[Any, ...], alike: bool = False) -> Mask:
    """Return the mask that `told` tells; with `alike`, equal rows have one entry for all.

    >>> written("left", (2, 2), alike=True)
    ~Prefix(2)
    """
    one = each[0] if alike and each.count(each[0]) == len(each) else None
    if form == "left":
        return ~Prefix(each if one is None else one)
    if form == "right":
        return Padding(each) if one is None else Prefix(one)
    return Keys(each if one is None else one)


def _stretch(cells: Cells, missing: bool) -> list[int] | None:
    """Return how many keys are missing before the first, or exist before one that does not.

    None where that does not tell all keys.
    """
    rows, size = cells.shape
    turns = (cells.argmax(1) if missing else cells.argmin(1)) if size else np.zeros(rows, np.int64)
    if size:  # of a row without such a key, the answer is 0, too
        turns = np.where(cells[np.arange(rows), turns] == missing, turns, size)
    told = int(turns.sum())
    exist = rows * size - told if missing else told
    counts: list[int] = turns.tolist()
    return counts if np.count_nonzero(cells) == exist else None


def runs_of_keys(cells: Cells) -> list[list[tuple[int, int | None]]]:
    """Return the runs of keys that each row has; one that reaches the end has none."""
    rows, size = cells.shape
    around = np.zeros((rows, size + 2), np.bool_)
    around[:, 1:-1] = cells
    turns = np.flatnonzero(around[:, 1:] != around[:, :-1])
    pairs = [one.tolist() for one in np.divmod(turns, size + 1)]
    runs: list[list[tuple[int, int | None]]] = [[] for _ in cells]
    for row, start, stop in zip(pairs[0][::2], pairs[1][::2], pairs[1][1::2], strict=True):
        runs[row].append((start, None if stop == size else stop))
    return runs
