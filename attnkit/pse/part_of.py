"""`PartOf`: what a rectangle, some rows and keys, or some heads of a bias have of it."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.errors import CompositionTypeError, shown
from attnkit.pse.base import Pse

__all__ = ["PartOf"]


@dataclass(frozen=True, repr=False, eq=False)
class PartOf(Pse):
    """A bias whose cells are some of another's. Its tensors are those of the other, whole."""

    part: Pse

    def __post_init__(self) -> None:
        if not isinstance(self.part, Pse):
            raise CompositionTypeError(
                f"pse.{type(self).__name__} takes a positional bias, not {shown(self.part)}"
            )

    @property
    def members(self) -> tuple[Pse, ...]:
        """The whole bias."""
        return (self.part,)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """As the whole bias names them."""
        return self.part.tensor_names

    @property
    def before_scale(self) -> bool:
        """As the whole bias."""
        return self.part.before_scale
