"""The mask functions of transformers 5.23, by name: what each is as a set.

Each is a function that another one makes, `maker.<locals>.inner_mask`, and its free variables are
what it was made with. `samples` are made-up values of these, on which the meaning is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from attnkit.arguments import check_readable, describe
from attnkit.errors import CompositionError
from attnkit.masks.base import Mask
from attnkit.masks.blocks import BlockCausal, Chunked
from attnkit.masks.foreign.frame import EVERY, NOTHING, Frame, Meet, Numbers, both, either
from attnkit.masks.rectangles import Prefix

__all__ = ["CLOSURES", "Closure", "Question", "Values", "free_values", "name_of"]

Values = Mapping[str, Any]
Samples = Callable[[Values], Iterator[dict[str, Any]]]


class Question(NamedTuple):
    """A mask function that is read: its free variables, where, and the way to read others."""

    values: Values
    frame: Frame
    lift: Callable[[Any, Frame], Meet | None]


class Closure(NamedTuple):
    """What a mask function means: `lift` answers None where that is no set that has a name.

    `samples` makes up values of the free variables, from the globals of the function.
    """

    said: str
    lift: Callable[[Question], Meet | None]
    samples: Samples


def free_values(fn: Any) -> dict[str, Any]:
    """Return the free variables of a function and what they hold."""
    cells = fn.__closure__ or ()
    return {
        name: cell.cell_contents for name, cell in zip(fn.__code__.co_freevars, cells, strict=True)
    }


def name_of(fn: Any) -> str | None:
    """Return the name of a mask function of transformers; None for any other.

    That of its maker, or its own; and its free variables, where two makers have one name.
    """
    code = getattr(fn, "__code__", None)
    module = getattr(fn, "__module__", None)
    if code is None or not isinstance(module, str) or module.partition(".")[0] != "transformers":
        return None
    if code.co_name == "<lambda>":
        return "lambda *args" if code.co_varnames == ("args",) and not code.co_freevars else None
    maker = fn.__qualname__.partition(".")[0]
    return f"{maker}({', '.join(code.co_freevars)})" if code.co_freevars else maker


def numbers(asked: Question, name: str, axes: int = 2) -> Numbers:
    """Return the tensor that a free variable holds, on the host."""
    given = asked.values[name]
    if not isinstance(given, torch.Tensor) or given.dim() != axes:
        raise CompositionError(
            f"a mask function of transformers holds {name}={describe(given)}; it is a tensor of "
            f"{axes} axes, the batch first"
        )
    check_readable(name, given)
    found: Numbers = given.detach().cpu().numpy()
    return found


# -- composites ------------------------------------------------------------------------------

PACKED = "packed_sequence_mask_function(packed_sequence_mask)"
REMAPPED = "remap_positions_for_packed_sequence(mask_function, position_ids)"


def _and(asked: Question) -> Meet | None:
    functions, frame = asked.values["mask_functions"], asked.frame
    names = [name_of(fn) for fn in functions]
    if REMAPPED in names and PACKED in names and frame.positions is None:
        packed = asked._replace(values=free_values(functions[names.index(PACKED)]))
        frame = frame.among(numbers(packed, "packed_sequence_mask"))
    found = EVERY
    for fn in functions:
        meet = asked.lift(fn, frame)
        if meet is None:
            return None
        found = both(found, meet)
    return found


def _or(asked: Question) -> Meet | None:
    found = NOTHING
    for fn in asked.values["mask_functions"]:
        meet = asked.lift(fn, asked.frame)
        if meet is None:
            return None
        found = either(asked.frame, found, meet)
    return found


def _offset(asked: Question) -> Meet | None:
    rows, keys = int(asked.values["q_offset"]), int(asked.values["kv_offset"])
    if asked.frame.positions is not None and (rows or keys):
        return None
    found = asked.lift(asked.values["mask_function"], asked.frame.moved(rows, keys))
    return None if found is None else found.seen_from(rows - keys)


def _remapped(asked: Question) -> Meet | None:
    if asked.frame.positions is not None:
        return None
    return asked.lift(asked.values["mask_function"], asked.frame.at(numbers(asked, "position_ids")))


# -- distances -------------------------------------------------------------------------------


def _reach(least: int | None, most: int | None, frame: Frame) -> Meet | None:
    if not frame.is_steady:
        return None
    return NOTHING if None not in (least, most) and least > most else Meet(least, most)  # type: ignore[operator]


def _sides(asked: Question) -> Meet | None:
    """``0 <= q - k < left`` or ``0 < k - q < right``."""
    left, right = asked.values["sliding_window"]
    return _two_sides(left, right, asked.frame)


def _two_sides(left: int, right: int, frame: Frame) -> Meet | None:
    if left < 1:  # without the diagonal: only keys behind the query's own
        return _reach(1, right - 1, frame)
    return _reach(1 - left, max(right - 1, 0), frame)


def _sides_of(asked: Question) -> Meet | None:
    size = asked.values["sliding_window"]
    sides = (size, 0) if asked.values["is_causal"] else ((size + 1) // 2, size // 2 + 1)
    return _two_sides(sides[0], sides[1], asked.frame)


# -- blocks and keys ---------------------------------------------------------------------------


def _chunked(asked: Question) -> Meet | None:
    size, frame = asked.values["chunk_size"], asked.frame
    pads = numbers(asked, "left_padding", 1).astype(np.int64)
    if frame.batch is not None:
        pads = pads[: frame.batch]
    if frame.positions is not None:
        return frame.alike(*frame.chunks(pads, size), none=False)

    def make(align: Any, shift: int) -> Mask:
        phases = (pads - shift) % size
        alike = bool((phases == phases[0]).all())
        return Chunked(size, align, int(phases[0]) if alike else phases)

    return Meet(rest=(frame.placed(make),))


def _limited(asked: Question) -> Meet | None:
    size, before = asked.values["chunk_size"], asked.values["left_context_chunks"]
    if asked.frame.positions is not None:
        return None

    def make(align: Any, shift: int) -> Mask:
        return BlockCausal(size, align, -shift % size, before)

    return Meet(rest=(asked.frame.placed(make),))


def _blockwise(asked: Question) -> Meet | None:
    ids = numbers(asked, "block_sequence_ids")
    return asked.frame.alike(*asked.frame.of_both(ids), none=True)


def _packed(asked: Question) -> Meet | None:
    ids = numbers(asked, "packed_sequence_mask")
    return asked.frame.alike(*asked.frame.of_both(ids), none=False)


def _padding(asked: Question) -> Meet | None:
    return asked.frame.existing(asked.frame.of_keys(numbers(asked, "padding_mask")) != 0)


def _prefill(asked: Question) -> Meet | None:
    """``k - kv_offset < prefill_length``, which may be infinite."""
    length = asked.values["prefill_length"]
    if length == float("inf"):
        return EVERY
    if asked.frame.positions is not None:
        return None
    count = int(length) + int(asked.values["kv_offset"]) - asked.frame.kv_offset
    return EVERY if count >= asked.frame.kv_len else Meet(rest=(Prefix(max(count, 0)),))


# -- made-up values --------------------------------------------------------------------------


def _each(**choices: list[Any]) -> Samples:
    """Return samples: of each free variable all choices, side by side."""
    rows = list(zip(*choices.values(), strict=True)) if choices else [()]
    return lambda _: (dict(zip(choices, values, strict=True)) for values in rows)


def _ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def _functions(known: Values) -> Iterator[dict[str, Any]]:
    window, causal = known["sliding_window_overlay"], known["causal_mask_function"]
    near = known["sliding_window_bidirectional_overlay"]
    yield {"mask_functions": (causal, window(3), known["padding_mask_function"](PADS))}
    yield {"mask_functions": (near(1), causal, known["blockwise_overlay"](BLOCKS))}
    yield {"mask_functions": (near(0), known["blockwise_overlay"](BLOCKS))}


def _moved(known: Values) -> Iterator[dict[str, Any]]:
    for q, k in ((0, 2), (3, 0), (1, 1)):
        yield {"mask_function": known["causal_mask_function"], "q_offset": q, "kv_offset": k}


def _turned(known: Values) -> Iterator[dict[str, Any]]:
    positions = _ids([*range(3), *range(4), *range(9)], [*range(16)])
    for fn in (known["padding_mask_function"](PADS), known["blockwise_overlay"](BLOCKS)):
        yield {"mask_function": fn, "position_ids": positions}
    yield {"mask_function": known["causal_mask_function"], "position_ids": positions[[1, 1]]}


PADS = _ids([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9 + [0] * 7) > 0
BLOCKS = _ids([-1, 0, 0, 0, -1, 1, 1, 0, 0, 2, -1, -1, 3, 3, 3, 3], [-1] * 12 + [0] * 4)
PACKS = _ids([0] * 5 + [1] * 4 + [2] * 7, [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, -1, -1, 2, 2, -1])
WINDOWS = [1, 2, 3, 7]

CLOSURES: dict[str, Closure] = {
    "and_masks(mask_functions)": Closure("all of several", _and, _functions),
    "or_masks(mask_functions)": Closure("any of several", _or, _functions),
    "add_offsets_to_mask_function(kv_offset, mask_function, q_offset)": Closure(
        "indices with offsets", _offset, _moved
    ),
    REMAPPED: Closure("positions inside of packed texts", _remapped, _turned),
    "causal_mask_function": Closure(
        "keys up to the query's own", lambda asked: _reach(None, 0, asked.frame), _each()
    ),
    "bidirectional_mask_function": Closure(
        "all keys",
        lambda asked: (
            None
            if asked.frame.positions is not None and (asked.frame.positions < 0).any()
            else EVERY
        ),
        _each(),
    ),
    "lambda *args": Closure("all keys", lambda asked: EVERY, _each()),
    "sliding_window_overlay(sliding_window)": Closure(
        "a window of keys up to the query",
        lambda asked: _reach(1 - asked.values["sliding_window"], None, asked.frame),
        _each(sliding_window=WINDOWS),
    ),
    "sliding_window_bidirectional_overlay(sliding_window)": Closure(
        "a window on both sides, its end included",
        lambda asked: _reach(
            -asked.values["sliding_window"], asked.values["sliding_window"], asked.frame
        ),
        _each(sliding_window=[0, *WINDOWS]),
    ),
    "_bidirectional_window_overlay(sliding_window)": Closure(
        "a window on both sides, its end excluded",
        lambda asked: _reach(
            1 - asked.values["sliding_window"], asked.values["sliding_window"] - 1, asked.frame
        ),
        _each(sliding_window=WINDOWS),
    ),
    "sliding_window_mask_function(sliding_window)": Closure(
        "a window of two sides",
        _sides,
        _each(sliding_window=[(3, 2), (1, 1), (4, 0), (0, 3), (1, 5), (0, 0)]),
    ),
    "sliding_window_mask_function(is_causal, sliding_window)": Closure(
        "a window, causal or of two halves",
        _sides_of,
        _each(sliding_window=WINDOWS * 2, is_causal=[True] * 4 + [False] * 4),
    ),
    "chunked_overlay(chunk_size, left_padding)": Closure(
        "chunks that start behind the padding",
        _chunked,
        _each(
            chunk_size=[3, 4, 1],
            left_padding=[torch.tensor([0, 2]), torch.tensor([5, 5]), torch.tensor([1, 0])],
        ),
    ),
    "chunked_limited_mask_function(chunk_size, left_context_chunks)": Closure(
        "chunks that see some before",
        _limited,
        _each(chunk_size=[3, 1, 4], left_context_chunks=[1, 2, 0]),
    ),
    "blockwise_overlay(block_sequence_ids)": Closure(
        "blocks of tokens that see each other", _blockwise, _each(block_sequence_ids=[BLOCKS])
    ),
    PACKED: Closure("packed texts", _packed, _each(packed_sequence_mask=[PACKS])),
    "padding_mask_function(padding_mask)": Closure(
        "keys that exist", _padding, _each(padding_mask=[PADS])
    ),
    "create_reference_sliding_window_causal_mask(kv_offset, prefill_length)": Closure(
        "keys of the prefill",
        _prefill,
        _each(kv_offset=[0, 2, 0], prefill_length=[5, 3, float("inf")]),
    ),
}
