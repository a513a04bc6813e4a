"""`MultiHeadAttention`: projections, rotary positions and a cache around `Attention`."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attnkit import layouts
from attnkit.arguments import check_bool, check_device, check_float_dtype, check_int, check_tensor
from attnkit.attend import Asked, attend, is_tracing
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput
from attnkit.cache import KVCache
from attnkit.decoding import (
    queries_of_context,
    rows_of_bias,
    rows_of_context_bias,
    rows_of_context_mask,
    rows_of_mask,
    text_length,
)
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import BSND, TND, Layout, SeqLens
from attnkit.masks import Mask
from attnkit.planner import Plan
from attnkit.pse import Pse
from attnkit.rotary import Rotary, positions

__all__ = ["MultiHeadAttention"]

_WIDEST = 2**31 - 1


class MultiHeadAttention(nn.Module):
    """Multi-head attention: ``out(Attention(q(x), k(context), v(context)))``.

    ``x`` is ``[b s dim]``, or packed ``[t dim]`` with `seqlens`; `context` is the same with
    `kv_dim` (default `dim`) and makes it cross-attention; the output has the form of ``x``.
    Any dtype of `Attention`, which also documents `mask`, `pse`, `dropout`, `scale`,
    `softcap`, `sink` and `backend`.

    - `num_kv_heads`: fewer key heads than query heads (GQA; 1 is MQA).
    - `head_dim`: default ``dim / num_heads``. `bias`: of the four projections.
    - `layout`: how heads are handed to `Attention` where ``x`` has its kind, dense or packed.
      The other kind runs all the same, as BSND or TND.
    - `rotary`: True for ``Rotary()``, or a `Rotary`. Positions count from 0 in every sequence.

    `forward` takes a `cache` for decoding step by step: `KVCache`, one per layer.

    Raises `CompositionError` for sizes that do not divide or match, rotary positions in
    cross-attention, and what `Attention` and `KVCache` raise.

    >>> import torch
    >>> from attnkit import masks
    >>> layer = MultiHeadAttention(32, 4, num_kv_heads=2, rotary=True, mask=masks.Causal())
    >>> x = torch.randn(2, 6, 32)
    >>> cache = KVCache()
    >>> with torch.no_grad():
    ...     whole = layer(x)
    ...     steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
    >>> torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        bias: bool = False,
        rotary: bool | Rotary = False,
        mask: Mask | None = None,
        pse: Pse | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
        sink: bool = False,
        backend: str = "auto",
        layout: str = "BSND",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = _axis("dim", dim)
        self.kv_dim = _axis("kv_dim", dim if kv_dim is None else kv_dim)
        size = _head_dim(dim, _axis("num_heads", num_heads), head_dim)
        width = _axis("num_heads * head_dim", num_heads * size)
        check_bool("bias", bias, "of the four projections; a bias on the scores is pse=")
        check_device(device)
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        self.attention = Attention(
            num_heads,
            size,
            num_kv_heads=num_kv_heads,
            mask=mask,
            pse=pse,
            layout=layout,
            scale=scale,
            dropout=dropout,
            sink=sink,
            softcap=softcap,
            backend=backend,
        ).to(device=device)
        self.rotary = _rotary(rotary, self.attention.head_dim)
        kv_width = self.attention.num_kv_heads * self.attention.head_dim
        self.q_proj = _linear("q_proj", dim, width, bias, device, dtype)
        self.k_proj = _linear("k_proj", self.kv_dim, kv_width, bias, device, dtype)
        self.v_proj = _linear("v_proj", self.kv_dim, kv_width, bias, device, dtype)
        self.out_proj = _linear("out_proj", width, dim, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        cache: KVCache | None = None,
        return_stats: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend from `x` to itself, or to `context`; the output has the form of `x`.

        A call-time `mask` is intersected with the module's, a `pse` is added. With a `cache`,
        `x` holds the next tokens and attends to all so far; masks and biases still speak of
        the whole text, by its positions, and each step takes its rows. The outputs equal those
        of one call with the whole text, or `CompositionError` says why they cannot. In
        cross-attention the first call with an empty cache stores `context`, and later calls
        need not give it.

        With `return_stats`, returns `AttentionOutput(output, stats)`.

        >>> from attnkit import masks
        >>> layer = MultiHeadAttention(32, 4, mask=masks.Causal())
        >>> layer(torch.randn(2, 6, 32), return_stats=True).stats.lse.shape
        torch.Size([2, 4, 6])
        >>> layer(torch.randn(9, 32), seqlens=SeqLens([4, 5])).shape  # packed
        torch.Size([9, 32])
        >>> crossing, cache = MultiHeadAttention(32, 4, kv_dim=8), KVCache()
        >>> with torch.no_grad():
        ...     first = crossing(torch.randn(2, 1, 32), torch.randn(2, 7, 8), cache=cache)
        ...     second = crossing(torch.randn(2, 1, 32), cache=cache)
        >>> cache
        KVCache(length=7, capacity=16, sealed)
        """
        self._check(x, context, mask, pse, seqlens, cache)
        if cache is None:
            found = self._attend(x, context, mask, pse, seqlens)
        elif context is None and not cache.sealed:
            found = self._decode(x, mask, pse, cache)
        else:
            found = self._decode_context(x, context, mask, pse, cache)
        output = self.out_proj(rearrange(found.output, "... n d -> ... (n d)"))
        return AttentionOutput(output, found.stats) if return_stats else output

    def plan(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
    ) -> Plan:
        """Return the plan that `forward` would run without a cache; nothing is projected.

        >>> layer = MultiHeadAttention(32, 4)
        >>> layer.plan(torch.randn(2, 6, 32)).request.num_heads
        4
        """
        self._check(x, context, mask, pse, seqlens, None)
        source = x if context is None else context
        query = self._shaped(x, self.attention.num_heads)
        key = self._shaped(source, self.attention.num_kv_heads)
        asked, form = self._asked(mask, pse, seqlens)
        query, key = _into(form, query), _into(form, key)
        return self.attention._plan(asked, query, key, key, self.attention.sink, seqlens)

    def explain(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
    ) -> str:
        """Return the report of `plan`: what runs, at what price, and why.

        >>> print(MultiHeadAttention(32, 4).explain(torch.randn(2, 6, 32)).splitlines()[0])
        attention on backend 'tiled': the composition itself, no fused call
        """
        return self.plan(x, context, mask=mask, pse=pse, seqlens=seqlens).explain()

    def extra_repr(self) -> str:
        """Describe what the submodules do not show.

        >>> MultiHeadAttention(32, 4, kv_dim=8).extra_repr()
        'dim=32, kv_dim=8'
        """
        kv = f", kv_dim={self.kv_dim}" if self.kv_dim != self.dim else ""
        return f"dim={self.dim}{kv}" + (f", rotary={self.rotary}" if self.rotary else "")

    # -- the three ways to attend, each from x to [..., n, d] ----------------------------

    def _attend(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        pse: Pse | None,
        seqlens: SeqLens | None,
    ) -> AttentionOutput:
        source = x if context is None else context
        query, key, value = self._project(x, source)
        if self.rotary is not None:
            lengths = (x.shape[1],) if seqlens is None else seqlens.q
            query, key = self._turn(self.rotary, query, key, positions(lengths, 0, x.device))
        asked, form = self._asked(mask, pse, seqlens)
        q, k, v = (_into(form, t) for t in (query, key, value))
        found = self.attention._attend(asked, q, k, v, seqlens, return_stats=True)
        return AttentionOutput(_out_of(form, found.output, query.shape[-2]), found.stats)

    def _decode(
        self, x: Tensor, mask: Mask | None, pse: Pse | None, cache: KVCache
    ) -> AttentionOutput:
        start, stop = cache.length, cache.length + x.shape[1]
        whole_mask, whole_pse = self._composed(mask, pse)
        length = text_length(whole_mask, whole_pse, stop)
        rows = rows_of_mask(whole_mask, start, stop, length)
        bias = rows_of_bias(whole_pse, start, stop, length)
        query, key, value = self._project(x, x)
        if self.rotary is not None:
            where = positions((x.shape[1],), start, x.device)
            query, key = self._turn(self.rotary, query, key, where)
        keys, values = cache.append(key, value)
        try:
            return self._call(query, keys, values, rows, bias)
        except BaseException:
            cache.truncate(start)  # a step that failed has not happened
            raise

    def _decode_context(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, pse: Pse | None, cache: KVCache
    ) -> AttentionOutput:
        query = _heads(self.q_proj(x), self.attention.num_heads)
        fresh = not cache.sealed
        if context is not None and fresh:
            keys, values = cache.seal(*self._project_kv(context))
        else:
            keys, values = cache.read()
        start, stop = cache.queries, cache.queries + x.shape[1]
        try:
            whole_mask, whole_pse = self._composed(mask, pse)
            known = queries_of_context(whole_mask, whole_pse)
            rows = rows_of_context_mask(whole_mask, start, stop, cache.length, known)
            bias = rows_of_context_bias(whole_pse, start, stop, cache.length, known)
            found = self._call(query, keys, values, rows, bias)
        except BaseException:
            if fresh:
                cache.reset()
            raise
        cache.answered(x.shape[1])
        return found

    def _call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, pse: Pse | None
    ) -> AttentionOutput:
        """Attend with another mask and bias than the module's."""
        asked = self.attention._asked(None, None)
        asked = asked._replace(masks=(mask, None), biases=(pse, None), layout="BSND")
        return attend(asked, query, key, value, self.attention.sink, None)

    # -- parts ---------------------------------------------------------------------------

    def _asked(
        self, mask: Mask | None, pse: Pse | None, seqlens: SeqLens | None
    ) -> tuple[Asked, Layout]:
        """Return what a call asks for, and the layout of its heads."""
        asked, form = self.attention._asked(mask, pse), layouts.get(self.attention.layout)
        if form.packed == (seqlens is not None):
            return asked, form
        form = BSND if seqlens is None else TND
        return asked._replace(layout=form.name), form

    def _composed(self, mask: Mask | None, pse: Pse | None) -> tuple[Mask, Pse | None]:
        """Return the module's mask and bias with those of the call."""
        own = self.attention.composition
        if is_tracing() and (mask is not None or (pse is not None and own.pse is not None)):
            raise CompositionError(
                "inside of torch.compile a call with a cache takes no mask= and adds no pse=: "
                "build the module with them"
            )
        both = own.pse + pse if own.pse is not None and pse is not None else own.pse or pse
        return own.mask if mask is None else own.mask & mask, both

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _heads(self.q_proj(x), self.attention.num_heads), *self._project_kv(source)

    def _project_kv(self, source: Tensor) -> tuple[Tensor, Tensor]:
        count = self.attention.num_kv_heads
        return _heads(self.k_proj(source), count), _heads(self.v_proj(source), count)

    @staticmethod
    def _turn(rotary: Rotary, query: Tensor, key: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.rotate(query, where), rotary.rotate(key, where)

    def _shaped(self, source: Tensor, count: int) -> Tensor:
        """Return a tensor with the properties that the projected heads will have, and no data."""
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in [source, *weights])
        cell = torch.empty(1, dtype=_computed_dtype(source), device=source.device)
        shape = (*source.shape[:-1], count, self.attention.head_dim)
        return cell.requires_grad_(grad).expand(shape)

    # -- checks, before anything is computed ---------------------------------------------

    def _check(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        pse: Pse | None,
        seqlens: SeqLens | None,
        cache: KVCache | None,
    ) -> None:
        if not isinstance(mask, Mask | None):
            raise CompositionTypeError(
                f"mask={shown(mask)}; give a mask (a boolean tensor is masks.Dense.keep(t) or "
                ".drop(t))"
            )
        if not isinstance(pse, Pse | None):
            raise CompositionTypeError(
                f"pse={shown(pse)}; give a bias (a tensor of numbers is pse.Dense(t))"
            )
        if cache is not None and not isinstance(cache, KVCache):
            raise CompositionTypeError(f"cache={shown(cache)}; give a KVCache(), one per layer")
        crosses = context is not None or (cache is not None and cache.sealed)
        self._check_input("x", x, self.dim, "dim")
        if context is not None:
            self._check_input("context", context, self.kv_dim, "kv_dim")
            _check_pair(x, context)
        elif not crosses and self.kv_dim != self.dim:
            raise CompositionError(
                f"this module was built for cross-attention (kv_dim={self.kv_dim}, "
                f"dim={self.dim}); pass context=[..., {self.kv_dim}]"
            )
        if crosses and self.rotary is not None:
            raise CompositionError(
                "rotary positions relate the queries and keys of one text; cross-attention has "
                "two: build its module with rotary=False"
            )
        if cache is not None and x.ndim == 2:
            raise CompositionError(
                f"x {list(x.shape)} is packed, and a cache keeps one row per text; decode with "
                f"[b, s, {self.dim}]"
            )
        if cache is not None and cache.sealed and context is not None:
            _check_same_context(context, cache)
        _check_packing(x, context, seqlens)

    def _check_input(self, name: str, tensor: Tensor, width: int, label: str) -> None:
        check_tensor(name, tensor)
        if tensor.ndim not in (2, 3) or tensor.shape[-1] != width:
            raise CompositionError(
                f"{name} {list(tensor.shape)}: give [b, s, {width}], or packed [t, {width}] with "
                f"seqlens; the module was built with {label}={width}"
            )
        weight = self.k_proj.weight if name == "context" else self.q_proj.weight
        mixed = tensor.dtype != weight.dtype
        if mixed and not torch.is_autocast_enabled(tensor.device.type):
            raise CompositionTypeError(
                f"{name} is {tensor.dtype}, the module's weights are {weight.dtype}; cast one of "
                "them, or run under torch.autocast"
            )
        if tensor.device != weight.device:
            raise CompositionError(
                f"{name} is on {tensor.device}, the module on {weight.device}; move one of them"
            )


def _axis(name: str, value: int) -> int:
    return check_int(name, value, 1, _WIDEST)


def _linear(
    name: str,
    width: int,
    out: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    try:
        return nn.Linear(width, out, bias, device, dtype)
    except RuntimeError as error:
        raise CompositionError(
            f"{name} has {width:,} x {out:,} weights, for which there is no memory; give fewer or "
            "smaller heads"
        ) from error


def _head_dim(dim: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return _axis("head_dim", head_dim)
    if dim % num_heads:
        raise CompositionError(
            f"dim={dim} does not divide into num_heads={num_heads} heads; change one of them, or "
            "give head_dim="
        )
    return dim // num_heads


def _rotary(given: bool | Rotary, head_dim: int) -> Rotary | None:
    if not isinstance(given, (bool, Rotary)):
        raise CompositionTypeError(f"rotary={shown(given)}; give True, False or a Rotary")
    rotary = given if isinstance(given, Rotary) else Rotary() if given else None
    if rotary is not None:
        rotary.dims(head_dim)
    return rotary


def _computed_dtype(source: Tensor) -> torch.dtype:
    kind = source.device.type
    autocast = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else source.dtype


def _heads(projected: Tensor, count: int) -> Tensor:
    return rearrange(projected, "... (n d) -> ... n d", n=count)


def _into(form: Layout, heads: Tensor) -> Tensor:
    """Bring [b s n d] or [t n d] into a layout of its kind."""
    return (TND if form.packed else BSND).convert(heads, form)


def _out_of(form: Layout, heads: Tensor, count: int) -> Tensor:
    """Undo `_into`."""
    return form.convert(heads, TND if form.packed else BSND, count)


def _check_pair(x: Tensor, context: Tensor) -> None:
    if x.ndim != context.ndim or (x.ndim == 3 and x.shape[0] != context.shape[0]):
        raise CompositionError(
            f"x {list(x.shape)} and context {list(context.shape)}: give both as [b, s, ...] with "
            "one batch size, or both packed"
        )


def _check_same_context(context: Tensor, cache: KVCache) -> None:
    if context.shape[1] != cache.length:
        raise CompositionError(
            f"context {list(context.shape)}, but {cache} holds the keys of {cache.length} "
            "positions; a cache serves one context (reset() makes it ready for another)"
        )


def _check_packing(x: Tensor, context: Tensor | None, seqlens: SeqLens | None) -> None:
    if seqlens is None and x.ndim == 2:
        raise CompositionError(
            f"x {list(x.shape)} is packed: say where its sequences end, seqlens=ak.SeqLens([...]); "
            "or give [b, s, dim]"
        )
    if seqlens is None:
        return
    if not isinstance(seqlens, SeqLens):
        raise CompositionTypeError(
            f"seqlens={shown(seqlens)}: wrap the lengths as SeqLens(lengths), or "
            "SeqLens.from_cu_seqlens(cumulative): the two are not guessed apart"
        )
    if x.ndim == 3:
        raise CompositionError(
            f"x {list(x.shape)} has a batch axis and takes no seqlens; pack it as [t, dim], or "
            "say lengths inside a row with a mask (masks.Documents, masks.Padding)"
        )
    if context is None and seqlens.kv != seqlens.q:
        raise CompositionError(
            f"{seqlens}: in self-attention every sequence has as many keys as queries; give "
            "SeqLens(lengths), or a context"
        )
    if not is_tracing():  # where the plan is read, outside of the trace, this is checked too
        seqlens.check_totals(x.shape[0], (x if context is None else context).shape[0])
