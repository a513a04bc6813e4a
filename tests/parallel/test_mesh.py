"""Parameters that are sharded (FSDP2), heads (DTensor plans) and text, on a mesh of three axes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import attnkit as ak
from attnkit import masks, pse
from attnkit.parallel import ContextParallel, Shards
from tests.parallel.processes import Pool

DIM, HEADS, TOKENS, WORDS, STEPS = 16, 4, 25, 11, 2
MASKS = (masks.Causal() & masks.SlidingWindow(9), masks.Causal())
TP_PLAN = {
    "attention.q_proj": ColwiseParallel(),
    "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(),
    "attention.out_proj": RowwiseParallel(),
    "mlp.0": ColwiseParallel(),
    "mlp.2": RowwiseParallel(),
}


class Block(nn.Module):
    """Attention over some of the heads, of which its projections know all."""

    def __init__(self, mask: masks.Mask, ways: int, way: int) -> None:
        super().__init__()
        count, size = HEADS // ways, DIM // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        bias = pse.ALiBi(HEADS).for_heads(way * count, (way + 1) * count)
        self.attention = ak.MultiHeadAttention(
            DIM, count, head_dim=size, mask=mask, pse=bias, rotary=True
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.attention, name, nn.Linear(DIM, DIM, bias=False))
        self.attention.out_proj = nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, shards: Shards | None) -> Tensor:
        x = x + self.attention(self.norm1(x), shards=shards)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Scores for the next word."""

    def __init__(self, ways: int = 1, way: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, DIM)
        self.blocks = nn.ModuleList(Block(mask, ways, way) for mask in MASKS)
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, tokens: Tensor, shards: Shards | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, shards)
        return self.head(x)


def made(ways: int = 1, way: int = 0) -> Model:
    torch.manual_seed(0)
    return Model(ways, way).double()


def texts() -> Tensor:
    return torch.randint(WORDS, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def trained_on_one() -> tuple[list[float], dict[str, Tensor]]:
    model, losses = made(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = texts()
    for _ in range(STEPS):
        scores = model(tokens)[:, :-1]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_on_a_mesh(
    group: dist.ProcessGroup, method: str
) -> tuple[list[float], dict[str, Tensor]]:
    logging.getLogger("torch").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "cp", "tp"))
    tp, spread = mesh["tp"], mesh["dp", "cp"]._flatten("dp_cp")
    model = made(tp.size(), tp.get_local_rank())
    model.load_state_dict(made().state_dict())  # projections are whole until they are cut
    for block in model.blocks:
        parallelize_module(block, tp, TP_PLAN)
        fully_shard(block, mesh=spread)
    fully_shard(model, mesh=spread)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []

    cp = ContextParallel(mesh["cp"], method=method)
    here = cp.shards(layers=MASKS, tokens=TOKENS)
    row = mesh["dp"].get_local_rank()
    tokens = texts()[row : row + 1]
    labels = here.labels(tokens)
    for _ in range(STEPS):
        scores = model(here.take(tokens), shards=here)
        # FSDP takes the mean over dp and cp; the loss is the mean over dp of sums over cp.
        loss = here.loss(scores, labels, scale=cp.size)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total, group=spread.get_group())
        losses.append(total.item() / spread.size())
    whole = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        whole[name] = p.full_tensor().detach().clone()
    return losses, whole


@pytest.fixture(scope="module")
def eight() -> Iterator[Pool]:
    pool = Pool(8)
    yield pool
    pool.close()


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["needed", "ring"])
def test_fsdp_heads_and_text_on_a_mesh_train_like_one_process(eight: Pool, method: str) -> None:
    losses, expected = trained_on_one()
    for found in eight.run(trained_on_a_mesh, method, limit=240.0):
        assert found[0] == pytest.approx(losses, abs=1e-12)
        assert found[1].keys() == expected.keys()
        far = max((found[1][name] - p).abs().max().item() for name, p in expected.items())
        assert far < 1e-12
