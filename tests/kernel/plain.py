"""Independent references: cell-by-cell sets and the whole-matrix formula in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange

from attnkit.geometry import Region
from attnkit.kernel import AttenMask, KernelCall, TensorSpec

FLT_MAX = 3.4028234663852886e38
DENSE = {"BSH": "b s (n d)", "SBH": "s b (n d)", "BSND": "b s n d", "BNSD": "b n s d"}
LAYOUTS = (*DENSE, "TND")


def cells(
    mode: int, sq: int, skv: int, pre: int, nxt: int, prefix: int = 0, cut: bool = False
) -> torch.Tensor:
    """The closed form of each mode, one cell at a time; True = takes part."""
    shift = skv - sq

    def takes_part(i: int, j: int) -> bool:
        match mode:
            case 0:
                return i - pre <= j <= i + nxt
            case 1:
                return True
            case 2:
                return j <= i
            case 3:
                return j <= i + shift
            case 4:
                return i + shift - pre <= j <= i + shift + nxt
            case 5 | 6:
                return j <= i + shift or j < prefix
            case 7:
                return j <= i + shift + nxt if cut else j <= i + shift
            case 8:
                return j <= i + shift + nxt if cut else j <= i
        raise ValueError(mode)

    rows = [[takes_part(i, j) for j in range(skv)] for i in range(sq)]
    return torch.tensor(rows, dtype=torch.bool).view(sq, skv)


def region_cells(region: Region, sq: int, skv: int) -> torch.Tensor:
    out = torch.zeros(sq, skv, dtype=torch.bool)
    for i, j in ((i, j) for i in range(sq) for j in range(skv)):
        out[i, j] = (i, j) in region
    return out


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    bias_first: bool = False,
    keep: torch.Tensor | None = None,
    keep_prob: float = 1.0,
    sink: torch.Tensor | None = None,
    zero_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over whole [b, n, s, d] matrices, with repeated keys and autograd."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = torch.einsum("bnid,bnjd->bnij", query, key)
    if bias is not None and bias_first:
        scores = (scores + bias) * scale
    else:
        scores = scores * scale + (0 if bias is None else bias)
    if allowed is not None:
        scores = torch.where(allowed, scores, -FLT_MAX)
    peak = scores.detach().amax(-1)
    if sink is not None:
        peak = torch.maximum(peak, sink.detach()[None, :, None])
    weights = (scores - peak[..., None]).exp()
    total = weights.sum(-1)
    if sink is not None:
        total = total + (sink[None, :, None] - peak).exp()
    if keep is not None:
        weights = weights * keep / keep_prob
    out = torch.einsum("bnij,bnjd->bnid", weights, value) / total[..., None]
    if zero_rows:
        out = torch.where((peak == -FLT_MAX)[..., None], 0.0, out)
    return out, peak, total


def to_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return rearrange(tensor, f"b n s d -> {DENSE[layout]}")


def from_layout(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    return rearrange(tensor, f"{DENSE[layout]} -> b n s d", n=heads)


def cumulative(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(sum(lengths[: n + 1])) for n in range(len(lengths)))


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, n, s, d] tensors of single sequences to one [t, n, d]."""
    return torch.cat([rearrange(t, "1 n s d -> s n d") for t in tensors])


def call_for(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    layout: str,
    **arguments: object,
) -> KernelCall:
    specs = (TensorSpec.of(t) for t in (query, key, value))
    return KernelCall(*specs, head_num=heads, input_layout=layout, **arguments)  # type: ignore[arg-type]


def mask_for(mode: int) -> AttenMask:
    return AttenMask.prefix() if mode == 6 else AttenMask.causal()
