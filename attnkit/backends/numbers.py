"""Where numbers end: what a backend makes of scales, soft-caps and biases beyond its dtype.

Every backend asks here, so that all of them cut at the same place.
"""

from __future__ import annotations

import torch

__all__ = ["bounded", "largest_bias", "masks_before_scale", "usable_cap"]


def bounded(value: float, dtype: torch.dtype) -> float:
    """Return the number, cut off at the ends of a dtype.

    >>> bounded(-1e300, torch.float32)
    -3.4028234663852886e+38
    """
    top = torch.finfo(dtype).max
    return max(-top, min(top, value))


def largest_bias(dtype: torch.dtype) -> float:
    """Return where a bias is cut off in scores of a dtype: sums of a few stay finite.

    A row of ``torch.finfo.min``, as many masks are written, then weighs all of its keys alike
    instead of dividing nothing by nothing.

    >>> largest_bias(torch.float32) == torch.finfo(torch.float32).max / 8
    True
    """
    return torch.finfo(dtype).max / 8


def usable_cap(softcap: float, dtype: torch.dtype) -> float:
    """Return the soft-cap as a number that scores of a dtype can be divided by and times which.

    Beyond the ends ``c * tanh(score / c)`` is 0 or the score itself, to within rounding.

    >>> usable_cap(1e-300, torch.float32) > 0, usable_cap(1e300, torch.float32) < 1e30
    (True, True)
    """
    info = torch.finfo(dtype)
    return float(max(info.tiny, min(info.max**0.75, softcap)))


def masks_before_scale(scale: float, dtype: torch.dtype) -> bool:
    """Whether a kernel may set masked scores to -inf first and scale them after.

    >>> [masks_before_scale(scale, torch.float32) for scale in (0.5, 0.0, -0.5, 1e-320)]
    [True, False, False, False]
    """
    return scale >= torch.finfo(dtype).tiny
