"""`Pse`, the abstract positional bias, and the registry of kinds.

A bias is a value: a frozen dataclass with equality, hash and repr. It knows nothing of how
it will be computed; `materialize` is its exact definition and the oracle for everyone else.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast, final

import torch
from torch import Tensor, nn

from attnkit.arguments import check_float_dtype, check_int, check_place
from attnkit.eager import BIAS_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.handles import born
from attnkit.masks import Rectangle
from attnkit.masks.trace import row_blocks
from attnkit.pse.dividing import Divisible, Range
from attnkit.pse.structure import Align, OfDistance, Structure
from attnkit.textform import Families, check_names

if TYPE_CHECKING:
    from typing_extensions import Self

    from attnkit.pse.composite import Sum

__all__ = ["EVERY", "PSE", "Align", "Pse", "Range", "Rectangle", "rebound"]


EVERY = -1
"""For `Rectangle.batch`: all batch elements."""


class Pse(Divisible, ABC):
    """A bias on the scores: ``scale*q.k + bias``, or ``scale*(q.k + bias)`` when `before_scale`.

    Shapes: ``[1 | b, n | 1, q_len, kv_len]`` once materialised. In a packed batch every
    sequence is its own score matrix and has its own `q_len` and `kv_len`.

    A new family is a frozen dataclass with `_values`, the cells of a rectangle; whatever else is
    asked of a bias follows from that. Where it is made for some heads, batch elements or lengths,
    it says `heads`, `batch`, `extent`. Where its cells follow from less than a matrix, it says
    so by `structure`, and reaches kernels in that form. Tensors in its fields are its own: with
    ``@dataclass(frozen=True, eq=False)`` equality compares what they hold. A name in
    configurations and in `parse` comes by ``@PSE.register("kind")``.

    One object given to several layers is shared: they have one set of parameters. `copy` makes
    another, with its own parameters.

    >>> from attnkit import pse
    >>> bias = pse.ALiBi(2) + pse.ALiBi(2, align="top_left")
    >>> bias.heads, bias.toeplitz, bias.materialize(3, 4).shape
    (2, True, torch.Size([1, 2, 3, 4]))
    """

    kind: ClassVar[str]
    _handle: Tensor  # what a graph knows of it
    _cells_from: ClassVar[frozenset[str]] = frozenset({"_values"})
    """Where a subclass defines one of these anew, its structure is what this class states."""

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Make a bias; inside of a compiled function, one that its graph makes when it runs."""
        if torch.compiler.is_dynamo_compiling():
            from attnkit.pse import written

            if written.WRITER.takes(*given, *named.values()):
                return cast("Self", written.made(cls.__name__, given, named))
        return cast("Self", _new(cls, given, named))

    def __init_subclass__(cls) -> None:
        """Leave a subclass that computes its cells in another way the structure they still have."""
        super().__init_subclass__()
        for parent in cls.__mro__[1:]:
            anew = vars(parent).get("_cells_from", frozenset()) & vars(cls).keys()
            if anew and "structure" not in vars(cls):
                type.__setattr__(cls, "structure", vars(parent)["structure"])

    # -- what a family says --------------------------------------------------------------

    @abstractmethod
    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Return the cells of a rectangle: ``[rows, keys]``, before them ``n`` and ``b``, if any.

        Of all batch elements and heads (or of batch element ``at.batch`` alone, unless that is
        `EVERY`); an axis of one entry serves any number. They are computed in `dtype`, float32 or
        float64, and rounded after. Gradients reach the tensors of the bias.
        """

    @property
    def structure(self) -> Structure | None:
        """What its cells follow from (`attnkit.pse.structure`); None: no less than a matrix."""
        return None

    @property
    def before_scale(self) -> bool:
        """Whether the bias is added before the scores are scaled."""
        return False

    @property
    def heads(self) -> int | None:
        """The number of query heads it was made for; None fits any."""
        return _first(part.heads for part in self.members)

    @property
    def batch(self) -> int | None:
        """The number of batch elements (or packed sequences) it was made for; None fits any."""
        return _first(part.batch for part in self.members)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The (q_len, kv_len) it was made for; None where it fits any length."""
        known = [part.extent for part in self.members]
        return _first(q_len for q_len, _ in known), _first(kv_len for _, kv_len in known)

    @property
    def anchored(self) -> bool:
        """Whether more rows or keys would move the numbers, rather than add some."""
        return not self.members or any(part.anchored for part in self.members)

    @property
    def members(self) -> tuple[Pse, ...]:
        """The biases that this one is made of; most are made of none."""
        return ()

    # -- what everyone asks --------------------------------------------------------------

    @property
    def parts(self) -> tuple[Pse, ...]:
        """The biases it is the sum of: itself, unless it is a `Sum`."""
        return (self,)

    @property
    def toeplitz(self) -> bool:
        """Whether the bias depends on the distance ``j - i`` only (and on the head)."""
        return isinstance(self.structure, OfDistance)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it carries, whose values are bound when a plan runs."""
        own = [value for value in self._fields if isinstance(value, Tensor)]
        for part in self.members:
            own += part.tensors
        return tuple(own)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """A name for each of the tensors: that of its field; in a sum, after the part's number.

        >>> from attnkit import pse
        >>> (pse.ALiBi(2) + pse.T5Relative(2)).tensor_names
        ('1_table',)
        """
        names = cast(Any, self).__dataclass_fields__
        own = {id(value): name for name, value in zip(names, self._fields, strict=True)}
        return tuple(own.get(id(tensor), str(k)) for k, tensor in enumerate(self.tensors))

    @property
    def structure_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that its `structure` speaks of: its own, or what follows from those.

        >>> from attnkit import pse
        >>> pse.T5Relative(8).for_heads(0, 2).structure_tensors[0].shape
        torch.Size([32, 2])
        """
        return self.tensors

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient has to flow back into the bias."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def copy(self) -> Self:
        """Return an equal bias whose tensors are its own: parameters for another layer.

        >>> from attnkit.pse import T5Relative
        >>> first = T5Relative(8)
        >>> second = first.copy()
        >>> second == first, second.table is first.table
        (True, False)
        """
        return rebound(self, [_twin(tensor) for tensor in self.tensors])

    @final
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
        for one batch element (or packed sequence) only, so that dimension 0 is 1. A bias that is
        a tensor gives a view of it, unless `dtype` asks for a cast.

        Raises `CompositionError` where the bias does not fit, or lives on another device.

        >>> from attnkit import pse
        >>> pse.ALiBi([0.5]).materialize(1, 3)
        tensor([[[[-1.0000, -0.5000, -0.0000]]]])
        """
        self.check(q_len, kv_len, batch, heads)
        place = Rectangle((0, q_len), (0, kv_len), q_len, kv_len)
        return self._read(place, batch_index, dtype, device)

    @final
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

        No other cell is made.

        >>> from attnkit import pse
        >>> pse.ALiBi([1.0]).rectangle((2, 3), (0, 2), q_len=3, kv_len=3)
        tensor([[[[-2., -1.]]]])
        """
        self.check(q_len, kv_len, batch, heads)
        return self._read(Rectangle(q_range, kv_range, q_len, kv_len), batch_index, dtype, device)

    def _read(
        self,
        at: Rectangle,
        batch_index: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        check_float_dtype("dtype", dtype)
        tensors = self.tensors
        for tensor in tensors:
            check_place("a tensor of the bias", tensor, device)
        where = tensors[0].device if tensors else None if device is None else torch.device(device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        at = at._replace(batch=EVERY if batch_index is None else batch_index)
        return self._cells(at, wide, where).to(dtype).expand(-1, -1, *at.shape)

    def _cells(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Return the cells of a rectangle ``[1 | b, n | 1, rows | 1, keys | 1]``."""
        cells = self._values(at, dtype, device)
        cells = cells[(None,) * (4 - cells.ndim)]
        if at.batch != EVERY and cells.shape[0] > 1:
            cells = cells[at.batch : at.batch + 1]
        return cells

    def diagonals(
        self, q_len: int, kv_len: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return a bias by distance as a vector for each head: ``[1 | n, q_len + kv_len - 1]``.

        The numbers are those of the diagonals ``j - i``, from ``1 - q_len`` on.

        >>> from attnkit import pse
        >>> pse.ALiBi([1.0]).diagonals(2, 3, dtype=torch.float32)
        tensor([[-2., -1., -0., -1.]])
        """
        whole = {"q_len": q_len, "kv_len": kv_len}
        column = self.rectangle((0, q_len), (0, 1), **whole, dtype=dtype, device=device)
        row = self.rectangle((0, 1), (1, kv_len), **whole, dtype=dtype, device=device)
        return torch.cat([column[0, :, :, 0].flip(-1), row[0, :, 0]], -1)

    @final
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
        self.check(q_len, kv_len, batch, heads)
        place = Rectangle((0, q_len), (0, kv_len), q_len, kv_len)
        read = ((part, part._read(place, batch_index, dtype, device)) for part in self.parts)
        return reduce(add, (scale * cells if part.before_scale else cells for part, cells in read))

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` where the bias does not fit; computes nothing.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(6).check(4, 4, batch=2, heads=8)
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: ALiBi(6) was made for 6 heads, but the query has 8; \
give it one per query head
        """
        sizes: dict[str, Any] = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
        for name, size in sizes.items():
            said = size is not None or name.endswith("len")
            if said and not isinstance(size, torch.SymInt):
                check_int(name, size, 0)
        for own, given, made, remedy in (
            (self.heads, heads, "{} heads, but the query has {}", "; give it one per query head"),
            (self.batch, batch, "a batch of {}, but the query's is {}", ""),
        ):
            if own is not None and given is not None and own != given:
                raise CompositionError(f"{self} was made for {made.format(own, given)}{remedy}")
        if any(own not in (None, n) for own, n in zip(self.extent, (q_len, kv_len), strict=True)):
            made = " x ".join("any" if own is None else str(own) for own in self.extent)
            raise CompositionError(
                f"pse.{self} is for score matrices of {made} (queries x keys), but this one is "
                f"{q_len} x {kv_len}; slice the tensor, or cut the bias, to these lengths (every "
                "sequence of a packed batch is its own score matrix), or use a bias defined for "
                "any length"
            )

    def _extends(self, shorter: int, longer: int) -> bool:
        """Whether the square matrix of a text begins with that of a shorter one, cell for cell."""
        if self.members:
            return all(part._extends(shorter, longer) for part in self.members)
        if self.toeplitz:  # either anchor is the diagonal of a square matrix
            return True

        def read(rows: Range, n: int) -> Tensor:
            return self.rectangle(rows, (0, shorter), q_len=n, kv_len=n, dtype=torch.float64)

        blocks = row_blocks(0, shorter, shorter)
        return all(torch.equal(read(rows, shorter), read(rows, longer)) for rows in blocks)

    def _repr_html_(self) -> str:
        """Return heat maps for a notebook, at lengths that suit the bias."""
        from attnkit.pse.shown import page

        return page(self)

    # -- value ---------------------------------------------------------------------------

    @property
    def _fields(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in cast(Any, self).__dataclass_fields__])

    def key(self) -> Hashable:
        """Return what a plan may depend on: equal keys mean that one plan serves both biases.

        These are its fields, of tensors the shape, the dtype and the need of a gradient.

        >>> from attnkit import pse
        >>> pse.ALiBi(2).key() == pse.ALiBi(2).key()
        True
        """
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return (kind, *map(_key, self._fields))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pse) or type(other) is not type(self):
            return NotImplemented
        alike = self is other or self.key() == other.key()
        return alike and all(map(_same, self.tensors, other.tensors))

    def __getstate__(self) -> dict[str, Any]:
        # What is cached stays behind, and what a graph knows of it.
        return dict(zip(cast(Any, self).__dataclass_fields__, self._fields, strict=True))

    def __hash__(self) -> int:
        told = (tuple(v.shape) if isinstance(v, Tensor) else v for v in self._fields)
        return hash((type(self), *told))

    def __add__(self, other: Pse) -> Sum:
        if not isinstance(other, Pse):
            raise CompositionTypeError(
                f"a positional bias adds to another one, not to {type(other).__name__}; "
                "wrap a tensor as pse.Dense(tensor)"
            )
        from attnkit.pse.composite import Sum

        return Sum((self, other))

    def __radd__(self, other: object) -> NoReturn:
        raise CompositionTypeError(
            f"{shown(other)} plus a positional bias: both sides of + are biases; wrap a tensor as "
            "pse.Dense(tensor)"
        )


@untraced(BIAS_IN_GRAPH)
def _new(cls: type[Pse], given: Sequence[Any], named: dict[str, Any]) -> Any:
    """Make one for its constructor to fill in; a tracer that cannot write it down stops here."""
    check_names(cls, given, named)
    made = object.__new__(cls)
    vars(made)["_handle"] = born(made)
    return made


PSE = Families[Pse]("positional bias", Pse, "pse", "ALiBi(8) + SqrtALiBi(8)")


Some = TypeVar("Some", bound=Pse)


def rebound(pse: Some, tensors: Sequence[Tensor]) -> Some:
    """Return the same bias with `tensors` in place of its own, in the order of ``pse.tensors``.

    Raises `CompositionError` for a bias that does not keep its tensors in its fields.

    >>> import torch
    >>> from attnkit.pse import ALiBi, Dense
    >>> bias = ALiBi(2) + Dense(torch.zeros(2, 3, 3))
    >>> rebound(bias, [torch.ones(2, 3, 3)]).tensors[0].sum()
    tensor(18.)
    """
    places: dict[int, list[Tensor]] = {}  # one that several addends share is met as often
    for old, new in zip(pse.tensors, tensors, strict=True):
        places.setdefault(id(old), []).append(new)
    found = cast(Some, _replaced(pse, {key: iter(new) for key, new in places.items()}))
    if any(a is not b for a, b in zip(found.tensors, tensors, strict=True)):
        raise CompositionError(
            f"the tensors of {pse!r} were replaced (by copying, moving, casting or loading), and "
            "it does not keep them in the fields of its dataclass; build it anew"
        )
    return found


def _replaced(value: Any, places: dict[int, Iterator[Tensor]]) -> Any:
    if isinstance(value, tuple):
        return tuple(_replaced(part, places) for part in value)
    if not isinstance(value, Pse):
        return next(places.get(id(value), iter(())), value)
    twin = copy.copy(value)
    for item in fields(cast(Any, value)):
        object.__setattr__(twin, item.name, _replaced(getattr(value, item.name), places))
    return twin


def _twin(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values that shares nothing with the one given."""
    values = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, tuple) and value and isinstance(value[0], Pse):
        return tuple(part.key() for part in value)
    return value.key() if isinstance(value, Pse) else value


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and not a.is_meta and torch.equal(a, b))


def _first(claims: Iterable[int | None]) -> int | None:
    return next((claim for claim in claims if claim is not None), None)
