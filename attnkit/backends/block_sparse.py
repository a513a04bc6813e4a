"""Calls of the block-sparse op, made and answered like those of the fused op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.merged import Answer
from attnkit.kernel import BlockSparseCall, Gradients
from attnkit.kernel.block_sparse_op import launch_blocks, launch_blocks_grad

__all__ = ["blocks_backward", "blocks_forward"]


def blocks_forward(call: BlockSparseCall, tensors: Mapping[str, Any], ops: Any) -> Answer:
    """Make a call; its log-sum-exp is a maximum that sums to 1."""
    out, lse = launch_blocks(call, tensors, ops)
    return Answer(out, lse, torch.ones_like(lse))


def blocks_backward(
    call: BlockSparseCall, tensors: Mapping[str, Any], dy: Tensor, merged: Answer, ops: Any
) -> Gradients:
    """Make a grad call, with the statistics and output of the whole softmax."""
    lse = merged.peak + merged.total.log()
    return launch_blocks_grad(call, tensors, dy, merged.out, lse, ops)
