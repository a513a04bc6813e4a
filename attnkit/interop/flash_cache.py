"""flash-attn's attention to a cache: what is written to it, and the keys that are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.errors import CompositionError, shown
from attnkit.interop.flash_core import FlashOptions, flash_attend
from attnkit.interop.host import IntsOnHost, ints_on_host
from attnkit.layouts import SeqLens
from attnkit.rotary import positions

__all__ = ["CacheCall", "attend_to_cache", "paged_keys"]

NAME = "flash_attn_with_kvcache"


class CacheCall(NamedTuple):
    """The arguments of `flash_attn_with_kvcache` that say where tokens lie and stand."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: int | IntsOnHost | None
    cache_batch_idx: Tensor | None
    cache_leftpad: IntsOnHost | None
    block_table: Tensor | None
    rotary_interleaved: bool

    @property
    def batch(self) -> int:
        """The number of texts."""
        return self.q.shape[0]

    @property
    def new(self) -> int:
        """The new tokens of each text."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        """The tokens that a text has room for."""
        if self.block_table is None:
            return self.k_cache.shape[1]
        return self.block_table.shape[1] * self.k_cache.shape[1]

    def places(self, text: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and the column of a cache where tokens of texts lie."""
        if self.block_table is not None:
            page = self.k_cache.shape[1]
            return self.block_table.long()[text, token // page], token % page
        if self.cache_batch_idx is not None:
            text = self.cache_batch_idx.long()[text]
        return text, token


def attend_to_cache(
    call: CacheCall, how: FlashOptions, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Write what is new, and attend to what is there then."""
    _check(call)
    held = _lengths(call, call.cache_seqlens, "cache_seqlens", call.capacity)
    first = _lengths(call, call.cache_leftpad, "cache_leftpad", 0)
    stops = [some + call.new for some in held]
    if max(stops) > call.capacity or any(a > b for a, b in zip(first, held, strict=True)):
        raise CompositionError(
            f"{NAME}: cache_seqlens={shown(held)} from cache_leftpad={shown(first)} on, and "
            f"{call.new} new tokens, in a cache of {call.capacity}; a text begins before it ends, "
            "and the cache has room for it"
        )
    with torch.no_grad():
        query = _write(call, held, how.follows)
        seqlens = SeqLens(
            [query.shape[1]] * call.batch, [b - a for a, b in zip(first, stops, strict=True)]
        )
        return _attend(call, query, first, seqlens, how, with_lse)


def _attend(
    call: CacheCall,
    query: Tensor,
    first: Sequence[int],
    seqlens: SeqLens,
    how: FlashOptions,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    alike = len(set(seqlens.kv)) == 1
    if alike and not any(first) and call.block_table is None and call.cache_batch_idx is None:
        used = seqlens.kv[0]
        key, value = call.k_cache[: call.batch, :used], call.v_cache[: call.batch, :used]
        return flash_attend((query, key, value), None, how, with_lse)
    rows, columns = call.places(*_tokens(seqlens.kv, first, query.device))
    key, value = call.k_cache[rows, columns], call.v_cache[rows, columns]
    if alike:
        sizes = call.batch, seqlens.kv[0]
        key, value = torch.unflatten(key, 0, sizes), torch.unflatten(value, 0, sizes)
        return flash_attend((query, key, value), None, how, with_lse)
    out, lse = flash_attend((query.flatten(0, 1), key, value), seqlens, how, with_lse)
    out = torch.unflatten(out, 0, query.shape[:2])
    if lse is None:
        return out, None
    return out, torch.unflatten(lse, 1, query.shape[:2]).transpose(0, 1)


def paged_keys(
    k: Tensor, v: Tensor, block_table: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of packed sequences ``t n d``, from pages ``blocks page n d``.

    >>> pages, table = torch.arange(6.0).view(3, 2, 1, 1), torch.tensor([[2, 0], [1, 0]])
    >>> paged_keys(pages, pages, table, [3, 1])[0].flatten()
    tensor([4., 5., 0., 2.])
    """
    _check_table(block_table, len(lengths))
    if k.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise CompositionError(
            f"k is {shown(k)} and v {shown(v)} beside a block_table; give pages of tokens, "
            "(num_blocks, page_block_size, nheads_k, headdim)"
        )
    page = k.shape[1]
    if max(lengths) > block_table.shape[1] * page:
        raise CompositionError(
            f"a sequence of {max(lengths)} tokens does not fit into the {block_table.shape[1]} "
            f"pages of {page} that block_table has for it"
        )
    text, token = _tokens(lengths, [0] * len(lengths), k.device)
    rows = block_table.long()[text, token // page]
    return k[rows, token % page], v[rows, token % page]


def _tokens(
    lengths: Sequence[int], first: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the text of each packed token, and where in it the token is."""
    total, counts = sum(lengths), torch.tensor(lengths)
    text = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=total)
    token = positions(lengths) + torch.tensor(first)[text]
    return text.to(device, non_blocking=True), token.to(device, non_blocking=True)


def _write(call: CacheCall, held: Sequence[int], follows: bool) -> Tensor:
    """Write new keys and values behind those held, in place; return the queries, turned."""
    if call.k is None or call.v is None:
        return call.q
    start = torch.tensor(held).to(call.q.device, non_blocking=True)[:, None]
    token = start + torch.arange(call.new, device=call.q.device)
    query, key = call.q, call.k
    if call.rotary_cos is not None:
        steps = torch.arange(call.q.shape[1], device=call.q.device)
        query = _turned(call, query, start + steps * int(follows))
        key = _turned(call, key, token)
    texts = torch.arange(call.batch, device=call.q.device)[:, None].expand_as(token)
    rows, columns = call.places(texts, token)
    call.k_cache[rows, columns] = key
    call.v_cache[rows, columns] = call.v
    return query


def _turned(call: CacheCall, heads: Tensor, where: Tensor) -> Tensor:
    """Return heads ``b s n d`` turned by the rows of the tables at some positions ``b s``."""
    exact = torch.promote_types(heads.dtype, torch.float32)
    cos, sin = (
        table[where].to(exact)[:, :, None]
        for table in (call.rotary_cos, call.rotary_sin)
        if table is not None
    )
    dim = 2 * cos.shape[-1]
    ends, two = ((-1, 2), -1) if call.rotary_interleaved else ((2, -1), -2)
    x, y = torch.unflatten(heads[..., :dim].to(exact), -1, ends).unbind(two)
    turned = torch.stack((x * cos - y * sin, x * sin + y * cos), two).flatten(-2)
    return torch.cat((turned.to(heads.dtype), heads[..., dim:]), -1)


def _lengths(
    call: CacheCall, given: int | IntsOnHost | None, name: str, default: int
) -> tuple[int, ...]:
    """Return a number for each text."""
    if given is None or (isinstance(given, int) and name == "cache_seqlens"):
        given = [default if given is None else given] * call.batch
    found = ints_on_host(f"{NAME}: {name}", given)  # type: ignore[arg-type]
    if len(found) != call.batch:
        raise CompositionError(
            f"{NAME}: {name} has {len(found)} entries for a batch of {call.batch}; give one each"
        )
    return found


def _check(call: CacheCall) -> None:
    tensors = (call.q, call.k_cache, call.v_cache, call.k, call.v)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise CompositionError(
            f"{NAME} has no backward pass, and a tensor asks for a gradient; call it under "
            "torch.no_grad()"
        )
    if (call.k is None) != (call.v is None):
        raise CompositionError(f"{NAME}: give both of k and v, or none")
    if call.k_cache.shape[:3] != call.v_cache.shape[:3]:
        raise CompositionError(
            f"{NAME}: k_cache is {shown(call.k_cache)}, v_cache {shown(call.v_cache)}; they have "
            "the same tokens and heads"
        )
    _check_new(call)
    _check_rotary(call)
    if call.block_table is not None:
        if call.cache_batch_idx is not None:
            raise CompositionError(
                f"{NAME}: a block_table has a row for each text of the batch, and "
                "cache_batch_idx picks rows of a cache; give one of them"
            )
        _check_table(call.block_table, call.batch)
    elif call.cache_batch_idx is not None:
        if call.cache_batch_idx.shape != (call.batch,):
            raise CompositionError(
                f"{NAME}: cache_batch_idx={shown(call.cache_batch_idx)} for a batch of "
                f"{call.batch}; give one row each"
            )
    elif call.k_cache.shape[0] < call.batch:
        raise CompositionError(
            f"{NAME}: a cache of {call.k_cache.shape[0]} texts for a batch of {call.batch}"
        )


def _check_new(call: CacheCall) -> None:
    if call.k is None or call.v is None:
        return
    if call.cache_seqlens is None:
        raise CompositionError(f"{NAME}: k and v come without cache_seqlens, which says where to")
    for name, new, cache in (("k", call.k, call.k_cache), ("v", call.v, call.v_cache)):
        wanted = (call.batch, call.k.shape[1] if call.k.ndim == 4 else 0, *cache.shape[2:])
        if tuple(new.shape) != wanted or new.dtype != cache.dtype:
            raise CompositionError(
                f"{NAME}: {name} is {shown(new)} beside a cache {shown(cache)}; give "
                "(batch_size, seqlen_new, nheads_k, headdim) of its dtype"
            )


def _check_rotary(call: CacheCall) -> None:
    cos, sin = call.rotary_cos, call.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or cos.ndim != 2:
        raise CompositionError(
            f"{NAME}: rotary_cos={shown(cos)}, rotary_sin={shown(sin)}; give both, "
            "(seqlen_ro, rotary_dim / 2)"
        )
    if call.k is None:
        raise CompositionError(
            f"{NAME}: rotary_cos and rotary_sin turn new keys and the queries beside them, and "
            "there are no new keys"
        )
    if 2 * cos.shape[1] > call.q.shape[-1] or cos.shape[0] < call.capacity:
        raise CompositionError(
            f"{NAME}: rotary_cos {shown(cos)} for heads of {call.q.shape[-1]} and a cache of "
            f"{call.capacity} tokens; give a row for each of them, of at most half a head"
        )


def _check_table(table: Tensor, texts: int) -> None:
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[0] != texts:
        raise CompositionError(
            f"block_table={shown(table)} for {texts} texts; give (batch_size, "
            "max_num_blocks_per_seq) of page numbers"
        )
