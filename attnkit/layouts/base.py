"""`Layout`: one einops pattern, its rules, and the registry of all of them.

The canonical form is ``b n s d``; a packed layout has one token axis ``t`` instead of
``b`` and ``s``. Converting permutes and splits axes, so it returns views wherever strides
can express the result. Whoever wants to know which axis of a tensor is which asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from attnkit.arguments import check_int, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import names
from attnkit.layouts.names import LAYOUTS, Sizes, check_shape, check_sizes, get
from attnkit.layouts.seqlens import check_lengths

__all__ = ["LAYOUTS", "Layout", "Sizes", "get", "register"]

_AXES = {"b": "batch", "s": "length", "n": "heads", "d": "dim", "t": "tokens"}
_DENSE = frozenset("bsnd")
_PACKED = frozenset("tnd")
_Strides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int | None, tuple[int, int] | None]
_IN_ORDER = (0, 1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """A named einops pattern over ``b s n d``, or over ``t n d`` when packed.

    ``n`` and ``d`` may be merged as ``(n d)``; then the head count is not in the shape and
    every method needs `num_heads` (or `head_dim`). Elsewhere `num_heads` is optional and
    checked. Any dtype and device; nothing is computed, tensors are only viewed (`from_bnsd`
    of a merged layout and `join` copy when strides leave no choice). `aliases` are names that
    others have for it, and that `get` takes as well.

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
    aliases: tuple[str, ...] = field(default=(), repr=False, compare=False)

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
        letters = " ".join(self.axes).split()
        known = frozenset(letters) in (_DENSE, _PACKED) and len(set(letters)) == len(letters)
        if not known or any(axis not in (*_AXES, "n d") for axis in self.axes):
            raise CompositionError(
                f"layout pattern {shown(self.pattern)}: a layout names each of the axes b s n d "
                "(or t n d, packed) once, separated by spaces, and may merge only '(n d)'"
            )
        _ = self._strides  # now, since a tracer cannot fill in what is cached

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of a tensor in this layout; a merged pair is one.

        >>> get("BSH").axes
        ('b', 's', 'n d')
        """
        before, _, rest = self.pattern.partition("(")
        inside, closed, after = rest.partition(")")
        return (*before.split(), *((inside,) if closed else ()), *after.split())

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
        return len(self.axes)

    @property
    def length_axis(self) -> int:
        """Which axis of a tensor counts positions: ``s``, or ``t`` when packed.

        >>> get("BSH").length_axis, get("BNSD").length_axis
        (1, 2)
        """
        return self.axes.index("t" if self.packed else "s")

    def __str__(self) -> str:
        return f"{self.name} ({self.pattern})"

    def extents(self, shape: Sequence[int], what: str = "tensor") -> dict[str, int]:
        """Return the extent of each of the `axes`, as it is; `sizes` checks and divides them.

        Raises `CompositionError` for a wrong rank.

        >>> get("BSH").extents((2, 16, 32))
        {'b': 2, 's': 16, 'n d': 32}
        """
        if not isinstance(shape, torch.Size):
            check_shape(shape, what)
        if len(shape) != len(self.axes):
            raise CompositionError(
                f"{self._given(shape, what)}: the layout has {self.rank} axes, the shape has "
                f"{len(shape)}; permute the tensor or name the layout it has "
                f"({names.of_rank(len(shape))})"
            )
        return dict(zip(self.axes, shape, strict=True))

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
        found = self.extents(shape, what)
        for label, count in (("num_heads", num_heads), ("head_dim", head_dim)):
            if count is not None:
                check_int(label, count, 1)
        if self.merges_heads:
            told = self._given(shape, what)
            found["n"], found["d"] = _divide(told, found["n d"], num_heads, head_dim)
        for given, axis, label in ((num_heads, "n", "num_heads"), (head_dim, "d", "head_dim")):
            if given is not None and found[axis] != given:
                raise CompositionError(
                    f"{self._given(shape, what)}: {label}={shown(given)} was given, but the shape "
                    f"holds {found[axis]} ({_AXES[axis]}); "
                    f"{names.like(self, shape, num_heads, head_dim)}"
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
        check_sizes("shape", sizes)
        tokens = sizes.batch * sizes.length
        extents = {"b": sizes.batch, "s": sizes.length, "t": tokens}
        extents |= {"n": sizes.heads, "d": sizes.dim}
        merged = sizes.heads * sizes.dim
        return tuple(extents.get(group, merged) for group in self.axes)

    def to_bnsd(self, tensor: Tensor, num_heads: int | None = None) -> Tensor:
        """Return the tensor as ``b n s d``: always a view.

        Raises `CompositionError` as `sizes` does, and for a packed layout, which has no
        ``b n s d`` form: see `split` and `to_tnd`.

        >>> get("SBH").to_bnsd(torch.zeros(16, 2, 32), num_heads=4).shape
        torch.Size([2, 4, 16, 8])
        """
        self._need(False, "to_bnsd", "split(tensor, lengths) gives one [1, n, s, d] per sequence")
        return self._by_head(tensor, num_heads)

    def from_bnsd(self, tensor: Tensor) -> Tensor:
        """Return a ``b n s d`` tensor in this layout: a view where strides allow one.

        Merging heads copies exactly when ``n`` and ``d`` do not lie next to each other in
        memory (as in a contiguous BNSD tensor).

        >>> get("BSH").from_bnsd(torch.zeros(2, 4, 16, 8)).shape
        torch.Size([2, 16, 32])
        """
        self._need(False, "from_bnsd", "join(parts) packs one [1, n, s, d] per sequence")
        _need_rank(tensor, "b n s d")
        return self.restore(tensor)

    def to_tnd(self, tensor: Tensor, num_heads: int | None = None) -> Tensor:
        """Return the tensor as ``t n d``, batch rows one after the other.

        A view for BSH and BSND (and packed layouts); BNSD and SBH are copied when the batch
        has more than one row, since their tokens do not lie in this order.

        >>> get("BSH").to_tnd(torch.zeros(2, 16, 32), num_heads=4).shape
        torch.Size([32, 4, 8])
        """
        return self._by_head(tensor, num_heads).transpose(1, 2).flatten(0, 1)

    def from_tnd(self, tensor: Tensor, batch: int = 1) -> Tensor:
        """Undo `to_tnd`: `batch` rows of equal length (a packed layout keeps its one row).

        >>> get("BNSD").from_tnd(torch.zeros(32, 4, 8), batch=2).shape
        torch.Size([2, 4, 16, 8])
        """
        check_int("batch", batch, 1)
        _need_rank(tensor, "t n d")
        batch = 1 if self.packed else batch
        tokens = tensor.shape[0]
        if tokens % batch:
            raise CompositionError(
                f"{tokens} tokens do not divide into batch={batch} rows of equal "
                f"length for layout {self.name}; keep them packed, with SeqLens"
            )
        rows = tensor.reshape(batch, tokens // batch, *tensor.shape[1:])
        return self.restore(rows.transpose(1, 2))

    def convert(self, tensor: Tensor, to: Layout, num_heads: int | None = None) -> Tensor:
        """Return a tensor of this layout in another one of its kind, dense or packed.

        >>> get("BSH").convert(torch.zeros(2, 16, 32), get("SBH"), num_heads=4).shape
        torch.Size([16, 2, 32])
        """
        if self.packed != to.packed:
            raise CompositionError(
                f"layout {self} does not convert to {to}: one of them is packed; to_tnd, from_tnd, "
                "split and join lead from one kind to the other"
            )
        return tensor if to == self else to.restore(self._by_head(tensor, num_heads))

    def split(
        self, tensor: Tensor, lengths: Sequence[int], num_heads: int | None = None
    ) -> tuple[Tensor, ...]:
        """Cut a packed tensor into its sequences: one ``1 n s d`` view per length.

        Raises `CompositionError` when the layout is not packed or the lengths do not sum to
        the number of tokens.

        >>> [tuple(part.shape) for part in get("TND").split(torch.zeros(7, 4, 8), (3, 0, 4))]
        [(1, 4, 3, 8), (1, 4, 0, 8), (1, 4, 4, 8)]
        """
        self._need(True, "split", "use to_bnsd")
        whole = self._by_head(tensor, num_heads)
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
        self._need(True, "join", "use from_bnsd")
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
        # Permuting before concatenating leaves the result contiguous in its own layout.
        return torch.cat([self.restore(part) for part in parts], dim=self.length_axis)

    def view(self, tensor: Tensor, heads: int) -> Tensor:
        """Return the ``[b n s d]`` view of a tensor, b = 1 when packed; nothing is checked.

        >>> get("TND").view(torch.zeros(48, 4, 8), 4).shape
        torch.Size([1, 4, 48, 8])
        """
        order, _, merged, swapped = self._strides
        if swapped is not None:  # and no more: tiny calls feel every further question
            return tensor.transpose(*swapped)
        if merged is not None:
            shape = tensor.shape
            apart = heads, shape[merged] // heads
            tensor = tensor.view(*shape[:merged], *apart, *shape[merged + 1 :])
        if self.packed:
            tensor = tensor[None]
        return tensor if order == _IN_ORDER else tensor.permute(order)

    def restore(self, heads: Tensor) -> Tensor:
        """Return a ``[b n s d]`` tensor in this layout, `view` undone; nothing is checked.

        >>> get("TND").restore(torch.zeros(1, 4, 48, 8)).shape
        torch.Size([48, 4, 8])
        """
        _, inverse, merged, swapped = self._strides
        if swapped is not None:
            return heads.transpose(*swapped)
        tensor = heads if inverse == _IN_ORDER else heads.permute(inverse)
        if self.packed:
            tensor = tensor[0]
        return tensor if merged is None else tensor.flatten(merged, merged + 1)

    @cached_property
    def _strides(self) -> _Strides:
        """How to permute from and to ``[b n s d]``, the merged axis, and the only two that move."""
        letters = " ".join(self.axes).split()
        if self.packed:
            letters = ["b", *("s" if letter == "t" else letter for letter in letters)]
        order = tuple(letters.index(letter) for letter in "bnsd")
        inverse = tuple(order.index(axis) for axis in range(4))
        merged = self.axes.index("n d") if self.merges_heads else None
        moved = [axis for axis in range(4) if order[axis] != axis]
        alone = len(moved) == 2 and merged is None and not self.packed
        return order, inverse, merged, (moved[0], moved[1]) if alone else None

    def _by_head(self, tensor: Tensor, num_heads: int | None) -> Tensor:
        check_tensor("the tensor of a layout", tensor)
        return self.view(tensor, self.sizes(tensor.shape, num_heads).heads)

    def _need(self, packed: bool, method: str, remedy: str) -> None:
        if self.packed != packed:
            why = "is not packed, its batch rows have one length"
            if self.packed:
                why = "is packed and its sequences may differ in length, so it has no "
                why += "[b, n, s, d] form"
            raise CompositionError(f"{method}: layout {self} {why}; {remedy}")

    def _given(self, shape: Sequence[int], what: str) -> str:
        return f"{what} {list(shape)} in layout {self}"


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


def _divide(
    given: str, extent: int, num_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """Return heads and their dimension, of which one is known."""
    label, count = ("head_dim", head_dim) if num_heads is None else ("num_heads", num_heads)
    if count is None:
        raise CompositionError(
            f"{given}: this layout merges heads into its last axis, so the shape does not say "
            "how many there are; pass num_heads="
        )
    if extent % count:
        raise CompositionError(
            f"{given}: its last axis of {extent} does not divide into {label}={shown(count)}; "
            f"change the width to a multiple of {shown(count)}, or {label}"
        )
    return (count, extent // count) if label == "num_heads" else (extent // count, count)


def _need_rank(tensor: Tensor, pattern: str) -> None:
    check_tensor("the tensor of a layout", tensor)
    axes = pattern.split()
    if tensor.ndim != len(axes) or (axes[0] == "1" and tensor.shape[0] != 1):
        raise CompositionError(
            f"tensor {list(tensor.shape)}: expected the form [{', '.join(axes)}]"
        )
