"""What is taken of a mask and a bias, on the backends: the rows of the whole attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.layouts import SeqLens
from attnkit.pse.base import rebound
from attnkit.ranges import Excerpt
from tests.pse.families import Waves, numbers

LENGTH, HEADS, BATCH = 24, 4, 2
WIDE = torch.float64

BIASES = {
    "alibi": lambda: pse.ALiBi(HEADS),
    "root": lambda: pse.SqrtALiBi(HEADS, align="top_left"),
    "learnable": lambda: rebound(pse.ALiBi(HEADS, learnable=True), [nn.Parameter(numbers(HEADS))]),
    "t5": lambda: pse.T5Relative(HEADS, 8, 12, table=nn.Parameter(numbers(8, HEADS))),
    "distances": lambda: pse.DistanceBias(
        nn.Parameter(numbers(HEADS, 2 * LENGTH - 1)), first=1 - LENGTH
    ),
    "keys": lambda: pse.KeyBias(nn.Parameter(numbers(HEADS, LENGTH))),
    "keys of a batch": lambda: pse.KeyBias(nn.Parameter(numbers(BATCH, 1, LENGTH))),
    "dense": lambda: pse.Dense(nn.Parameter(numbers(HEADS, LENGTH, LENGTH)), before_scale=True),
    "dense of a batch": lambda: pse.Dense(nn.Parameter(numbers(BATCH, 1, LENGTH, LENGTH))),
    "table": lambda: pse.Table(
        nn.Parameter(numbers(7, HEADS)), torch.arange(LENGTH * LENGTH).view(LENGTH, LENGTH) % 7
    ),
    "sum": lambda: BIASES["t5"]() + pse.ALiBi(HEADS) + BIASES["keys"](),
    "waves": lambda: Waves(nn.Parameter(numbers(HEADS))),
}

ROWS = {
    "side by side": ((range(12, 20),), (range(LENGTH),)),
    "several": ((range(2, 6), range(18, 24)), (range(12, 24), range(12))),
    "all": ((range(LENGTH),), (range(LENGTH),)),
}

MASK = masks.Causal() & masks.SlidingWindow(14)


def make(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=WIDE, generator=generator)


def operands() -> tuple[Tensor, ...]:
    shapes = ((BATCH, LENGTH, HEADS, 8), (BATCH, LENGTH, 2, 8), (BATCH, LENGTH, 2, 16))
    return tuple(make(*shape)[..., :8] for shape in shapes)


def places(ranges) -> list[int]:
    return [position for one in ranges for position in one]


def answers(bias: pse.Pse, whole: pse.Pse, grad: Tensor, *given: Tensor, **how: object):
    """Return the output, and the gradients that it has on the tensors of a bias."""
    out = ak.attention(*given, pse=bias, **how)
    trained = [t for t in whole.tensors if t.requires_grad]
    return out, torch.autograd.grad(out, trained, grad) if trained else ()


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "tiled", "emulated"])
@pytest.mark.parametrize("name", BIASES)
def test_rows_and_heads_of_a_rank_are_those_of_one_process(name: str, backend: str) -> None:
    bias, (q, k, v) = BIASES[name](), operands()
    grad = make(BATCH, LENGTH, HEADS, 8)
    for rows, keys in ROWS.values():
        own, others = places(rows), places(keys)
        taken = {"q_len": LENGTH, "kv_len": LENGTH}
        for first in (0, 2):
            part, kv = slice(first, HEADS), slice(first // 2, 2)
            alone = torch.zeros_like(grad)
            alone[:, own, part] = grad[:, own, part]
            right = answers(bias, bias, alone, q, k, v, mask=MASK, backend="reference")
            found = answers(
                bias.take(rows, keys, **taken).for_heads(first, HEADS), bias, grad[:, own, part],
                q[:, own, part], k[:, others, kv], v[:, others, kv],
                mask=MASK.take(rows, keys, **taken), backend=backend,
            )  # fmt: skip
            close(found[0], right[0][:, own, part])
            for a, b in zip(found[1], right[1], strict=True):
                close(a, b)


@pytest.mark.parametrize("backend", ["reference", "tiled", "emulated"])
@pytest.mark.parametrize("name", [name for name in BIASES if " of a batch" not in name])
def test_packed_sequences_of_a_rank_are_those_of_one_process(name: str, backend: str) -> None:
    """Three texts; a rank has the end of one and pieces of another."""
    excerpts = [
        Excerpt(LENGTH, LENGTH, (range(20, 24),), (range(24),), batch=2),
        Excerpt(LENGTH, LENGTH, (range(2, 6), range(10, 12)), (range(12),), batch=0),
    ]
    bias = BIASES[name]()
    q, k, v = make(72, HEADS, 8), make(72, 2, 9)[..., :8], make(72, 2, 10)[..., :8]
    whole = {"layout": "TND", "seqlens": SeqLens((LENGTH,) * 3), "mask": MASK}
    rows = [*range(68, 72), *range(2, 6), *range(10, 12)]
    keys = [*range(48, 72), *range(12)]
    grad = make(len(rows), HEADS, 8)
    right = answers(bias, bias, torch.zeros_like(q).index_copy(0, torch.tensor(rows), grad),
                    q, k, v, **whole, backend="reference")  # fmt: skip
    own = {"layout": "TND", "seqlens": SeqLens((4, 6), (24, 12))}
    found = answers(
        bias.take_excerpts(excerpts), bias, grad, q[rows], k[keys], v[keys],
        mask=MASK.take_excerpts(excerpts), **own, backend=backend,
    )  # fmt: skip
    close(found[0], right[0][rows])
    for a, b in zip(found[1], right[1], strict=True):
        close(a, b)
