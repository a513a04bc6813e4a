"""``npu_block_sparse_attention`` and its ``_backward``: the ops in einops, and calling them.

`EMULATED` answers like ``torch.ops.npu`` on any device, float64 included. What the op leaves open,
a row without a block, is NaN here, so that a wrong plan fails in a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from attnkit.constants import constant
from attnkit.geometry import Region
from attnkit.kernel.block_sparse import OP, BlockSparseCall
from attnkit.kernel.emulator import Gradients
from attnkit.kernel.stats import COPIES

__all__ = [
    "BACKWARD",
    "EMULATED",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "lacks_block_sparse",
    "launch_blocks",
    "launch_blocks_grad",
]

BACKWARD = f"{OP}_backward"

Lengths = Sequence[int] | None
Matrix = tuple[Tensor, ...]


# -- the ops, emulated -------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _matrices(
    table: Tensor,
    shape: Sequence[int],
    lengths: tuple[Lengths, Lengths],
    *sides: tuple[int, Tensor],
) -> Iterator[tuple[Tensor, Matrix]]:
    """Yield what is allowed [n s t] of each sequence, and views [n s d] of tensors of a side."""
    batch = table.shape[0]
    packed = sides[0][1].dim() == 3
    starts = [0, 0]
    for b in range(batch):
        views, sizes = [], []
        for side, tensor in sides:
            some = lengths[side]
            count = tensor.shape[2] if some is None else some[b]
            at = slice(starts[side], starts[side] + count)
            views.append(tensor[at].transpose(0, 1) if packed else tensor[b, :, :count])
            sizes.append((side, count))
        extents = dict(sizes)
        cells = repeat(table[b] != 0, "n i j -> n (i x) (j y)", x=shape[0], y=shape[1])
        yield cells[:, : extents[0], : extents[1]], tuple(views)
        if packed:
            starts = [starts[0] + extents[0], starts[1] + extents[1]]


def _scores(query: Tensor, key: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = query.shape[0] // key.shape[0]
    keys = repeat(_wide(key), "m t d -> (m g) t d", g=group)
    scores = scale * einsum(_wide(query), keys, "n s d, n t d -> n s t")
    return scores.masked_fill(~allowed, -torch.inf)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor,
    block_shape: Sequence[int],
    *,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    num_key_value_heads: int = 1,
    scale_value: float = 0.0,
    inner_precise: int = 1,
    actual_seq_lengths: Lengths = None,
    actual_seq_lengths_kv: Lengths = None,
    softmax_lse_flag: int | None = 0,
) -> tuple[Tensor, Tensor]:
    """Attend in blocks: output in the query's form, log-sum-exp ``b n s 1`` or ``t n 1``."""
    out, lse = torch.full_like(query, torch.nan), _wide(query[..., :1]).clone()
    sides = ((0, query), (1, key), (1, value), (0, out), (0, lse))
    lengths = (actual_seq_lengths, actual_seq_lengths_kv)
    for allowed, (q, k, v, to_out, to_lse) in _matrices(
        block_sparse_mask, block_shape, lengths, *sides
    ):
        scores = _scores(q, k, allowed, scale_value)
        values = repeat(_wide(v), "m t d -> (m g) t d", g=q.shape[0] // v.shape[0])
        total = scores.logsumexp(-1, keepdim=True)
        to_lse.copy_(total.masked_fill(total == -torch.inf, torch.nan))
        to_out.copy_(einsum(scores.softmax(-1), values, "n s t, n t d -> n s d"))
    return out, lse


def block_sparse_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_lse: Tensor,
    block_sparse_mask: Tensor,
    block_shape: Sequence[int],
    actual_seq_lengths: Lengths,
    actual_seq_lengths_kv: Lengths,
    q_input_layout: str,
    kv_input_layout: str,
    num_key_value_heads: int,
    scale_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from a log-sum-exp and output as given."""
    made = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
    given = (d_out, query, attention_out, softmax_lse, made[0])
    sides = (*((0, t) for t in given), *((1, t) for t in (key, value, *made[1:])))
    lengths = (actual_seq_lengths, actual_seq_lengths_kv)
    for allowed, (dy, q, out, lse, dq, k, v, dk, dv) in _matrices(
        block_sparse_mask, block_shape, lengths, *sides
    ):
        group = q.shape[0] // k.shape[0]
        keys, values = (repeat(_wide(t), "m t d -> (m g) t d", g=group) for t in (k, v))
        weights = (_scores(q, k, allowed, scale_value) - lse).exp()
        dy = _wide(dy)
        delta = (dy * _wide(out)).sum(-1, keepdim=True)
        slope = weights * (einsum(dy, values, "n s d, n t d -> n s t") - delta) * scale_value
        dq.copy_(einsum(slope, keys, "n s t, n t d -> n s d"))
        to_key = einsum(slope, _wide(q), "n s t, n s d -> n t d")
        to_value = einsum(weights, dy, "n s t, n s d -> n t d")
        dk.copy_(rearrange(to_key, "(m g) t d -> m g t d", g=group).sum(1))
        dv.copy_(rearrange(to_value, "(m g) t d -> m g t d", g=group).sum(1))
    return made[0], made[1], made[2]


EMULATED = SimpleNamespace(
    **{OP: block_sparse_attention, BACKWARD: block_sparse_attention_backward}
)
"""In the place of ``torch.ops.npu``."""


# -- calling them ------------------------------------------------------------------------------


def lacks_block_sparse(ops: Any, training: bool) -> str | None:
    """Return what installed ops lack for calls like these; None if nothing.

    >>> lacks_block_sparse(EMULATED, training=True) is None
    True
    """
    given = {OP: {"block_sparse_mask", "softmax_lse_flag"}, BACKWARD: {"softmax_lse"}}
    for name in (OP, BACKWARD)[: 1 + training]:
        op = getattr(ops, name, None)
        if op is None:
            return f"the installed torch_npu has no {name}; release 26.0.0 has, with CANN 9.0"
        schema = getattr(getattr(op, "default", None), "_schema", None)
        known = given[name] if schema is None else {one.name for one in schema.arguments}
        if not given[name] <= known:
            return f"the installed {name} has no argument {', '.join(sorted(given[name] - known))}"
    return None


@constant
def _table(
    tables: tuple[Region, ...],
    heads: int,
    stacked: int,
    grid: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Return the bits that the op reads, ``b m (g i) j`` of int8."""
    bits = torch.zeros(len(tables), 1, *grid, dtype=torch.int8)
    for one, table in zip(bits, tables, strict=True):
        for i in range(grid[0]):
            for a, b in table.row(i):
                one[0, i, a:b] = 1
    return bits.repeat(1, heads // stacked, stacked, 1).to(device)


def _handed(call: BlockSparseCall, rows: Tensor, stacked: int = 1) -> Tensor:
    """Return a tensor of a call as the op takes it: packed as it is, or heads before rows."""
    if call.is_packed:
        return rows.contiguous()
    return rearrange(rows, "b s (m g) d -> b m (g s) d", g=stacked).contiguous()


def _back(call: BlockSparseCall, rows: Tensor, stacked: int = 1) -> Tensor:
    """Return what the op answers in the form of the call."""
    if call.is_packed:
        return rows
    return rearrange(rows, "b m (g s) d -> b s (m g) d", g=stacked).contiguous()


def _tensors(call: BlockSparseCall, given: Mapping[str, Any]) -> dict[str, Any]:
    stacked, query = call.stacked, given["query"]
    table = _table(call.tables, call.num_heads, stacked, call.grid, query.device)
    sides = {name: _handed(call, given[name]) for name in ("key", "value")}
    return {"query": _handed(call, query, stacked), **sides, "block_sparse_mask": table}


def launch_blocks(
    call: BlockSparseCall, tensors: Mapping[str, Any], ops: Any
) -> tuple[Tensor, Tensor]:
    """Make a call; returns output and log-sum-exp in the form of the fused op's."""
    out, lse = getattr(ops, OP)(**_tensors(call, tensors), **call.arguments())
    if not call.is_packed:
        lse = rearrange(lse, "b m (g s) c -> b (m g) s c", g=call.stacked)
    return _back(call, out, call.stacked), lse.expand(*lse.shape[:-1], COPIES)


def launch_blocks_grad(
    call: BlockSparseCall,
    tensors: Mapping[str, Any],
    dy: Tensor,
    out: Tensor,
    lse: Tensor,
    ops: Any,
) -> Gradients:
    """Make a grad call, of an output and a log-sum-exp in that form, of any softmax around it."""
    stacked, lse = call.stacked, lse[..., :1]
    if not call.is_packed:
        lse = rearrange(lse, "b (m g) s c -> b m (g s) c", g=stacked)
    more = {"d_out": dy, "attention_out": out}
    given = {name: _handed(call, tensor, stacked) for name, tensor in more.items()}
    given |= {"softmax_lse": lse.contiguous(), **_tensors(call, tensors)}
    query, key, value = getattr(ops, BACKWARD)(**given, **call.arguments(backward=True))
    sides = (_back(call, key), _back(call, value))
    return Gradients(_back(call, query, stacked), *sides, None, None)
