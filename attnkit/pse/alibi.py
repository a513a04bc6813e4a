"""ALiBi: biases of a slope per head times a distance, or its root; slopes fixed or learnable."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.arguments import check_align, check_bool, check_int, check_number
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.pse.base import PSE, Align, Pse, Rectangle
from attnkit.pse.by_distance import MOST_HEADS, ByDistance
from attnkit.pse.structure import Linear, Root
from attnkit.pse.taken import shift_of
from attnkit.ranges import Excerpt

__all__ = ["ALiBi", "LearnableALiBi", "Sloped", "SqrtALiBi", "press_slopes"]


def press_slopes(num_heads: int) -> tuple[float, ...]:
    """Return the ALiBi slopes of Press et al.: ``2**(-8*(h+1)/n)`` for a power of two `n`.

    Otherwise the slopes of the largest power of two below `num_heads`, then every other slope
    of twice as many heads until there are enough: the interleaving of the authors' code.

    Source: Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases
    Enables Input Length Extrapolation" (ICLR 2022), and its published `get_slopes`.

    >>> press_slopes(6)
    (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    """
    check_int("num_heads", num_heads, 1, MOST_HEADS)
    power = 1 << (num_heads.bit_length() - 1)
    extra = _geometric(2 * power)[0::2][: num_heads - power]
    return _geometric(power) + extra


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Sloped(ByDistance):
    """A bias ``-slope[h] * f(distance)``, where ``distance = abs(i' - j)``.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, so that the last query stands
    on the last key; ``i' = i`` for ``"top_left"``. The two agree on square score matrices.

    `num_heads` may be an int (slopes of `press_slopes`), or a sequence of floats, which
    are the slopes; `slopes` gives them by name. A rank that holds some of the heads passes
    the slopes of those heads: ``ALiBi(slopes=ALiBi(32).slopes[8:16])``.

    >>> from attnkit.pse import ALiBi
    >>> ALiBi(slopes=ALiBi(8).slopes[2:4])
    ALiBi(slopes=(0.125, 0.0625))
    """

    num_heads: int | None = None
    slopes: tuple[float, ...] = ()
    align: Align = "bottom_right"

    def __init__(
        self,
        num_heads: int | Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        align: Align = "bottom_right",
    ) -> None:
        name = type(self).__name__
        given = _slopes(name, slopes)
        if num_heads is not None and not isinstance(num_heads, int):
            if given:
                raise CompositionError(
                    f"{name}: slopes were given twice, as the first argument and as slopes="
                )
            given, num_heads = _slopes(name, num_heads), None
        if not given:
            if num_heads is None:
                raise CompositionError(f"{name} needs a number of heads or one slope per head")
            given = press_slopes(num_heads)
        if num_heads is not None and num_heads != len(given):
            raise CompositionError(
                f"{name}: num_heads={shown(num_heads)} but {len(given)} slopes; give one slope per "
                "query head, or num_heads alone for the slopes of Press et al."
            )
        check_align(name, align)
        vars(self).update(num_heads=len(given), slopes=given, align=align)

    @property
    def heads(self) -> int:
        """The number of query heads: one slope each."""
        return len(self.slopes)

    def _bias_of(self, at: Rectangle) -> Pse:
        """Return the same slopes with the anchor that the rectangle has, where it has one."""
        shift = at.rows[0] + self.offset(at.q_len, at.kv_len) - at.keys[0]
        rows, keys = at.shape
        if shift == keys - rows:
            return replace(self, align="bottom_right")
        return replace(self, align="top_left") if shift == 0 else super()._bias_of(at)

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Pse:
        """Return the same slopes with the anchor that the excerpts have, where they have one."""
        found = shift_of(excerpts, self.align)
        if found is None or found[1] != 0:
            return super().take_excerpts(excerpts)
        return replace(self, align=found[0])

    def _of_heads(self, start: int, stop: int) -> Pse:
        return replace(self, num_heads=None, slopes=self.slopes[start:stop])

    @abstractmethod
    def curve(self, distance: Tensor) -> Tensor:
        """Return ``f(distance)`` for non-negative floating-point distances.

        >>> from attnkit import pse
        >>> pse.SqrtALiBi(2).curve(torch.tensor([4.0]))
        tensor([2.])
        """

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``-slope[h] * f(abs(distance))``.

        Computed in float32 (float64 when asked for that) and cast once, since half
        precision cannot hold distances above a few hundred or thousand.
        """
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        slopes = torch.tensor(self.slopes, dtype=exact, device=distance.device)
        slopes = slopes.view(-1, *(1,) * distance.ndim)
        return (-slopes * self.curve(distance.abs().to(exact))).to(dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_slopes_text(self.slopes, self.align)})"


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
        return super().__new__(cls, num_heads, slopes, align, learnable)

    def __init__(
        self,
        num_heads: int | Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        align: Align = "bottom_right",
        learnable: bool = False,
    ) -> None:
        super().__init__(num_heads, slopes, align)

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
        return f"ALiBi({_slopes_text(self.slopes, self.align)}, learnable=True)"


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


def _slopes_text(slopes: tuple[float, ...], align: Align) -> str:
    """Return the arguments that say some slopes, in the shortest way."""
    end = "" if align == "bottom_right" else f", align={align!r}"
    computed = slopes == press_slopes(len(slopes))
    return f"{len(slopes)}{end}" if computed else f"slopes={slopes!r}{end}"


def _geometric(power: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8.0 * (head + 1) / power) for head in range(power))


def _slopes(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        raise CompositionTypeError(
            f"{name}: slopes are constants of the composition and kept as floats; pass "
            "tensor.tolist(); slopes that train are pse.ALiBi(tensor.tolist(), learnable=True)"
        )
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise CompositionTypeError(
            f"{name} takes a number of heads or a sequence of slopes, not {shown(values)}"
        )
    if len(values) > MOST_HEADS:
        raise CompositionError(
            f"{name}: {len(values)} slopes; there are at most {MOST_HEADS} heads"
        )
    return tuple(check_number(f"{name} slope", v, math.isfinite, "finite") for v in values)
