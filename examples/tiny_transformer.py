"""A transformer in one screen, with `ak.Attention` where the attention goes.

    python examples/tiny_transformer.py

`Attention` has no projections and no positions of its own: it takes queries, keys and values, and
computes softmax(scale * q.k + bias) @ v on the cells that its mask allows. What to allow is a value
made of parts. Here each token sees a window of 64 and, from anywhere, the first 4 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
DIM = HEADS * HEAD_DIM

MASK = masks.Causal() & (masks.SlidingWindow(64) | masks.Prefix(4))


class Block(nn.Module):
    """Attention, then an MLP, each with a residual around it; tensors are [b, s, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.to_qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.attention = ak.Attention(
            HEADS, HEAD_DIM, num_kv_heads=KV_HEADS, mask=MASK, pse=pse.ALiBi(HEADS), layout="BSND"
        )
        self.to_out = nn.Linear(DIM, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [b, s, heads, HEAD_DIM]."""
        qkv = self.to_qkv(self.norm1(x)).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what this block adds to it."""
        x = x + self.to_out(self.attention(*self.heads(x)).flatten(2))
        residual: Tensor = x + self.mlp(self.norm2(x))
        return residual


class TinyTransformer(nn.Module):
    """Token ids [b, s] to scores [b, s, vocabulary]."""

    def __init__(self, vocabulary: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.head = nn.Linear(DIM, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next token at every position."""
        scores: Tensor = self.head(self.blocks(self.embedding(tokens)))
        return scores


def main() -> None:
    """Show the mask, run the model forward and backward, and print the plan that it got."""
    torch.manual_seed(0)
    model = TinyTransformer()
    tokens = torch.randint(256, (2, 256))

    print(f"the mask: {MASK}\n")
    print(MASK.show(256, 256))

    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    print(f"\nscores of random bytes cost {loss.item():.3f} nats; ln 256 is 5.545\n")

    block: Block = model.blocks[0]  # type: ignore[assignment]
    print(block.attention.explain(*block.heads(model.embedding(tokens))))


if __name__ == "__main__":
    main()
