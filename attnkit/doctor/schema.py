"""``python -m attnkit schema``: the JSON schema of configurations, for editors and other tools."""

from __future__ import annotations

import argparse
import json

from attnkit.config import AttentionConfig, MultiHeadAttentionConfig
from attnkit.doctor.screen import Screen
from attnkit.doctor.usage import GOOD

__all__ = ["add_arguments", "run"]

_MODELS: dict[str, type[AttentionConfig] | type[MultiHeadAttentionConfig]] = {
    "attention": AttentionConfig,
    "multi-head-attention": MultiHeadAttentionConfig,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("module", choices=_MODELS, nargs="?", default="attention")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the command and return its exit code."""
    schema = _MODELS[arguments.module].model_json_schema()
    screen.data(json.dumps(schema, indent=1) + "\n")
    return GOOD
