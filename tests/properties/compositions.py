"""Compositions as data: what the property tests and the sweeps run on two backends.

A `Case` is a composition with its sizes; `run` returns what a backend makes of it, by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnkit as ak
from attnkit import layouts
from attnkit.masks import Mask
from attnkit.pse import Pse
from tests.agreement import Results, results


@dataclass(frozen=True)
class Case:
    """Shapes and composition; `seqlens` makes it a packed one."""

    mask: Mask
    layout: str
    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int = 1
    dim: int = 2
    value_dim: int = 2
    pse: Pse | None = None
    sink: bool = False
    scale: float | None = None
    seqlens: ak.SeqLens | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
        """Query, key, value and sink logits: the same numbers in every dtype, rounded to it."""
        generator = torch.Generator().manual_seed(seed)
        form = layouts.get(self.layout)

        def make(length: int, heads: int, dim: int) -> Tensor:
            batch = 1 if form.packed else self.batch
            sizes = layouts.Sizes(batch, length, heads, dim)
            return torch.randn(form.shape(sizes), dtype=torch.float64, generator=generator)

        made = [
            make(self.q_len, self.heads, self.dim),
            make(self.kv_len, self.kv_heads, self.dim),
            make(self.kv_len, self.kv_heads, self.value_dim),
        ]
        # A sink is float32 beside half precision, as the kernel has it.
        wide = dtype if dtype == torch.float64 else torch.float32
        logits = torch.randn(self.heads, dtype=torch.float64, generator=generator)
        made = [t.to(dtype) for t in made]
        return (*made, logits.to(wide)) if self.sink else tuple(made)

    def arguments(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """What `attention` takes beside query, key and value."""
        return {
            "sink": tensors[3] if self.sink else None,
            "mask": self.mask,
            "pse": self.pse,
            "layout": self.layout,
            "seqlens": self.seqlens,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "scale": self.scale,
        }

    def run(self, backend: str, tensors: tuple[Tensor, ...]) -> Results:
        """Output, statistics and gradients."""
        return results(backend, tensors[:3], **self.arguments(tensors))

    def plan(self, backend: str, dtype: torch.dtype = torch.float64) -> ak.Plan:
        """The plan of `run`."""
        tensors = self.tensors(dtype)
        leaves = (t.requires_grad_() for t in tensors[:3])
        return ak.plan(*leaves, **self.arguments(tensors), backend=backend)

    def try_plan(
        self, backend: str, dtype: torch.dtype = torch.float64
    ) -> tuple[ak.Plan | None, tuple[ak.Refusal, ...]]:
        """The plan, or why there is none."""
        try:
            return self.plan(backend, dtype), ()
        except ak.BackendRefused as refused:
            return None, refused.refusals
