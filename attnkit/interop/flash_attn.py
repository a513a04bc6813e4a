"""flash-attn 2's functions, by their own names, arguments and conventions.

    from attnkit.interop.flash_attn import flash_attn_func      # was: from flash_attn import ...

Queries and keys meet in the bottom-right corner; a window (left, right) counts distances, both
ends inclusive, so that (W, 0) keeps W + 1 keys, and -1 is no bound; soft-cap comes before ALiBi,
which is ``-slope * |i + seqlen_k - seqlen_q - j|``. Rows that see no key are 0.

Source: flash_attn/flash_attn_interface.py of version 2.8. What differs from it: any device,
floating dtype and head size; the log-sum-exp of a row without keys is -inf; a slope that asks for
a gradient, and cumulative lengths that do not end with the tokens, are errors.
"""

from __future__ import annotations

from torch import Tensor

from attnkit.arguments import check_bool, check_int, check_number
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.interop.flash_cache import CacheCall, attend_to_cache, paged_keys
from attnkit.interop.flash_core import FlashOptions, WindowSize, flash_attend
from attnkit.interop.host import IntsOnHost, ints_on_host
from attnkit.layouts import SeqLens

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

FlashOutput = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attend: q ``b s n d``, k and v ``b t m d`` with m a divisor of n; returns ``b s n d``.

    ``softmax(cap(softmax_scale * q.k) - slope * |i + t - s - j|) @ v`` over the keys from
    ``i + t - s - left`` to ``i + t - s + right``; causal means right = 0. Query head h reads key
    head ``h // (n / m)``. `softcap` of 0 is none, `softmax_scale` None is ``d ** -0.5``.
    `alibi_slopes` are ``n`` or ``b n`` constants. `deterministic` as that of `ak.Attention`.

    With `return_attn_probs`: (out, log-sum-exp ``b n s``, a tensor without elements),
    as the library without dropout. With dropout it is refused: no backend tells what it dropped.

    Raises `CompositionError` for arguments that contradict each other.

    >>> import torch
    >>> q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 5, 2, 8)
    >>> flash_attn_func(q, k, k, causal=True, window_size=(2, 0)).shape
    torch.Size([2, 2, 4, 8])
    """
    _check_axes("flash_attn_func", "(batch, seqlen, nheads, headdim)", 4, q=q, k=k, v=v)
    how = FlashOptions.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )
    _check_probs(return_attn_probs, how)
    return _returned(*flash_attend((q, k, v), None, how, return_attn_probs), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attend as `flash_attn_func` does, with keys and values in one tensor ``b t 2 m d``.

    >>> import torch
    >>> kv = torch.randn(2, 5, 2, 2, 8)
    >>> flash_attn_kvpacked_func(torch.randn(2, 3, 4, 8), kv, causal=True).shape
    torch.Size([2, 3, 4, 8])
    """
    _check_stack("flash_attn_kvpacked_func: kv", kv, 5, 2)
    return flash_attn_func(
        q,
        kv[:, :, 0],
        kv[:, :, 1],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attend as `flash_attn_func` does, with all three in one tensor ``b s 3 n d``.

    >>> import torch
    >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 4, 8), window_size=(1, 1)).shape
    torch.Size([2, 5, 4, 8])
    """
    _check_stack("flash_attn_qkvpacked_func: qkv", qkv, 5, 3)
    return flash_attn_func(
        qkv[:, :, 0],
        qkv[:, :, 1],
        qkv[:, :, 2],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: IntsOnHost,
    cu_seqlens_k: IntsOnHost,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> FlashOutput:
    """Attend in packed sequences: q ``t n d``, k and v ``u m d``; returns ``t n d``.

    `cu_seqlens_q` and `cu_seqlens_k` are cumulative lengths with a leading 0. Lists of integers
    cost nothing; a tensor on a device is read once (`attnkit.interop.host`). Masks and slopes,
    ``n`` or one row per sequence, are of each sequence. With a `block_table`
    ``sequences pages``, k and v are ``blocks page m d``, and `cu_seqlens_k` says how many tokens
    of its pages each sequence has. The log-sum-exp is ``n t``.

    Raises `CompositionError` where the lengths are not those of the tensors, or one is longer
    than `max_seqlen_q` or `max_seqlen_k`, which do nothing else.

    >>> import torch
    >>> x = torch.randn(8, 4, 16)
    >>> flash_attn_varlen_func(x, x, x, [0, 3, 8], [0, 3, 8], 5, 5, causal=True).shape
    torch.Size([8, 4, 16])
    """
    name = "flash_attn_varlen_func"
    _check_axes(name, "(total_q, nheads, headdim)", 3, q=q)
    seqlens = SeqLens.from_cu_seqlens(
        ints_on_host(f"{name}: cu_seqlens_q", cu_seqlens_q),
        ints_on_host(f"{name}: cu_seqlens_k", cu_seqlens_k),
    )
    _check_longest("q", max_seqlen_q, seqlens.max_q)
    _check_longest("k", max_seqlen_k, seqlens.max_kv)
    if block_table is not None:
        k, v = paged_keys(k, v, block_table, seqlens.kv)
    _check_axes(name, "(total_k, nheads_k, headdim)", 3, k=k, v=v)
    how = FlashOptions.of(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )
    _check_probs(return_attn_probs, how)
    return _returned(*flash_attend((q, k, v), seqlens, how, return_attn_probs), return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: IntsOnHost,
    cu_seqlens_k: IntsOnHost,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attend as `flash_attn_varlen_func` does, with keys and values in one tensor ``u 2 m d``.

    >>> import torch
    >>> q, kv = torch.randn(3, 4, 16), torch.randn(8, 2, 2, 16)
    >>> flash_attn_varlen_kvpacked_func(q, kv, [0, 1, 3], [0, 3, 8], 2, 5).shape
    torch.Size([3, 4, 16])
    """
    _check_stack("flash_attn_varlen_kvpacked_func: kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q,
        kv[:, 0],
        kv[:, 1],
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: IntsOnHost,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> FlashOutput:
    """Attend as `flash_attn_varlen_func` does, with all three in one tensor ``t 3 n d``.

    >>> import torch
    >>> qkv = torch.randn(8, 3, 4, 16)
    >>> flash_attn_varlen_qkvpacked_func(qkv, [0, 3, 8], 5, causal=True).shape
    torch.Size([8, 4, 16])
    """
    _check_stack("flash_attn_varlen_qkvpacked_func: qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        qkv[:, 0],
        qkv[:, 1],
        qkv[:, 2],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | IntsOnHost | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: IntsOnHost | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to a cache, in which new keys and values are written first, in place.

    q ``b s n d``; the caches ``c capacity m d``, or with a `block_table` ``b pages`` they are
    ``blocks page m d``. Row b of the batch has the cache's row `cache_batch_idx` (b), in it the
    tokens from `cache_leftpad` (0) to `cache_seqlens` (all), and behind them the new k and v
    ``b t m d``. With `rotary_cos` and `rotary_sin` ``positions r/2`` the new keys are turned to
    positions `cache_seqlens` and on, the queries likewise with a causal mask or a window, and
    else all of them to `cache_seqlens`. Pairs are (2c, 2c + 1), or with `rotary_interleaved`
    False (c, c + r/2). `num_splits` is a hint that changes no number.

    With `return_softmax_lse`: (out, log-sum-exp ``b n s``). As in the library there is no
    backward pass; here tensors that ask for one are an error.

    Lengths are wanted on the host, as those of `flash_attn_varlen_func`. For steps that are all
    the same call, with lengths on the device (captured graphs), there is `ak.StaticCache`.

    >>> import torch
    >>> cache, new = torch.zeros(2, 8, 2, 16), torch.ones(2, 1, 2, 16)
    >>> out = flash_attn_with_kvcache(new, cache, cache, new, new, cache_seqlens=[3, 5])
    >>> out.shape, cache[..., 0, 0].nonzero().tolist()
    (torch.Size([2, 1, 2, 16]), [[0, 3], [1, 5]])
    """
    name = "flash_attn_with_kvcache"
    _check_axes(name, "four axes", 4, q=q, k_cache=k_cache, v_cache=v_cache)
    check_int(f"{name}: num_splits", num_splits, 0)
    check_bool(f"{name}: return_softmax_lse", return_softmax_lse)
    how = FlashOptions.of(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        check_bool(f"{name}: rotary_interleaved", rotary_interleaved),
    )
    out, lse = attend_to_cache(call, how, return_softmax_lse)
    return out if lse is None else (out, lse)


def _returned(out: Tensor, lse: Tensor | None, asked: bool) -> FlashOutput:
    if not asked or lse is None:
        return out
    return out, lse, out.new_empty(0)


def _check_probs(asked: object, how: FlashOptions) -> None:
    if check_bool("return_attn_probs", asked) and how.dropout_p:
        raise CompositionError(
            f"return_attn_probs=True with dropout_p={how.dropout_p}: which weights were dropped is "
            "not told here, and the probabilities say so by their signs; leave one of them out"
        )


def _check_longest(which: str, given: object, longest: int) -> None:
    # numpy's integers, and floats that count, come from data loaders.
    limit = check_number(f"max_seqlen_{which}", given, lambda n: n >= 0, "a length")
    if limit < longest:
        raise CompositionError(
            f"max_seqlen_{which}={shown(given)}, but a sequence of cu_seqlens_{which} has "
            f"{longest} tokens; give the longest length, or more"
        )


def _check_axes(owner: str, shape: str, axes: int, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CompositionTypeError(f"{owner}: {name} is {shown(tensor)}; give a tensor {shape}")
        if tensor.ndim != axes:
            raise CompositionError(
                f"{owner}: {name} is {shown(tensor)}, which has {tensor.ndim} axes; give {shape}"
            )


def _check_stack(name: str, tensor: object, axes: int, count: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.ndim != axes or tensor.shape[-3] != count:
        raise CompositionError(
            f"{name} is {shown(tensor)}; give {axes} axes, of which the third from behind has "
            f"{count} entries"
        )
