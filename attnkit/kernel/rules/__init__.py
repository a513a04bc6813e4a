"""The rules of the fused kernel's contract as data, by subject."""

from __future__ import annotations

from attnkit.kernel.rules.biases import BIAS_RULES
from attnkit.kernel.rules.extras import EXTRA_RULES
from attnkit.kernel.rules.masks import MASK_RULES
from attnkit.kernel.rules.rule import LAYERS, Layer, MaskFacts, Product, Rule, Target, Violation
from attnkit.kernel.rules.shapes import ARGUMENT_TYPE, SHAPE_RULES

__all__ = [
    "ARGUMENT_TYPE",
    "LAYERS",
    "RULES",
    "Layer",
    "MaskFacts",
    "Product",
    "Rule",
    "Target",
    "Violation",
]

RULES: tuple[Rule, ...] = (*SHAPE_RULES, *MASK_RULES, *BIAS_RULES, *EXTRA_RULES)
"""Every rule: the one about types first of all, structural ones first within their subject."""
