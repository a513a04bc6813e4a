"""`SeqLens`: the lengths of the sequences in a packed batch, as host integers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["SeqLens", "check_lengths"]

_SHOWN = 8
_LONGEST = 2**63 - 1  # what a kernel's list of lengths can hold
_MOST = 2**24  # sequences: more than any batch, and what a range without end is stopped at


@dataclass(frozen=True, init=False, repr=False)
class SeqLens:
    """How long each sequence of a packed batch is, for queries and for keys.

    `q` and `kv` hold one length per sequence, not running totals; `kv` defaults to `q`
    (self-attention). `from_cu_seqlens` takes running totals: the two forms are never guessed
    from each other. A length may be 0. Accepted are a list, tuple or range of ints, a 1-D
    numpy integer array, or a 1-D integer CPU tensor. A tensor on an accelerator is refused,
    because reading it would make the host wait for the device.

    Raises `CompositionError` for no, negative or unequally many lengths, and
    `CompositionTypeError` for anything that is not a list of integers.

    >>> lens = SeqLens([3, 5])
    >>> lens
    SeqLens(q=(3, 5))
    >>> lens.cu_q, lens.total_q, lens.max_q, len(lens)
    ((0, 3, 8), 8, 5, 2)
    >>> SeqLens([3, 5], [4, 9]) == SeqLens.from_cu_seqlens([0, 3, 8], [0, 4, 13])
    True
    """

    q: tuple[int, ...]
    kv: tuple[int, ...]

    def __init__(self, q: Sequence[int] | Tensor, kv: Sequence[int] | Tensor | None = None) -> None:
        lengths = check_lengths("SeqLens: q", q)
        object.__setattr__(self, "q", lengths)
        object.__setattr__(self, "kv", lengths if kv is None else check_lengths("SeqLens: kv", kv))
        if len(self.q) != len(self.kv):
            raise CompositionError(
                f"SeqLens: {len(self.q)} query lengths but {len(self.kv)} key lengths; every "
                "sequence needs one of each (0 for none)"
            )

    @classmethod
    def from_cu_seqlens(
        cls, cu_q: Sequence[int] | Tensor, cu_kv: Sequence[int] | Tensor | None = None
    ) -> SeqLens:
        """Build from cumulative lengths with a leading 0: ``[0, 3, 8]`` means 3 and 5.

        This is the field's ``cu_seqlens``. The fused kernel's own ``actual_seq_qlen`` has no
        leading 0: prepend it. Accepted containers are those of the class.

        >>> SeqLens.from_cu_seqlens([0, 3, 8]).q
        (3, 5)
        >>> SeqLens.from_cu_seqlens([3, 8])
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: SeqLens.from_cu_seqlens: cu_q starts with 3, but \
cumulative lengths start with 0; prepend the 0, or use SeqLens(...) if these are lengths
        """
        q = _differences("cu_q", cu_q)
        return cls(q, q if cu_kv is None else _differences("cu_kv", cu_kv))

    @cached_property
    def cu_q(self) -> tuple[int, ...]:
        """Where each sequence's queries start, and the total last.

        >>> SeqLens([3, 5]).cu_q
        (0, 3, 8)
        """
        return tuple(accumulate(self.q, initial=0))

    @cached_property
    def cu_kv(self) -> tuple[int, ...]:
        """Where each sequence's keys start, and the total last.

        >>> SeqLens([3, 5], [4, 9]).cu_kv
        (0, 4, 13)
        """
        return self.cu_q if self.kv is self.q else tuple(accumulate(self.kv, initial=0))

    @property
    def total_q(self) -> int:
        """The number of query tokens in the batch.

        >>> SeqLens([3, 5]).total_q
        8
        """
        return self.cu_q[-1]

    @property
    def total_kv(self) -> int:
        """The number of key tokens in the batch.

        >>> SeqLens([3, 5], [4, 9]).total_kv
        13
        """
        return self.cu_kv[-1]

    @cached_property
    def max_q(self) -> int:
        """The longest sequence of queries.

        >>> SeqLens([3, 5]).max_q
        5
        """
        return max(self.q)

    @cached_property
    def max_kv(self) -> int:
        """The longest sequence of keys.

        >>> SeqLens([3, 5], [4, 9]).max_kv
        9
        """
        return max(self.kv)

    def check_totals(self, total_q: int, total_kv: int) -> None:
        """Raise unless the lengths sum to the tokens that query and key hold.

        >>> SeqLens([3, 5]).check_totals(8, 9)
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: SeqLens: the kv lengths (3, 5) sum to 8, but key and \
value hold 9 tokens; every token belongs to exactly one sequence
        """
        for tokens in (total_q, total_kv):
            if type(tokens) is not int:
                raise CompositionTypeError(
                    f"check_totals takes two numbers of tokens, not {shown(tokens)}"
                )
        sides = (
            ("q", self.q, self.total_q, total_q, "query holds"),
            ("kv", self.kv, self.total_kv, total_kv, "key and value hold"),
        )
        for name, lengths, total, tokens, holder in sides:
            if total != tokens:
                raise CompositionError(
                    f"SeqLens: the {name} lengths {_short(lengths)} sum to {total}, but {holder} "
                    f"{shown(tokens)} tokens; {_sum_remedy(lengths, tokens)}"
                )

    def __len__(self) -> int:
        return len(self.q)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.q, self.kv))

    def __repr__(self) -> str:
        kv = "" if self.kv == self.q else f", kv={_short(self.kv)}"
        return f"SeqLens(q={_short(self.q)}{kv})"

    def __reduce__(self) -> tuple[type[SeqLens], tuple[tuple[int, ...], tuple[int, ...]]]:
        # Rebuilding drops the cached hash, which another interpreter may compute differently.
        return (SeqLens, (self.q, self.kv))


def check_lengths(where: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Return lengths of sequences as a tuple of ints; `where` names them in messages.

    >>> check_lengths("SeqLens: q", range(1, 4))
    (1, 2, 3)
    >>> check_lengths("SeqLens: q", [3, -1])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: SeqLens: q[1] is -1; a length is 0 or more
    """
    lengths = _host_ints(where, values)
    if not lengths:
        raise CompositionError(f"{where} is empty; a packed batch holds at least one")
    if min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise CompositionError(f"{where}[{at}] is {shown(lengths[at])}; a length is 0 or more")
    if sum(lengths) > _LONGEST:
        raise CompositionError(
            f"{where} is {_short(lengths)}: more tokens in all than a 64-bit number counts"
        )
    return lengths


