"""Positional biases: what is added to the scores, as values.

>>> from attnkit import pse
>>> print(pse.ALiBi(4) + pse.SqrtALiBi(slopes=(0.5, 0.25, 0.125, 0.0625)))
ALiBi(4) + SqrtALiBi(slopes=(0.5, 0.25, 0.125, 0.0625))
>>> list(pse.PSE)
['alibi', 'sqrt_alibi']
"""

from __future__ import annotations

from attnkit.pse.alibi import ALiBi
from attnkit.pse.base import PSE, Align, Pse, Sum
from attnkit.pse.cut import Cut
from attnkit.pse.dense import Dense
from attnkit.pse.parse import parse
from attnkit.pse.sloped import Sloped, press_slopes
from attnkit.pse.sqrt_alibi import SqrtALiBi

__all__ = [
    "PSE",
    "ALiBi",
    "Align",
    "Cut",
    "Dense",
    "Pse",
    "Sloped",
    "SqrtALiBi",
    "Sum",
    "parse",
    "press_slopes",
]
