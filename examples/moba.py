"""MoBA: each block of queries reads its own block, and the earlier blocks that score highest.

    python examples/moba.py

Blocks are scored by their mean key against the mean query. Which ones win is known only while the
model runs, and stays on the device: the plan is one, whatever is selected. The published layer
selects for each query, and nothing trains what it selects by; here a block of queries selects
together, and the scores of the winners are gates, so that the selection learns.

Source: Lu et al., "MoBA: Mixture of Block Attention" (2025, arXiv:2502.13189).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from lm.steps import dense, shown

DIM, HEADS, KV_HEADS, BLOCK, TOP = 64, 4, 2, 32, 2
LENGTH = 256


class MoBA(nn.Module):
    """Attention over selected blocks, ``[b s DIM] -> [b s DIM]``.

    `plainly` computes the same selection over the whole score matrix, to compare with.
    """

    def __init__(self, plainly: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.plainly, self.dim = plainly, DIM // HEADS
        self.to_qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * self.dim)
        self.to_out = nn.Linear(DIM, DIM)
        self.rotary = ak.Rotary()
        self.attention = ak.Attention(HEADS, self.dim, num_kv_heads=KV_HEADS, backend=backend)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[b s n d]``, turned by their positions."""
        qkv = self.to_qkv(x).unflatten(-1, (-1, self.dim))
        query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        places = torch.arange(x.shape[1], device=x.device)
        return self.rotary.rotate(query, places), self.rotary.rotate(key, places), value

    def select(self, query: Tensor, key: Tensor) -> masks.SelectedBlocks:
        """Return the blocks that each block of queries reads, for each key head."""
        sizes = {"r": BLOCK, "n": KV_HEADS}
        queries = rearrange(query, "b (i r) (n g) d -> b n i (r g) d", **sizes).mean(3)
        keys = rearrange(key, "b (j r) n d -> b n j r d", **sizes).mean(3)
        scores = queries @ keys.mT
        blocks = torch.arange(scores.shape[-1], device=scores.device)
        best = scores.masked_fill(blocks >= blocks[:, None], -torch.inf).topk(TOP)
        # Of the first blocks of queries fewer are read; what is not read may be anything.
        return masks.SelectedBlocks(best.indices, BLOCK, BLOCK, causal=True, gates=best.values)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the blocks that are selected."""
        query, key, value = self.heads(x)
        mask = self.select(query, key)
        if self.plainly:
            made = dense(query, key, value, mask)
        else:
            made = self.attention(query, key, value, mask=mask)
        out: Tensor = self.to_out(made.flatten(2))
        return out


def main(steps: int = 40) -> None:
    """Compare with the dense computation, train a little, and print the plan."""
    layer: MoBA = shown(MoBA, DIM, LENGTH, steps).layers[0]  # type: ignore[assignment]
    query, key, value = layer.heads(torch.randn(2, LENGTH, DIM))
    print(layer.attention.explain(query, key, value, mask=layer.select(query, key)))


if __name__ == "__main__":
    main()
