"""What objects look like at a prompt and in a notebook: text, small pages, pictures as SVG.

Knows nothing of torch, nor of anything else of attnkit: what is shown comes as numbers and strings.
"""

from attnkit.display import html, svg
from attnkit.display.drawing import COLOURS, Drawing, Layer, colour
from attnkit.display.text import Text, Told

__all__ = ["COLOURS", "Drawing", "Layer", "Text", "Told", "colour", "html", "svg"]
