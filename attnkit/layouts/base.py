"""`Layout`: one einops pattern, its rules, and the registry of all of them.

The canonical form is ``b n s d``; a packed layout has one token axis ``t`` instead of
``b`` and ``s``. Converting permutes and splits axes, so it returns views wherever strides
can express the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange
from torch import Tensor

from attnkit.arguments import check_int, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts.seqlens import check_lengths
from attnkit.registry import Registry

__all__ = ["LAYOUTS", "Layout", "Sizes", "get", "register"]

_AXES = {"b": "batch", "s": "length", "n": "heads", "d": "dim", "t": "tokens"}
_DENSE = frozenset("bsnd")
_PACKED = frozenset("tnd")
_MOST_AXES = 64  # what a tensor can have


@dataclass(frozen=True)
class Sizes:
    """The extents of one tensor, whatever its layout; a packed tensor counts as one batch row.

    >>> Sizes(batch=2, length=16, heads=4, dim=8)
    Sizes(batch=2, length=16, heads=4, dim=8)
    """

    batch: int
    length: int
    heads: int
    dim: int


@dataclass(frozen=True)
class Layout:
    """A named einops pattern over ``b s n d``, or over ``t n d`` when packed.

    ``n`` and ``d`` may be merged as ``(n d)``; then the head count is not in the shape and
    every method needs `num_heads` (or `head_dim`). Elsewhere `num_heads` is optional and
    checked. Any dtype and device; nothing is computed, tensors are only viewed (`from_bnsd`
    of a merged layout and `join` copy when strides leave no choice).

    Raises `CompositionError` for a pattern, rank or head count that does not fit.

    >>> import torch
    >>> bsh = Layout("BSH", "b s (n d)")
    >>> bsh.sizes((2, 16, 32), num_heads=4)
    Sizes(batch=2, length=16, heads=4, dim=8)
    >>> x = torch.zeros(2, 16, 32)
    >>> y = bsh.to_bnsd(x, num_heads=4)
    >>> y.shape, y.data_ptr() == x.data_ptr()
    (torch.Size([2, 4, 16, 8]), True)
    """

    name: str
    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name != self.name.upper():
            raise CompositionError(
                f"a layout's name is a non-empty upper-case string such as 'BSND', "
                f"not {shown(self.name)}"
            )
        if not isinstance(self.pattern, str):
            raise CompositionTypeError(
                f"a layout's pattern is an einops string, not {shown(self.pattern)}"
            )
        _groups(self.pattern)

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after the other along one token axis ``t``.

        >>> get("TND").packed, get("BSND").packed
        (True, False)
        """
        return "t" in self.pattern

    @property
    def merges_heads(self) -> bool:
        """Whether heads and their dimension share an axis, ``(n d)``.

        >>> get("BSH").merges_heads, get("BSND").merges_heads
        (True, False)
        """
        return "(" in self.pattern

    @property
    def rank(self) -> int:
        """The number of axes of a tensor in this layout.

        >>> get("BSH").rank, get("BSND").rank
        (3, 4)
        """
        return len(_groups(self.pattern))

    def __str__(self) -> str:
        return f"{self.name} ({self.pattern})"

    def sizes(
        self,
        shape: Sequence[int],
        num_heads: int | None = None,
        *,
        head_dim: int | None = None,
        what: str = "tensor",
    ) -> Sizes:
        """Read the extents off a shape; `what` names the tensor in error messages.

        Of a packed tensor `length` is the number of tokens and `batch` is 1: how many
        sequences it holds is for `SeqLens` to say.

        Raises `CompositionError` for a wrong rank, heads that do not divide, or a head count
        that is missing or contradicts the shape.

        >>> get("TND").sizes((48, 4, 8))
        Sizes(batch=1, length=48, heads=4, dim=8)
        >>> get("SBH").sizes((16, 2, 32), head_dim=8).heads
        4
        >>> get("BSH").sizes((2, 16, 30), num_heads=4, what="query")
        Traceback (most recent call last):
        ...
        attnkit.errors.CompositionError: query [2, 16, 30] in layout BSH (b s (n d)): \
its last axis of 30 does not divide into num_heads=4; change the width to a multiple of 4, \
or num_heads
        """
        if not isinstance(shape, torch.Size):
            _check_shape(shape, what)
        groups = _groups(self.pattern)
        if len(shape) != len(groups):
            raise self._wrong_rank(shape, what)
        for label, count in (("num_heads", num_heads), ("head_dim", head_dim)):
            if count is not None:
                check_int(label, count, 1)
        found: dict[str, int] = {}
        for group, extent in zip(groups, shape, strict=True):
            if len(group) == 1:
                found[group] = extent
            else:
                found["n"], found["d"] = self._divide(shape, extent, num_heads, head_dim, what)
        for given, axis, label in ((num_heads, "n", "num_heads"), (head_dim, "d", "head_dim")):
            if given is not None and found[axis] != given:
                raise CompositionError(
                    f"{self._given(shape, what)}: {label}={shown(given)} was given, but the shape "
                    f"holds {found[axis]} ({_AXES[axis]}); "
                    f"{self._agree(shape, num_heads, head_dim)}"
                )
            if found[axis] == 0:
                raise CompositionError(
                    f"{self._given(shape, what)}: the {_AXES[axis]} axis is empty; "
                    "attention needs at least one head of at least one dimension"
                )
        length = found["t"] if self.packed else found["s"]
        return Sizes(found.get("b", 1), length, found["n"], found["d"])

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape a tensor of these sizes has in this layout: `sizes` undone.

        >>> get("SBH").shape(Sizes(batch=2, length=16, heads=4, dim=8))
        (16, 2, 32)
        """
        _need_sizes("shape", sizes)
        tokens = sizes.batch * sizes.length
        extents = {"b": sizes.batch, "s": sizes.length, "t": tokens}
        extents |= {"n": sizes.heads, "d": sizes.dim}
        merged = sizes.heads * sizes.dim
        return tuple(extents.get(group, merged) for group in _groups(self.pattern))

    def to_bnsd(self, tensor: Tensor, num_heads: int | None = None) -> Tensor:
        """Return the tensor as ``b n s d``: always a view.

        Raises `CompositionError` as `sizes` does, and for a packed layout, which has no
        ``b n s d`` form: see `split` and `to_tnd`.

        >>> get("SBH").to_bnsd(torch.zeros(16, 2, 32), num_heads=4).shape
        torch.Size([2, 4, 16, 8])
        """
        self._need_dense("to_bnsd", "split(tensor, lengths) gives one [1, n, s, d] per sequence")
        return self._from_own(tensor, "b n s d", num_heads)

    def from_bnsd(self, tensor: Tensor) -> Tensor:
        """Return a ``b n s d`` tensor in this layout: a view where strides allow one.

        Merging heads copies exactly when ``n`` and ``d`` do not lie next to each other in
        memory (as in a contiguous BNSD tensor).

        >>> get("BSH").from_bnsd(torch.zeros(2, 4, 16, 8)).shape
        torch.Size([2, 16, 32])
        """
        self._need_dense("from_bnsd", "join(parts) packs one [1, n, s, d] per sequence")
        return self._to_own(tensor, "b n s d")

    def to_tnd(self, tensor: Tensor, num_heads: int | None = None) -> Tensor:
        """Return the tensor as ``t n d``, batch rows one after the other.

        A view for BSH and BSND (and packed layouts); BNSD and SBH are copied when the batch
        has more than one row, since their tokens do not lie in this order.

        >>> get("BSH").to_tnd(torch.zeros(2, 16, 32), num_heads=4).shape
        torch.Size([32, 4, 8])
        """
        return self._from_own(tensor, "t n d" if self.packed else "(b s) n d", num_heads)

    def from_tnd(self, tensor: Tensor, batch: int = 1) -> Tensor:
        """Undo `to_tnd`: `batch` rows of equal length (a packed layout keeps its one row).

        >>> get("BNSD").from_tnd(torch.zeros(32, 4, 8), batch=2).shape
        torch.Size([2, 4, 16, 8])
        """
        check_int("batch", batch, 1)
        if self.packed:
            return self._to_own(tensor, "t n d")
        _need_rank(tensor, "t n d")
        if tensor.shape[0] % batch:
            raise CompositionError(
                f"{tensor.shape[0]} tokens do not divide into batch={batch} rows of equal "
                f"length for layout {self.name}; keep them packed, with SeqLens"
            )
        return self._to_own(tensor, "(b s) n d", b=batch)

    def split(
        self, tensor: Tensor, lengths: Sequence[int], num_heads: int | None = None
    ) -> tuple[Tensor, ...]:
        """Cut a packed tensor into its sequences: one ``1 n s d`` view per length.

        Raises `CompositionError` when the layout is not packed or the lengths do not sum to
        the number of tokens.

        >>> [tuple(part.shape) for part in get("TND").split(torch.zeros(7, 4, 8), (3, 0, 4))]
        [(1, 4, 3, 8), (1, 4, 0, 8), (1, 4, 4, 8)]
        """
        self._need_packed("split", "to_bnsd")
        whole = self._from_own(tensor, "1 n t d", num_heads)
        lengths = check_lengths("split: lengths", lengths)
        if sum(lengths) != whole.shape[2]:
            raise CompositionError(
                f"{self._given(tensor.shape, 'tensor')}: {len(lengths)} lengths that sum to "
                f"{sum(lengths)} cannot cut {whole.shape[2]} tokens; every token belongs to "
                "one sequence"
            )
        return tuple(torch.split(whole, list(lengths), dim=2))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Pack one ``1 n s d`` tensor per sequence: `split` undone, in one new tensor.

        >>> get("TND").join([torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 5, 8)]).shape
        torch.Size([8, 4, 8])
        """
        self._need_packed("join", "from_bnsd")
        if not isinstance(parts, Sequence):
            raise CompositionTypeError(f"join takes a list of tensors, not {shown(parts)}")
        if not parts:
            raise CompositionError("join got no sequences; a packed batch holds at least one")
        for part in parts:
            _need_rank(part, "1 n t d")
        forms = {(t.shape[1], t.shape[3], t.dtype, t.device): t for t in parts}
        if len(forms) > 1:
            told = " and ".join(
                f"{list(t.shape)} of {t.dtype} on {t.device}" for t in forms.values()
            )
            raise CompositionError(
                f"join got sequences that differ: {told}; give all the same heads, dimensions, "
                "dtype and device"
            )
        axis = _groups(self.pattern).index("t")
        # Permuting before concatenating leaves the result contiguous in its own layout.
        return torch.cat([self._to_own(part, "1 n t d") for part in parts], dim=axis)

    def _from_own(self, tensor: Tensor, pattern: str, num_heads: int | None) -> Tensor:
        check_tensor("the tensor of a layout", tensor)
        sizes = self.sizes(tensor.shape, num_heads)
        merged = {"n": sizes.heads} if self.merges_heads else {}
        return rearrange(tensor, f"{self.pattern} -> {pattern}", **merged)

    def _to_own(self, tensor: Tensor, pattern: str, **extents: int) -> Tensor:
        _need_rank(tensor, pattern)
        return rearrange(tensor, f"{pattern} -> {self.pattern}", **extents)

    def _divide(
        self,
        shape: Sequence[int],
        extent: int,
        num_heads: int | None,
        head_dim: int | None,
        what: str,
    ) -> tuple[int, int]:
        if num_heads is None and head_dim is None:
            raise CompositionError(
                f"{self._given(shape, what)}: this layout merges heads into its last axis, so "
                "the shape does not say how many there are; pass num_heads="
            )
        label, count = ("head_dim", head_dim) if num_heads is None else ("num_heads", num_heads)
        if count is None or extent % count:
            raise CompositionError(
                f"{self._given(shape, what)}: its last axis of {extent} does not divide into "
                f"{label}={shown(count)}; change the width to a multiple of {shown(count)}, "
                f"or {label}"
            )
        return (count, extent // count) if label == "num_heads" else (extent // count, count)

    def _agree(self, shape: Sequence[int], num_heads: int | None, head_dim: int | None) -> str:
        """Say what to do about a count that a shape contradicts: name the layouts that fit."""
        fitting = [
            name
            for name, known in LAYOUTS.items()
            if known.packed == self.packed and known._holds(shape, num_heads, head_dim)
        ]
        if not fitting:
            return "make them agree"
        return f"this looks like {' or '.join(fitting)}: say layout={fitting[0]!r}"

    def _holds(self, shape: Sequence[int], num_heads: int | None, head_dim: int | None) -> bool:
        """Whether a shape has these counts in this layout."""
        groups = _groups(self.pattern)
        if len(groups) != len(shape):
            return False
        found = dict(zip(groups, shape, strict=True))
        if self.merges_heads:
            counts = num_heads, head_dim
            return None not in counts and found["n d"] == (num_heads or 0) * (head_dim or 0)
        return num_heads in (None, found["n"]) and head_dim in (None, found["d"])

    def twin(self) -> Layout | None:
        """Return the layout that differs in the places of lengths and heads alone, if there is one.

        >>> get("BSND").twin()
        Layout(name='BNSD', pattern='b n s d')
        """
        swapped = self.pattern.translate(str.maketrans("sn", "ns"))
        return next((known for _, known in LAYOUTS.items() if known.pattern == swapped), None)

    def doubt(self, query: Sizes, key: Sizes) -> str | None:
        """Return why tensors may be in another layout than this; None where nothing says so.

        The sizes are those read in this layout. Where both have more heads than positions and the
        layout has a `twin`, lengths and heads are likely to be confused: one axis cannot be told
        from another by its extent.

        >>> x = get("BSND").sizes((2, 8, 128, 64))
        >>> get("BSND").doubt(x, x)
        "8 positions and 128 heads were read off the shapes; if these are 8 heads and 128 \
positions, say layout='BNSD'"
        >>> get("BSND").doubt(get("BSND").sizes((2, 1, 8, 64)), get("BSND").sizes((2, 4096, 8, 64)))
        """
        _need_sizes("doubt", query)
        _need_sizes("doubt", key)
        twin, length, heads = self.twin(), query.length, query.heads
        if twin is None or not 0 < length < heads or key.length >= key.heads:
            return None
        return (
            f"{length:,} positions and {heads:,} heads were read off the shapes; if these are "
            f"{length:,} heads and {heads:,} positions, say layout={twin.name!r}"
        )

    def _given(self, shape: Sequence[int], what: str) -> str:
        return f"{what} {list(shape)} in layout {self}"

    def _wrong_rank(self, shape: Sequence[int], what: str) -> CompositionError:
        fitting = [name for name, known in LAYOUTS.items() if known.rank == len(shape)]
        hint = f"layouts of {len(shape)} axes: {', '.join(fitting)}" if fitting else "reshape it"
        return CompositionError(
            f"{self._given(shape, what)}: the layout has {self.rank} axes, the shape has "
            f"{len(shape)}; permute the tensor or name the layout it has ({hint})"
        )

    def _need_dense(self, method: str, remedy: str) -> None:
        if self.packed:
            raise CompositionError(
                f"{method}: layout {self} is packed and its sequences may differ in length, "
                f"so it has no [b, n, s, d] form; {remedy}"
            )

    def _need_packed(self, method: str, other: str) -> None:
        if not self.packed:
            raise CompositionError(
                f"{method}: layout {self} is not packed, its batch rows have one length; "
                f"use {other}"
            )


LAYOUTS: Registry[Layout] = Registry("layout")


def register(layout: Layout) -> Layout:
    """Make a layout known by its name, and return it; a taken name is an error.

    >>> bnds = register(Layout("BNDS", "b n d s"))
    >>> get("BNDS").to_bnsd(torch.zeros(2, 4, 8, 16)).shape
    torch.Size([2, 4, 16, 8])
    >>> LAYOUTS.remove("BNDS")
    """
    if not isinstance(layout, Layout):
        raise CompositionTypeError(f"register takes a Layout(name, pattern), not {shown(layout)}")
    return LAYOUTS.add(layout.name, layout)


def get(name: str) -> Layout:
    """Return the layout of that exact name.

    >>> get("bsnd")
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: unknown layout 'bsnd': names are upper case, write 'BSND'
    """
    if not isinstance(name, str):
        raise CompositionTypeError(
            f"a layout is given by its name, one of {', '.join(LAYOUTS)}; "
            f"got {shown(name)} ({type(name).__name__})"
        )
    if name not in LAYOUTS and name.upper() in LAYOUTS:
        raise CompositionError(
            f"unknown layout {shown(name)}: names are upper case, write {name.upper()!r}"
        )
    return LAYOUTS[name]


@cache
def _groups(pattern: str) -> tuple[str, ...]:
    """Split a pattern into its axes, a merged pair as one entry ``"n d"``."""
    outside, _, rest = pattern.partition("(")
    inside, closed, after = rest.partition(")")
    merged = (inside,) if closed else ()
    groups = (*outside.split(), *merged, *after.split())
    axes = " ".join(groups).split()
    known = frozenset(axes) in (_DENSE, _PACKED) and len(set(axes)) == len(axes)
    if not known or any(group not in (*_AXES, "n d") for group in groups):
        raise CompositionError(
            f"layout pattern {shown(pattern)}: a layout names each of the axes b s n d (or t n d, "
            "packed) once, separated by spaces, and may merge only '(n d)'"
        )
    return groups


def _check_shape(shape: Sequence[int], what: str) -> None:
    whole = isinstance(shape, Sequence) and not isinstance(shape, str | bytes)
    if (
        not whole
        or len(shape) > _MOST_AXES
        or any(type(extent) is not int or extent < 0 for extent in shape)
    ):
        raise CompositionTypeError(
            f"{what}: a shape is a list of ints that are 0 or more, got {shown(shape)}"
        )


def _need_sizes(method: str, sizes: Sizes) -> None:
    if not isinstance(sizes, Sizes):
        raise CompositionTypeError(
            f"{method} takes Sizes(batch=, length=, heads=, dim=), not {shown(sizes)}"
        )


def _need_rank(tensor: Tensor, pattern: str) -> None:
    check_tensor("the tensor of a layout", tensor)
    rank = len(pattern.replace("(b s)", "t").split())
    if tensor.ndim != rank or (pattern[0] == "1" and tensor.shape[0] != 1):
        raise CompositionError(
            f"tensor {list(tensor.shape)}: expected the form [{', '.join(pattern.split())}]"
        )
