"""Configurations: attention modules as checked, versioned mappings.

`MaskField` and `PseField` are the types of a mask and a bias in pydantic models of your own.
"""

from attnkit.config.models import (
    AttentionConfig,
    MaskField,
    MultiHeadAttentionConfig,
    PseField,
    load_config,
)

__all__ = [
    "AttentionConfig",
    "MaskField",
    "MultiHeadAttentionConfig",
    "PseField",
    "load_config",
]
