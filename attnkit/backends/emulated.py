"""The emulated backend: the fused kernel's contract in torch, on any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnkit.backends.base import register
from attnkit.backends.fused import Fused
from attnkit.backends.merged import Answer
from attnkit.errors import KernelContractError
from attnkit.kernel import Gradients, KernelCall, emulate, emulate_grad

__all__ = ["Emulated"]

_SEEDS = 2**62


class Emulated(Fused):
    """Runs the calls that Ascend would run, bad parts included, so that wrong plans show here."""

    name = "emulated"

    def forward(self, call: KernelCall, tensors: dict[str, Tensor | None]) -> Answer:
        """Execute one call on the emulator."""
        query, key, value = (_required(tensors, name) for name in ("query", "key", "value"))
        call = _seeded(call)
        out, peak, total = emulate(call, query, key, value, **_optional(tensors))
        return Answer(out, peak, total, (call.seed, call.offset, call.numels))

    def backward(
        self, call: KernelCall, tensors: dict[str, Tensor | None], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Execute one grad call, with the dropout decisions of its forward."""
        seed, offset, _ = merged.random
        call = replace(call, seed=seed, offset=offset)
        query, key, value = (_required(tensors, name) for name in ("query", "key", "value"))
        return emulate_grad(
            call,
            query,
            key,
            value,
            dy,
            softmax_max=merged.peak,
            softmax_sum=merged.total,
            attention_in=merged.out,
            **_optional(tensors),
        )


def _seeded(call: KernelCall) -> KernelCall:
    """Draw a seed for a call with dropout from torch's generator, as the device op does.

    A plan holds no seed: it is the same plan in every step. The backward regenerates the
    decisions from the seed of its forward.
    """
    if call.keep_prob >= 1:
        return call
    return replace(call, seed=int(torch.randint(_SEEDS, ())), offset=0)


def _optional(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensors[name] for name in ("pse", "atten_mask", "sink")}


def _required(tensors: dict[str, Tensor | None], name: str) -> Tensor:
    tensor = tensors[name]
    if tensor is None:
        raise KernelContractError(f"a kernel call needs its {name}", ["operand-missing"])
    return tensor


register(Emulated())
