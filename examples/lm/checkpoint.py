"""A run's whole state in one file: stopping and going on again changes no bit of the result.

The order of the data is a function of the seed and the step (see `lm.data`), so the step is all
that has to be kept of it. Dropout draws from torch's generators, so their states are kept too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm.config import RunConfig, RunError

FORMAT = 1


@dataclass
class Progress:
    """How far a run has come, and what it cost on the way."""

    step: int = 0
    train_bits: list[float] = field(default_factory=list)
    """Bits per byte of each training batch."""
    held_out_bits: dict[int, float] = field(default_factory=dict)
    """Step -> bits per byte on the held-out topics."""


def save(
    path: Path,
    config: RunConfig,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Write the checkpoint, completely or not at all."""
    state = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "progress": vars(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": _generator_states(device),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)  # a reader sees the old file or the new one, never half of one


def load(
    path: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Progress:
    """Put a run back where the checkpoint left it.

    Raises `RunError` if there is no such file, or if it is of a run with another config.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path} to resume from") from None
    except Exception as error:  # torch names no common base for what a damaged file may raise
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path} is no checkpoint of this script (format {FORMAT})")
    _check_same_run(path, state["config"], config.model_dump(mode="json"))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _restore_generators(state["generators"], device)
    return Progress(**state["progress"])


def _check_same_run(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in _flat(given).items():
        before = _flat(saved).get(key)
        if before != value:
            raise RunError(
                f"{path} is of another run: there {key} was {before!r}, here it is {value!r}; "
                "resume with the config it was started with, or start anew with another --out"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type].cpu())
