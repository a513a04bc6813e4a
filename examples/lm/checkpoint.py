"""A run's whole state in one file: stopping and going on again changes no bit of the result.

The order of the data is a function of the seed and the step (see `lm.data`), so the step is all
that has to be kept of it. Dropout draws from torch's generators, so their states are kept too.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
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
    # Made in memory and written by Python, which says what a full disk is; torch's writer does not.
    content = io.BytesIO()
    torch.save(state, content)
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)  # a reader sees the old file or the new one, never half of one
    except OSError as error:
        kept = f"; {path.name} there is the one before, and whole" if path.is_file() else ""
        raise RunError(
            f"cannot write the checkpoint {path}: {error.strerror or error}{kept}"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load(
    path: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Progress:
    """Put a run back where the checkpoint left it.

    Raises `RunError` if there is no such file, if it is damaged or has other parts than `save`
    writes, or if it is of a run with another config.
    """
    state = _read(path, device)
    _check_same_run(path, state["config"], config.model_dump(mode="json"))
    progress = _progress(path, state["progress"], config.training.steps)
    _part(path, "model", lambda: _load_model(model, state["model"]))
    _part(path, "optimizer", lambda: _load_optimizer(optimizer, state["optimizer"]))
    _part(path, "generators", lambda: _restore_generators(state["generators"], device))
    return progress


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the parts of a checkpoint whose bytes are those that were written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path} to resume from") from None
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch checks no sums, zipfile does
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the bytes of {damaged} are not those that were written")
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # torch names no common base for what a damaged file may raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path} is no checkpoint of this script (format {FORMAT})")
    parts = {"format", "config", "progress", "model", "optimizer", "generators"}
    if state.keys() != parts:
        odd = ", ".join(sorted(map(str, state.keys() ^ parts)))
        raise RunError(f"{path} has other parts than this script writes: {odd}; start anew")
    if not all(isinstance(state[name], dict) for name in parts - {"format"}):
        raise RunError(f"{path} has parts that are no tables of names; start anew")
    return state


def _part(path: Path, name: str, load: Callable[[], None]) -> None:
    try:
        load()
    except Exception as error:  # torch has many words for tables that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(
            f"the {name} in {path} does not fit this run: {reason}; start anew with another --out"
        ) from error


def _progress(path: Path, saved: dict[str, Any], steps: int) -> Progress:
    try:
        progress = Progress(**saved)
        step, train, held_out = progress.step, progress.train_bits, progress.held_out_bits
        right = (
            type(step) is int
            and 0 <= step <= steps
            and isinstance(train, list)
            and len(train) == step
            and all(isinstance(bits, float) for bits in (*train, *held_out.values()))
            and all(type(at) is int and 0 <= at <= step for at in held_out)
        )
    except (TypeError, AttributeError):  # other names, or no tables
        right = False
    if not right:
        raise RunError(
            f"{path} does not tell how far its run has come: progress needs a step from 0 to "
            f"{steps} and the bits per byte of each; start anew with another --out"
        )
    return progress


def _load_model(model: nn.Module, saved: dict[str, Any]) -> None:
    for name, own in model.state_dict().items():
        _check_like(name, saved[name], own)
    model.load_state_dict(saved)


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    before = [_choices(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if [_choices(group) for group in optimizer.param_groups] != before:
        raise ValueError("its choices are others than the config's")
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                _check_like(name, value, torch.tensor(0.0) if name == "step" else weight)


def _choices(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group of weights is trained with; the rate is set anew in every step."""
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def _check_like(name: str, given: object, own: torch.Tensor) -> None:
    if not isinstance(given, torch.Tensor) or (given.shape, given.dtype) != (own.shape, own.dtype):
        kind = type(given).__name__
        told = f"{list(given.shape)} of {given.dtype}" if isinstance(given, torch.Tensor) else kind
        raise ValueError(f"{name} is {told}, and should be {list(own.shape)} of {own.dtype}")


def _check_same_run(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    before, now = _flat(saved), _flat(given)
    for key in dict.fromkeys([*now, *before]):
        if key not in before or key not in now or before[key] != now[key]:
            was = repr(before[key])[:80] if key in before else "not there"
            is_now = repr(now[key])[:80] if key in now else "no key"
            raise RunError(
                f"{path} is of another run: there {key} was {was}, here it is {is_now}; "
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
