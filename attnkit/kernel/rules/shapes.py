"""Rules about layouts, ranks, heads, dtypes, lengths: what the tensors look like."""

from __future__ import annotations

from itertools import pairwise

import torch

from attnkit import layouts
from attnkit.errors import shown
from attnkit.kernel.arguments import mistyped
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import Found, Target, rule
from attnkit.kernel.sizes import LAYOUTS, TensorSpec
from attnkit.layouts.names import meant

__all__ = ["argument_type"]

_MILLION = 1_000_000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _named(call: KernelCall) -> dict[str, TensorSpec]:
    return {"query": call.query, "key": call.key, "value": call.value}


@rule(
    layer="torch",
    remedy="Convert the argument; lengths and indices are host integers, not tensors.",
    type_error=True,
    structural=True,
)
def argument_type(call: KernelCall, on: Target) -> Found:
    """Numbers are int (64 bits) or float, lists hold such ints, switches are bool, layouts str."""
    wrong = mistyped(call)
    if wrong:
        yield ", ".join(f"{n}={shown(getattr(call, n))}" for n in wrong)


@rule(
    layer="torch",
    remedy="Use one of them; BNSD is [batch, heads, tokens, head size].",
    structural=True,
)
def layout_unknown(call: KernelCall, on: Target) -> Found:
    """The input_layout is one of BSH, SBH, BSND, BNSD, TND."""
    if call.layout not in LAYOUTS:
        other = meant(call.layout)
        hint = f", which is {other.name} here" if other and other.name in LAYOUTS else ""
        yield f"input_layout={shown(call.input_layout)}{hint}"


@rule(layer="torch", remedy="Reshape the tensors, or name the layout they are in.", structural=True)
def rank(call: KernelCall, on: Target) -> Found:
    """Query, key and value have the rank of the layout: 3 for BSH, SBH, TND, 4 for BSND, BNSD."""
    if layout_unknown.broken(call, on):
        return
    axes = layouts.get(call.layout).rank
    wrong = [f"{n} {s}" for n, s in _named(call).items() if len(s.shape) != axes]
    if wrong:
        yield f"{', '.join(wrong)} in layout {call.layout}, which has rank {axes}"


@rule(layer="torch", remedy="Pass the number of query heads.", structural=True)
def head_num(call: KernelCall, on: Target) -> Found:
    """The head_num is positive, divides H (BSH, SBH) and equals the query's head axis elsewhere."""
    if layout_unknown.broken(call, on) or rank.broken(call, on):
        return
    extents = layouts.get(call.layout).extents(call.query.shape)
    if call.head_num <= 0:
        yield f"head_num={call.head_num}"
    elif "n d" in extents and extents["n d"] % call.head_num:
        yield f"head_num={call.head_num} with H={extents['n d']}"
    elif extents.get("n", call.head_num) != call.head_num:
        yield f"head_num={call.head_num} with a query of {extents['n']} heads"


@rule(
    layer="tiling",
    remedy="Query head h reads key head h // (heads / kv_heads); repeat or drop key heads.",
    structural=True,
)
def kv_heads(call: KernelCall, on: Target) -> Found:
    """The query heads are a multiple of the key and value heads."""
    if any(earlier.broken(call, on) for earlier in (layout_unknown, rank, head_num)):
        return
    merged = layouts.get(call.layout).merges_heads
    dim, width = call.head_dim, call.key.shape[-1]
    if merged and (dim == 0 or width % dim):
        yield f"key H={width} with a head size of {dim}"
    elif call.num_kv_heads == 0 or call.num_heads % call.num_kv_heads:
        yield f"{call.num_heads} query heads over {call.num_kv_heads} key heads"
    elif merged and call.value.shape[-1] % call.num_kv_heads:
        yield f"value H={call.value.shape[-1]} over {call.num_kv_heads} key heads"


@rule(
    layer="torch",
    remedy="Pass the cumulative lengths without a leading 0, one entry per sequence in each.",
    structural=True,
)
def varlen_lists(call: KernelCall, on: Target) -> Found:
    """Layout TND needs actual_seq_qlen and actual_seq_kvlen, of the same length, not empty."""
    if not call.is_packed:
        return
    q_lens, kv_lens = call.actual_seq_qlen, call.actual_seq_kvlen
    if not q_lens or not kv_lens:
        yield f"actual_seq_qlen={shown(q_lens)}, actual_seq_kvlen={shown(kv_lens)}"
    elif len(q_lens) != len(kv_lens):
        yield f"{len(q_lens)} query lengths and {len(kv_lens)} key lengths"


@rule(layer="documented", remedy="Leave them out, or pack the sequences into layout TND.")
def varlen_dense(call: KernelCall, on: Target) -> Found:
    """The lists actual_seq_qlen and actual_seq_kvlen belong to layout TND."""
    given = call.actual_seq_qlen is not None or call.actual_seq_kvlen is not None
    if given and not call.is_packed:
        yield f"actual_seq lists in layout {call.layout}"


@rule(layer="aclnn", remedy="Cast them to the same dtype.", type_error=True)
def dtype_mixed(call: KernelCall, on: Target) -> Found:
    """Query, key and value have one dtype."""
    if len({spec.dtype for spec in _named(call).values()}) > 1:
        yield ", ".join(f"{name} {spec}" for name, spec in _named(call).items())


