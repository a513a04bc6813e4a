"""The emulated backend: the fused kernel's contract in torch, on any device."""

from __future__ import annotations

from torch import Tensor

from attnkit.backends.base import register
from attnkit.backends.fused import CallTensors, Fused
from attnkit.kernel import KernelCall, emulate

__all__ = ["Emulated"]


class Emulated(Fused):
    """Runs the calls that Ascend would run, bad parts included, so that wrong plans show here."""

    name = "emulated"

    def launch(self, call: KernelCall, tensors: CallTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Execute one call on the emulator."""
        out, peak, total = emulate(
            call,
            tensors.query,
            tensors.key,
            tensors.value,
            pse=tensors.pse,
            atten_mask=tensors.atten_mask,
            sink=tensors.sink,
        )
        return out, peak, total


register(Emulated())
