"""Switching models to attnkit: by name for all to come, or one model that there is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from attnkit.errors import CompositionError
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.lifting import make_mask
from attnkit.interop.transformers.names import NAME, PACKED, says
from attnkit.interop.transformers.tables import has_table, learn_tables

__all__ = ["TESTED", "Switched", "calling", "enable", "register"]

TESTED = ("5.23.0", "5.23.0")
"""The first and the last version of transformers that this was tested with."""


@dataclass(frozen=True)
class Switched:
    """What `enable` found in a model: names of its modules.

    `interface` call attention by name, and now call attnkit; `packed` among them pass packed
    sequences in one call; `fused` had attention of their own, which is computed by attnkit now;
    `left` are other modules with attention in their name that do not, each with a reason.
    """

    interface: tuple[str, ...]
    packed: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.interface)} attention modules call attnkit by name"]
        if self.packed:
            lines.append(f"{len(self.packed)} of them give packed sequences to one call")
        if self.fused:
            lines.append(f"{len(self.fused)} modules with attention of their own call attnkit")
        lines += [f"left as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def register() -> None:
    """Make ``attn_implementation="attnkit"`` known to transformers, for all models from now on.

    May be called any number of times; `enable` does it too.
    """
    _check_version(transformers.__version__)
    for name in (NAME, PACKED):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, make_mask)


def enable(model: nn.Module, *, strict: bool = True) -> Switched:
    """Switch the attention of a model of transformers to attnkit, and say what was switched.

    Everything that calls attention by name is switched, vision and text, and attention written by
    hand where it is known. Raises `CompositionError` where nothing was, and with `strict` where
    some attention of the model would go on without attnkit.
    """
    register()
    if not isinstance(model, nn.Module):
        raise CompositionError(f"enable takes a model, got {type(model).__name__}")
    for part in _outermost(model):
        _set_name(part)
    for module in model.modules():
        if has_table(module):
            learn_tables(type(module))
    interface = tuple(calling(model))
    packed = tuple(_pack(model))
    if not interface:
        raise CompositionError(
            f"{type(model).__name__} has no module that calls attention by name, so nothing was "
            "switched"
        )
    return Switched(interface, packed)


def _check_version(version: str) -> None:
    first, last = TESTED
    if not _number(first) <= _number(version) <= _number(last):
        warnings.warn(
            f"attnkit.interop.transformers was tested with transformers {first} to {last}, and "
            f"this is {version}; what it does not understand raises, but compare a model's output "
            "with attn_implementation='eager' once",
            stacklevel=3,
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _outermost(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the models of transformers that are in no other of them."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def _set_name(model: PreTrainedModel) -> None:
    """Set the name in every configuration that some module of the model reads.

    Not by `set_attn_implementation`: that warns of each class whose source has some attention
    class without a call by name, and leaves all of it.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = NAME


def calling(model: nn.Module) -> Iterator[str]:
    """Yield the names of modules whose code asks for an attention function by name."""
    for name, module in model.named_modules():
        if says(type(module), "get_interface"):
            yield name


def _passes_packed(module: nn.Module) -> bool:
    """Whether a module's code passes running totals of lengths where a name has "flash" in it."""
    kind = type(module)
    return says(kind, "is_flash_attention_requested") and says(kind, "cu_seq_lens_q")


def _pack(model: nn.Module) -> Iterator[str]:
    """Name packed towers so, and yield their attention modules.

    A configuration that other attention reads, too, stays: there the name means other things.
    """
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name in calling(model):
        module = model.get_submodule(name)
        users.setdefault(id(getattr(module, "config", None)), []).append((name, module))
    for each in users.values():
        if all(_passes_packed(module) for _, module in each):
            config: Any = each[0][1].config
            config._attn_implementation_internal = PACKED
            yield from (name for name, _ in each)
