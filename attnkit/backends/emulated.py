"""The emulated backend: the fused kernel's contract in torch, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.base import register
from attnkit.backends.bias_pass import Bits
from attnkit.backends.block_sparse import blocks_backward, blocks_forward
from attnkit.backends.fused import Fused
from attnkit.backends.merged import Answer, Drawn, Launcher
from attnkit.kernel import BlockSparseCall, Gradients, KernelCall, emulate, emulate_grad
from attnkit.kernel.block_sparse_op import EMULATED
from attnkit.kernel.dropout import dropout_bits

__all__ = ["Emulated"]

_SEEDS = 2**62


class Emulated(Fused):
    """Runs the calls that Ascend would run, bad parts included, so that wrong plans show here.

    Those of the fused op alone, which every torch_npu has, unless `block_sparse` says that the
    block-sparse op is to be among them.
    """

    name = "emulated"

    def __init__(
        self, block_sparse: bool = False, generator: torch.Generator | None = None
    ) -> None:
        self.block_sparse, self._generator = block_sparse, generator

    @contextmanager
    def drawing(self, seed: Tensor | None, device: torch.device) -> Iterator[Launcher]:
        """Draw from a generator of its own: torch's is that of all threads."""
        if seed is None:
            yield self
            return
        yield Emulated(self.block_sparse, torch.Generator().manual_seed(int(seed)))

    def forward(self, call: KernelCall, tensors: dict[str, Any]) -> Answer:
        """Execute one call on the emulator."""
        if isinstance(call, BlockSparseCall):
            return blocks_forward(call, tensors, EMULATED)
        # A plan holds no seed: it is the same plan in every step. As the device op does, each
        # call draws one from torch's generator, or from that of a share.
        if call.keep_prob < 1:
            seed = torch.randint(_SEEDS, (), generator=self._generator)
            call = replace(call, seed=int(seed), offset=0)
        out, peak, total = emulate(call, **tensors)
        return Answer(out, peak, total, (call.seed, call.offset, call.numels))

    def backward(
        self, call: KernelCall, tensors: dict[str, Any], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Execute one grad call, with the dropout decisions of its forward."""
        if isinstance(call, BlockSparseCall):
            return blocks_backward(call, tensors, dy, merged, EMULATED)
        seed, offset, _ = merged.random
        call = replace(call, seed=seed, offset=offset)
        return emulate_grad(
            call,
            dy=dy,
            softmax_max=merged.peak,
            softmax_sum=merged.total,
            attention_in=merged.out,
            **tensors,
        )

    def decisions(self, call: KernelCall, random: Drawn, query: Tensor) -> Bits:
        """Return the emulator's decisions again."""
        seed, offset, _ = random
        return lambda numbers: dropout_bits(numbers, seed, offset, call.keep_prob)


register(Emulated())
