"""Which layout a name means, which one a shape looks like, and `Sizes`, which no layout changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnkit.errors import CompositionTypeError, shown
from attnkit.registry import Registry, suggestion

if TYPE_CHECKING:
    from attnkit.layouts.base import Layout

__all__ = ["LAYOUTS", "Sizes", "doubt", "get", "like", "meant", "of_rank", "twin"]

LAYOUTS: Registry[Layout] = Registry("layout", "attnkit.layouts")

_APART = ("SBHD", "SBND")  # common elsewhere; the kernel has them with merged heads only
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


def check_shape(shape: Sequence[int], what: str) -> None:
    """Raise `CompositionTypeError` for anything but a list of extents."""
    whole = isinstance(shape, Sequence) and not isinstance(shape, str | bytes)
    if (
        not whole
        or len(shape) > _MOST_AXES
        or any(type(extent) is not int or extent < 0 for extent in shape)
    ):
        raise CompositionTypeError(
            f"{what}: a shape is a list of ints that are 0 or more, got {shown(shape)}"
        )


def check_sizes(method: str, sizes: Sizes) -> None:
    """Raise `CompositionTypeError` for anything but `Sizes`."""
    if not isinstance(sizes, Sizes):
        raise CompositionTypeError(
            f"{method} takes Sizes(batch=, length=, heads=, dim=), not {shown(sizes)}"
        )


def get(name: str) -> Layout:
    """Return the layout of a name, or of another name that libraries have for it.

    Lower case will do. BSHD (TransformerEngine, flash-attn), BTNH (jax) and BMHK (xformers) are
    BSND; BHSD and BNTH (cuDNN) are BNSD; THD is TND. A layout that is registered may have
    `aliases`, too.

    >>> get("bshd")
    Layout(name='BSND', pattern='b s n d')
    >>> get("BSDN")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: unknown layout 'BSDN'; did you mean 'BSND'? Known: ...
    """
    if not isinstance(name, str):
        raise CompositionTypeError(
            f"a layout is given by its name, one of {', '.join(LAYOUTS)}; "
            f"got {shown(name)} ({type(name).__name__})"
        )
    found = meant(name)
    if found is not None:
        return found
    hint = suggestion(name.upper(), LAYOUTS)
    if name.upper() in _APART:
        hint = ": give tensor.flatten(2), which is a view, with layout='SBH' and num_heads="
    raise LAYOUTS.unknown(name, hint)


def meant(name: str) -> Layout | None:
    """Return the layout that a name or an alias means; None if it means none."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    known, word = (layout for _, layout in LAYOUTS.items()), name.upper()
    return next((layout for layout in known if word in (layout.name, *layout.aliases)), None)


def of_rank(rank: int) -> str:
    """Say which layouts have so many axes."""
    fitting = [name for name, known in LAYOUTS.items() if known.rank == rank]
    return f"layouts of {rank} axes: {', '.join(fitting)}" if fitting else "reshape it"


def like(layout: Layout, shape: Sequence[int], num_heads: int | None, head_dim: int | None) -> str:
    """Say what to do about a count that a shape contradicts: name the layouts that fit."""
    fitting = [
        name
        for name, known in LAYOUTS.items()
        if known.packed == layout.packed and _holds(known, shape, num_heads, head_dim)
    ]
    if not fitting:
        return "make them agree"
    return f"this looks like {' or '.join(fitting)}: say layout={fitting[0]!r}"


def _holds(
    layout: Layout, shape: Sequence[int], num_heads: int | None, head_dim: int | None
) -> bool:
    """Whether a shape has these counts in this layout."""
    if layout.rank != len(shape):
        return False
    found = layout.extents(shape)
    if layout.merges_heads:
        counts = num_heads, head_dim
        return None not in counts and found["n d"] == (num_heads or 0) * (head_dim or 0)
    return num_heads in (None, found["n"]) and head_dim in (None, found["d"])


def doubt(layout: Layout, query: Sizes, key: Sizes) -> str | None:
    """Return why tensors may be in another layout than this; None where nothing says so.

    The sizes are those read in this layout. Where both have more heads than positions and the
    layout has a `twin`, lengths and heads are likely to be confused: one axis cannot be told
    from another by its extent.

    >>> x = get("BSND").sizes((2, 8, 128, 64))
    >>> doubt(get("BSND"), x, x)
    "8 positions and 128 heads were read off the shapes; if these are 8 heads and 128 \
positions, say layout='BNSD'"
    >>> doubt(get("BNSD"), x, Sizes(batch=2, length=4096, heads=8, dim=64))
    """
    check_sizes("doubt", query)
    check_sizes("doubt", key)
    other, length, heads = twin(layout), query.length, query.heads
    if other is None or not 0 < length < heads or key.length >= key.heads:
        return None
    return (
        f"{length:,} positions and {heads:,} heads were read off the shapes; if these are "
        f"{length:,} heads and {heads:,} positions, say layout={other.name!r}"
    )


def twin(layout: Layout) -> Layout | None:
    """Return the layout that differs in the places of lengths and heads alone, if there is one.

    >>> twin(get("BSND"))
    Layout(name='BNSD', pattern='b n s d')
    """
    swapped = layout.pattern.translate(str.maketrans("sn", "ns"))
    return next((known for _, known in LAYOUTS.items() if known.pattern == swapped), None)
