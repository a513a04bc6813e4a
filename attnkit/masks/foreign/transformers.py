"""Mask functions of transformers as sets, read off the closures that its `masking_utils` composes.

Such a function answers ``fn(b, h, q_idx, kv_idx)``. It is known by the names of its code and of
its free variables, and these say the set: no cell is asked. That the code of a name still means
what it meant is proven once, on small made-up values of its free variables (`_proven`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch

from attnkit.arguments import check_int, check_readable, describe
from attnkit.constants import constant
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import Mask
from attnkit.masks.foreign.closures import CLOSURES, Question, free_values, name_of
from attnkit.masks.foreign.frame import Frame, Meet, both
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.predicate import function_name
from attnkit.masks.recover import recover
from attnkit.masks.sources import indices_used

__all__ = ["from_transformers"]

MaskFunction = Callable[..., Any]


@untraced(MASK_IN_GRAPH)
def from_transformers(
    mask_function: MaskFunction,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
) -> Lifted:
    """Return the mask of transformers' ``mask_function(b, h, q_idx, kv_idx)``, as a set.

    Query i of the call has ``q_idx = i + q_offset``, and key j ``kv_idx = j + kv_offset``, as the
    mask interface of transformers hands them over with a cache (a static one's offset is a tensor
    of one number, which is read). `attention_mask` [b, keys] is the
    tokenizer's, by `kv_idx`: keys behind its end do not exist. Keys that no query may see for
    another reason are left as they are, so that steps of a cache have equal masks.

    What `masking_utils` and the models of transformers 5.23 compose is read by structure, and only
    id and padding tensors are looked at, which waits for a device. Another function is read cell by
    cell, in blocks (`masks.recover`); `parts` names it and `cells_read` counts.

    Raises `CompositionError` for offsets that do not belong to the tensors of the function.

    >>> def causal_mask_function(batch_idx, head_idx, q_idx, kv_idx):
    ...     return kv_idx <= q_idx
    >>> padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    >>> found = from_transformers(causal_mask_function, 4, 4, attention_mask=padding)
    >>> found.mask, found.cells_read  # not of transformers, so it is read
    (Causal() & ~Prefix((1, 0)), 16)
    """
    _check(mask_function, q_len, kv_len, batch)
    frame = Frame(q_len, kv_len, _offset("q", q_offset), _offset("kv", kv_offset), batch)
    lifting = _Lifting()
    found = lifting.lift(mask_function, frame)
    if found is None:  # only what is inside of a remap has no set
        raise CompositionError(f"{function_name(mask_function)} was not read")
    if attention_mask is not None:
        found = both(found, _existing(attention_mask, frame, found.most))
        lifting.parts["keys that exist"] = None
    source = f"the mask function {function_name(mask_function)} of transformers"
    return Lifted(frame.mask(found), source, tuple(lifting.parts), lifting.cells)


def _check(mask_function: object, q_len: int, kv_len: int, batch: int | None) -> None:
    if not callable(mask_function) or isinstance(mask_function, torch.Tensor | Mask):
        raise CompositionTypeError(
            f"from_transformers takes a mask function fn(b, h, q_idx, kv_idx), got "
            f"{describe(mask_function)} (a bool tensor is masks.Dense.keep(t))"
        )
    check_int("from_transformers q_len", q_len, 0)
    check_int("from_transformers kv_len", kv_len, 0)
    if batch is not None:
        check_int("from_transformers batch", batch, 1)


def _offset(name: str, given: object) -> int:
    """Return an offset; a static cache has it on its device."""
    if isinstance(given, torch.Tensor) and given.numel() == 1:
        check_readable(f"from_transformers {name}_offset", given)
        given = given.item()
    return check_int(f"from_transformers {name}_offset", given, 0)


def _existing(attention_mask: torch.Tensor, frame: Frame, most: int | None) -> Meet:
    """Return the keys that a tokenizer's mask says exist; `most`: no key is further ahead."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise CompositionError(
            f"from_transformers got attention_mask={describe(attention_mask)}; it is a tensor "
            "[b, keys] of 0 and 1 (of four axes, transformers takes it as it is)"
        )
    check_readable("attention_mask", attention_mask)
    rows = len(attention_mask)
    if frame.batch is not None and rows not in (1, frame.batch):
        raise CompositionError(
            f"attention_mask has {rows} rows for {frame.batch} batch elements; give one for each"
        )
    given = attention_mask.detach()[:, frame.kv_offset : frame.kv_offset + frame.kv_len]
    cells = (given if given.dtype == torch.bool else given != 0).cpu().numpy()
    count = cells.shape[1]
    seen = frame.kv_len if most is None else max(frame.ahead + frame.q_len + most, 0)
    if count < frame.kv_len or seen < count:
        whole = np.zeros((rows, frame.kv_len), np.bool_)
        whole[:, :count] = cells
        whole[:, seen:] = True
        cells = whole
    return frame.existing(cells)


