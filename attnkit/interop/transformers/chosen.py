"""Keys that an indexer chooses for each query: top-k, of keys or of blocks of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError
from attnkit.masks import Dense, Mask

__all__ = ["chosen_blocks", "chosen_keys"]


def chosen_keys(module: nn.Module, indices: Tensor, query: Tensor, key: Tensor) -> Mask:
    """Return the keys ``indices[b, i, :]`` of each query, as models of DeepSeek's kind choose."""
    cells = indices.new_zeros((*indices.shape[:2], key.shape[2]), dtype=torch.bool)
    return Dense.keep(cells.scatter_(-1, indices.long(), True)[:, None])


def chosen_blocks(module: nn.Module, indices: Tensor, query: Tensor, key: Tensor) -> Mask:
    """Return the keys of the blocks ``indices[b, g, i, :]``; -1 is none, g a group of heads."""
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is None:
        raise CompositionError(
            f"{type(module).__name__} passes block_indices, but no indexer.block_size says how "
            "long a block is"
        )
    kv_len, heads = key.shape[2], query.shape[1]
    blocks = -(-kv_len // size)
    # What is -1 goes to one block more, which is dropped.
    chosen = indices.new_zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool)
    chosen.scatter_(-1, indices.masked_fill(indices < 0, blocks).long(), True)
    cells = chosen[..., :blocks].repeat_interleave(size, -1)[..., :kv_len]
    return Dense.keep(cells.repeat_interleave(heads // cells.shape[1], 1))
