"""What stands for the indices of a function, and notes what the function does to them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from attnkit.geometry import Region
from attnkit.masks.relations import Order, compare, marked

__all__ = ["Extent", "NotUnderstoodError", "Side", "Symbol", "call", "plain_name", "region_of"]

_ORDERS: dict[str, Order] = {
    "le": "le", "less_equal": "le", "ge": "ge", "greater_equal": "ge", "eq": "eq",
    "lt": "lt", "less": "lt", "gt": "gt", "greater": "gt", "ne": "ne", "not_equal": "ne",
}  # fmt: skip
_MIRRORED: dict[Order, Order] = {
    "le": "ge", "ge": "le", "eq": "eq", "lt": "gt", "gt": "lt", "ne": "ne"
}  # fmt: skip
_JOINS: dict[str, Callable[[Region, Region], Region]] = {
    "and": operator.and_, "bitwise_and": operator.and_, "logical_and": operator.and_,
    "or": operator.or_, "bitwise_or": operator.or_, "logical_or": operator.or_,
    "xor": operator.xor, "bitwise_xor": operator.xor, "logical_xor": operator.xor,
    "mul": operator.and_, "eq": lambda a, b: a ^ b, "ne": operator.xor,
}  # fmt: skip
_INVERSIONS = {"invert", "bitwise_not", "logical_not"}
# What is done to each number alone, so that many at once are as one.
_EACH = {
    *_ORDERS, *_JOINS, *_INVERSIONS,
    "add", "sub", "subtract", "mul", "multiply", "floordiv", "floor_divide", "mod", "remainder",
    "truediv", "div", "divide", "true_divide", "neg", "negative", "abs", "absolute", "where",
    "clamp", "clip", "clamp_min", "clamp_max", "minimum", "maximum", "rshift", "lshift",
    "bitwise_right_shift", "bitwise_left_shift", "to", "long", "int", "bool", "float", "double",
    "square", "sign", "log", "log2", "log1p", "exp", "exp2", "sqrt", "rsqrt", "pow", "floor",
    "ceil", "trunc", "sigmoid", "tanh",
}  # fmt: skip


class NotUnderstoodError(Exception):
    """The function does something that is not known as a set; its cells say what."""


@dataclass(frozen=True)
class Extent:
    """The rows and keys that a function is asked for: how many, and the first of each.

    `by_distance`: what follows from ``j - i`` alone is kept as a number for each distance, from
    ``1 - q_len`` to ``kv_len - 1`` (a `Side` of axis 2).
    """

    q_len: int
    kv_len: int
    q_offset: int = 0
    kv_offset: int = 0
    by_distance: bool = False

    def indices(self, axis: int, device: torch.device | str | None) -> Tensor:
        """Return the rows (axis 0) or keys (1)."""
        start = (self.q_offset, self.kv_offset)[axis]
        return torch.arange(start, start + (self.q_len, self.kv_len)[axis], device=device)


# -- what stands for indices -------------------------------------------------------------


class Symbol:
    """Something that follows from i and j; operators and torch's functions are noted."""

    window: Extent
    takes_all = False

    def taken(self, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Return what an operation makes of this, where it `takes_all` of them."""
        raise NotUnderstoodError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call(func, args, kwargs or {})

    def __bool__(self) -> NoReturn:
        raise NotUnderstoodError

    __int__ = __float__ = __index__ = __len__ = __iter__ = __bool__

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise NotUnderstoodError
        return lambda *args, **named: call(method, (self, *args), named)


def _operators() -> None:
    names = "add sub mul pow floordiv mod truediv rshift lshift and or xor lt le gt ge eq ne"
    for name in names.split():
        function = getattr(operator, f"{name}_" if name in ("and", "or") else name)

        def forward(self: Symbol, other: Any, function: Any = function) -> Any:
            return call(function, (self, other), {})

        def backward(self: Symbol, other: Any, function: Any = function) -> Any:
            return call(function, (other, self), {})

        setattr(Symbol, f"__{name}__", forward)
        if name not in _ORDERS:
            setattr(Symbol, f"__r{name}__", backward)
    for name in ("neg", "abs", "invert"):
        function = getattr(operator, name)
        setattr(Symbol, f"__{name}__", lambda self, function=function: call(function, (self,), {}))


_operators()


@dataclass(frozen=True, eq=False)
class Side(Symbol):
    """A number (or bool) for each row, axis 0, key, 1, or distance, 2; for each cell, 3."""

    window: Extent
    axis: int
    values: Tensor

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        """Of one: none."""
        return torch.Size()

    def new_ones(self, size: Any, **named: Any) -> Tensor:
        """As a tensor's, which functions use to say True."""
        return self.values.new_ones(size, **named)

    def new_zeros(self, size: Any, **named: Any) -> Tensor:
        """As a tensor's, which functions use to say False."""
        return self.values.new_zeros(size, **named)

    def new_full(self, size: Any, value: Any, **named: Any) -> Tensor:
        """As a tensor's."""
        return self.values.new_full(size, value, **named)


@dataclass(frozen=True, eq=False)
class _Total(Symbol):
    """An integer of the row plus one of the key; its absolute value, if `folded`."""

    window: Extent
    row: np.ndarray[Any, Any]
    key: np.ndarray[Any, Any]
    folded: bool = False


@dataclass(frozen=True, eq=False)
class _Set(Symbol):
    """Cells."""

    window: Extent
    region: Region


# -- what is done with them --------------------------------------------------------------


def call(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Return what a function of torch, or an operator, makes of symbols."""
    name = plain_name(func)
    if name == "rsub":  # the only reversed function that torch hands over
        name, func, args = "sub", operator.sub, args[::-1]
    if name == "getitem":
        return _looked_up(*args)
    symbols = [one for one in (*args, *named.values()) if isinstance(one, Symbol)]
    for one in symbols:
        if one.takes_all:
            return one.taken(name, args, named)
    sides = [one for one in symbols if isinstance(one, Side)]
    if len(sides) == len(symbols) and len({side.axis for side in sides}) == 1:
        return _of_one_side(name, func, args, named, sides[0])
    if named:
        raise NotUnderstoodError
    window = symbols[0].window
    if name == "where" and len(args) == 3:
        chosen, a, b = (region_of(one, window) for one in args)
        return _Set(window, (chosen & a) | (b - chosen))
    if name in _INVERSIONS:
        return _Set(window, region_of(args[0], window).complement(window.q_len, window.kv_len))
    if name in ("abs", "absolute", "neg", "negative"):
        one = _total(args[0], window)
        sign = -1 if name[0] == "n" else 1
        return _Total(window, sign * one.row, sign * one.key, folded=name[0] == "a")
    if len(args) != 2:
        raise NotUnderstoodError
    return _of_two(name, args[0], args[1], window)


def plain_name(func: Any) -> str:
    """Return a function's name without underscores; what writes in place is not understood."""
    name: str = getattr(func, "__name__", "_")
    if name.endswith("_") and not name.endswith("__") and func not in (operator.and_, operator.or_):
        raise NotUnderstoodError
    return name.strip("_")


def _of_one_side(
    name: str, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], side: Side
) -> Side:
    if name not in _EACH:
        raise NotUnderstoodError
    count = side.values.shape
    plain = [_spread(_plain(one), count) for one in args]
    values = func(*plain, **{key: _spread(_plain(one), count) for key, one in named.items()})
    if not isinstance(values, Tensor) or values.shape != side.values.shape:
        raise NotUnderstoodError
    return Side(side.window, side.axis, values)


def _plain(value: Any) -> Any:
    if isinstance(value, Side):
        return value.values
    if isinstance(value, Tensor) and value.dim():  # one for each cell: not a number
        raise NotUnderstoodError
    return value


def _spread(value: Any, shape: torch.Size) -> Any:
    """Return a single number as often as needed, so that dtypes are promoted as of two numbers."""
    if isinstance(value, Tensor) and not value.dim():
        return value.expand(shape)
    return value


def _looked_up(table: Any, at: Any) -> Side:
    """Return ``table[i]``, or ``table[b, i]``: one entry for each index."""
    places = at if isinstance(at, tuple) else (at,)
    sides = [one for one in places if isinstance(one, Side)]
    if not isinstance(table, Tensor) or table.dim() != len(places):
        raise NotUnderstoodError
    axes = {side.axis for side in sides}
    if axes == {0, 1} and sides[0].window.by_distance:
        return _cells_of(table, places, sides[0].window)
    if len(axes) != 1:
        raise NotUnderstoodError
    if any(side.dtype == torch.bool for side in sides):
        raise NotUnderstoodError
    if not all(isinstance(one, Side | int) or _is_number(one) for one in places):
        raise NotUnderstoodError
    values = table[tuple(_plain(one) for one in places)]
    return Side(sides[0].window, sides[0].axis, values)


def _cells_of(table: Tensor, places: tuple[Any, ...], window: Extent) -> Side:
    """Return ``table[.., i, j]``: one entry for each cell."""
    shapes = {0: (-1, 1), 1: (1, -1)}
    at = [one.values.view(shapes[one.axis]) if isinstance(one, Side) else one for one in places]
    if not all(isinstance(one, Side | int) or _is_number(one) for one in places):
        raise NotUnderstoodError
    return Side(window, 3, table[tuple(at)])


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.dim() and value.dtype != torch.bool


def _of_two(name: str, a: Any, b: Any, window: Extent) -> Symbol:
    """Return what joins a row with a key: a sum, a comparison, or an operation of sets."""
    sets = [isinstance(one, _Set) or _is_bool(one) for one in (a, b)]
    if all(sets) and name in _JOINS:
        joined = _JOINS[name](region_of(a, window), region_of(b, window))
        if name == "eq":
            joined = joined.complement(window.q_len, window.kv_len)
        return _Set(window, joined)
    if any(sets):
        raise NotUnderstoodError
    if name in ("add", "sub", "subtract"):
        x, y = _total(a, window), _total(b, window)
        sign = 1 if name == "add" else -1
        if x.folded or y.folded:
            raise NotUnderstoodError
        total = _Total(window, x.row + sign * y.row, x.key + sign * y.key)
        return _by_distance(total) if window.by_distance else total
    if name in _ORDERS:
        return _Set(window, _compared(a, _ORDERS[name], b, window))
    raise NotUnderstoodError


def _by_distance(total: _Total) -> Symbol:
    """Return a sum that is the distance, or its negative, and a constant, for each distance."""
    rows, keys = np.diff(total.row), np.diff(total.key)
    for step in (1, -1):
        if (keys == step).all() and (rows == -step).all() and len(total.row) and len(total.key):
            window = total.window
            first = 1 - window.q_len
            values = torch.arange(first, window.kv_len) * step
            return Side(window, 2, values + int(total.row[0] + total.key[0]))
    return total


def _is_bool(value: Any) -> bool:
    if isinstance(value, Side | Tensor):
        return value.dtype == torch.bool
    return isinstance(value, bool)


def _compared(a: Any, order: Order, b: Any, window: Extent) -> Region:
    """Return the cells where two numbers stand in an order."""
    if isinstance(a, Side) and isinstance(b, Side):  # of unlike axes; of any dtype, exactly
        if a.axis == 1:
            a, b, order = b, a, _MIRRORED[order]
        return compare(_numbers(a.values, b.values), order, _numbers(b.values, a.values))
    if isinstance(b, _Total) and (b.folded or not isinstance(a, _Total)):
        a, b, order = b, a, _MIRRORED[order]
    x, y = _total(a, window), _total(b, window)
    if y.folded:
        raise NotUnderstoodError
    if not x.folded:
        return compare(x.row - y.row, order, y.key - x.key)
    # |x| <= y is x <= y and -x <= y; what is above is the rest.
    if order in ("gt", "ge"):
        inside = _compared(a, "le" if order == "gt" else "lt", b, window)
        return inside.complement(window.q_len, window.kv_len)
    if order not in ("le", "lt"):
        raise NotUnderstoodError
    return compare(x.row - y.row, order, y.key - x.key) & compare(
        -x.row - y.row, order, y.key + x.key
    )


def _numbers(values: Tensor, other: Tensor) -> np.ndarray[Any, Any]:
    """Return numbers in the dtype that torch compares two in."""
    common = torch.promote_types(values.dtype, other.dtype)
    if common.is_complex or (common == torch.bool):
        raise NotUnderstoodError
    numbers = values.detach().to(common).cpu()
    if common.is_floating_point:
        numbers = numbers.double()  # exact; numpy has no bfloat16
        if bool(numbers.isnan().any()):
            raise NotUnderstoodError
    return numbers.numpy()


def _total(value: Any, window: Extent) -> _Total:
    """Return an integer as the sum of one of the row and one of the key."""
    if isinstance(value, _Total):
        return value
    row, key = (np.zeros(n, np.int64) for n in (window.q_len, window.kv_len))
    if isinstance(value, Side):
        if value.dtype not in (torch.int64, torch.int32):
            raise NotUnderstoodError  # sums of others round, or begin anew
        numbers = value.values.detach().to(torch.int64).cpu().numpy()
        return _Total(window, numbers, key) if value.axis == 0 else _Total(window, row, numbers)
    if _is_number(value) and not value.dtype.is_floating_point:
        value = int(value)
    if type(value) is not int:
        raise NotUnderstoodError
    return _Total(window, row + value, key)


def region_of(value: Any, window: Extent) -> Region:
    """Return the cells that an answer marks."""
    if isinstance(value, _Set):
        return value.region
    if not _is_bool(value):
        raise NotUnderstoodError
    if isinstance(value, Side):
        if value.axis > 1:
            raise NotUnderstoodError  # a region is made of comparisons of rows with keys
        return marked(value.values.cpu().numpy(), value.axis, window.q_len, window.kv_len)
    if isinstance(value, Tensor) and value.dim():
        raise NotUnderstoodError
    return Region.full(window.q_len, window.kv_len) if value else Region.empty()
