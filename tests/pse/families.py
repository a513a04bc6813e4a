"""One bias of every family, of some third parties too, each beside its formula in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnkit import pse

Q, KV, HEADS, BATCH = 4, 5, 2, 3
"""Lengths and counts of what is made for some."""

Formula = Callable[..., float]
"""A cell: of the bias, batch element, head, query, key, and the two lengths."""


class Family(NamedTuple):
    """How to make a bias, and what its cells are; `text`: whether it can be written down."""

    make: Callable[[], pse.Pse]
    cell: Formula
    text: bool = False


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers that are told apart, the same every time."""
    return (torch.arange(math.prod(shape)) * 7919 % 997).view(shape).to(dtype) / 250 - 2


# -- families of third parties -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Waves(pse.Pse):
    """``sin(pace[h] * (1 + i + 2j))``: nothing but its cells."""

    pace: Tensor = field(default_factory=lambda: nn.Parameter(numbers(HEADS)))

    @property
    def heads(self) -> int:
        return len(self.pace)

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: object) -> Tensor:
        i, j = torch.arange(*at.rows)[:, None], torch.arange(*at.keys)
        return torch.sin(self.pace.to(dtype)[:, None, None] * (1 + i + 2 * j))


@dataclass(frozen=True)
class Recency(pse.Pse):
    """``-weight * log(1 + abs(i' - j))``, before the scale, and says that it is of distances."""

    weight: float = 1.5

    @property
    def before_scale(self) -> bool:
        return True

    @property
    def structure(self) -> pse.Toeplitz:
        return pse.Toeplitz("bottom_right")

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: object) -> Tensor:
        query = torch.arange(*at.rows)[:, None] + at.kv_len - at.q_len
        return -self.weight * torch.log1p((query - torch.arange(*at.keys)).abs().to(dtype))


@dataclass(frozen=True, eq=False)
class Steep(pse.Pse):
    """``-slope[h] * abs(i - j)``: ALiBi by another author."""

    slopes: Tensor = field(default_factory=lambda: nn.Parameter(numbers(HEADS)))

    @property
    def heads(self) -> int:
        return len(self.slopes)

    @property
    def structure(self) -> pse.Linear:
        return pse.Linear("top_left")

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: object) -> Tensor:
        distance = (torch.arange(*at.rows)[:, None] - torch.arange(*at.keys)).abs()
        return -self.slopes.to(dtype)[:, None, None] * distance


@dataclass(frozen=True, eq=False)
class NearOrFar(pse.Pse):
    """``table[0, h]`` where the key is at most two behind or ahead of it, else ``table[1, h]``."""

    table: Tensor = field(default_factory=lambda: nn.Parameter(numbers(2, HEADS)))

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    @property
    def structure(self) -> pse.Stepped:
        return pse.Stepped((-3, -2), (1, 0), "bottom_right")

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: object) -> Tensor:
        query = torch.arange(*at.rows)[:, None] + at.kv_len - at.q_len
        far = (torch.arange(*at.keys) - query < -2).long()
        return self.table.to(dtype)[far].movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class Loud(pse.Pse):
    """A number per key for each batch element: a bias per key by another author."""

    volume: Tensor = field(default_factory=lambda: nn.Parameter(numbers(BATCH, 1, KV)))

    @property
    def batch(self) -> int:
        return len(self.volume)

    @property
    def extent(self) -> tuple[None, int]:
        return None, self.volume.shape[-1]

    @property
    def structure(self) -> pse.PerKey:
        return pse.PerKey(per_head=False)

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: object) -> Tensor:
        return self.volume.to(dtype)[:, :, None, slice(*at.keys)]


# -- all of them -------------------------------------------------------------------------------


def distance(bias: pse.Pse, i: int, j: int, q_len: int, kv_len: int) -> int:
    """Return ``j - i'``."""
    return j - i - (kv_len - q_len if bias.align == "bottom_right" else 0)


def sloped(slopes: str, curve: Callable[[float], float], bias, b, h, i, j, *lengths) -> float:
    return -getattr(bias, slopes)[h] * curve(abs(distance(bias, i, j, *lengths)))


def bucketed(bias, b, h, i, j, *lengths) -> float:
    kinds = (bias.num_buckets, bias.max_distance, bias.bidirectional)
    at = torch.tensor(distance(bias, i, j, *lengths))
    return bias.table[pse.t5_bucket(at, *kinds), h]


def entry(bias, b, h, i, j, q_len, kv_len) -> float:
    return bias.tensor.expand(BATCH, HEADS, q_len, kv_len)[b, h, i, j]


def key_entry(bias, b, h, i, j, q_len, kv_len) -> float:
    return bias.tensor.expand(BATCH, HEADS, kv_len)[b, h, j]


def summed(bias, *cell) -> float:
    return FAMILIES["t5"].cell(bias.parts[0], *cell) + FAMILIES["alibi"].cell(bias.parts[1], *cell)


def cut_waves(bias, b, h, i, j, *lengths) -> float:
    return math.sin(bias.part.pace[h] * (1 + (i + 2) + 2 * (j + 1)))


