"""What an argument must be: checked here and told in one way, wherever one is given.

Nothing is converted on the way: a bool is a slip where an int is meant, and reading a number off
a tensor may wait for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from attnkit.errors import LONGEST, CompositionError, CompositionTypeError, clipped, shown

__all__ = [
    "FLOATS",
    "Align",
    "Anchor",
    "IntsLike",
    "LengthsLike",
    "anchor",
    "check_align",
    "check_bool",
    "check_choice",
    "check_device",
    "check_float_dtype",
    "check_floats",
    "check_int",
    "check_ints",
    "check_length",
    "check_number",
    "check_place",
    "check_range",
    "check_readable",
    "check_tensor",
    "describe",
    "full_text",
    "holds_integers",
    "short",
    "tokens",
]

Align = Literal["bottom_right", "top_left"]
Anchor = Align | int
"""From where distances are counted: a corner of the score matrix, or the key of query 0."""

IntsLike = Sequence[int] | Tensor | np.ndarray[Any, Any]  # what `check_ints` takes
LengthsLike = IntsLike | Sequence[IntsLike]  # the same, for every batch element or for each

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that attention is computed in."""

LARGEST = (1 << 63) - 1
"""The largest integer that is held: positions are int64 in tensors."""

MOST_ENTRIES = 1 << 24
"""How many numbers a list of lengths has, at most."""

_INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint16, torch.uint32, torch.uint64}
)

_ALIGN = {
    "bottom_right": "the last query sees every key",
    "top_left": "query 0 stands at key 0",
}


# -- numbers and words -------------------------------------------------------------------


def check_int(name: str, value: object, minimum: int | None, maximum: int = LARGEST) -> int:
    """Return `value` if it is an int from `minimum` (None: any) to `maximum`.

    >>> check_int("num_heads", 8, 1)
    8
    >>> check_int("num_heads", 0, 1)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: num_heads=0 is too small; it must be >= 1
    """
    if not isinstance(value, int) or isinstance(value, bool):
        rule = "an int" if minimum is None else f"an int >= {minimum}"
        number = not isinstance(value, bool) and hasattr(value, "__index__")
        raise CompositionTypeError(
            f"{name}={shown(value)} is of type {type(value).__name__}; it must be {rule}"
            + (f": write int({name.split()[-1]})" if number else "")
        )
    if minimum is not None and value < minimum:
        raise CompositionError(f"{name}={shown(value)} is too small; it must be >= {minimum}")
    if maximum == LARGEST < abs(value):
        raise CompositionError(
            f"{name}={shown(value)} is too large; positions are 64-bit integers, so it is at most "
            f"{LARGEST} (leave a limit out, or write None, where there is none)"
        )
    if value > maximum:
        raise CompositionError(f"{name}={shown(value)}; it is at most {maximum:,}")
    return value


def check_number(name: str, value: object, fits: Callable[[float], bool], rule: str) -> float:
    """Return `value` as a float if it is a number that `fits`; `rule` says in words which do.

    >>> check_number("dropout", 1, lambda p: 0 <= p < 1, "at least 0 and below 1")
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: dropout=1 is out of range; it must be at least 0 and below 1
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CompositionTypeError(
            f"{name}={shown(value)} is of type {type(value).__name__}; it must be an int or float"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not fits(number):
        raise CompositionError(f"{name}={shown(value)} is out of range; it must be {rule}")
    return number


def check_bool(name: str, value: object, meaning: str = "") -> bool:
    """Return `value` if it is True or False; `meaning` says in words which of them means what.

    >>> check_bool("bias", 1)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: bias=1; it is True or False
    """
    if not isinstance(value, bool):
        told = f" ({meaning})" if meaning else ""
        raise CompositionTypeError(f"{name}={shown(value)}; it is True or False{told}")
    return value


def check_choice(name: str, value: object, choices: Mapping[str, str]) -> str:
    """Return `value` if it is one of a few words; `choices` says what each means.

    >>> check_choice("side", "up", {"right": "behind the keys", "left": "before them"})
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: side='up'; it is 'right' (behind the keys) or 'left' \
(before them)
    """
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(f"{word!r} ({meaning})" for word, meaning in choices.items())
        raise CompositionError(f"{name}={shown(value)}; it is {known}")
    return value


def check_align(owner: str, align: object) -> None:
    """Raise `CompositionError` unless `align` is one of the two words."""
    check_choice(f"{owner} got align", align, _ALIGN)


def check_range(name: str, span: tuple[int, int], length: int | None) -> int:
    """Return the length that a range ``[start, stop)`` lies in; None: one that will do.

    >>> check_range("q_range", (2, 5), 4)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: q_range=(2, 5) does not lie in a score matrix of extent 4; \
