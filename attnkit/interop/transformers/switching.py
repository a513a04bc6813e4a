"""Switching models to attnkit: by name for all to come, or one model that there is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from attnkit.display import Told
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch import MultiheadAttention, fuse, replace
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.lifting import make_mask
from attnkit.interop.transformers.names import NAME, PACKED, says
from attnkit.interop.transformers.tables import has_table, learn_tables

__all__ = ["TESTED", "Switched", "calling", "enable", "register"]

TESTED = ("5.23.0", "5.23.0")
"""The first and the last version of transformers that this was tested with."""


@dataclass(frozen=True)
class Switched(Told):
    """What `enable` found in a model: the names of modules that compute attention.

    `interface` call attention by name, and now call attnkit; those of them that are `packed` give
    packed sequences to one call. `watched` write attention by hand, as products and a softmax, and
    `replaced` are torch's `nn.MultiheadAttention`: attnkit computes these, too. `left` are other
    modules with attention in their names, which run as they are.
    """

    interface: tuple[str, ...]
    packed: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.interface or self.watched or self.replaced)

    def __str__(self) -> str:
        told = (
            (self.interface, "attention modules call attnkit by name"),
            (self.packed, "of them give packed sequences to one call"),
            (self.watched, "modules write attention by hand, which is computed by attnkit"),
            (self.replaced, "nn.MultiheadAttention are computed by attnkit"),
        )
        lines = [f"{len(names)} {what}" for names, what in told if names]
        if self.left:
            lines.append(f"left as they are: {', '.join(self.left)}")
        return "\n".join(lines) or "nothing computes attention here"


def register() -> None:
    """Make ``attn_implementation="attnkit"`` known to transformers, for all models from now on.

    May be called any number of times; `enable` does it too.
    """
    _check_version(transformers.__version__)
    for name in (NAME, PACKED):
        AttentionInterface.register(name, _outside(attend))
        AttentionMaskInterface.register(name, _outside(make_mask))


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that graphs of `torch.compile` leave off for: what it reads is no data."""
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    return disable(function, reason=_IN_GRAPH)


_IN_GRAPH = (
    "masks of transformers are read as sets, and planned, between graphs; compile without "
    "fullgraph=True"
)


def enable(model: nn.Module, *, strict: bool = True) -> Switched:
    """Switch the attention of a model of transformers to attnkit, and say what was switched.

    Every module that calls attention by name is switched, in vision towers too, which then give
    all their images to one call; attention that is written by hand runs through
    `attnkit.interop.torch.fuse`, and `nn.MultiheadAttention` through
    `attnkit.interop.torch.replace`. Parameters, state dicts and the modules stay what they are.

    Raises `CompositionError` where nothing was switched, unless `strict` is False.
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"enable takes a model, got {type(model).__name__}")
    register()
    interface = tuple(calling(model))
    for module in model.modules():
        _set_name(module)
        if has_table(module):
            learn_tables(type(module))
    packed = tuple(_pack(model))
    found = Switched(interface, packed, *_others(model, interface))
    if strict and not found:
        raise CompositionError(
            f"{type(model).__name__} has no module whose attention attnkit can compute, so nothing "
            f"was switched; left as they are: {', '.join(found.left) or 'none has it in its name'}"
        )
    return found


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


def _set_name(module: nn.Module) -> None:
    """Set the name in the configuration that a module reads.

    Not by `set_attn_implementation`: that warns of each class whose source has some attention
    class without a call by name, and leaves all of it.
    """
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


def _others(model: nn.Module, interface: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Switch attention that is not called by name; yield names: watched, replaced, and left."""
    done = set(interface)
    named = {name: m for name, m in model.named_modules() if name not in done and _attends(m)}
    torchs = {name: m for name, m in named.items() if isinstance(m, nn.MultiheadAttention)}
    left: set[str] = set()
    if any(not isinstance(module, MultiheadAttention) for module in torchs.values()):
        left.update(replace(model).left)
    replaced = tuple(name for name in torchs if name not in left)
    kinds = {type(m) for m in named.values() if any(says(type(m), word) for word in _BY_HAND)}
    kinds = {kind for kind in kinds if not issubclass(kind, nn.MultiheadAttention)}
    watched = tuple(fuse(model, kinds).spots) if kinds else ()
    done.update(watched, replaced)
    for name, module in named.items():
        inner = any(f"{name}.{below}" in done for below, _ in module.named_modules() if below)
        if name not in done and not inner and not _is_within(name, done) and _projects(module):
            left.add(name)
    yield from (watched, replaced, tuple(sorted(left)))


_BY_HAND = ("softmax", "Softmax", "scaled_dot_product_attention")


def _attends(module: nn.Module) -> bool:
    said = type(module).__name__.lower()
    return "attention" in said or "attn" in said


def _projects(module: nn.Module) -> bool:
    """Whether a module has several projections: what finishes another's output has one."""
    return sum(isinstance(child, nn.Linear | nn.Conv2d) for child in module.children()) > 1


def _is_within(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:k]) in names for k in range(1, len(parts)))
