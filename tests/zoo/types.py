"""Which model types there are: those whose code calls transformers' attention interface."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

__all__ = ["BY_HAND", "interface_types", "own_types"]

# Types that attend by code of their own and are counted with the others from the start.
BY_HAND = ("bloom", "falcon", "mpt")


def code_of(model_type: str) -> str:
    """Return the modeling code of a type."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return "".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("modeling_*.py")))


@cache
def interface_types() -> tuple[str, ...]:
    """Return the types with a model whose code calls the interface, and those of `BY_HAND`."""
    found = {
        name
        for name in CONFIG_MAPPING_NAMES
        if name in MODEL_MAPPING_NAMES and "ALL_ATTENTION_FUNCTIONS" in code_of(name)
    }
    return tuple(sorted(found | set(BY_HAND)))


@cache
def own_types() -> tuple[str, ...]:
    """Return the types with a softmax or a fused call of their own and no interface."""
    words = ("softmax", "scaled_dot_product_attention", "MultiheadAttention")
    return tuple(
        sorted(
            name
            for name in CONFIG_MAPPING_NAMES
            if name in MODEL_MAPPING_NAMES
            and "ALL_ATTENTION_FUNCTIONS" not in (code := code_of(name))
            and any(word in code for word in words)
        )
    )
