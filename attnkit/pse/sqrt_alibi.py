"""Square-root ALiBi: a bias that flattens with distance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnkit.pse.base import PSE
from attnkit.pse.sloped import Sloped
from attnkit.pse.structure import Root

__all__ = ["SqrtALiBi"]


@PSE.register("sqrt_alibi")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class SqrtALiBi(Sloped):
    """Square-root ALiBi: ``bias[h, i, j] = -slope[h] * sqrt(abs(i' - j))``, after the scale.

    The root is of the distance alone; slopes, `align`, shapes, dtypes and errors are those of
    `ALiBi`. This is the fused kernel's inner bias of type 3.

    >>> SqrtALiBi([0.5]).materialize(1, 5)
    tensor([[[[-1.0000, -0.8660, -0.7071, -0.5000, -0.0000]]]])
    """

    @property
    def structure(self) -> Root:
        """A slope per head, times the root of the distance."""
        return Root(self.align, self.slopes)

    def curve(self, distance: Tensor) -> Tensor:
        """Return the square root of the distance."""
        return distance.sqrt()