give (start, stop) with 0 <= start <= stop <= the extent
    """
    pair = isinstance(span, tuple | list) and len(span) == 2
    known = span[1] if pair and length is None else length
    if not pair or any(type(end) is not int for end in (*span, known)):
        raise CompositionTypeError(
            f"{name}={shown(span)} of extent {shown(known)}; a range is (start, stop), two ints "
            "with start <= stop"
        )
    if known is None or not 0 <= span[0] <= span[1] <= known:
        raise CompositionError(
            f"{name}={shown(span)} does not lie in a score matrix of extent {shown(known)}; give "
            "(start, stop) with 0 <= start <= stop <= the extent"
        )
    return known


def anchor(align: Anchor, q_len: int, kv_len: int) -> int:
    """Return the key position that query 0 is at: 0, kv_len - q_len, or what was said.

    >>> anchor("bottom_right", 2, 5), anchor("top_left", 2, 5), anchor(-4, 2, 5)
    (3, 0, -4)
    """
    if isinstance(align, int):
        return align
    return 0 if align == "top_left" else kv_len - q_len


# -- lists of integers -------------------------------------------------------------------


def check_ints(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """Return a list, tensor or array of integers as a tuple, each at least `minimum`."""
    if isinstance(values, Tensor):
        check_readable(name, values)
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim != 1 or not holds_integers(values):
            raise CompositionTypeError(
                f"{name} is {describe(values)}; it must be a 1-D tensor of integers, or a list "
                "of int"
            )
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise CompositionTypeError(f"{name} is {describe(values)}; it must be a sequence of int")
    if not values:
        raise CompositionError(f"{name} is empty; give at least one entry")
    check_length(name, values)
    for k, value in enumerate(values):
        if type(value) is not int or not minimum <= value <= LARGEST:  # the check itself is slow
            check_int(f"{name}[{k}]", value, minimum)
    return tuple(values)


def tokens(name: str, ids: object) -> Tensor:
    """Return a number per token as an integer tensor, [S] or [B, S].

    >>> tokens("from_ids", [[0, 1]]).shape
    torch.Size([1, 2])
    """
    if isinstance(ids, Tensor):
        check_readable(name, ids)
    elif isinstance(ids, Sequence):
        for row in (ids, *(ids[:1])):
            if isinstance(row, Sequence):
                check_length(name, row)
    try:
        rows = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CompositionTypeError(
            f"{name} takes one number per token, [S] or [B, S]; got {describe(ids)} "
            f"({clipped(str(error), LONGEST)})"
        ) from None
    if rows.dim() not in (1, 2) or rows.numel() == 0 or not holds_integers(rows):
        raise CompositionTypeError(
            f"{name} takes one integer per token, [S] or [B, S]; got {describe(rows)}"
        )
    return rows


def check_length(name: str, values: Sequence[Any]) -> None:
    """Raise `CompositionError` for a list that nobody means to be read entry by entry."""
    if len(values) > MOST_ENTRIES:
        raise CompositionError(f"{name} has {len(values)} entries; it has at most {MOST_ENTRIES}")


def holds_integers(values: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether a tensor or array has an integer dtype; bool is not one."""
    if isinstance(values, np.ndarray):
        return bool(np.issubdtype(values.dtype, np.integer))
    return values.dtype in _INTEGERS


# -- tensors -----------------------------------------------------------------------------


def check_tensor(name: str, tensor: object) -> None:
    """Raise `CompositionTypeError` for anything but a tensor whose numbers lie at strides.

    >>> check_tensor("key", [1.0])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: key is a list; give a torch tensor
    """
    if not isinstance(tensor, Tensor):
        raise CompositionTypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
    odd = _odd(tensor)
    if odd is not None:
        raise CompositionTypeError(
            f"{name} is {odd}; give a dense one (to_dense(), dequantize(), "
            "to_padded_tensor(); texts of unlike lengths are packed into one, with SeqLens)"
        )


