"""ALiBi: attention with linear biases."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnkit.pse.base import PSE
from attnkit.pse.sloped import Sloped

__all__ = ["ALiBi"]


@PSE.register("alibi")
@dataclass(frozen=True, init=False, repr=False)
class ALiBi(Sloped):
    """ALiBi: ``bias[h, i, j] = -slope[h] * abs(i' - j)``, added after the scale.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"`` (the default: right for
    decoding), ``i' = i`` for ``"top_left"``. Slopes are those of Press et al. (`press_slopes`)
    for a number of heads, or given, one per query head. No gradient. Materialises as
    ``[1, n, q_len, kv_len]`` in any floating dtype.

    Raises `CompositionError` for neither heads nor slopes, counts that disagree, slopes that
    are not finite, and at use for a query with another number of heads.

    Source: Press, Smith and Lewis, "Train Short, Test Long" (ICLR 2022).

    >>> ALiBi(6).slopes
    (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    >>> ALiBi([0.5]).materialize(1, 3)
    tensor([[[[-1.0000, -0.5000, -0.0000]]]])
    """

    def curve(self, distance: Tensor) -> Tensor:
        """Return the distance itself."""
        return distance
