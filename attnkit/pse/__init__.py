"""Positional biases: what is added to the scores, as values.

>>> from attnkit import pse
>>> print(pse.ALiBi(4) + pse.SqrtALiBi(slopes=(0.5, 0.25, 0.125, 0.0625)))
ALiBi(4) + SqrtALiBi(slopes=(0.5, 0.25, 0.125, 0.0625))
>>> list(pse.PSE)
['alibi', 'learnable_alibi', 'sqrt_alibi', 't5_relative']
"""

from __future__ import annotations

from attnkit.pse.additive import split_additive
from attnkit.pse.alibi import ALiBi, LearnableALiBi, Sloped, SqrtALiBi, press_slopes
from attnkit.pse.base import PSE, Align, Pse, Rectangle
from attnkit.pse.by_distance import ByDistance
from attnkit.pse.composite import Cut, Sum
from attnkit.pse.distance_bias import DistanceBias
from attnkit.pse.of_heads import OfHeads
from attnkit.pse.parse import parse
from attnkit.pse.structure import (
    Indexed,
    Linear,
    PerCell,
    PerKey,
    Root,
    Stepped,
    Structure,
    Toeplitz,
)
from attnkit.pse.t5_relative import T5Relative, t5_bucket
from attnkit.pse.table import Table
from attnkit.pse.taken import Taken
from attnkit.pse.tensors import Dense, KeyBias

__all__ = [
    "PSE",
    "ALiBi",
    "Align",
    "ByDistance",
    "Cut",
    "Dense",
    "DistanceBias",
    "Indexed",
    "KeyBias",
    "LearnableALiBi",
    "Linear",
    "OfHeads",
    "PerCell",
    "PerKey",
    "Pse",
    "Rectangle",
    "Root",
    "Sloped",
    "SqrtALiBi",
    "Stepped",
    "Structure",
    "Sum",
    "T5Relative",
    "Table",
    "Taken",
    "Toeplitz",
    "parse",
    "press_slopes",
    "split_additive",
    "t5_bucket",
]