def check_floats(name: str, tensor: object) -> None:
    """Raise unless a tensor is a dense one of a dtype that scores are computed in."""
    check_tensor(name, tensor)
    dtype = cast(Tensor, tensor).dtype
    if dtype not in FLOATS:
        remedy = "cast it first"
        if dtype == torch.bool:
            remedy = "a boolean tensor is a mask: masks.Dense.keep(t) or .drop(t)"
        raise CompositionTypeError(
            f"{name} got {shown(tensor)}: a bias has a floating dtype of 16, 32 or 64 bits; "
            f"{remedy}"
        )


def check_readable(name: str, tensor: Tensor) -> None:
    """Raise `CompositionError` unless a tensor is dense and holds its numbers itself."""
    odd = _unreadable(tensor)
    if odd is not None:
        raise CompositionError(
            f"{name} got {odd}, whose numbers cannot be read; give a dense tensor on a device "
            "(to_dense(), dequantize(), to_padded_tensor())"
        )


def check_float_dtype(name: str, dtype: object) -> None:
    """Raise `CompositionTypeError` unless attention can be computed in this dtype.

    >>> check_float_dtype("dtype", torch.int32)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: dtype=torch.int32; give one of torch.float64, \
torch.float32, torch.float16, torch.bfloat16
    """
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise CompositionTypeError(f"{name}={shown(dtype)}; give one of {known}")


def check_device(device: object) -> None:
    """Raise `CompositionError` unless tensors can be made there: nothing else tells for certain.

    >>> check_device("cpu")
    >>> check_device(1.5)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: device=1.5; give a name such as 'cpu', or None
    """
    if not isinstance(device, torch.device | str | int | None) or isinstance(device, bool):
        raise CompositionTypeError(f"device={shown(device)}; give a name such as 'cpu', or None")
    try:
        torch.empty(0, device=cast(Any, device))
    except Exception as error:  # each kind of device has its own error
        reason = shown(str(error).partition("\n")[0])
        raise CompositionError(f"device={shown(device)} is not there: {reason}") from error


def check_place(name: str, tensor: Tensor, device: torch.device | str | None) -> None:
    """Raise `CompositionError` unless a tensor is where the scores are."""
    if device is None:
        return
    own, asked = tensor.device, torch.device(device)
    # "cuda" without an index means the current one, which only the tensor can tell.
    if own.type != asked.type or asked.index not in (None, own.index):
        raise CompositionError(
            f"{name} is on {own}, the scores are on {device}; move it once, where the model is "
            "built"
        )


# -- how a message shows a value ---------------------------------------------------------


def short(value: Any) -> str:
    """Return a repr with long tuples cut in the middle.

    >>> short(tuple(range(100)))
    '(0, 1, 2, 3, ... 100 in all)'
    """
    if isinstance(value, tuple):
        items = [short(item) for item in (value if len(value) <= 8 else value[:4])]
        if len(value) > 8:
            return f"({', '.join(items)}, ... {len(value)} in all)"
        return f"({', '.join(items)}{',' * (len(value) == 1)})"
    return shown(value) if isinstance(value, str | int) else repr(value)


def full_text(value: Any) -> str:
    """Return the text that `masks.parse` reads back, whole."""
    if isinstance(value, tuple):
        return f"({', '.join(full_text(item) for item in value)}{',' * (len(value) == 1)})"
    # What is made of such values has a text that is whole, and a repr that may be cut.
    return str(value) if is_dataclass(value) else repr(value)


def describe(value: object) -> str:
    """Return what a wrong argument is, in a few words.

    >>> describe(torch.zeros(2, 3)), describe(torch.zeros(2, device="meta"))
    ('a tensor of shape (2, 3) and torch.float32', 'a tensor on the meta device of torch.float32')
    """
    odd = _unreadable(value) if isinstance(value, Tensor) else None
    if isinstance(value, Tensor) and odd is not None:
        return f"{odd} of {value.dtype}"
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    return f"{clipped(shown(value), 80)} ({type(value).__name__})"


def _odd(tensor: Tensor) -> str | None:
    """Return in words what kind of tensor this is, if its numbers do not lie at strides."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.').removeprefix('_')} tensor"
    return "a quantised tensor" if tensor.is_quantized else None


def _unreadable(tensor: Tensor) -> str | None:
    """Return the same for a tensor that does not hold its numbers itself."""
    return _odd(tensor) or ("a tensor on the meta device" if tensor.is_meta else None)
