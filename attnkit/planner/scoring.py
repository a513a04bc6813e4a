"""Score functions: what one is asked for, how it is asked for many cells at once.

    score = fn(score, b, h, i, j)

FlexAttention's `score_mod`. The function is asked for one cell: its score, after scale, soft-cap
and bias and before the mask, and the cell's four numbers. Cells that the mask allows are computed
with what it returns. A -inf that it returns takes a cell out, which no plan knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnkit.arguments import describe
from attnkit.constants import constant
from attnkit.errors import LONGEST, AttnkitError, CompositionError, CompositionTypeError, clipped
from attnkit.masks.predicate import function_name
from attnkit.ranges import Excerpt

__all__ = [
    "SCORE_IN_GRAPH",
    "SCORE_IN_PROGRAM",
    "SCORE_WITH_CACHE",
    "ScoreFunction",
    "check_score_fn",
    "modified",
    "taken_score",
    "trains",
]

ScoreFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``fn(score, batch, head, q_idx, kv_idx) -> score``, each a tensor without axes."""

SCORE_IN_GRAPH = (
    "score_fn reads a tensor that asks for a gradient, and inside of torch.compile none reaches "
    "it: give what trains as a bias (pse=), or call the layer outside of the compiled function"
)

SCORE_IN_PROGRAM = (
    "score_fn is a function, which no exported program holds; write what it says as a "
    "bias (attnkit.pse), or compile the layer instead (torch.compile)"
)

SCORE_WITH_CACHE = (
    "a layer with score_fn takes no cache: its function is told positions in the tensors of one "
    "call, and a step's queries stand further on in the text; give a bias (pse=), which is read by "
    "positions of the text, or call ak.attention with a function that adds the step's offset"
)


def check_score_fn(fn: object) -> None:
    """Raise `CompositionTypeError` unless this can be a score function, and a key of plans."""
    if fn is None:
        return
    if not callable(fn):
        raise CompositionTypeError(
            f"score_fn takes a function fn(score, b, h, i, j), got {describe(fn)}"
        )
    try:
        hash(fn)
    except TypeError:
        raise CompositionTypeError(
            f"score_fn is {describe(fn)}, which has no hash; plans are kept by their function, so "
            "give a function or an object that is equal to itself alone"
        ) from None


def modified(
    fn: ScoreFunction, scores: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """Return what `fn` makes of scores ``[b n i j]``, in their dtype.

    `b`, `h`, `i` and `j` number the axes, one integer for each of their entries. The function is
    called once; each cell is computed as if it were alone.
    """
    if not scores.numel():
        return scores
    name = f"the score function {function_name(fn)}"

    def cell(score: Tensor, *index: Tensor) -> Tensor:
        found = fn(score, *index)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise CompositionTypeError(
                f"{name} returned {kind}; fn(score, b, h, i, j) returns a score, a floating tensor"
            )
        if found.dim():
            raise CompositionError(
                f"{name} returned shape {tuple(found.shape)} for one cell; its arguments come as "
                "single numbers, and the answer is a single score (reduce over the other axes)"
            )
        return found

    every: Callable[..., Tensor] = cell
    for axis in (4, 3, 2, 1):
        every = torch.vmap(every, (0, *(0 if k == axis else None for k in range(1, 5))))
    try:
        return every(scores, b, h, i, j).to(scores.dtype)
    except AttnkitError:
        raise
    except Exception as error:  # whatever the author's function does
        raise CompositionError(
            f"{name} cannot be asked for many cells at once ({clipped(str(error), LONGEST)}); "
            "write it with torch operations on single numbers, without `if`, .item() and changes "
            "in place, as FlexAttention needs it"
        ) from error


def trains(fn: ScoreFunction | None, like: Tensor) -> bool:
    """Return whether a tensor that the function reads asks for a gradient now.

    The function itself is asked, for one cell: nothing else knows all that it reads.
    """
    if fn is None or not torch.is_grad_enabled():
        return False
    score = torch.zeros((), device=like.device)
    cell = torch.zeros((), dtype=torch.int64, device=like.device)
    try:
        return bool(fn(score, cell, cell, cell, cell).requires_grad)
    except Exception:  # it will be told where the function is asked for scores
        return False


# -- of some rows, keys and heads of a larger attention ------------------------------------------


def taken_score(
    fn: ScoreFunction | None, excerpts: Sequence[Excerpt], first_head: int = 0
) -> ScoreFunction | None:
    """Return a function that tells `fn` the numbers of the whole, given those of a share.

    Excerpts are those of the share's mask and bias: one for all batch elements, or one for each.

    >>> def far(score, b, h, i, j):
    ...     return score + 100 * i + j
    >>> share = taken_score(far, [Excerpt(8, 8, (range(6, 8),), (range(4, 6),))])
    >>> zero, one = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.int64)
    >>> share(torch.zeros(()), zero, zero, one, zero)
    tensor(704.)
    """
    return None if fn is None else _OfShare(fn, _Excerpts(tuple(excerpts)), first_head)


@dataclass(frozen=True)
class _Excerpts:
    """Excerpts with a hash that is computed once: their tensors are looked up for each tile."""

    each: tuple[Excerpt, ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.each)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"each": self.each}


@dataclass(frozen=True)
class _OfShare:
    """A score function of a share: a value, so that plans of equal shares are one."""

    fn: ScoreFunction
    excerpts: _Excerpts
    first_head: int

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        batch, rows, keys = _whole_numbers(self.excerpts, score.device)
        if batch is not None:
            number, first_row, first_key = batch[b].unbind(-1)
            b, i, j = number.to(b.dtype), i + first_row, j + first_key
        return self.fn(score, b, h + self.first_head, rows[i].to(h.dtype), keys[j].to(h.dtype))

    def __repr__(self) -> str:
        return f"{function_name(self.fn)} of a share"


@constant
def _whole_numbers(
    excerpts: _Excerpts, device: torch.device
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the rows and keys of all excerpts one after the other, as positions of the whole.

    Before them, where excerpts are of batch elements, the element of each, and where its rows and
    its keys begin: ``[b, 3]``.
    """
    each = excerpts.each
    rows, keys = (
        torch.cat(
            [torch.arange(one.start, one.stop, one.step) for one in side] or [torch.arange(0)]
        )
        for side in ([r for one in each for r in one.rows], [r for one in each for r in one.keys])
    )
    batch = None
    if each[0].batch is not None:
        sizes = zip(*(one.sizes for one in each), strict=True)
        starts = [accumulate(lengths, initial=0) for lengths in sizes]
        numbers = [one.batch for one in each]
        batch = torch.tensor(list(zip(numbers, *starts, strict=False))).to(device)
    return batch, rows.to(device), keys.to(device)
