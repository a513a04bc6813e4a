"""What the adapter keeps on an object of somebody else: it goes with it, and into no copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Beside", "kept_on", "read_once"]

T = TypeVar("T")


class Beside(dict[Any, Any]):
    """A dict that neither pickles nor deep-copies what it holds: a copy begins empty.

    >>> import copy
    >>> copy.deepcopy(Beside({"plan": 1}))
    {}
    """

    def __deepcopy__(self, memo: object) -> Beside:
        return Beside()

    __copy__ = copy = lambda self: Beside()

    def __reduce__(self) -> tuple[type[Beside], tuple[()]]:
        return Beside, ()


def kept_on(owner: Any) -> Beside:
    """Return what is kept on an object that takes attributes."""
    found: Beside | None = vars(owner).get("_attnkit_kept")
    if found is None:
        found = vars(owner)["_attnkit_kept"] = Beside()
    return found


def read_once(tensor: Tensor, what: Any, read: Callable[[], T]) -> T:
    """Return what reading a tensor tells, read once while nobody writes to it.

    All layers of a model are given the same mask; to read it makes the host wait for a device.
    """
    try:
        version = tensor._version
    except RuntimeError:  # an inference tensor counts no writes
        return read()
    kept = kept_on(tensor)
    found = kept.get(what)
    if found is None or found[0] != version:
        found = kept[what] = (version, read())
    made: T = found[1]
    return made
