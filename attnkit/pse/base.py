"""`Pse`, the abstract positional bias, `Sum`, and the registry of kinds.

A bias is a value: a frozen dataclass with equality, hash and repr. It knows nothing of how
it will be computed; `materialize` is its exact definition and the oracle for everyone else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from attnkit.eager import BIAS_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.registry import Registry
from attnkit.textform import check_names

if TYPE_CHECKING:
    from typing_extensions import Self

    from attnkit.pse.structure import Structure

__all__ = ["PSE", "Align", "Pse", "Range", "Sum", "check_range"]

Align = Literal["bottom_right", "top_left"]
Range = tuple[int, int]

_CELLS_AT_ONCE = 1 << 20  # read together where two matrices are compared


class Pse(ABC):
    """A bias on the scores: ``scale*q.k + bias``, or ``scale*(q.k + bias)`` when `before_scale`.

    Shapes: ``[1 | b, n | 1, q_len, kv_len]`` once materialised. In a packed batch every
    sequence is its own score matrix and has its own `q_len` and `kv_len`.

    A new family is a frozen dataclass with `materialize`, and `check` where it can be wrong;
    ``@PSE.register("kind")`` gives it a name in configurations and in `parse`.

    >>> from attnkit import pse
    >>> bias = pse.ALiBi(2) + pse.ALiBi(2, align="top_left")
    >>> bias.heads, bias.toeplitz, bias.materialize(3, 4).shape
    (2, True, torch.Size([1, 2, 3, 4]))
    """

    kind: ClassVar[str]

    # A tracer would hand a half-made object to the planner, whose fields still have the defaults
    # of their class.
    @untraced(BIAS_IN_GRAPH)
    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Make a bias; inside of a compiled function, outside of its graph."""
        check_names(cls, given, named)
        return super().__new__(cls)

    @property
    def before_scale(self) -> bool:
        """Whether the bias is added before the scores are scaled."""
        return False

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient has to flow back into the bias."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def heads(self) -> int | None:
        """The number of query heads it was made for; None fits any."""
        return None

    @property
    def batch(self) -> int | None:
        """The number of batch elements (or packed sequences) it was made for; None fits any."""
        return None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The (q_len, kv_len) it was made for; None where it fits any length."""
        return (None, None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it carries, whose values are bound when a plan runs."""
        return ()

    @property
    def toeplitz(self) -> bool:
        """Whether the bias depends on the distance ``j - i`` only (and on the head)."""
        return False

    @property
    def structure(self) -> Structure | None:
        """What a planner may exploit of a single bias (`attnkit.pse.structure`); None: nothing."""
        return None

    @property
    def parts(self) -> tuple[Pse, ...]:
        """The biases it is the sum of: itself, unless it is a `Sum`."""
        return (self,)

    @abstractmethod
    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the bias as a tensor ``[1 | b, n | 1, q_len, kv_len]``: its definition.

        `batch` and `heads` are those of the query, checked where given. `batch_index` asks
        for one batch element (or packed sequence) only, so that dimension 0 is 1.
        """

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` where the bias does not fit; computes nothing.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(6).check(4, 4, batch=2, heads=8)
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: ALiBi(6) was made for 6 heads, but the query has 8; \
give one slope per query head
        """
        counts = (("batch", batch), ("heads", heads))
        said = [(name, count) for name, count in counts if count is not None]
        for name, length in (("q_len", q_len), ("kv_len", kv_len), *said):
            plain = isinstance(length, int | torch.SymInt) and not isinstance(length, bool)
            if not plain or not 0 <= length <= LARGEST:
                raise CompositionTypeError(
                    f"{self} was asked for {name}={shown(length)}; a length is an int from 0 to "
                    f"{LARGEST}"
                )
        for what, own, given in (("heads", self.heads, heads), ("batch", self.batch, batch)):
            if own is not None and given is not None and own != given:
                raise CompositionError(self._misfit(what, own, given))

    def cut(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Pse:
        """Return the part inside a rectangle ``[start, stop)``, renumbered from its corner.

        `q_len` and `kv_len` are the lengths of the whole score matrix; they may be left out
        where the bias knows them (`extent`) or does not depend on them.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(8, align="top_left").cut((4, 6), (0, 6), q_len=6, kv_len=6)
        ALiBi(8)
        """
        from attnkit.pse.cut import Cut

        whole = [
            given if given is not None else known
            for given, known in zip((q_len, kv_len), self.extent, strict=True)
        ]
        if whole[0] is None or whole[1] is None:
            raise CompositionError(
                f"{self}: what a rectangle of it holds depends on the lengths of the whole score "
                "matrix; pass q_len= and kv_len="
            )
        return Cut(self, q_range, kv_range, whole[0], whole[1])

    def rectangle(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int,
        kv_len: int,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the part of `materialize` inside a rectangle ``[start, stop)``.

        Families with a formula per cell override it, so that no other cell is ever made.

        >>> from attnkit import pse
        >>> pse.ALiBi([1.0]).rectangle((2, 3), (0, 2), q_len=3, kv_len=3)
        tensor([[[[-2., -1.]]]])
        """
        whole = self.materialize(
            q_len,
            kv_len,
            batch=batch,
            heads=heads,
            batch_index=batch_index,
            dtype=dtype,
            device=device,
        )
        return whole[..., slice(*q_range), slice(*kv_range)]

    def _extends(self, shorter: int, longer: int) -> bool:
        """Whether the square matrix of a text begins with that of a shorter one, cell for cell."""
        height = max(1, _CELLS_AT_ONCE // max(1, shorter))
        for i in range(0, shorter, height):
            rows, keys = (i, min(i + height, shorter)), (0, shorter)
            old, new = (
                self.rectangle(rows, keys, q_len=n, kv_len=n, dtype=torch.float64)
                for n in (shorter, longer)
            )
            if not torch.equal(old, new):
                return False
        return True

    def key(self) -> Hashable:
        """Return what a plan may depend on: equal keys mean that one plan serves both biases.

        >>> from attnkit import pse
        >>> pse.ALiBi(2).key() == pse.ALiBi(2).key()
        True
        """
        return self

    def term(
        self,
        q_len: int,
        kv_len: int,
        *,
        scale: float,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return what is added to the *scaled* scores: ``score = scale*q.k + term``.

        This is the materialised bias, times `scale` for a part that says `before_scale`.

        >>> import torch
        >>> from attnkit.pse import Dense
        >>> Dense(torch.ones(1, 2), before_scale=True).term(1, 2, scale=0.5)
        tensor([[[[0.5000, 0.5000]]]])
        """

        def one(part: Pse) -> Tensor:
            bias = part.materialize(
                q_len,
                kv_len,
                batch=batch,
                heads=heads,
                batch_index=batch_index,
                dtype=dtype,
                device=device,
            )
            return scale * bias if part.before_scale else bias

        return reduce(add, map(one, self.parts))

    def __add__(self, other: Pse) -> Sum:
        if not isinstance(other, Pse):
            raise CompositionTypeError(
                f"a positional bias adds to another one, not to {type(other).__name__}; "
                "wrap a tensor as pse.Dense(tensor)"
            )
        return Sum((self, other))

    def __radd__(self, other: object) -> NoReturn:
        raise CompositionTypeError(
            f"{shown(other)} plus a positional bias: both sides of + are biases; wrap a tensor as "
            "pse.Dense(tensor)"
        )

    def _misfit(self, what: str, own: int, given: int) -> str:
        if what == "heads":
            return f"{self} was made for {own} heads, but the query has {given}"
        return f"{self} was made for a batch of {own}, but the query's is {given}"


class PseRegistry(Registry[type[Pse]]):
    """The families of biases, by the kind that a configuration gives them."""

    def add(self, name: str, entry: type[Pse]) -> type[Pse]:
        """Register a family; its class name must be free too, for `parse`."""
        if not isinstance(entry, type) or not issubclass(entry, Pse):
            raise CompositionTypeError(
                f"{shown(entry)} is no family of positional biases; one is a frozen dataclass that "
                "derives from pse.Pse"
            )
        for kind, known in self._entries.items():
            if known.__name__ == entry.__name__ and kind != name:
                raise CompositionError(
                    f"a positional bias named {entry.__name__} is registered already, "
                    f"as {kind!r}; choose another class name"
                )
        super().add(name, entry)
        entry.kind = name
        return entry


LARGEST = (1 << 63) - 1
"""The largest length: positions are int64 in tensors."""

PSE = PseRegistry("positional bias", "attnkit.pse")


@dataclass(frozen=True, init=False, repr=False)
class Sum(Pse):
    """The sum of several biases, ``p1 + p2``.

    The parts stay apart, because each may reach a kernel in its own way. Sums flatten
    and keep their order, since rounding makes the order of additions part of the value.
    Parts before and after the scale may mix; then there is no single matrix, and `term`
    takes the place of `materialize`.

    Raises `CompositionError` for no parts, or parts made for different heads or batches.

    >>> from attnkit.pse import ALiBi, SqrtALiBi
    >>> both = ALiBi(2) + SqrtALiBi(2)
    >>> both
    ALiBi(2) + SqrtALiBi(2)
    >>> (both + ALiBi(2)).parts == (ALiBi(2), SqrtALiBi(2), ALiBi(2))
    True
    """

    addends: tuple[Pse, ...]

    def __init__(self, addends: Iterable[Pse]) -> None:
        if not isinstance(addends, Iterable):
            raise CompositionTypeError(f"Sum adds a list of biases, not {shown(addends)}")
        flat: tuple[Pse, ...] = ()
        for addend in addends:
            if not isinstance(addend, Pse):
                raise CompositionTypeError(
                    f"Sum adds positional biases, not {type(addend).__name__}; "
                    "wrap a tensor as pse.Dense(tensor)"
                )
            flat += addend.parts
        if not flat:
            raise CompositionError("Sum of no biases; pass pse=None for none")
        object.__setattr__(self, "addends", flat)
        _agree("heads", [(part, part.heads) for part in flat])
        _agree("batch elements", [(part, part.batch) for part in flat])
        _agree("queries", [(part, part.extent[0]) for part in flat])
        _agree("keys", [(part, part.extent[1]) for part in flat])

    @property
    def parts(self) -> tuple[Pse, ...]:
        """The addends, none of them a `Sum`."""
        return self.addends

    @property
    def before_scale(self) -> bool:
        """Whether all parts are before the scale; a mixed sum has no answer and raises."""
        sides = {part.before_scale for part in self.parts}
        if len(sides) > 1:
            raise CompositionError(
                f"{self} mixes parts before and after the scale; ask each of .parts, or take "
                ".term(..., scale=...), which weighs each part"
            )
        return sides.pop()

    @property
    def heads(self) -> int | None:
        """The number of heads of the parts that have one."""
        return _first(part.heads for part in self.parts)

    @property
    def batch(self) -> int | None:
        """The batch size of the parts that have one."""
        return _first(part.batch for part in self.parts)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths of the parts that have some."""
        q_lens, kv_lens = zip(*(part.extent for part in self.parts), strict=True)
        return _first(q_lens), _first(kv_lens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts, in order."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def toeplitz(self) -> bool:
        """Whether every part depends on the distance only."""
        return all(part.toeplitz for part in self.parts)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` where any part does not fit."""
        for part in self.parts:
            part.check(q_len, kv_len, batch, heads)

    def cut(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Pse:
        """Return the sum of the parts' cuts."""
        return Sum(part.cut(q_range, kv_range, q_len=q_len, kv_len=kv_len) for part in self.parts)

    def _extends(self, shorter: int, longer: int) -> bool:
        """Whether every part does."""
        return all(part._extends(shorter, longer) for part in self.parts)

    def key(self) -> Hashable:
        """Return the keys of the parts, in order."""
        return ("Sum", *(part.key() for part in self.parts))

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the sum of the parts, which must lie on one side of the scale."""
        _ = self.before_scale  # raises for a mixed sum
        return reduce(
            add,
            (
                part.materialize(
                    q_len,
                    kv_len,
                    batch=batch,
                    heads=heads,
                    batch_index=batch_index,
                    dtype=dtype,
                    device=device,
                )
                for part in self.parts
            ),
        )

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def check_range(name: str, span: Range, length: int) -> None:
    """Raise `CompositionError` unless ``0 <= start <= stop <= length``."""
    pair = isinstance(span, tuple | list) and len(span) == 2
    if not pair or any(type(end) is not int for end in (*span, length)):
        raise CompositionTypeError(
            f"{name}={shown(span)} of extent {shown(length)}; a range is (start, stop), two ints "
            "with start <= stop"
        )
    start, stop = span
    if not 0 <= start <= stop <= length:
        raise CompositionError(
            f"{name}={shown(span)} does not lie in a score matrix of extent {shown(length)}; give "
            "(start, stop) with 0 <= start <= stop <= the extent"
        )


def _first(claims: Iterable[int | None]) -> int | None:
    return next((claim for claim in claims if claim is not None), None)


def _agree(what: str, claims: list[tuple[Pse, int | None]]) -> None:
    made_for = [(part, count) for part, count in claims if count is not None]
    for part, count in made_for[1:]:
        first, expected = made_for[0]
        if count != expected:
            raise CompositionError(
                f"cannot add {first}, made for {expected} {what}, and {part}, made for {count}; "
                "both describe the same score matrices"
            )
