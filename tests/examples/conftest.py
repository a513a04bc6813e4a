"""A run so small that it takes a second, and the means to vary it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

TINY: dict[str, dict[str, Any]] = {
    "training": {
        "steps": 6,
        "max_len": 24,
        "tokens_per_batch": 64,
        "learning_rate": 0.01,
        "warmup": 2,
        "validate_every": 4,
        "checkpoint_every": 4,
    },
    "model": {"dim": 16, "layers": 2, "rotary": True},
    "attention": {
        "version": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mask": "Causal()",
        "layout": "TND",
        "dropout": 0.2,
    },
    "sample": {"prompt": "ab", "bytes": 5},
}

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Return a function that writes the tiny config, with sections changed as it is told."""

    def write(**changes: dict[str, Any] | None) -> Path:
        content: dict[str, Any] = {name: dict(section) for name, section in TINY.items()}
        for name, change in changes.items():
            if change is None:
                del content[name]
            else:
                content[name] = content.get(name, {}) | change
        path = tmp_path / "tiny.yaml"
        YAML(typ="safe", pure=True).dump(content, path)
        return path

    return write
