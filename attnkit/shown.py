"""What a notebook shows of a layer: what it composes, its mask and its bias as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from attnkit.display import html
from attnkit.masks import Mask
from attnkit.masks.shown import pictured as mask_pictured
from attnkit.pse import Pse
from attnkit.pse.shown import pictured as bias_pictured

__all__ = ["page"]


def page(layer: object, said: Mapping[str, str], mask: Mask, pse: Pse | None) -> str:
    """Return what a layer's `_repr_html_` does: mask and bias are pictures.

    >>> from attnkit import masks
    >>> page(object(), {"num_heads": "8", "mask": "Causal()"}, masks.Causal(), None).count("<svg")
    1
    """

    def build() -> str:
        drawn = {"mask": mask_pictured(mask)}
        drawn |= {} if pse is None else {"pse": bias_pictured(pse)}
        rows = [(escape(name), drawn.get(name) or html.code(text)) for name, text in said.items()]
        return html.block(html.heading(type(layer).__name__), html.table(rows))

    return html.safely(build, lambda: repr(layer))
