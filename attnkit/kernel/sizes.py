"""What a kernel call says of its tensors: shapes, dtypes, and the extents read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from attnkit import layouts
from attnkit.arguments import check_tensor
from attnkit.errors import KernelContractError, contract
from attnkit.layouts import Sizes

__all__ = ["LAYOUTS", "UNBOUNDED", "TensorSpec", "paired_steps", "read_sizes"]

UNBOUNDED = 2147483647
"""The default of pre_tokens and next_tokens: no bound."""

LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
"""The input layouts of the kernel; `attnkit.layouts` holds their patterns."""


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of a tensor, without the tensor.

    >>> print(TensorSpec((2, 16, 64), torch.bfloat16))
    bfloat16[2, 16, 64]
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "TensorSpec.of: tensor") -> TensorSpec:
        """Describe a dense tensor; messages call it by the name."""
        with contract("argument-type"):
            check_tensor(name, tensor)
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def read_sizes(layout: str, spec: TensorSpec, *, heads: int = 0, dim: int = 0) -> Sizes:
    """Read extents off a shape. Where heads are merged, their number or their size is known.

    Empty axes, and heads that do not divide, are for the rules to tell.
    """
    if layout not in LAYOUTS:
        words = f"input_layout={layout!r} is not one of {', '.join(LAYOUTS)}"
        raise KernelContractError(words, ["layout-unknown"])
    with contract("rank"):
        found = layouts.get(layout).extents(spec.shape)
    if "n d" in found:
        heads = heads or (found["n d"] // dim if dim else 0)
        found["n"], found["d"] = heads, found["n d"] // heads if heads else 0
    length = found["t"] if "t" in found else found["s"]
    return Sizes(found.get("b", 1), length, found["n"], found["d"])


def paired_steps(q: Sequence[int], kv: Sequence[int]) -> list[tuple[int, int]]:
    """Return the steps of two cumulative lists without leading 0; they may be negative.

    >>> paired_steps([3, 5, 5, 0], [4, 5, 6, 6])
    [(3, 4), (2, 1), (0, 1), (-5, 0)]
    """
    points = zip((0, *q), (0, *kv), strict=False)
    return [(q1 - q0, kv1 - kv0) for (q0, kv0), (q1, kv1) in pairwise(points)]
