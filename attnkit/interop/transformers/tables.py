"""Bias tables of T5 and its kin: recognised at the module, and never made a matrix of scores."""

from __future__ import annotations

import copy
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.attend import is_tracing
from attnkit.interop.transformers.bias_tensor import BiasTensor
from attnkit.interop.transformers.kept import kept_on
from attnkit.interop.transformers.names import NAME, says
from attnkit.pse import Pse, T5Relative
from attnkit.pse.t5_relative import t5_bucket

__all__ = ["has_table", "learn_tables"]

_ARGUMENTS = ["self", "query_length", "key_length", "device", "past_seen_tokens"]


def has_table(module: nn.Module) -> bool:
    """Whether a module computes a bias from a table of buckets of distances, as T5 does."""
    compute = getattr(type(module), "compute_bias", None)
    if compute is None or not says(type(module), "get_interface"):
        return False
    same = list(signature(compute).parameters) == _ARGUMENTS
    return same and hasattr(module, "relative_attention_num_buckets")


def learn_tables(kind: type[nn.Module]) -> bool:
    """Let the modules of a class hand on the table itself, where they run on attnkit.

    Returns whether it did so now. For every other attention the class does what it did.
    """
    home = next(base for base in kind.__mro__ if "compute_bias" in vars(base))
    plain = vars(home)["compute_bias"]
    if hasattr(plain, "__wrapped__"):
        return False

    @wraps(plain)
    def compute_bias(
        self: Any,
        query_length: int,
        key_length: int,
        device: Any = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Tensor:
        ours = getattr(self.config, "_attn_implementation", None) == NAME and not is_tracing()
        table = _table(self, plain) if ours else None
        if table is None:
            made: Tensor = plain(self, query_length, key_length, device, past_seen_tokens)
            return made
        weight = self.relative_attention_bias.weight
        shape = (1, weight.shape[1], query_length, key_length)
        bias = _rows(table, int(past_seen_tokens), query_length, key_length)
        return BiasTensor(bias, shape, weight.dtype, weight.device)

    home.compute_bias = compute_bias  # type: ignore[attr-defined]
    return True


def _rows(table: T5Relative, past: int, q_len: int, kv_len: int) -> Pse:
    """Return the rows of a text from `past` on; keys may lie ahead that a cache has room for."""
    if past + q_len == kv_len:
        return table
    first = T5Relative(
        table.num_heads,
        table.num_buckets,
        table.max_distance,
        table.bidirectional,
        "top_left",
        table=table.table,
    )
    rows = (past, past + q_len)
    return first.cut(rows, (0, kv_len), q_len=rows[1], kv_len=kv_len)


def _table(module: Any, plain: Any) -> T5Relative | None:
    """Return a module's table as a bias, or None where its buckets are not those of T5."""
    kept = kept_on(module)
    weight = module.relative_attention_bias.weight
    found: tuple[Tensor, T5Relative | None] | None = kept.get("table")
    if found is None or found[0] is not weight:
        found = kept["table"] = weight, _proven(module, plain, weight)
    return found[1]


def _proven(module: Any, plain: Any, weight: Tensor) -> T5Relative | None:
    """Compare the bucket of every distance with that of a copy of the module."""
    buckets, heads = weight.shape
    most = module.relative_attention_max_distance
    two_sided = not module.is_decoder
    probe = copy.copy(module)
    probe._modules = dict(module._modules)
    numbers = torch.arange(float(buckets), dtype=torch.float64)[:, None]
    probe._modules["relative_attention_bias"] = nn.Embedding(buckets, 1, _weight=numbers)
    reach = most + 1
    with torch.no_grad():  # a checkpoint counts what is recorded, and this happens once
        own = plain(probe, 1, 2 * reach + 1, torch.device("cpu"), reach).flatten()
    distances = torch.arange(-reach, reach + 1)
    ours = t5_bucket(distances, buckets, most, two_sided)
    if not torch.equal(own.long(), ours):
        return None
    return T5Relative(heads, buckets, most, two_sided, table=weight)
