"""Score functions: what one is asked for, how it is asked for many cells at once.

    score = fn(score, b, h, i, j)

FlexAttention's `score_mod`. The function is asked for one cell: its score, after scale, soft-cap
and bias and before the mask, and the cell's four numbers. Cells that the mask allows are computed
with what it returns. A -inf that it returns takes a cell out, which no plan knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from attnkit.arguments import describe
from attnkit.errors import LONGEST, AttnkitError, CompositionError, CompositionTypeError, clipped
from attnkit.masks.predicate import function_name

__all__ = [
    "SCORE_IN_GRAPH",
    "SCORE_WITH_CACHE",
    "ScoreFunction",
    "check_score_fn",
    "modified",
    "trains",
]

ScoreFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``fn(score, batch, head, q_idx, kv_idx) -> score``, each a tensor without axes."""

SCORE_IN_GRAPH = (
    "score_fn reads a tensor that asks for a gradient, and inside of torch.compile none reaches "
    "it: give what trains as a bias (pse=), or call the layer outside of the compiled function"
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
