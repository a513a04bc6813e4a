"""A few steps of training on windows of the text, for layers of any kind between the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnkit import masks
from lm.data import VOCABULARY, load_corpus


class ByteModel(nn.Module):
    """Token ids ``[b s]`` to scores ``[b s 257]``, with layers ``[b s dim] -> [b s dim]``."""

    def __init__(self, dim: int, layers: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(layers))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next byte at every position."""
        x = self.embedding(tokens)
        for norm, layer, mlp in zip(self.norms, self.layers, self.mlps, strict=True):
            x = x + layer(norm(x))
            x = x + mlp(x)
        scores: Tensor = self.head(x)
        return scores


def windows(batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yield token ids ``[batch length + 1]`` from random places of the training text, without end.

    Topics lie end to end: every position has a whole window before it to look back on.
    """
    text = torch.cat([document.tokens() for document in load_corpus().train])
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[start : start + length + 1] for start in starts.tolist()])


def train(model: nn.Module, steps: int, length: int, batch: int = 2, seed: int = 0) -> list[float]:
    """Train with AdamW, and return the loss of each step in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _, tokens in zip(range(steps), windows(batch, length, seed), strict=False):
        scores = model(tokens[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    return losses


def dense(query: Tensor, key: Tensor, value: Tensor, mask: masks.SelectedBlocks) -> Tensor:
    """Attend ``[b s n d]`` over the whole score matrix: what a selection means, in plain torch."""
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    key, value = (t.repeat_interleave(group, 2) for t in (key, value))
    scores = torch.einsum("bind,bjnd->bnij", query, key) * dim**-0.5
    if mask.gates is not None:
        blocks = torch.arange(length // mask.kv_block)
        chosen = mask.live(length)[..., None] & (mask.indices[..., None] == blocks)
        gates = torch.where(chosen, mask.gates[..., None], 0.0).sum(-2)
        gates = gates.repeat_interleave(mask.q_block, 2).repeat_interleave(mask.kv_block, 3)
        scores = scores + gates.repeat_interleave(heads // gates.shape[1], 1)
    allowed = mask.materialize(length, length, batch, heads)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", weights, value)


def apart(layer: nn.Module, plain: nn.Module, x: Tensor) -> float:
    """Return how far two layers with the same weights are apart: in output and all gradients."""
    plain.load_state_dict(layer.state_dict())
    far: list[float] = []
    found = []
    for one in (layer, plain):
        given = x.detach().clone().requires_grad_()
        out = one(given)
        leaves = [given, *one.parameters()]
        loss = out.square().sum()
        found.append([out, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for a, b in zip(*found, strict=True):
        far.append((a - b).abs().max().item() / max(1.0, b.abs().max().item()))
    return max(far)


def shown(make: Callable[..., nn.Module], dim: int, length: int, steps: int) -> ByteModel:
    """Compare a layer with its dense computation, train a model of two, and print both."""
    torch.manual_seed(0)
    x = torch.randn(2, length, dim, dtype=torch.float64)
    far = apart(make().double(), make(plainly=True).double(), x)
    print(f"output and gradients differ from the dense computation by {far:.1e}")
    model = ByteModel(dim, 2, make)
    losses = train(model, steps, length)
    print(f"bits per byte: {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps\n")
    return model