@rule(layer="aclnn", remedy="Cast query, key and value.", type_error=True)
def dtype(call: KernelCall, on: Target) -> Found:
    """The kernel computes float16, bfloat16 and float32 (float64 only off the device)."""
    allowed = (*_DTYPES, torch.float64) if on.product == "emulator" else _DTYPES
    if call.dtype not in allowed:
        yield f"query {call.query}"


@rule(layer="tiling", remedy="Expand or cut the batch axes to match.")
def batch_mismatch(call: KernelCall, on: Target) -> Found:
    """Query, key and value have the same batch."""
    sizes = tuple(size.batch for size in call.sizes)
    if len(set(sizes)) > 1:
        yield f"batches of query, key, value: {sizes}"


@rule(layer="tiling", remedy="Pass as many values as keys.")
def key_value_shape(call: KernelCall, on: Target) -> Found:
    """Key and value have the same shape except for the head size."""
    _, key, value = call.sizes
    if (key.length, key.heads) != (value.length, value.heads):
        yield f"key {call.key} and value {call.value}"


@rule(layer="aclnn", remedy="Project both to one head size.")
def head_dim_equal(call: KernelCall, on: Target) -> Found:
    """Query and key heads have the same size."""
    query, key, _ = call.sizes
    if query.dim != key.dim:
        yield f"query heads of {query.dim} and key heads of {key.dim}"


@rule(
    layer="aclnn",
    remedy="Pad query and key heads with zeros up to the value's size; scores do not change.",
)
def value_dim(call: KernelCall, on: Target) -> Found:
    """Value heads are not larger than query heads."""
    if call.value_dim > call.head_dim:
        yield f"value heads of {call.value_dim} beside query heads of {call.head_dim}"


@rule(layer="aclnn", remedy="Use more, smaller heads.")
def head_dim_limit(call: KernelCall, on: Target) -> Found:
    """Heads have 1 to 768 elements."""
    if not (0 < call.head_dim <= 768 and 0 < call.value_dim <= 768):
        yield f"heads of {call.head_dim} and {call.value_dim}"


@rule(layer="documented", remedy="Split the heads over several calls.")
def heads_limit(call: KernelCall, on: Target) -> Found:
    """There are 1 to 256 query heads."""
    if call.num_heads > 256:
        yield f"{call.num_heads} heads"


@rule(
    layer="documented",
    remedy="Split the batch, leave an empty one out; merge the padding at the end into one "
    "sequence.",
)
def batch_limit(call: KernelCall, on: Target) -> Found:
    """A dense call has 1 to 2M batch elements, a packed one 1 to 2048 sequences.

    Longer lists may end the process.
    """
    limit = 2048 if call.is_packed else 2 * _MILLION
    if not 0 < call.batch <= limit:
        what = "sequences" if call.is_packed else "batch elements"
        yield f"{call.batch} {what}, the limit is {limit}"


@rule(layer="documented", remedy="Split the sequence and merge the parts by their statistics.")
def length_limit(call: KernelCall, on: Target) -> Found:
    """There are at most 1,000,000 tokens (the binding checks cumulative entries only)."""
    longest = max(size.length for size in call.sizes[:2])
    if longest > _MILLION:
        yield f"{longest} tokens"


@rule(layer="tiling", remedy="Check that the lists are cumulative and belong to these tensors.")
def varlen_total(call: KernelCall, on: Target) -> Found:
    """Packed lengths sum to at most the number of tokens in the tensors."""
    used, have = call.total_lengths, [size.length for size in call.sizes[:2]]
    if call.is_packed and (used[0] > have[0] or used[1] > have[1]):
        yield f"lengths sum to {used[0]} queries and {used[1]} keys; the tensors hold {have}"


@rule(
    layer="silent",
    source="tiling",
    remedy="Append 0 to both lists, which makes those rows zero, or cut the tensors.",
)
def varlen_tail(call: KernelCall, on: Target) -> Found:
    """Query rows beyond the last sequence stay uninitialised unless both lists end in 0.

    With keys beyond it, too, they are rejected from CANN 9.0 on.
    """
    used = call.total_lengths
    spare_q, spare_kv = (size.length - n for size, n in zip(call.sizes, used, strict=False))
    lists = (call.actual_seq_qlen or (), call.actual_seq_kvlen or ())
    q_ends, kv_ends = (given and given[-1] == 0 for given in lists)
    if call.is_packed and spare_q > 0 and not (q_ends and (kv_ends or spare_kv <= 0)):
        yield f"{spare_q} query rows and {spare_kv} keys lie beyond the last sequence"


@rule(layer="silent", source="tiling", remedy="Pass running totals, not the lengths themselves.")
def varlen_decreasing(call: KernelCall, on: Target) -> Found:
    """Cumulative lengths start at 0 or more and never decrease (but for zeros at the end).

    The kernel takes a sequence whose length would be negative to be empty.
    """
    for name in ("actual_seq_qlen", "actual_seq_kvlen") if call.is_packed else ():
        given = getattr(call, name)
        zeros = next((n for n, total in enumerate(given[::-1]) if total), len(given))
        if any(now < last for last, now in pairwise((0, *given[: len(given) - zeros]))):
            yield f"{name}={shown(given)} decreases"
