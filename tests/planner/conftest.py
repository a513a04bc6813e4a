"""Plans on meta tensors: nothing is computed, so any size will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import layouts


@pytest.fixture
def planned() -> Callable[..., ak.Plan]:
    """plan(mask, q_len, kv_len=q_len, ...) of the emulated backend, on meta tensors."""

    def make(
        mask: Any,
        q_len: int,
        kv_len: int | None = None,
        *,
        layout: str = "BSND",
        batch: int = 1,
        heads: int = 4,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        **rest: Any,
    ) -> ak.Plan:
        form = layouts.get(layout)

        def empty(length: int) -> torch.Tensor:
            rows = 1 if form.packed else batch
            shape = form.shape(layouts.Sizes(rows, length, heads, dim))
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = empty(q_len), empty(q_len if kv_len is None else kv_len)
        rest.setdefault("backend", "emulated")
        return ak.plan(q, k, k, mask=mask, layout=layout, num_heads=heads, **rest)

    return make
