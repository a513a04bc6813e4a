"""What a notebook shows of a bias: a heat map of a few heads, in one colour above 0, another below.

Nobody waits for a display: of a long bias only the first cells are made.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from attnkit.display import COLOURS, Drawing, Layer, html
from attnkit.masks.shown import guessed
from attnkit.masks.trace import Rectangle
from attnkit.pse.base import Pse

__all__ = ["drawings", "page", "pictured"]

_GRID = 64
_SHORTEST = 32
_MOST_CELLS = 1 << 20  # over all heads
_MOST_HEADS = 4
_ABOVE, _BELOW = COLOURS[1], COLOURS[0]


def page(bias: Pse) -> str:
    """Return what `Pse._repr_html_` does: its text, and pictures or why there are none.

    >>> from attnkit import pse
    >>> page(pse.ALiBi(8)).count("<svg")
    4
    """
    return html.safely(lambda: html.block(html.heading("Bias"), pictured(bias)), lambda: repr(bias))


def pictured(bias: Pse) -> str:
    """Return the text and pictures of a bias, as a part of a page."""
    text = f"<p>{html.code(repr(bias))}</p>"
    try:
        drawn, told = drawings(bias)
        return text + html.pictures(drawn) + html.note(told)
    except Exception as error:  # its tensors may be anywhere, its family anybody's
        return text + html.note(f"no picture: {type(error).__name__}: {error}")


def drawings(bias: Pse) -> tuple[list[Drawing], str]:
    """Return a picture for each of a few heads, and what they show in words.

    >>> from attnkit import pse
    >>> drawn, told = drawings(pse.ALiBi([0.5]))
    >>> drawn[0].title
    'from -15.5 (blue) to 0'
    """
    heads = bias.heads or 1
    q_len, kv_len = bias.extent
    free = q_len is None or kv_len is None
    both = q_len or kv_len or min(_GRID, max(_SHORTEST, guessed(bias)))
    most = max(1, isqrt(_MOST_CELLS // heads))
    if q_len is None and kv_len is None:
        both = min(both, most)
    q_len, kv_len = both if q_len is None else q_len, both if kv_len is None else kv_len
    rows, keys = min(q_len, most), min(kv_len, most)
    at = Rectangle((0, rows), (0, keys), q_len, kv_len)
    with torch.no_grad():
        index = None if bias.batch is None else 0
        own = [part._read(at, index, torch.float32, None) for part in bias.parts]
        values = sum(own[1:], own[0])[0].cpu()
    shown = values[:_MOST_HEADS]
    drawn = [_drawing(one, f"head {h}: " if len(values) > 1 else "") for h, one in enumerate(shown)]
    told = f"{q_len:,} queries (down) x {kv_len:,} keys"
    if (rows, keys) != (q_len, kv_len):
        told = f"the first {rows:,} queries (down) and {keys:,} keys of {told}"
    told += " (it fits other lengths)" * free
    told += f"; {len(values)} heads, the first {len(shown)} are drawn" * (len(values) > len(shown))
    told += "; of the first batch element" * (index is not None)
    return drawn, told


def _drawing(values: Tensor, name: str) -> Drawing:
    """Return the heat map of one head; each head has a scale of its own, told in its title."""
    q_len, kv_len = values.shape
    finite = values.nan_to_num(0.0, 0.0, 0.0)
    low, high = (float(end) + 0.0 for end in finite.aminmax()) if finite.numel() else (0.0, 0.0)
    most = max(-low, high)
    fields = (min(q_len, _GRID), min(kv_len, _GRID))

    def layer(part: Tensor, colour: str, scale: float) -> Layer:
        means = adaptive_avg_pool2d(part[None, None], fields)[0, 0] if part.numel() else part
        return Layer((means / scale if scale else means).tolist(), colour)

    layers = [
        layer(finite.clamp(min=0), _ABOVE, most),
        layer(-finite.clamp(max=0), _BELOW, most),
    ]
    blue, orange = " (blue)" * (low < 0), " (orange)" * (high > 0)
    title = f"{name}from {low:.4g}{blue} to {high:.4g}{orange}"
    return Drawing(q_len, kv_len, tuple(layers), title)
