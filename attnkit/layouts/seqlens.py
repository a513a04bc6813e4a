"""`SeqLens`: the lengths of the sequences in a packed batch, as host integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from attnkit.arguments import LARGEST, check_ints, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.handles import born

__all__ = ["SeqLens", "as_seqlens", "check_lengths"]

_SHOWN = 8


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

    if TYPE_CHECKING:  # beside the fields
        _handle: Tensor  # what a graph knows of it
        _alike: bool  # whether each sequence has as many keys as queries

    def __init__(self, q: Sequence[int] | Tensor, kv: Sequence[int] | Tensor | None = None) -> None:
        lengths = check_lengths("SeqLens: q", q)
        object.__setattr__(self, "q", lengths)
        object.__setattr__(self, "kv", lengths if kv is None else check_lengths("SeqLens: kv", kv))
        vars(self).update(_handle=born(self), _alike=self.q == self.kv)
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


def as_seqlens(given: SeqLens | None) -> SeqLens | None:
    """Return the lengths of a packed batch that a call is given, if they are some.

    >>> as_seqlens(SeqLens([3, 5])), as_seqlens(None)
    (SeqLens(q=(3, 5)), None)
    """
    if not isinstance(given, SeqLens | None):
        raise CompositionTypeError(
            f"seqlens={shown(given)}: wrap the lengths as SeqLens(lengths), or "
            "SeqLens.from_cu_seqlens(cumulative): the two are not guessed apart"
        )
    return given


def check_lengths(where: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Return lengths of sequences as a tuple of ints; `where` names them in messages.

    >>> check_lengths("SeqLens: q", range(1, 4))
    (1, 2, 3)
    >>> check_lengths("SeqLens: q", [3, -1])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: SeqLens: q[1]=-1 is too small; it must be >= 0
    """
    lengths = _host_ints(where, values)
    if sum(lengths) > LARGEST:
        raise CompositionError(
            f"{where} is {_short(lengths)}: more tokens in all than a 64-bit number counts"
        )
    return lengths


def _differences(name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    where = f"SeqLens.from_cu_seqlens: {name}"
    totals = _host_ints(where, values)
    if totals[0] != 0:
        raise CompositionError(
            f"{where} starts with {shown(totals[0])}, but cumulative lengths start with 0; "
            "prepend the 0, or use SeqLens(...) if these are lengths"
        )
    for at, (before, after) in enumerate(pairwise(totals), 1):
        if after < before:
            raise CompositionError(
                f"{where} falls from {shown(before)} to {shown(after)} at index {at}; cumulative "
                "lengths never decrease (use SeqLens(...) if these are lengths)"
            )
    return tuple(after - before for before, after in pairwise(totals))


def _host_ints(where: str, values: object) -> tuple[int, ...]:
    """Return a list of numbers that are 0 or more; numpy's are taken, too, one by one."""
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise CompositionTypeError(
            f"{where} is a tensor on {values.device}: reading it would make the host wait for "
            "the device in every step; keep the lengths on the host (a list or CPU tensor) "
            "where the batch is built"
        )
    if isinstance(values, Tensor):
        check_tensor(where, values)
    elif isinstance(values, list | tuple):
        values = [
            index(v) if hasattr(v, "__index__") and type(v) is not bool else v for v in values
        ]
    elif hasattr(values, "__array__"):
        values = np.asarray(values)
    return check_ints(where, values, 0)


def _sum_remedy(lengths: tuple[int, ...], tokens: int) -> str:
    if lengths[-1] == tokens and list(lengths) == sorted(lengths):
        return "these look like running totals: use SeqLens.from_cu_seqlens(...)"
    return "every token belongs to exactly one sequence"


def _short(lengths: tuple[int, ...]) -> str:
    if len(lengths) <= _SHOWN:
        return repr(lengths)
    head = ", ".join(map(str, lengths[: _SHOWN - 2]))
    return f"({head}, ..., {lengths[-1]}; {len(lengths)} in all)"
