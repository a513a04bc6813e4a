"""`Lifted`: the mask that a foreign form turned out to be, and what was recognised in it."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.masks.base import Mask

__all__ = ["Lifted"]


@dataclass(frozen=True)
class Lifted:
    """A mask of another library as one of attnkit's, and how it was read.

    `source` is what was given, in words; `parts` what was recognised in it, one sentence each.
    `cells_read` counts the cells that had to be evaluated; 0 where structure alone said it all.

    >>> from attnkit import masks
    >>> print(Lifted(masks.Causal(), "a causal flag", ("is_causal is Causal()",)))
    Causal(), of a causal flag: is_causal is Causal()
    """

    mask: Mask
    source: str
    parts: tuple[str, ...] = ()
    cells_read: int = 0

    def __str__(self) -> str:
        told = "; ".join(self.parts) or "nothing but its cells"
        read = f" ({self.cells_read:,} cells read)" if self.cells_read else ""
        return f"{self.mask!r}, of {self.source}: {told}{read}"

    def _repr_html_(self) -> str:
        """Return the mask and what was recognised, for a notebook."""
        from attnkit.masks.shown import page_of

        read = [f"{self.cells_read:,} cells read"] if self.cells_read else []
        return page_of(f"Lifted from {self.source}", self.mask, [*self.parts, *read], None)
