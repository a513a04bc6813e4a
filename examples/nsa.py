"""NSA: compressed keys for all of the past, the blocks they point to, and a window; mixed by gates.

    python examples/nsa.py

Every block of keys becomes one compressed key. What queries make of these says which blocks are
worth reading in full, for each block of queries: that is the selected branch, one packed call of
the fused kernel, its blocks gathered on the device. The published layer selects for each query.

Source: Yuan et al., "Native Sparse Attention" (2025, arXiv:2502.11089).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from lm.steps import dense, shown

DIM, HEADS, KV_HEADS, BLOCK, TOP, WINDOW = 64, 4, 1, 16, 3, 32
LENGTH = 256


def ended(length: int) -> masks.Slices:
    """Return which blocks have ended before or with each query: what it sees of compressed keys."""
    count = length // BLOCK
    bars = [((j + 1) * BLOCK - 1, length, j, j + 1, None, None) for j in range(count)]
    return masks.Slices(bars, length, count)


class NSA(nn.Module):
    """Three branches of attention, ``[b s DIM] -> [b s DIM]``; their softmaxes are separate.

    `plainly` computes the selected branch over the whole score matrix, to compare with.
    """

    def __init__(self, plainly: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.plainly, self.dim = plainly, DIM // HEADS
        self.to_qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * self.dim)
        self.to_out = nn.Linear(DIM, DIM)
        self.to_gates = nn.Linear(DIM, 3 * HEADS)
        self.place = nn.Parameter(0.02 * torch.randn(BLOCK, self.dim))
        self.compress = nn.ModuleList(nn.Linear(BLOCK * self.dim, self.dim) for _ in range(2))
        self.rotary = ak.Rotary()
        self.compressed, self.window = (
            ak.Attention(HEADS, self.dim, num_kv_heads=KV_HEADS, mask=mask)
            for mask in (ended(LENGTH), masks.SlidingWindow(WINDOW))
        )
        self.selected = ak.Attention(HEADS, self.dim, num_kv_heads=KV_HEADS, backend=backend)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the three branches answer, ``[b s n d]``."""
        query, key, value = self.heads(x)
        whole = tuple(
            one(rearrange(t, "b (j r) n d -> b j n r d", r=BLOCK).add(self.place).flatten(-2))
            for one, t in zip(self.compress, (key, value), strict=True)
        )
        mask = self.select(query, whole[0])
        chosen = (
            dense(query, key, value, mask)
            if self.plainly
            else self.selected(query, key, value, mask=mask)
        )
        return self.compressed(query, *whole), chosen, self.window(query, key, value)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[b s n d]``, turned by their positions."""
        qkv = self.to_qkv(x).unflatten(-1, (-1, self.dim))
        query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        places = torch.arange(x.shape[1], device=x.device)
        return self.rotary.rotate(query, places), self.rotary.rotate(key, places), value

    @torch.no_grad()
    def select(self, query: Tensor, compressed: Tensor) -> masks.SelectedBlocks:
        """Return the blocks whose compressed keys have most weight; the first is always one."""
        queries = rearrange(query, "b s (n g) d -> b n g s d", n=KV_HEADS)
        scores = queries @ rearrange(compressed, "b j n d -> b n 1 d j") * self.dim**-0.5
        length, count = scores.shape[-2:]
        allowed = ended(length).materialize(length, count, device=query.device)[0, 0]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        worth = rearrange(weights, "b n g (i r) j -> b n i j (g r)", r=BLOCK).sum(-1)
        worth[..., 0] = torch.inf
        blocks = torch.arange(worth.shape[-1], device=worth.device)
        best = worth.masked_fill(blocks >= blocks[:, None], -torch.inf).topk(TOP)
        return masks.SelectedBlocks(best.indices, BLOCK, BLOCK, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the branches, for each query and head by gates of its own."""
        gates = self.to_gates(x).sigmoid().unflatten(-1, (HEADS, 3))
        mixed = (torch.stack(self.branches(x), -1) * gates[..., None, :]).sum(-1)
        out: Tensor = self.to_out(mixed.flatten(2))
        return out


def main(steps: int = 40) -> None:
    """Compare with the dense computation, train a little, and print the plan."""
    layer: NSA = shown(NSA, DIM, LENGTH, steps).layers[0]  # type: ignore[assignment]
    query, key, value = layer.heads(torch.randn(2, LENGTH, DIM))
    mask = layer.select(query, torch.randn(2, LENGTH // BLOCK, KV_HEADS, DIM // HEADS))
    print(layer.selected.explain(query, key, value, mask=mask))


if __name__ == "__main__":
    main()
