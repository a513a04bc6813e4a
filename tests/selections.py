"""Selections of blocks for tests: all there are, and random ones."""

from __future__ import annotations

from itertools import permutations, product

import torch
from torch import Tensor

__all__ = ["UNREAD", "every_selection", "some_selection"]

UNREAD = 10**9
"""What stands where no index is read."""


def choices(q_block: int, kv_block: int, q_blocks: int, kv_len: int, causal: bool) -> list[int]:
    """Return from how many blocks each query block may select."""
    if not causal:
        return [kv_len // kv_block] * q_blocks
    first = kv_len - q_blocks * q_block
    return [(first + i * q_block) // kv_block for i in range(q_blocks)]


def every_selection(
    q_block: int, kv_block: int, q_blocks: int, kv_len: int, k: int, causal: bool
) -> Tensor:
    """Return every way to select, in every order: ``[b, 1, q_blocks, k]``."""
    each = []
    for room in choices(q_block, kv_block, q_blocks, kv_len, causal):
        some = permutations(range(room), min(k, room))
        each.append([[*one, *[UNREAD] * (k - len(one))] for one in some])
    return torch.tensor(list(product(*each)))[:, None]


def some_selection(
    shape: tuple[int, int, int, int],
    q_block: int,
    kv_block: int,
    kv_len: int,
    causal: bool,
    seed: int = 0,
) -> Tensor:
    """Return random different blocks ``[b, heads, q_blocks, k]``."""
    b, heads, q_blocks, k = shape
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full(shape, UNREAD)
    rooms = choices(q_block, kv_block, q_blocks, kv_len, causal)
    for place in product(range(b), range(heads), range(q_blocks)):
        found = torch.randperm(rooms[place[2]], generator=generator)[:k]
        indices[place][: len(found)] = found
    return indices