def _differences(name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    where = f"SeqLens.from_cu_seqlens: {name}"
    totals = _host_ints(where, values)
    if not totals:
        raise CompositionError(f"{where} is empty; cumulative lengths start with 0")
    if totals[0] != 0:
        raise CompositionError(
            f"{where} starts with {shown(totals[0])}, but cumulative lengths start with 0; "
            "prepend the 0, or use SeqLens(...) if these are lengths"
        )
    lengths = tuple(after - before for before, after in pairwise(totals))
    if lengths and min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise CompositionError(
            f"{where} falls from {shown(totals[at])} to {shown(totals[at + 1])} at index {at + 1}; "
            "cumulative lengths never decrease (use SeqLens(...) if these are lengths)"
        )
    return lengths


def _host_ints(where: str, values: object) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        values = _read_tensor(where, values)
    elif hasattr(values, "__array__"):
        values = _read_array(where, np.asarray(values))
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise CompositionTypeError(
            f"{where} is a list of ints, one per sequence; got {type(values).__name__}"
        )
    if len(values) > _MOST:
        raise CompositionError(
            f"{where} has {shown(len(values))} entries; a packed batch holds {_MOST:,} sequences "
            "at most"
        )
    if bool in map(type, values):
        raise CompositionTypeError(f"{where} holds booleans; give lengths, not a mask")
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        bad = next(value for value in values if not hasattr(value, "__index__"))
        raise CompositionTypeError(
            f"{where} holds {shown(bad)} ({type(bad).__name__}); lengths are whole numbers of "
            "tokens"
        ) from None


def _read_tensor(where: str, values: Tensor) -> list[int]:
    if values.device.type != "cpu":
        raise CompositionTypeError(
            f"{where} is a tensor on {values.device}: reading it would make the host wait for "
            "the device in every step; keep the lengths on the host (a list or CPU tensor) "
            "where the batch is built"
        )
    dense = not values.is_nested and values.layout == torch.strided
    integral = not (values.is_floating_point() or values.is_complex())
    if not dense or values.ndim != 1 or not integral:
        kind = "nested" if values.is_nested else str(values.layout).removeprefix("torch.")
        shape = list(values.shape) if dense else kind
        raise CompositionTypeError(
            f"{where} is a tensor {shape} of {values.dtype}; give one axis of integers"
        )
    return [*values.tolist()]


def _read_array(where: str, values: np.ndarray[Any, Any]) -> list[int]:
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise CompositionTypeError(
            f"{where} is an array {list(values.shape)} of {values.dtype}; give one axis of integers"
        )
    return [*values.tolist()]


def _sum_remedy(lengths: tuple[int, ...], tokens: int) -> str:
    if lengths[-1] == tokens and list(lengths) == sorted(lengths):
        return "these look like running totals: use SeqLens.from_cu_seqlens(...)"
    return "every token belongs to exactly one sequence"


def _short(lengths: tuple[int, ...]) -> str:
    if len(lengths) <= _SHOWN:
        return repr(lengths)
    head = ", ".join(map(str, lengths[: _SHOWN - 2]))
    return f"({head}, ..., {lengths[-1]}; {len(lengths)} in all)"
