"""Who computes attention: transformers' own ways and attnkit, each counted at the interface.

A count is part of the check. A model that never calls its interface equals eager, and proves
nothing; so each run returns the modules that called, and those that eager's run called must be
among them.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash
from transformers import modeling_utils
from transformers.integrations import npu_flash_attention, sdpa_attention
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from attnkit import fusion_attention
from attnkit.backends import run_plan

__all__ = ["NPU_WAYS", "WAYS", "Calls", "counted", "environment"]


@dataclass
class Calls:
    """How often attention was computed, by the module's number in the model and by whom."""

    by_module: Counter[int] = field(default_factory=Counter)
    by_name: Counter[str] = field(default_factory=Counter)
    dropped: int = 0  # calls that were told to drop weights
    plans: int = 0  # plans that attnkit ran, for the interface or in place of a model's own code


_MASK = "attention_mask"


def without_empty_rows(out: Tensor, mask: Any) -> Tensor:
    """Return the output ``b s n d`` with 0 where the mask ``b 1 s j`` leaves a row no key."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not mask.is_floating_point():
        return out
    empty = (mask <= torch.finfo(mask.dtype).min / 2).all(-1)  # b 1 s
    return out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)


@contextlib.contextmanager
def counted(model: nn.Module, noise: float = 0.0, empty_rows: bool = False) -> Iterator[Calls]:
    """Count every call that goes through transformers' interface, eager's included.

    With `noise` queries and outputs are changed by as much of their largest number, as if they
    were rounded in another way; with `empty_rows` rows that an additive mask leaves without a key
    are 0.
    """
    random = torch.Generator().manual_seed(17)
    numbers = {id(module): number for number, module in enumerate(model.modules())}
    calls = Calls()
    plain = AttentionInterface.get_interface

    def grained(tensor: Tensor) -> Tensor:
        grain = torch.randn(tensor.shape, generator=random).to(tensor.dtype)
        return tensor + noise * grain * tensor.detach().abs().amax()

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        chosen = plain(self, name, default)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.by_module[numbers.get(id(module), -1)] += 1
            calls.by_name[name or "eager"] += 1
            calls.dropped += bool(kwargs.get("dropout"))
            if noise and args:
                args = (grained(args[0]), *args[1:])
            out, *rest = chosen(module, *args, **kwargs)
            if empty_rows:
                out = without_empty_rows(out, args[3] if len(args) > 3 else kwargs.get(_MASK))
            return grained(out) if noise else out, *rest

        return call

    def run(plan: Any, operands: Any) -> Any:
        calls.plans += 1
        return run_plan(plan, operands)

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    users = [m for name, m in sys.modules.items() if name.startswith("attnkit.")]
    users = [m for m in users if vars(m).get("run_plan") is run_plan]
    for user in users:
        user.run_plan = run  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        for user in users:
            user.run_plan = run_plan  # type: ignore[attr-defined]
        AttentionInterface.get_interface = plain  # type: ignore[method-assign]


def eager(model: nn.Module) -> None:
    """Leave the model as it was built."""


def sdpa(model: nn.Module) -> None:
    """transformers' own call of torch's fused attention."""
    model.set_attn_implementation("sdpa")


def attnkit(model: nn.Module) -> None:
    """attnkit's adapter."""
    from attnkit.interop.transformers import enable

    enable(model)


def npu_flash(model: nn.Module) -> None:
    """transformers' flash path for NPUs, on attnkit's emulator of the kernel."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._compatible_flash_implementations:
            name = part._compatible_flash_implementations[0]
            raise NotImplementedError(f"{type(part).__name__} asks for the hub's kernel {name}")
    model.set_attn_implementation("flash_attention_2")


@contextlib.contextmanager
def environment(way: str) -> Iterator[None]:
    """Let transformers believe that there is an NPU, where the way is one of an NPU."""
    changes: list[tuple[Any, str, Any]] = [(sdpa_attention, "_is_torch_npu_available", False)]
    if way == "npu-sdpa":
        changes = [(sdpa_attention, "_is_torch_npu_available", True)]
    elif way == "npu-flash":
        npu_flash_attention.npu_fusion_attention = fusion_attention  # as `import torch_npu` would
        changes += [
            (flash, "is_torch_npu_available", lambda: True),
            (flash, "_loaded_implementation", None),
            (PreTrainedModel, "_flash_attn_can_dispatch", supports_flash),
            (flash, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", MATRIX),
            (modeling_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", MATRIX),
        ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def supports_flash(self: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
    """Ask what each model declares, and no device."""
    if not self._supports_flash_attn:
        raise ValueError(f"{type(self).__name__} does not support Flash Attention")
    return True


MATRIX = {2: {"general_availability_check": lambda: True}}
NPU_WAYS = ("npu-sdpa", "npu-flash")
WAYS: dict[str, Callable[[nn.Module], None]] = {
    "eager": eager,
    "sdpa": sdpa,
    "attnkit": attnkit,
    "npu-sdpa": sdpa,
    "npu-flash": npu_flash,
}
