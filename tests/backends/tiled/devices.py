"""The walk on a device that has no memory: `python -m tests.backends.tiled.devices`.

A device of torch's own making, "npu", with fake tensors on it: every operator says what it would
return, and whoever looks at a number gets an error, as who would have to wait for a real device.
Its guard cannot be taken back, so that this runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands
from attnkit.backends.base import Kept

DEVICE = "npu"
TILED = BACKENDS["tiled"]


def bent(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i % 7 == b, -torch.inf, torch.tanh(score) - 0.1 * h * (i - j))


CASES: dict[str, dict[str, Any]] = {
    "causal": {"mask": masks.Causal()},
    "soft-cap": {"mask": masks.Causal(), "softcap": 5.0},
    "a function": {"mask": masks.Causal() & masks.SlidingWindow(133), "score_fn": bent},
    "slopes": {"mask": masks.Causal(), "pse": pse.ALiBi(4)},
    "slopes that train": {"mask": masks.Causal(), "pse": pse.ALiBi(4, learnable=True)},
    "buckets": {"mask": masks.Causal(), "pse": pse.T5Relative(4)},
    "sink": {"mask": masks.SlidingWindow(100), "sink": True},
    "padding": {"mask": masks.Padding([400, 317])},
    "cells": {"mask": masks.Dilated(2) & masks.Causal()},
    "a mask's function": {"mask": masks.Predicate(lambda b, h, i, j: (i + j) % 3 == 0)},
    "dropout": {"mask": masks.Causal(), "dropout": 0.1},
    "packed": {"layout": "TND", "seqlens": ak.SeqLens([100, 30, 123, 147])},
    "packed causal": {
        "mask": masks.Causal(), "layout": "TND", "seqlens": ak.SeqLens([100, 30, 123, 147]),
    },
}  # fmt: skip


def walk(how: dict[str, Any], dtype: torch.dtype) -> Iterator[Tensor]:
    """Output, statistics and gradients on the device."""
    how = dict(how)
    bias: pse.Pse | None = how.pop("pse", None)
    if bias is not None and bias.tensors:
        bias = pse.base.rebound(bias, [torch.randn(t.shape, device=DEVICE) for t in bias.tensors])
    shape = (400, 4, 16) if "seqlens" in how else (2, 400, 4, 16)
    query, key, value = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))
    sink = torch.randn(4, device=DEVICE) if how.pop("sink", False) else None
    given = (query.requires_grad_(), key, value)
    plan = ak.plan(*given, sink=sink, pse=bias, backend="tiled", **how)
    operands = Operands(query.detach(), key, value, bias, sink)
    seed = torch.randint(2**63 - 1, (1,)) if "dropout" in how else None
    wanted = tuple(leaf is not None for leaf in operands.leaves)
    with torch.no_grad():
        output, stats = TILED.compute(plan, operands, seed)
        arrived = (torch.ones_like(output), torch.ones_like(stats.lse))
        kept = Kept(seed, output, stats.lse, *arrived)
        yield from (output, stats.lse)
        yield from (t for t in TILED.gradients(plan, operands, kept, wanted) if t is not None)


def main() -> None:
    """Walk every case."""
    _setup_privateuseone_for_python_backend(DEVICE)
    for name, how in CASES.items():
        halves = (torch.bfloat16,) if name in ("soft-cap", "a function") else ()
        for dtype in (torch.float32, *halves):
            with FakeTensorMode():
                for tensor in walk(how, dtype):
                    if tensor.device.type != DEVICE:
                        raise RuntimeError(f"{name}: a result is on {tensor.device}")
        print(name)


if __name__ == "__main__":
    main()
