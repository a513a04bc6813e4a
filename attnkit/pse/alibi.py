"""ALiBi: attention with linear biases, its slopes fixed or learnable; and its square-root form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.arguments import check_bool
from attnkit.pse.base import PSE, Align
from attnkit.pse.by_distance import ByDistance
from attnkit.pse.sloped import Sloped, slopes_text
from attnkit.pse.structure import Linear, Root

__all__ = ["ALiBi", "LearnableALiBi", "SqrtALiBi"]


@PSE.register("alibi")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class ALiBi(Sloped):
    """ALiBi: ``bias[h, i, j] = -slope[h] * abs(i' - j)``, added after the scale.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"`` (the default: right for
    decoding), ``i' = i`` for ``"top_left"``. Slopes are those of Press et al. (`press_slopes`)
    for a number of heads, or given, one per query head: constants without a gradient.
    With ``learnable=True`` they are where training starts, and the bias is a `LearnableALiBi`.
    Materialises as ``[1, n, q_len, kv_len]`` in any floating dtype.

    Raises `CompositionError` for neither heads nor slopes, counts that disagree, slopes that
    are not finite, and at use for a query with another number of heads.

    Source: Press, Smith and Lewis, "Train Short, Test Long" (ICLR 2022).

    >>> ALiBi(6).slopes
    (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    >>> ALiBi([0.5]).materialize(1, 3)
    tensor([[[[-1.0000, -0.5000, -0.0000]]]])
    >>> ALiBi(2, learnable=True).weight
    Parameter containing:
    tensor([0.0625, 0.0039], requires_grad=True)
    """

    learnable: bool = False

    def __new__(
        cls,
        num_heads: int | Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        align: Align = "bottom_right",
        learnable: bool = False,
    ) -> Any:
        """Return a `LearnableALiBi` where the slopes are to be learned.

        It is a separate class, so that nobody who takes slopes for constants can meet one.
        """
        check_bool("ALiBi: learnable", learnable)
        if learnable:
            return LearnableALiBi(num_heads, slopes, align)
        return super().__new__(cls)

    def __init__(
        self,
        num_heads: int | Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        align: Align = "bottom_right",
        learnable: bool = False,
    ) -> None:
        super().__init__(num_heads, slopes, align)
        object.__setattr__(self, "learnable", False)

    @property
    def structure(self) -> Linear:
        """A slope per head, times the distance."""
        return Linear(self.align, self.slopes)

    def curve(self, distance: Tensor) -> Tensor:
        """Return the distance itself."""
        return distance


@PSE.register("learnable_alibi")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class LearnableALiBi(ByDistance):
    """ALiBi whose slopes are a parameter: what ``ALiBi(..., learnable=True)`` makes.

    ``bias[h, i, j] = -weight[h] * abs(i' - j)``; `weight` is an `nn.Parameter` [n] that starts at
    the slopes given. Its gradient reaches it on the fused kernel too: on each side of a query the
    bias is linear in positions, and becomes channels of query and key. Where a mask allows keys
    on both sides, each side is computed by its own calls.

    Equality compares the weights' content; text and configurations hold where they started.

    >>> bias = ALiBi(2, learnable=True)
    >>> bias
    ALiBi(2, learnable=True)
    >>> bias.materialize(1, 3)[0, 0].detach()
    tensor([[-0.1250, -0.0625, -0.0000]])
    """

    num_heads: int | None = None
    slopes: tuple[float, ...] = ()
    align: Align = "bottom_right"
    weight: Tensor = field(init=False)

    def __init__(
        self,
        num_heads: int | Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        align: Align = "bottom_right",
    ) -> None:
        fixed: Sloped = ALiBi(num_heads, slopes, align)
        vars(self).update(num_heads=fixed.heads, slopes=fixed.slopes, align=align)
        object.__setattr__(self, "weight", nn.Parameter(torch.tensor(fixed.slopes)))

    @property
    def heads(self) -> int:
        """The number of query heads: one slope each."""
        return len(self.slopes)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The weight is the slopes."""
        return ("slopes",)

    @property
    def structure(self) -> Linear:
        """A slope per head, times the distance."""
        return Linear(self.align)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``-weight[h] * abs(distance)``, computed in float32 (float64) and cast once."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.weight.to(exact).view(-1, *(1,) * distance.ndim)
        return (-weight * distance.abs().to(exact)).to(dtype)

    def __repr__(self) -> str:
        return f"ALiBi({slopes_text(self.slopes, self.align)}, learnable=True)"


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
