"""FlexAttention's own functions without its compiled kernel: any dtype, statistics, gradients.

torch's eager path refuses gradients on the CPU, so what it computes is spelt out here on the
scores that torch's own code makes of a `mask_mod` and a `score_mod`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import _math_attention_inner

from attnkit import Refusal
from attnkit.backends import BACKENDS, Flex, register
from attnkit.backends.flex.backend import FlexCall
from attnkit.planner import Request


def eager(call: FlexCall) -> tuple[Tensor, Tensor]:
    """Softmax over the scores of FlexAttention's eager code."""
    query, key, value, score_mod, mask, scale, _ = call
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    fn = score_mod or (lambda score, b, h, i, j: score)
    _, scores = _math_attention_inner(query, key, value, fn, mask.as_tuple(), scale, {})
    empty = (scores == -torch.inf).all(-1)
    filled = scores.masked_fill(empty[..., None], 0.0)
    lse = filled.logsumexp(-1).masked_fill(empty, -torch.inf)
    weights = filled.softmax(-1).masked_fill(empty[..., None], 0.0)
    return (weights @ value.to(weights.dtype)).to(query.dtype), lse


class EagerFlex(Flex):
    """The flex backend on the eager code, without the limits of the CPU's compiled kernel."""

    name = "flex-eager"

    def __init__(self) -> None:
        super().__init__(eager)

    def refusals(self, request: Request) -> list[Refusal]:
        return super().refusals(replace(request, device="meta", dtype=torch.float32))


@contextmanager
def registered() -> Iterator[None]:
    """Let the eager backend be known by name, if it is not already."""
    known = EagerFlex.name in BACKENDS
    if not known:
        register(EagerFlex())
    yield
    if not known:
        BACKENDS.remove(EagerFlex.name)
