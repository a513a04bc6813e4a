"""Layers that are given `shards=`: on all ranks together, they are the layers of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.parallel import ContextParallel, Shards
from attnkit.parallel.wires import Wires
from attnkit.rotary import Dynamic, Rotary
from tests.parallel.threads import run_ranks

TOKENS, DIM = 37, 16
CAUSAL = masks.Causal()
LENGTHS = ak.SeqLens([11, 1, 0, 17, 8])
NEAR = masks.Causal() & masks.SlidingWindow(7)


def mha(**changes: Any) -> ak.MultiHeadAttention:
    torch.manual_seed(0)
    given = {"num_kv_heads": 2, "mask": CAUSAL, **changes}
    layer = ak.MultiHeadAttention(DIM, 4, **given).double()
    for weight in layer.parameters():
        with torch.no_grad():
            weight.add_(0.3 * torch.randn_like(weight))  # sinks and tables are no zeros
    return layer


LAYERS: dict[str, Callable[[], ak.MultiHeadAttention]] = {
    "rotary": lambda: mha(rotary=True),
    "alibi": lambda: mha(pse=pse.ALiBi(4), mask=NEAR),
    "t5": lambda: mha(pse=pse.T5Relative(4, bidirectional=False), sink=True),
    "gated, normed, soft-capped": lambda: mha(
        rotary=True, qk_norm="rms", gate="head", softcap=3.0, mask=NEAR
    ),
    "extra key": lambda: mha(extra_key=True, bias=True),
    "turned by length": lambda: mha(
        rotary=Rotary(scaling=Dynamic(2.0, original_max_position_embeddings=8))
    ),
    "heads differ": lambda: mha(mask=masks.PerHead([CAUSAL, NEAR, CAUSAL, masks.Full()])),
}


def gradients(
    layer: nn.Module, output: Tensor, inputs: list[Tensor], slope: Tensor
) -> list[Tensor]:
    leaves = [*inputs, *layer.parameters()]
    found = torch.autograd.grad(output, leaves, slope, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def on_one(layer: nn.Module, slope: Tensor, *inputs: Tensor, **given: Any) -> list[Tensor]:
    own = [one.clone().requires_grad_() for one in inputs]
    output = layer(*own, **given)
    return [output, *gradients(layer, output, own, slope)]


def on_ranks(
    count: int,
    layer: nn.Module,
    shards: Callable[[ContextParallel], Shards],
    slope: Tensor,
    *inputs: Tensor,
    faulty: Callable[[Shards], dict[str, Any]] = lambda here: {},
    **choices: Any,
) -> list[Tensor]:
    """Return what `on_one` does, of all ranks: outputs put together, weights' shares added."""
    dim = inputs[0].ndim - 2

    def work(wires: Wires) -> tuple[Shards, list[Tensor]]:
        here, own = shards(ContextParallel(wires, **choices)), copy.deepcopy(layer)
        sides = [here, here.keys][: len(inputs)]
        local = [
            s.take(x, dim).clone().requires_grad_() for s, x in zip(sides, inputs, strict=True)
        ]
        output = own(*local, shards=here, **faulty(here))
        return here, [output.detach(), *gradients(own, output, local, here.take(slope, dim))]

    found = run_ranks(count, work)
    here, parts = found[0][0], list(zip(*(one[1] for one in found), strict=True))
    whole = [here.sharding.restore(parts[0], dim)]
    for side, part in zip([here, here.keys], parts[1 : 1 + len(inputs)], strict=False):
        whole.append(side.sharding.restore(part, dim))
    return [*whole, *(sum(shares[1:], shares[0]) for shares in parts[1 + len(inputs) :])]


def far(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_on_ranks_is_that_of_one_process(name: str, packed: bool) -> None:
    layer = LAYERS[name]()
    shape = (TOKENS, DIM) if packed else (2, TOKENS, DIM)
    x, slope = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask, lengths = layer.attention.mask, {"seqlens": LENGTHS} if packed else {}
    expected = on_one(layer, slope, x, **lengths)
    found = on_ranks(
        3,
        layer,
        lambda cp: cp.shards(mask, **({"seqlens": LENGTHS} if packed else {"tokens": TOKENS})),
        slope,
        x,
    )
    assert far(found, expected) < 1e-12