def cut_slopes(bias, b, h, i, j, *lengths) -> float:
    return -bias.part.slopes[h] * abs((i + 2) - (j + 4))


def tables(*given: object, **named: object) -> Callable[[], pse.Pse]:
    """Return how to make a T5 bias with a table that trains."""

    def make() -> pse.Pse:
        table = nn.Parameter(numbers(8, HEADS))
        return pse.T5Relative(HEADS, 8, 12, *given, **named, table=table)

    return make


def places(*shape: int) -> Tensor:
    """Return entries of a table of seven, one of which nothing looks up."""
    return (torch.arange(math.prod(shape)) * 7919 % 997 % 6).view(shape)


def looked_up(p: pse.Table, b: int, h: int, i: int, j: int, q: int, kv: int) -> float:
    index = p.index if p.index.ndim == 3 else p.index[None]
    return p.table[index[b % len(index), i, j], h % p.table.shape[1]]


SLOPES = (0.5, -0.25)
ROOT = partial(sloped, "slopes", math.sqrt)
LINE, TRAINED = partial(sloped, "slopes", float), partial(sloped, "weight", float)

FAMILIES = {
    "alibi": Family(lambda: pse.ALiBi(HEADS), LINE, True),
    "alibi top left": Family(lambda: pse.ALiBi(SLOPES, align="top_left"), LINE, True),
    "sqrt alibi": Family(lambda: pse.SqrtALiBi(SLOPES), ROOT, True),
    "sqrt top left": Family(lambda: pse.SqrtALiBi(HEADS, align="top_left"), ROOT, True),
    "learnable": Family(lambda: pse.ALiBi(HEADS, learnable=True), TRAINED, True),
    "learnable top left": Family(
        lambda: pse.ALiBi(slopes=SLOPES, align="top_left", learnable=True), TRAINED, True
    ),
    "t5": Family(tables(), bucketed),
    "t5 top left": Family(tables(align="top_left"), bucketed),
    "t5 one way": Family(tables(bidirectional=False), bucketed),
    "t5 of zeros": Family(lambda: pse.T5Relative(HEADS, bidirectional=False), bucketed, True),
    "t5 by text": Family(lambda: pse.T5Relative(HEADS, 8, 20, align="top_left"), bucketed, True),
    "dense": Family(lambda: pse.Dense(numbers(Q, KV)), entry),
    "dense per head": Family(lambda: pse.Dense(nn.Parameter(numbers(HEADS, Q, KV))), entry),
    "dense of a batch": Family(lambda: pse.Dense(numbers(BATCH, 1, Q, KV), True), entry),
    "dense of both": Family(lambda: pse.Dense(numbers(BATCH, HEADS, Q, KV)), entry),
    "keys": Family(lambda: pse.KeyBias(numbers(KV)), key_entry),
    "keys per head": Family(lambda: pse.KeyBias(nn.Parameter(numbers(HEADS, KV))), key_entry),
    "keys of both": Family(lambda: pse.KeyBias(numbers(BATCH, HEADS, KV)), key_entry),
    "keys of a batch": Family(lambda: pse.KeyBias(numbers(BATCH, 1, KV)), key_entry),
    "table": Family(lambda: pse.Table(nn.Parameter(numbers(7, HEADS)), places(Q, KV)), looked_up),
    "table of one column": Family(lambda: pse.Table(numbers(7, 1), places(1, Q, KV)), looked_up),
    "table of a batch": Family(
        lambda: pse.Table(nn.Parameter(numbers(7, HEADS)), places(BATCH, Q, KV).int()), looked_up
    ),
    "sum": Family(lambda: tables()() + pse.ALiBi(HEADS), summed),
    "cut": Family(lambda: Waves().cut((2, 6), (1, 6), q_len=7, kv_len=9), cut_waves),
    "cut of slopes": Family(
        lambda: pse.ALiBi(SLOPES, align="top_left").cut((2, 6), (4, 9), q_len=7, kv_len=9),
        cut_slopes,
    ),
    "waves": Family(Waves, lambda p, b, h, i, j, q, kv: math.sin(p.pace[h] * (1 + i + 2 * j))),
    "recency": Family(
        Recency, lambda p, b, h, i, j, q, kv: -p.weight * math.log1p(abs(i + kv - q - j))
    ),
    "steep": Family(Steep, lambda p, b, h, i, j, q, kv: -p.slopes[h] * abs(i - j)),
    "near or far": Family(
        NearOrFar, lambda p, b, h, i, j, q, kv: p.table[int(j - i - kv + q < -2), h]
    ),
    "loud": Family(Loud, lambda p, b, h, i, j, q, kv: p.volume[b, 0, j]),
}


def lengths_of(bias: pse.Pse) -> list[tuple[int, int]]:
    """Return small lengths that a bias is for."""
    q_lens, kv_lens = (range(7) if own is None else [own] for own in bias.extent)
    return [(q_len, kv_len) for q_len in q_lens for kv_len in kv_lens]
