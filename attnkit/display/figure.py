"""A `Drawing` as a matplotlib figure. Imported where somebody plots: matplotlib is an extra."""

from __future__ import annotations

from io import BytesIO

import matplotlib.figure
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from attnkit.display.drawing import Drawing

__all__ = ["Figure", "figure"]


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows once, with or without ``%matplotlib inline``.

    It is in no list of pyplot's, so no cell shows it a second time when it ends; as the value of a
    cell it is a PNG.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return the picture at twice the resolution, and the size at which it is shown."""
        held = BytesIO()
        self.savefig(held, format="png", dpi=2 * self.dpi)
        width, height = (round(self.dpi * inches) for inches in self.get_size_inches())
        return held.getvalue(), {"width": width, "height": height}


def figure(drawing: Drawing, columns: int = 2) -> Figure:
    """Return the figure of a drawing; a score matrix without cells is a blank field.

    >>> from attnkit.display import Layer
    >>> drawn = figure(Drawing(1, 2, (Layer([[1, 0]], "#000000", "allowed"),), "a mask"))
    >>> drawn.axes[0].get_images()[0].get_array()[0].tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    drawn = Figure(figsize=(5, 5.4), layout="constrained")
    axes = drawn.add_subplot()
    cells = np.ones((*drawing.fields, 3))
    for layer in drawing.layers:
        share = np.asarray(layer.shares, dtype=np.float64).reshape(*drawing.fields, 1)
        cells = cells * (1 - share) + np.array(to_rgb(layer.colour)) * share
    if cells.size:
        place = (0.0, float(drawing.kv_len), float(drawing.q_len), 0.0)
        axes.imshow(cells, extent=place, aspect="auto", interpolation="nearest")
    axes.set_title("\n".join(filter(None, (drawing.title, drawing.note))), fontsize=9)
    axes.set(xlabel=drawing.axes[1], ylabel=drawing.axes[0])
    legend = [Patch(color=tint, label=label) for tint, label in drawing.legend]
    if legend:
        drawn.legend(handles=legend, loc="outside lower center", ncols=columns, fontsize=8)
    return drawn
