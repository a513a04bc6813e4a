"""Rules about layouts, ranks, heads, dtypes, lengths: what the tensors look like.

Sources: op-plugin's checks before dispatch, the aclnn parameter checks and the general tiling
of CANN flash_attention_score, and the limits of the operator's reference pages.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from attnkit.errors import shown
from attnkit.kernel.arguments import BOOLS, FLOATS, INTEGERS, LISTS, TEXTS, fits_int64
from attnkit.kernel.rules.rule import Rule, Target
from attnkit.kernel.sizes import LAYOUTS

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall, TensorSpec

__all__ = ["ARGUMENT_TYPE", "SHAPE_RULES"]

_MILLION = 1_000_000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _operands(call: KernelCall) -> dict[str, TensorSpec]:
    return {"query": call.query, "key": call.key, "value": call.value}


def _argument_type(call: KernelCall, on: Target) -> str | None:
    def is_list(value: object) -> bool:
        return value is None or (isinstance(value, tuple) and all(map(fits_int64, value)))

    wrong = [n for n in INTEGERS if not fits_int64(getattr(call, n))]
    wrong += [n for n in LISTS if not is_list(getattr(call, n))]
    for name in FLOATS:
        number: object = getattr(call, name)
        if not (isinstance(number, float) or fits_int64(number)):
            wrong.append(name)
    wrong += [n for n in BOOLS if not isinstance(getattr(call, n), bool)]
    wrong += [n for n in TEXTS if not isinstance(getattr(call, n), str)]
    if not wrong:
        return None
    return ", ".join(f"{n}={shown(getattr(call, n))}" for n in wrong)


def _layout_unknown(call: KernelCall, on: Target) -> str | None:
    return None if call.layout in LAYOUTS else f"input_layout={shown(call.input_layout)}"


def _rank(call: KernelCall, on: Target) -> str | None:
    if call.layout not in LAYOUTS:
        return None
    rank = 3 if call.layout in ("BSH", "SBH", "TND") else 4
    wrong = [f"{n} {s}" for n, s in _operands(call).items() if len(s.shape) != rank]
    return f"{', '.join(wrong)} in layout {call.layout}, which has rank {rank}" if wrong else None


def _head_num(call: KernelCall, on: Target) -> str | None:
    if _layout_unknown(call, on) or _rank(call, on):
        return None
    last = call.query.shape[-1]
    if call.head_num <= 0:
        return f"head_num={call.head_num}"
    if call.layout in ("BSH", "SBH"):
        return f"head_num={call.head_num} with H={last}" if last % call.head_num else None
    heads = call.query.shape[1 if call.layout in ("BNSD", "TND") else 2]
    return (
        f"head_num={call.head_num} with a query of {heads} heads"
        if heads != call.head_num
        else None
    )


def _kv_heads(call: KernelCall, on: Target) -> str | None:
    if _layout_unknown(call, on) or _rank(call, on) or _head_num(call, on):
        return None
    dim = call.head_dim
    width = call.key.shape[-1]
    if call.layout in ("BSH", "SBH") and (dim == 0 or width % dim):
        return f"key H={width} with a head size of {dim}"
    kv_heads = call.num_kv_heads
    if kv_heads == 0 or call.num_heads % kv_heads:
        return f"{call.num_heads} query heads over {kv_heads} key heads"
    if call.layout in ("BSH", "SBH") and call.value.shape[-1] % kv_heads:
        return f"value H={call.value.shape[-1]} over {kv_heads} key heads"
    return None


def _varlen_lists(call: KernelCall, on: Target) -> str | None:
    if not call.is_packed:
        return None
    q_lens, kv_lens = call.actual_seq_qlen, call.actual_seq_kvlen
    if not q_lens or not kv_lens:
        return f"actual_seq_qlen={shown(q_lens)}, actual_seq_kvlen={shown(kv_lens)}"
    if len(q_lens) != len(kv_lens):
        return f"{len(q_lens)} query lengths and {len(kv_lens)} key lengths"
    return None


def _varlen_dense(call: KernelCall, on: Target) -> str | None:
    given = call.actual_seq_qlen is not None or call.actual_seq_kvlen is not None
    return f"actual_seq lists in layout {call.layout}" if given and not call.is_packed else None


def _dtype_mixed(call: KernelCall, on: Target) -> str | None:
    dtypes = {s.dtype for s in _operands(call).values()}
    if len(dtypes) == 1:
        return None
    return ", ".join(f"{n} {s}" for n, s in _operands(call).items())


def _dtype(call: KernelCall, on: Target) -> str | None:
    allowed = (*_DTYPES, torch.float64) if on.product == "emulator" else _DTYPES
    return None if call.dtype in allowed else f"query {call.query}"


def _batch(call: KernelCall, on: Target) -> str | None:
    sizes = (call.query_sizes.batch, call.key_sizes.batch, call.value_sizes.batch)
    return f"batches of query, key, value: {sizes}" if len(set(sizes)) > 1 else None


def _key_value(call: KernelCall, on: Target) -> str | None:
    key, value = call.key_sizes, call.value_sizes
    if (key.length, key.heads) == (value.length, value.heads):
        return None
    return f"key {call.key} and value {call.value}"


def _head_dim_equal(call: KernelCall, on: Target) -> str | None:
    pair = (call.head_dim, call.key_sizes.head_dim)
    return None if pair[0] == pair[1] else f"query heads of {pair[0]} and key heads of {pair[1]}"


def _value_dim(call: KernelCall, on: Target) -> str | None:
    if call.value_dim <= call.head_dim:
        return None
    return f"value heads of {call.value_dim} beside query heads of {call.head_dim}"


def _head_dim_limit(call: KernelCall, on: Target) -> str | None:
    sizes = (call.head_dim, call.value_dim)
    return None if all(0 < size <= 768 for size in sizes) else "heads of {} and {}".format(*sizes)


def _heads_limit(call: KernelCall, on: Target) -> str | None:
    return f"{call.num_heads} heads" if call.num_heads > 256 else None


def _batch_limit(call: KernelCall, on: Target) -> str | None:
    limit = 2048 if call.is_packed else 2 * _MILLION
    what = "sequences" if call.is_packed else "batch elements"
    return None if 0 < call.batch <= limit else f"{call.batch} {what}, the limit is {limit}"


def _length_limit(call: KernelCall, on: Target) -> str | None:
    longest = max(call.query_sizes.length, call.key_sizes.length)
    return f"{longest} tokens" if longest > _MILLION else None


def _varlen_total(call: KernelCall, on: Target) -> str | None:
    used = [sum(column) for column in zip(*call.sequences, strict=True)]
    have = [call.query_sizes.length, call.key_sizes.length]
    if not call.is_packed or (used[0] <= have[0] and used[1] <= have[1]):
        return None
    return f"lengths sum to {used[0]} queries and {used[1]} keys; the tensors hold {have}"


def _varlen_tail(call: KernelCall, on: Target) -> str | None:
    if not call.is_packed:
        return None
    used_q, used_kv = (sum(column) for column in zip(*call.sequences, strict=True))
    spare_q, spare_kv = call.query_sizes.length - used_q, call.key_sizes.length - used_kv
    q_ends, kv_ends = (given and given[-1] == 0 for given in _cumulative(call))
    if spare_q <= 0 or (q_ends and (kv_ends or spare_kv <= 0)):
        return None
    return f"{spare_q} query rows and {spare_kv} keys lie beyond the last sequence"


def _cumulative(call: KernelCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return call.actual_seq_qlen or (), call.actual_seq_kvlen or ()


def _varlen_decreasing(call: KernelCall, on: Target) -> str | None:
    if not call.is_packed:
        return None
    for name in ("actual_seq_qlen", "actual_seq_kvlen"):
        given = getattr(call, name)
        trimmed = given[
            : len(given) - next((n for n, v in enumerate(given[::-1]) if v), len(given))
        ]
        if any(now < last for last, now in pairwise((0, *trimmed))):
            return f"{name}={shown(given)} decreases"
    return None


ARGUMENT_TYPE = Rule(
    "argument-type",
    "torch",
    "numbers are int (of 64 bits) or float, lists hold such ints, switches are bool, layouts str",
    "Convert the argument; lengths and indices are host integers, not tensors.",
    _argument_type,
    type_error=True,
    structural=True,
)
"""The rule that every other one relies on."""

SHAPE_RULES: tuple[Rule, ...] = (
    ARGUMENT_TYPE,
    Rule(
        "layout-unknown",
        "torch",
        f"input_layout is one of {', '.join(LAYOUTS)}",
        "Use one of them; BNSD is [batch, heads, tokens, head size].",
        _layout_unknown,
        structural=True,
    ),
    Rule(
        "rank",
        "torch",
        "query, key and value have the rank of the layout: 3 for BSH, SBH, TND, 4 for BSND, BNSD",
        "Reshape the tensors, or name the layout they are in.",
        _rank,
        structural=True,
    ),
    Rule(
        "head-num",
        "torch",
        "head_num is positive, divides H (BSH, SBH) and equals the query's head axis elsewhere",
        "Pass the number of query heads.",
        _head_num,
        structural=True,
    ),
    Rule(
        "kv-heads",
        "tiling",
        "the query heads are a multiple of the key and value heads",
        "Query head h reads key head h // (heads / kv_heads); repeat or drop key heads.",
        _kv_heads,
        structural=True,
    ),
    Rule(
        "varlen-lists",
        "torch",
        "layout TND needs actual_seq_qlen and actual_seq_kvlen, of the same length, not empty",
        "Pass the cumulative lengths without a leading 0, one entry per sequence in each.",
        _varlen_lists,
        structural=True,
    ),
    Rule(
        "varlen-dense",
        "documented",
        "actual_seq_qlen and actual_seq_kvlen belong to layout TND",
        "Leave them out, or pack the sequences into layout TND.",
        _varlen_dense,
    ),
    Rule(
        "dtype-mixed",
        "aclnn",
        "query, key and value have one dtype",
        "Cast them to the same dtype.",
        _dtype_mixed,
        type_error=True,
    ),
    Rule(
        "dtype",
        "aclnn",
        "the kernel computes float16, bfloat16 and float32 (float64 only off the device)",
        "Cast query, key and value.",
        _dtype,
        type_error=True,
    ),
    Rule(
        "batch-mismatch",
        "tiling",
        "query, key and value have the same batch",
        "Expand or cut the batch axes to match.",
        _batch,
    ),
    Rule(
        "key-value-shape",
        "tiling",
        "key and value have the same shape except for the head size",
        "Pass as many values as keys.",
        _key_value,
    ),
    Rule(
        "head-dim-equal",
        "aclnn",
        "query and key heads have the same size",
        "Project both to one head size.",
        _head_dim_equal,
    ),
    Rule(
        "value-dim",
        "aclnn",
        "value heads are not larger than query heads",
        "Pad query and key heads with zeros up to the value's size; scores do not change.",
        _value_dim,
    ),
    Rule(
        "head-dim-limit",
        "aclnn",
        "heads have 1 to 768 elements",
        "Use more, smaller heads.",
        _head_dim_limit,
    ),
    Rule(
        "heads-limit",
        "documented",
        "there are 1 to 256 query heads",
        "Split the heads over several calls.",
        _heads_limit,
    ),
    Rule(
        "batch-limit",
        "documented",
        "a dense call has 1 to 2M batch elements, a packed one 1 to 2048 sequences (longer lists "
        "may end the process)",
        "Split the batch, leave an empty one out; merge the padding at the end into one sequence.",
        _batch_limit,
    ),
    Rule(
        "length-limit",
        "documented",
        "there are at most 1,000,000 tokens (the binding checks cumulative entries only)",
        "Split the sequence and merge the parts by their statistics.",
        _length_limit,
    ),
    Rule(
        "varlen-total",
        "tiling",
        "packed lengths sum to at most the number of tokens in the tensors",
        "Check that the lists are cumulative and belong to these tensors.",
        _varlen_total,
    ),
    Rule(
        "varlen-tail",
        "silent",
        "query rows beyond the last sequence stay uninitialised (and, with keys beyond it, are "
        "rejected from CANN 9.0 on) unless both lists end in 0",
        "Append 0 to both lists, which makes those rows zero, or cut the tensors.",
        _varlen_tail,
    ),
    Rule(
        "varlen-decreasing",
        "silent",
        "cumulative lengths start at 0 or more and never decrease (but for zeros at the end): the "
        "kernel takes such a sequence to be empty",
        "Pass running totals, not the lengths themselves.",
        _varlen_decreasing,
    ),
)