class _Lifting:
    """Reads functions, and notes what was recognised and how many cells were asked."""

    def __init__(self) -> None:
        self.parts: dict[str, None] = {}
        self.cells = 0

    def lift(self, fn: MaskFunction, frame: Frame) -> Meet | None:
        """Return what a function allows; None where only one around it can be read."""
        name = name_of(fn)
        known = None if name is None else CLOSURES.get(name)
        if known is not None and _proven(fn.__code__, fn.__module__, fn.__qualname__):
            found = known.lift(Question(free_values(fn), frame, self.lift))
            if found is not None:
                self.parts[known.said] = None
                return found
        return self.read(fn, frame) if frame.positions is None else None

    def read(self, fn: MaskFunction, frame: Frame) -> Meet:
        """Return what a function allows, read cell by cell."""
        device = _device_of(fn)
        head = torch.zeros((), dtype=torch.int64, device=device)

        def asked(b: Any, h: Any, i: Any, j: Any) -> Any:
            return fn(b, head, i + frame.q_offset, j + frame.kv_offset)

        apart = frame.q_len and frame.kv_len and "batch" in indices_used(asked, device)
        planes = (frame.batch or 1) if apart else None
        found = recover(asked, frame.q_len, frame.kv_len, batch=planes, device=device)
        self.cells += frame.q_len * frame.kv_len * (planes or 1)
        self.parts[f"{function_name(fn)} is not known, and was read cell by cell"] = None
        return Meet(rest=(found.mask,))


def _device_of(fn: object) -> torch.device | None:
    """Return where the tensors are that a function, or one that it calls, holds."""
    seen, left = set(), [fn]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, tuple | list):
            left += value
        elif isinstance(value, FunctionType) and value not in seen:
            seen.add(value)
            left += free_values(value).values()
    return None


# -- proof -----------------------------------------------------------------------------------

_FRAMES = (
    Frame(16, 16, 0, 0, 2),
    Frame(4, 9, 5, 0, 2),
    Frame(5, 7, 6, 4, 2),
    Frame(6, 16, 0, 0, 2),
    Frame(1, 16, 11, 0, 2),
    Frame(3, 9, 2, 4, 2),
)


@constant
def _proven(code: CodeType, module: str, qualname: str) -> bool:
    """Whether code means what `CLOSURES` says of its name, on all made-up values, cell by cell."""
    known = vars(sys.modules[module])
    for fn in _made_up(code, known, module, qualname):
        name = name_of(fn)
        if name is None:
            return False
        for frame in _FRAMES:
            found = CLOSURES[name].lift(Question(free_values(fn), frame, _Lifting().lift))
            if found is not None and not _is_same(fn, frame, found):
                return False
    return True


def _made_up(code: CodeType, known: dict[str, Any], module: str, name: str) -> Iterator[Any]:
    made = FunctionType(code, known, closure=tuple(CellType() for _ in code.co_freevars))
    made.__module__, made.__qualname__ = module, name
    kind = name_of(made)
    for values in CLOSURES[kind].samples(known) if kind is not None else ():
        cells = tuple(CellType(values[one]) for one in code.co_freevars)
        fn = FunctionType(code, known, closure=cells)
        fn.__module__, fn.__qualname__ = module, name
        yield fn


def _is_same(fn: MaskFunction, frame: Frame, found: Meet) -> bool:
    b, i, j = (torch.arange(n) for n in (2, frame.q_len, frame.kv_len))
    i, j = i + frame.q_offset, j + frame.kv_offset
    try:
        cells = fn(b[:, None, None, None], torch.zeros(1, 1, 1, 1).long(), i[:, None], j)
    except Exception:  # whatever a function of another version does with what it is given
        return False
    if not isinstance(cells, torch.Tensor) or cells.dtype != torch.bool:
        return False
    lengths, mask = (frame.q_len, frame.kv_len), frame.mask(found)
    drawn = np.zeros((2, 1, *lengths), np.bool_)
    for text in range(2):  # by rows: an operator of torch may take longer than all of them
        region = mask.region(*lengths, text if mask.batches is not None else 0)
        for row in range(frame.q_len):
            for start, stop in region.row(row):
                drawn[text, 0, row, start:stop] = True
    return np.array_equal(cells.expand(drawn.shape).numpy(), drawn)
