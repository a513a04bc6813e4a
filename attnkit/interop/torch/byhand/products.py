"""Products of two tensors in one form: which dimension of each is which of the result's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from attnkit.interop.torch.byhand.axes import NotAttention

__all__ = ["Product", "product_of"]


class Product(NamedTuple):
    """``out = sum over what only the operands have``: labels of the dimensions of all three.

    A dimension of extent 1 in an operand broadcasts, as in matmul.
    """

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    out: tuple[Any, ...]

    @property
    def summed(self) -> list[Any]:
        """What both operands have and the result has not."""
        return [one for one in self.first if one in self.second and one not in self.out]

    def free(self, operand: int) -> list[Any]:
        """What the result has of one operand alone, in the result's order."""
        mine, other = (self.first, self.second)[:: 1 if operand == 0 else -1]
        return [one for one in self.out if one in mine and one not in other]


def product_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Product, Any, Any]:
    """Return the labels of a call and its two operands."""
    if name == "einsum":
        return _einsum(args)
    if name == "baddbmm":
        first = kwargs["batch1"] if "batch1" in kwargs else args[1]
        second = kwargs["batch2"] if "batch2" in kwargs else args[2]
    else:
        given = [*args, *(kwargs[k] for k in ("other", "mat2") if k in kwargs)]
        if len(given) != 2 or kwargs.keys() - {"other", "mat2", "input", "self"}:
            raise NotAttention(f"{name} is called with {', '.join(kwargs) or 'other arguments'}")
        first, second = given
    return _matmul(len(first.shape), len(second.shape)), first, second


def _matmul(left: int, right: int) -> Product:
    if min(left, right) < 2:
        raise NotAttention("a product with a vector")
    lead = tuple(range(max(left, right) - 2))
    return Product(
        (*lead[len(lead) - left + 2 :], "i", "d"),
        (*lead[len(lead) - right + 2 :], "d", "j"),
        (*lead, "i", "j"),
    )


def _einsum(args: Sequence[Any]) -> tuple[Product, Any, Any]:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise NotAttention("an einsum of other than two operands")
    text = equation.replace(" ", "")
    if "->" not in text:
        raise NotAttention("an einsum without an arrow")
    inputs, out = text.split("->")
    parts = inputs.split(",")
    own = [len(one.shape) - len(part) + 3 for part, one in zip(parts, operands, strict=True)]
    dots = max(n if "..." in part else 0 for part, n in zip(parts, own, strict=True))
    first, second = (_labels(part, n, dots) for part, n in zip(parts, own, strict=True))
    made = Product(first, second, _labels(out, dots, dots))
    if any(len(set(labels)) != len(labels) for labels in made):
        raise NotAttention("an einsum with a diagonal")
    return made, operands[0], operands[1]


def _labels(part: str, own: int, dots: int) -> tuple[Any, ...]:
    before, some, after = part.partition("...")
    middle = range(dots - own, dots) if some else ()
    return (*before, *middle, *after)
