"""Named compositions, small enough to run often: one for each thing that a plan may have to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.layouts import SeqLens, Sizes
from attnkit.masks import Mask
from attnkit.pse import Pse

__all__ = ["CASES", "Case", "by_name"]

Device = torch.device | str


@dataclass(frozen=True)
class Case:
    """A composition and the sizes it runs with. `bias` makes the bias on a device."""

    name: str
    mask: Mask = field(default_factory=masks.Full)
    bias: Callable[[Device, torch.dtype], Pse] | None = None
    layout: str = "BSND"
    batch: int = 2
    q_len: int = 24
    kv_len: int = 24
    heads: int = 4
    kv_heads: int = 4
    dim: int = 16
    value_dim: int = 16
    seqlens: SeqLens | None = None
    sink: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return query, key, value, the output's gradient, and the sink if there is one."""
        generator = torch.Generator().manual_seed(seed)
        layout, lens = layouts.get(self.layout), self.seqlens
        batch = self.batch if lens is None else 1
        q_len, kv_len = (self.q_len, self.kv_len) if lens is None else (lens.total_q, lens.total_kv)
        shapes = {
            "query": Sizes(batch, q_len, self.heads, self.dim),
            "key": Sizes(batch, kv_len, self.kv_heads, self.dim),
            "value": Sizes(batch, kv_len, self.kv_heads, self.value_dim),
            "grad": Sizes(batch, q_len, self.heads, self.value_dim),
        }
        found = {
            name: torch.randn(layout.shape(sizes), generator=generator, dtype=torch.float64)
            for name, sizes in shapes.items()
        }
        if self.sink:
            found["sink"] = torch.randn(self.heads, generator=generator, dtype=torch.float64)
        return {name: tensor.to(dtype) for name, tensor in found.items()}

    def arguments(self, device: Device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of `attnkit.attention` beside the tensors."""
        return {
            "mask": self.mask,
            "pse": None if self.bias is None else self.bias(device, dtype),
            "layout": self.layout,
            "seqlens": self.seqlens,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "scale": self.scale,
        }

    def plan(self, backend: str, dtype: torch.dtype = torch.float32) -> ak.Plan:
        """Return the plan for tensors that need a gradient."""
        given = self.tensors(dtype)
        inputs = [given[name].requires_grad_() for name in ("query", "key", "value")]
        arguments = self.arguments("cpu", dtype)
        return ak.plan(*inputs, **arguments, sink=given.get("sink"), backend=backend)


def _matrix(*shape: int, before_scale: bool = False) -> Callable[[Device, torch.dtype], Pse]:
    def make(device: Device, dtype: torch.dtype) -> Pse:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return pse.Dense(values.to(dtype).to(device), before_scale=before_scale)

    return make


def _trained(make: Callable[[Device, torch.dtype], Pse]) -> Callable[[Device, torch.dtype], Pse]:
    """The same bias, whose numbers ask for a gradient."""

    def trained(device: Device, dtype: torch.dtype) -> Pse:
        bias = make(device, dtype)
        for tensor in bias.tensors:
            tensor.requires_grad_(tensor.is_floating_point())
        return bias

    return trained


def _table(device: Device, dtype: torch.dtype) -> Pse:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    index = torch.randint(9, (24, 24), generator=generator)
    return pse.Table(values.to(dtype).to(device), index.to(device))


def _fixed(bias: Pse) -> Callable[[Device, torch.dtype], Pse]:
    return lambda device, dtype: bias


def _checkers(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i + j) % 3 != 1


_CAUSAL = masks.Causal()
_DOCUMENTS = masks.Documents([7, 11, 6])
_UNEVEN = SeqLens([5, 0, 12, 7], [5, 3, 12, 9])
_EVEN = SeqLens([9, 4, 11])

CASES = (
    Case("full"),
    Case("causal", _CAUSAL),
    Case("causal, a chunk of queries", _CAUSAL, q_len=8, kv_len=40),
    Case("causal, one query", _CAUSAL, q_len=1, kv_len=40),
    Case("causal, more queries than keys", _CAUSAL, q_len=40, kv_len=24),
    Case("causal from the top left", masks.Causal(align="top_left"), q_len=16, kv_len=40),
    Case("sliding window", _CAUSAL & masks.SlidingWindow(5)),
    Case("sliding window, a chunk", _CAUSAL & masks.SlidingWindow(5), q_len=8, kv_len=40),
    Case("band", masks.Band(3, 4)),
    Case("window and first keys", _CAUSAL & (masks.SlidingWindow(5) | masks.Prefix(2))),
    Case(
        "wide window and first keys",
        _CAUSAL & (masks.SlidingWindow(75) | masks.Prefix(4)),
        q_len=300,
        kv_len=300,
        batch=1,
        kv_heads=2,
    ),
    Case("prefix", masks.PrefixLM(6)),
    Case("prefix per batch element", masks.PrefixLM((6, 11))),
    Case("chunked causal", _CAUSAL & masks.Chunked(8)),
    Case("block causal", masks.BlockCausal(6)),
    Case("documents", _DOCUMENTS),
    Case("causal documents", _DOCUMENTS & _CAUSAL),
    Case("causal documents, BNSD", _DOCUMENTS & _CAUSAL, layout="BNSD"),
    Case("documents per batch element", masks.Documents([[7, 17], [12, 12]]) & _CAUSAL),
    Case("padding", masks.Padding((24, 13))),
    Case("padding on the left, causal", masks.Padding((24, 13), side="left") & _CAUSAL),
    Case("empty rows", masks.Rows(3, 9)),
    Case("keys from several places", masks.SameId([(0, 5), (1, 6), (0, 7), (1, 6)])),
    Case(
        "keys from several places, grouped heads, rows without a key",
        masks.SameId([(0, 5), (1, 6), (None, 3), (0, 5), (1, 5)]) & _CAUSAL,
        batch=1,
        kv_heads=2,
    ),
    Case(
        "blocks of a table, per batch element",
        masks.SameId([[(0, 8), (1, 8), (0, 8)], [(0, 4), (1, 16), (0, 4)]]),
        kv_heads=1,
    ),
    Case("keys from several places, sink", masks.BlockCausal(4) - masks.Keys([(8, 12)]), sink=True),
    Case("blocks of a table, causal", masks.Blocks("#... ##.. #.#. ##.#", 6, 6, causal=True)),
    Case("a neighborhood", masks.Neighborhood((4, 6), 3), kv_heads=2),
    Case("tiles of a grid", masks.SlidingTiles((4, 6), 2, (1, 3)), kv_heads=2),
    Case("a tree over a cache", masks.Tree([-1, 0, 0, 1, 1, 2, 2, 5]), q_len=8, kv_len=40),
    Case(
        "wide window that slides around its sink",
        _CAUSAL & (masks.SlidingWindow(60) | masks.Prefix(4)) - masks.Rows(70, 73),
        q_len=201,
        kv_len=201,
        batch=1,
        kv_heads=2,
    ),
    Case("dilated", masks.Dilated(2) & _CAUSAL),
    Case("predicate", masks.Predicate(_checkers)),
    Case("dense mask", masks.Dense.keep(torch.ones(24, 24).tril(4).triu(-9).bool())),
    Case("a mask per head", masks.PerHead([_CAUSAL, masks.Full(), masks.Band(2, 2), _CAUSAL])),
    Case("ALiBi", _CAUSAL, _fixed(pse.ALiBi(4))),
    Case("ALiBi, a chunk", _CAUSAL, _fixed(pse.ALiBi(4)), q_len=8, kv_len=40),
    Case("square-root ALiBi", _CAUSAL, _fixed(pse.SqrtALiBi(4))),
    Case("ALiBi in a window", masks.SlidingWindow(5) & _CAUSAL, _fixed(pse.ALiBi(4))),
    Case("bias matrix", _CAUSAL, _matrix(4, 24, 24)),
    Case("bias matrix before the scale", _CAUSAL, _matrix(4, 24, 24, before_scale=True)),
    Case("bias matrix per batch element", masks.Full(), _matrix(2, 4, 24, 24)),
    Case("two biases", _CAUSAL, lambda d, t: pse.ALiBi(4) + _matrix(4, 24, 24)(d, t)),
    Case("bias matrix that trains", _CAUSAL, _trained(_matrix(4, 24, 24))),
    Case("bias matrix that trains, BSH", _CAUSAL, _trained(_matrix(2, 1, 24, 24)), layout="BSH"),
    Case("table that trains", masks.Full(), _trained(_table), kv_heads=2),
    Case(
        "bias matrix that trains, wide window and first keys",
        _CAUSAL & (masks.SlidingWindow(75) | masks.Prefix(4)),
        _trained(_matrix(4, 300, 300)),
        q_len=300,
        kv_len=300,
        batch=1,
    ),
    Case("sink", _CAUSAL, sink=True),
    Case("sink in a window", _CAUSAL & masks.SlidingWindow(5), sink=True),
    Case("sink, packed", _CAUSAL, layout="TND", seqlens=_EVEN, sink=True),
    Case("grouped heads", _CAUSAL, kv_heads=2),
    Case("one key head", _CAUSAL, kv_heads=1),
    Case("smaller values", _CAUSAL, value_dim=8),
    Case("wider values", _CAUSAL, value_dim=24, kv_heads=2),
    Case("scale", _CAUSAL, scale=0.37),
    Case("BSH", _CAUSAL, layout="BSH", kv_heads=2),
    Case("SBH", _CAUSAL, layout="SBH", kv_heads=2),
    Case("BNSD", _CAUSAL, layout="BNSD", kv_heads=2),
    Case("packed", masks.Full(), layout="TND", seqlens=_EVEN),
    Case("packed causal", _CAUSAL, layout="TND", seqlens=_EVEN, kv_heads=2),
    Case("packed causal, empty sequences", _CAUSAL, layout="TND", seqlens=_UNEVEN),
    Case(
        "packed, a sequence without keys",
        masks.Full(),
        layout="TND",
        seqlens=SeqLens([3, 4], [0, 9]),
    ),
    Case("packed window", _CAUSAL & masks.SlidingWindow(3), layout="TND", seqlens=_UNEVEN),
    Case("packed prefix", masks.PrefixLM(3), layout="TND", seqlens=_EVEN),
    Case("packed ALiBi", _CAUSAL, _fixed(pse.ALiBi(4)), layout="TND", seqlens=_EVEN),
)
"""Every composition of the suite, by what sets it apart."""


def by_name(name: str) -> Case:
    """Return the case of a name."""
    return next(case for case in CASES if case.name == name)
