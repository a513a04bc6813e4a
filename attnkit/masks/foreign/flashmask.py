"""FlashMask's column bounds as sets: `startend_row_indices` of PaddlePaddle's attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnkit.arguments import check_bool, check_int, check_readable, describe, holds_integers
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.recover import written_with
from attnkit.masks.runs import Runs

__all__ = ["from_flashmask"]

Ints = np.ndarray[Any, np.dtype[np.int64]]

_SAID = {
    (True, 1): "causal, and rows from a start on masked",
    (True, 2): "causal, and rows from a start to an end masked",
    (False, 2): "rows from a start on, and rows before an end masked",
    (False, 4): "rows from a start to an end masked, twice",
}


@untraced(MASK_IN_GRAPH)
def from_flashmask(
    startend_row_indices: torch.Tensor,
    *,
    causal: bool,
    q_len: int | None = None,
    heads: int | None = None,
) -> Lifted:
    """Return the mask that bounds of masked rows, for each key, are.

    Shapes: ``[b, n, kv_len, k]`` integers, n 1 or the key's heads. For key j these rows are masked:

    - causal, k = 1: ``i >= t[j, 0]``; k = 2: ``t[j, 0] <= i < t[j, 1]``; and all keys that are
      ahead, counted from the last of each (``j - i > kv_len - q_len``);
    - not causal, k = 2: ``i >= t[j, 0]`` and ``i < t[j, 1]``; k = 4: ``t[j, 0] <= i < t[j, 1]`` and
      ``t[j, 2] <= i < t[j, 3]``.

    `q_len` is kv_len where it is not said. With `heads`, the number of query heads, each entry
    serves ``heads // n`` of them. Reads the bounds, which waits for a device; the work follows
    their number. Raises `CompositionError` for other shapes.

    Source: ``paddle.nn.functional.flashmask_attention``, and its test's `flashmask_to_densemask`.

    >>> import torch
    >>> ends = torch.tensor([2, 2, 5, 5, 5])[None, None, :, None]
    >>> print(from_flashmask(ends, causal=True))
    Causal() & Documents((2, 3)), of FlashMask's startend_row_indices [1, 1, 5, 1]: causal, and \
rows from a start on masked
    """
    check_bool("from_flashmask causal", causal)
    bounds = _checked(startend_row_indices, causal, heads)
    batch, count, kv_len, kinds = bounds.shape
    rows = kv_len if q_len is None else check_int("from_flashmask q_len", q_len, 0)
    repeat = 1 if heads is None or count == 1 else heads // count
    regions = [
        tuple(_region(bounds[b, n], causal, rows) for n in range(count) for _ in range(repeat))
        for b in range(batch)
    ]
    found = written_with(tuple(regions), rows, kv_len, "bounds")
    source = f"FlashMask's startend_row_indices {list(bounds.shape)}"
    return Lifted(found.mask, source, (_SAID[causal, kinds],))


def _checked(given: object, causal: bool, heads: int | None) -> Ints:
    if not isinstance(given, torch.Tensor) or not holds_integers(given):
        raise CompositionTypeError(
            f"from_flashmask takes a tensor of integers [b, n, kv_len, 1 | 2 | 4], got "
            f"{describe(given)}"
        )
    check_readable("from_flashmask", given)
    if given.dim() != 4 or (causal, given.shape[3]) not in _SAID or 0 in given.shape[:2]:
        raise CompositionError(
            f"from_flashmask got shape {tuple(given.shape)} and causal={causal}; it takes "
            "[b, n, kv_len, k] with k = 1 or 2 where causal, 2 or 4 where not"
        )
    if heads is not None and check_int("from_flashmask heads", heads, 1) % given.shape[1]:
        raise CompositionError(
            f"from_flashmask got bounds of {given.shape[1]} heads and heads={heads}; each entry "
            "serves as many query heads"
        )
    values: Ints = given.detach().cpu().numpy().astype(np.int64)
    if values.size and values.min() < 0:
        raise CompositionError(
            f"from_flashmask got the row {int(values.min())}; rows count from the first one, 0"
        )
    return values


def _region(bounds: Ints, causal: bool, q_len: int) -> Region:
    """Return the allowed cells of one score matrix; `bounds` are [kv_len, k]."""
    kv_len, kinds = bounds.shape
    ends = np.minimum(bounds, q_len)
    nothing, all_rows = np.zeros(kv_len, np.int64), np.full(kv_len, q_len)
    closed = kinds == 4 or (causal and kinds == 2)
    masked = [(ends[:, 0], ends[:, 1] if closed else all_rows)]
    if causal:
        ahead = np.arange(kv_len) - (kv_len - q_len)
        masked.append((nothing, np.clip(ahead, 0, q_len)))
    else:
        masked.append((ends[:, 2], ends[:, 3]) if closed else (nothing, ends[:, 1]))
    return _complement(masked, q_len).region().transpose()


def _complement(masked: list[tuple[Ints, Ints]], q_len: int) -> Runs:
    """Return the rows that two ranges for each key leave, as runs of rows by key."""
    (a, b), (c, d) = masked
    b, d = np.maximum(a, b), np.maximum(c, d)  # a range that ends before it begins is empty
    a, b = np.where(a < b, a, 0), np.where(a < b, b, 0)
    c, d = np.where(c < d, c, 0), np.where(c < d, d, 0)
    swap = a > c
    a, c = np.where(swap, c, a), np.where(swap, a, c)
    b, d = np.where(swap, d, b), np.where(swap, b, d)
    starts = np.stack((np.zeros_like(a), b, np.maximum(b, d)), 1)
    stops = np.stack((a, c, np.full_like(a, q_len)), 1)
    some = starts < stops
    keys = np.broadcast_to(np.arange(len(a))[:, None], some.shape)
    return Runs(len(a), keys[some], starts[some], stops[some])
