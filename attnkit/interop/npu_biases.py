"""The biases of the fused kernel, by `pse_type` and shape, as attnkit's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from attnkit.constants import constant
from attnkit.errors import KernelContractError
from attnkit.kernel import KernelCall
from attnkit.pse import ALiBi, Dense, KeyBias, Pse, SqrtALiBi

__all__ = ["bias_of"]

_COMPRESSED_ROWS = 1024

Slopes = tuple[tuple[float, ...], ...]


def bias_of(call: KernelCall, pse: Tensor | None) -> Pse | None:
    """Return the bias that a call adds; `KernelContractError` for a form that has no name.

    >>> from attnkit.kernel import TensorSpec
    >>> x = TensorSpec((1, 4, 2, 16), torch.float32)
    >>> slopes = torch.tensor([0.5, 0.25])
    >>> bias_of(KernelCall(x, x, x, 2, "BSND", pse=TensorSpec.of(slopes), pse_type=2), slopes)
    ALiBi(slopes=(0.5, 0.25), align='top_left')
    """
    if pse is None:
        return None
    if call.pse_type in (2, 3):
        return _sloped(call, pse)
    before = call.pse_type == 1
    rows = pse.shape[2]
    if call.is_packed or (rows == _COMPRESSED_ROWS and call.q_len > rows):
        return _compressed(call, pse, before)
    if rows == 1 < call.q_len:
        keys = pse[:, :, 0]
        return KeyBias(keys * call.scale if before else keys, validate=False)
    return Dense(pse, before_scale=before, validate=False)


def _sloped(call: KernelCall, pse: Tensor) -> Pse:
    family = ALiBi if call.pse_type == 2 else SqrtALiBi
    rows = _read(pse)
    shift = call.start_indices[0] - call.start_indices[1]
    if len(rows) > 1:
        return _per_batch(call, rows, shift, family)
    if call.effective_mode == 8 and call.is_packed:
        # The rules ask for starts that put the first sequence's last query on its last key.
        return family(slopes=rows[0], align="bottom_right")
    bias: Pse = family(slopes=rows[0], align="top_left")
    if not shift:
        return bias
    sizes = set(call.sequences)
    if len(sizes) > 1:
        raise KernelContractError(
            f"q_start_idx and kv_start_idx move the slopes of packed sequences of unlike lengths "
            f"by {shift}, which no bias here says; give them in one call per length",
            ["start-packed"],
        )
    return _moved(bias, *sizes.pop(), shift)


def _moved(bias: Pse, q_len: int, kv_len: int, shift: int) -> Pse:
    """Return the part of a larger bias in which queries stand `shift` keys further."""
    row, key = max(shift, 0), max(-shift, 0)
    ends = row + q_len, key + kv_len
    return bias.cut((row, ends[0]), (key, ends[1]), q_len=ends[0], kv_len=ends[1])


def _per_batch(call: KernelCall, rows: Slopes, shift: int, family: Any) -> Pse:
    """Return slopes that differ between batch elements as the matrix they make."""
    if call.is_packed:
        raise KernelContractError(
            f"{len(rows)} rows of slopes that differ between packed sequences; give one row for "
            "all, or one call per sequence",
            ["slopes-packed"],
        )
    sizes = call.q_len, call.kv_len
    each = [_moved(family(slopes=row, align="top_left"), *sizes, shift) for row in rows]
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    return Dense(torch.cat([one.materialize(*sizes, dtype=dtype) for one in each]), validate=False)


def _compressed(call: KernelCall, pse: Tensor, before: bool) -> Pse:
    """Return the ALiBi that the last 1024 rows of a bias are, which its last row tells."""
    slopes = None
    if pse.shape[0] == 1 and not (pse.requires_grad and torch.is_grad_enabled()):
        slopes = _slopes_of(pse)
    if slopes is None:
        raise KernelContractError(
            f"pse of shape {list(pse.shape)} holds 1024 rows of a bias by distance that is not "
            "ALiBi, the same for every batch element; give all rows, or slopes with pse_type=2",
            ["pse-compressed"],
        )
    return ALiBi(slopes=[s * call.scale for s in slopes] if before else slopes, align="top_left")


def _read(pse: Tensor) -> Slopes:
    if pse.is_inference():
        return _rows(pse)
    return _kept_rows(WeakIdRef(pse), pse._version)


@constant
def _kept_rows(pse: Any, version: int) -> Slopes:
    return _rows(pse())


def _rows(pse: Tensor) -> Slopes:
    listed = pse.detach().reshape(-1, pse.shape[-1]).tolist()
    rows = tuple(tuple(row) for row in listed)
    return rows[:1] if len(set(rows)) == 1 else rows


def _slopes_of(pse: Tensor) -> tuple[float, ...] | None:
    if pse.is_inference():
        return _linear(pse)
    return _kept_linear(WeakIdRef(pse), pse._version)


@constant
def _kept_linear(pse: Any, version: int) -> tuple[float, ...] | None:
    return _linear(pse())


def _linear(pse: Tensor) -> tuple[float, ...] | None:
    """Return the slope of each head, where the last row falls in proportion to the distance."""
    by_distance = pse.detach()[0, :, -1].flip(-1).double()
    slopes = -by_distance[:, 1]
    meant = -slopes[:, None] * torch.arange(by_distance.shape[1], device=pse.device)
    bound = 2 * torch.finfo(pse.dtype).eps * meant.abs()
    if not bool(((by_distance - meant).abs() <= bound).all()):
        return None
    return tuple(slopes.tolist())
