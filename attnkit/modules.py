"""`MultiHeadAttention`: projections, rotary positions and a cache around `Attention`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from attnkit import layouts
from attnkit.arguments import check_bool
from attnkit.as_torch import AsTorch
from attnkit.attend import Asked, is_tracing
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput
from attnkit.cache import KVCache
from attnkit.decoding import (
    attend_rows,
    next_positions,
    next_rows,
    rows_of_context,
    rows_of_text,
    unpadded,
)
from attnkit.display import Text
from attnkit.errors import CompositionError
from attnkit.extra_key import with_extra_key
from attnkit.inputs import LayerInputs
from attnkit.layouts import BSND, TND, Layout, SeqLens
from attnkit.masks import Mask
from attnkit.memory import padded
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.shards import Shards, as_shards, telling
from attnkit.planner import Plan
from attnkit.planner.scoring import SCORE_WITH_CACHE, ScoreFunction
from attnkit.projections import (
    Norm,
    Projections,
    axis,
    computed_like,
    gate_size,
    head_size,
    heads_of,
    rotary_of,
)
from attnkit.pse import Pse
from attnkit.rotary import Rotary
from attnkit.rotary import positions as counted
from attnkit.rotary import positions_in_each as counted_in_each
from attnkit.sharded_cache import ShardedCache, sharded_step
from attnkit.static import StaticCache, static_step

__all__ = ["MultiHeadAttention"]

Three = tuple[Tensor, Tensor, Tensor]


class MultiHeadAttention(AsTorch):
    """Multi-head attention: ``out(Attention(q(x), k(context), v(context)))``.

    ``x`` is ``[b s dim]``, or packed ``[t dim]`` with `seqlens`; `context` is the same with
    `kv_dim` (default `dim`) and makes it cross-attention; the output has the form of ``x``.
    Any dtype of `Attention`, which also documents `mask`, `pse`, `dropout`, `scale`,
    `softcap`, `score_fn`, `deterministic`, `memory_limit`, `sink` and `backend`.

    - `num_kv_heads`: fewer key heads than query heads (GQA; 1 is MQA).
    - `head_dim`: default ``dim / num_heads``. `v_head_dim`: of values, where it differs (MLA).
    - `v_dim`: features of the tokens that values are made of, where these are others than those of
      the keys (`values` of a call) and differ in width.
    - `extra_key`: a key and a value of the layer's own, which every query sees besides those of
      the tokens (`add_bias_kv` of `nn.MultiheadAttention`).
    - `bias`: True for all projections, or the set of those that have one, such as
      ``{"q", "k", "v"}``; the others are "out" and "gate".
    - `qk_norm`: norms `q_norm` and `k_norm` of the heads before they turn: "rms" or "layer" over
      each head (Qwen3, Gemma-3), "rms_whole" over all of them (OLMo-2), or a function that makes
      a module for a head size.
    - `gate`: heads times ``sigmoid(gate_proj(x))`` before `out_proj`: one number for each head,
      "head", or for each of its dimensions, "elementwise" (Qwen3-Next).
    - `layout`: how heads are handed to `Attention` where ``x`` has its kind, dense or packed.
      The other kind runs all the same, as BSND or TND.
    - `rotary`: True for ``Rotary()``, or a `Rotary`.

    `q_proj`, `k_proj`, `v_proj`, `out_proj` and `gate_proj` are black boxes: any module that
    returns as many numbers can take their place, adapted, quantised or fused.

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
    >>> qwen3 = MultiHeadAttention(
    ...     32, 4, head_dim=16, qk_norm="rms", rotary=Rotary(1e6), mask=masks.Causal()
    ... )
    >>> qwen3(x).shape
    torch.Size([2, 6, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kv_dim: int | None = None,
        v_dim: int | None = None,
        bias: bool | Collection[str] = False,
        qk_norm: Norm = None,
        gate: Literal["head", "elementwise"] | None = None,
        extra_key: bool = False,
        rotary: bool | Rotary = False,
        mask: Mask | None = None,
        pse: Pse | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
        score_fn: ScoreFunction | None = None,
        deterministic: bool = False,
        memory_limit: int | None = None,
        sink: bool = False,
        backend: str = "auto",
        layout: str = "BSND",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = axis("dim", dim)
        self.kv_dim = axis("kv_dim", dim if kv_dim is None else kv_dim)
        self.v_dim = axis("v_dim", self.kv_dim if v_dim is None else v_dim)
        size = head_size(dim, axis("num_heads", num_heads), head_dim)
        self.v_head_dim = axis("v_head_dim", size if v_head_dim is None else v_head_dim)
        axis("num_heads * head_dim", num_heads * size)
        axis("num_heads * v_head_dim", num_heads * self.v_head_dim)
        gated = gate_size(gate, self.v_head_dim)
        names = ("q", "k", "v", "out", "gate")[: 5 if gated else 4]
        make = Projections.of(bias, names, device, dtype)
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
            score_fn=score_fn,
            deterministic=deterministic,
            memory_limit=memory_limit,
            backend=backend,
        ).to(device=device)
        self.rotary = rotary_of(rotary, self.attention.head_dim)
        self._make_projections(make, gated, qk_norm)
        plain = softcap is None and score_fn is None
        self.extra_k, self.extra_v = self._extra(make, check_bool("extra_key", extra_key), plain)

    def _make_projections(self, make: Projections, gated: int, qk_norm: Norm) -> None:
        """Make the projections and the norms; a gate of 0 numbers for each head is none."""
        heads, size = self.attention.num_heads, self.attention.head_dim
        kv_heads = self.attention.num_kv_heads
        self.q_proj: nn.Module = make.linear("q", self.dim, heads * size)
        self.k_proj: nn.Module = make.linear("k", self.kv_dim, kv_heads * size)
        self.v_proj: nn.Module = make.linear("v", self.v_dim, kv_heads * self.v_head_dim)
        self.out_proj: nn.Module = make.linear("out", heads * self.v_head_dim, self.dim)
        self.q_norm = make.norm(qk_norm, heads, size)
        self.k_norm = make.norm(qk_norm, kv_heads, size)
        self.gate_proj = make.linear("gate", self.dim, heads * gated) if gated else None

    def _extra(
        self, make: Projections, wanted: bool, plain: bool
    ) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return the layer's own key and value, of scores that are `plain`; None if unwanted."""
        if wanted and not plain:
            raise CompositionError(
                "extra_key=True with a softcap or a score_fn: what these do to the score of a key "
                "that has no position is not defined; leave one of them out"
            )
        kv_heads, sizes = self.attention.num_kv_heads, (self.attention.head_dim, self.v_head_dim)
        key, value = (make.own(kv_heads, size) if wanted else None for size in sizes)
        return key, value

    @overload
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        values: Tensor | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
        cache: KVCache | StaticCache | ShardedCache | None = None,
        positions: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        values: Tensor | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
        cache: KVCache | StaticCache | ShardedCache | None = None,
        positions: Tensor | None = None,
        return_stats: Literal[True],
    ) -> AttentionOutput: ...

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        values: Tensor | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
        cache: KVCache | StaticCache | ShardedCache | None = None,
        positions: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend from `x` to itself, or to `context`; the output has the form of `x`.

        A call-time `mask` is intersected with the module's, a `pse` is added. With a `cache`,
        `x` holds the next tokens and attends to all so far; masks and biases still speak of
        the whole text, by its positions, and each step takes its rows. The outputs equal those
        of one call with the whole text, or `CompositionError` says why they cannot. In
        cross-attention the first call with an empty cache stores `context`, and later calls
        need not give it.

        `values` are the tokens that values are made of, one for each that keys are made of, where
        these are others, as where positions are added to queries and keys alone (DETR):
        ``layer(x + where, values=x)``.

        `positions` are what `rotary` turns by: ``[s]``, or ``[b, s]`` where texts differ (with
        `Rotary.sections` one for each axis, ``[a, s]`` or ``[a, b, s]``); packed ``[t]``; with a
        cache those of the new tokens. By default every sequence counts from 0. They are data: in
        a compiled graph other numbers are the same graph. Texts that are padded on the left:

            exists = tokens.attention_mask
            layer(x, mask=masks.Padding.of(exists), positions=exists.cumsum(1) - 1)

        and the same mask with every token that is appended (`Padding.of` says which keys of the
        prompt do not exist, however long the text grows).

        With `shards` (`attnkit.parallel`), `x` has the tokens of this process and `context` its
        part of that one; masks and biases speak of the whole text, lengths and the positions that
        `rotary` turns by come from the shards.

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
        given = LayerInputs(x, context, mask, pse, seqlens, cache, positions, values, shards)
        spread = cache.shards if isinstance(cache, ShardedCache) else as_shards(shards)
        with telling(spread):
            return self._answer(given.read(), return_stats)

    if TYPE_CHECKING:  # what a call returns is what `forward` does
        __call__ = forward

    def _answer(self, given: LayerInputs, return_stats: bool) -> Tensor | AttentionOutput:
        self._check(given)
        cache = given.cache
        if cache is None:
            found = self._attend(given, return_stats)
        elif isinstance(cache, ShardedCache):
            found = self._decode_sharded(given, cache)
        elif isinstance(cache, StaticCache) or (given.context is None and not cache.sealed):
            found = self._decode(given, cache)
        else:
            found = self._decode_context(given, cache)
        heads = found.output
        if self.gate_proj is not None:
            gate = self.gate_proj(given.x).sigmoid().to(heads.dtype)
            heads = heads * torch.unflatten(gate, -1, (heads.shape[-2], -1))
        output = self.out_proj(heads.flatten(-2))
        return AttentionOutput(output, found.stats) if return_stats else output

    @overload
    def plan(
        self,
        x: Tensor,
        context: Tensor | None = ...,
        *,
        values: Tensor | None = ...,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: None = ...,
    ) -> Plan: ...

    @overload
    def plan(
        self,
        x: Tensor,
        context: Tensor | None = ...,
        *,
        values: Tensor | None = ...,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: Shards,
    ) -> ParallelPlan: ...

    def plan(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        values: Tensor | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
    ) -> Plan | ParallelPlan:
        """Return the plan that `forward` would run without a cache; nothing is projected.

        With `shards` it is that of all ranks; nothing is exchanged.

        >>> layer = MultiHeadAttention(32, 4)
        >>> layer.plan(torch.randn(2, 6, 32)).request.num_heads
        4
        """
        return self._plan(LayerInputs(x, context, mask, pse, seqlens, values=values, shards=shards))

    def _plan(self, given: LayerInputs) -> Plan | ParallelPlan:
        given = given.read()
        self._check(given)
        tokens = {"q": given.x, "k": given.source, "v": given.of_values}
        heads = (self._heads(which, of, computed_like) for which, of in tokens.items())
        asked, _, laid = self._asked(given, heads)
        if given.shards is not None:
            return self.attention._sharded_plan(asked, *laid, given.seqlens, given.shards)
        return self.attention._plan(asked, *laid, self.attention.sink, given.seqlens)

    def explain(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        values: Tensor | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
    ) -> Text:
        """Return the report of `plan`: what runs, at what price, and why.

        >>> print(MultiHeadAttention(32, 4).explain(torch.randn(2, 6, 32)).splitlines()[0])
        attention on backend 'tiled': the composition itself, no fused call
        """
        given = LayerInputs(x, context, mask, pse, seqlens, values=values, shards=shards)
        return self._plan(given).explain()

    def extra_repr(self) -> str:
        """Describe what the submodules do not show.

        >>> MultiHeadAttention(32, 4, kv_dim=8).extra_repr()
        'dim=32, kv_dim=8'
        """
        return ", ".join(f"{name}={text}" for name, text in self._said().items())

    def _repr_html_(self) -> str:
        """Return the composition for a notebook, with pictures of mask and bias."""
        from attnkit.shown import page

        inner = self.attention
        return page(self, self._said() | inner._said(), inner.mask, inner.pse)

    def _said(self) -> dict[str, str]:
        """Return the arguments around the composition, defaults left out."""
        said = {
            "dim": self.dim,
            "kv_dim": None if self.kv_dim == self.dim else self.kv_dim,
            "v_dim": None if self.v_dim == self.kv_dim else self.v_dim,
            "extra_key": None if self.extra_k is None else True,
            "rotary": self.rotary or None,
        }
        return {name: str(value) for name, value in said.items() if value is not None}

    # -- the three ways to attend, each from x to [..., n, d] ----------------------------

    def _attend(self, given: LayerInputs, return_stats: bool) -> AttentionOutput:
        heads = self._project(given, 0)
        return self._attend_heads(given, heads, return_stats)

    def _attend_heads(
        self,
        given: LayerInputs,
        heads: Three,
        return_stats: bool,
        rows: tuple[Mask, Pse | None] | None = None,
    ) -> AttentionOutput:
        """Attend with heads that are projected; with `rows` in place of mask and bias."""
        asked, form, laid = self._asked(given, heads)
        if rows is not None:
            asked = asked._replace(masks=(None, rows[0]), biases=(None, rows[1]))
        stats = return_stats or self.extra_k is not None
        found = self.attention._attend(asked, *laid, given.seqlens, stats, given.shards)
        output = form.convert(found.output, TND if form.packed else BSND, heads[0].shape[-2])
        return self._with_extra(AttentionOutput(output, found.stats), heads[0], given.shards)

    def _decode(self, given: LayerInputs, cache: KVCache | StaticCache) -> AttentionOutput:
        if isinstance(cache, StaticCache):
            where = cache.positions(given.x) if given.positions is None else given.positions
            heads = self._project(given._replace(positions=where), 0)
            found = static_step(self.attention, cache, self._composed(given), heads)
            return self._with_extra(found, heads[0])
        packed = given.seqlens
        counts, before = (given.x.shape[1],) if packed is None else packed.q, cache.lengths
        rows = next_rows(cache, *self._composed(given), counts, given.x)
        if len(cache.texts) > 1 and given.positions is None:
            given = given._replace(positions=next_positions(cache, counts, given.x))
        query, key, value = self._project(given, cache.length)
        keys, values = cache.append(key, value, None if packed is None else counts)
        try:
            rows_in = query if packed is None else padded(query, counts)
            found = attend_rows(self.attention, rows_in, keys, values, *rows)
        except BaseException:
            cache.truncate(before or 0)  # a step that failed has not happened
            raise
        return self._with_extra(found if packed is None else unpadded(found, counts), query)

    def _decode_sharded(self, given: LayerInputs, cache: ShardedCache) -> AttentionOutput:
        heads = self._project(given, cache.length)
        if given.shards is None:
            found = sharded_step(self.attention, cache, self._composed(given), heads)
            return self._with_extra(found, heads[0])
        rows = rows_of_text(*self._composed(given), 0, given.shards.sharding.length)
        cache.append(*heads[1:])  # of the prompt
        try:
            return self._attend_heads(given, heads, True, rows)
        except BaseException:
            cache.reset()
            raise

    def _decode_context(self, given: LayerInputs, cache: KVCache) -> AttentionOutput:
        query, source = self._heads("q", given.x), given.source
        fresh = not cache.sealed
        if fresh:
            cache.seal(self._heads("k", source), self._heads("v", given.of_values))
        keys, values = cache.read()
        start, stop = cache.queries, cache.queries + given.x.shape[1]
        try:
            rows = rows_of_context(*self._composed(given), start, stop, cache.length)
            found = attend_rows(self.attention, query, keys, values, *rows)
        except BaseException:
            if fresh:
                cache.reset()
            raise
        cache.answered(stop - start)
        return self._with_extra(found, query)

    def _with_extra(
        self, found: AttentionOutput, query: Tensor, shards: Shards | None = None
    ) -> AttentionOutput:
        """Return the same with the layer's own key, if it has one."""
        if self.extra_k is None or self.extra_v is None:
            return found
        composed = self.attention.composition
        scale = self.attention.head_dim**-0.5 if composed.scale is None else composed.scale
        drops = composed.dropout if self.training else 0.0
        return with_extra_key(found, query, self.extra_k, self.extra_v, scale, drops, shards)

    # -- parts ---------------------------------------------------------------------------

    def _asked(self, given: LayerInputs, heads: Iterable[Tensor]) -> tuple[Asked, Layout, Three]:
        """Return what a call asks for, the layout of its heads, and the heads in it."""
        asked = self.attention._asked(given.mask, given.pse)
        form, plain = layouts.get(self.attention.layout), BSND if given.seqlens is None else TND
        if form.packed != plain.packed:
            asked, form = asked._replace(layout=plain.name), plain
        query, key, value = (plain.convert(one, form) for one in heads)
        return asked, form, (query, key, value)

    def _composed(self, given: LayerInputs) -> tuple[Mask, Pse | None]:
        """Return the module's mask and bias with those of the call."""
        own, mask, pse = self.attention.composition, given.mask, given.pse
        if is_tracing() and (mask is not None or (pse is not None and own.pse is not None)):
            raise CompositionError(
                "inside of torch.compile a call with a cache takes no mask= and adds no pse=: "
                "build the module with them"
            )
        both = own.pse + pse if own.pse is not None and pse is not None else own.pse or pse
        return own.mask if mask is None else own.mask & mask, both

    def _heads(self, which: str, tokens: Tensor, form: Callable[..., Tensor] = heads_of) -> Tensor:
        """Return the heads ``[..., n, d]`` of queries, keys or values: "q", "k" or "v"."""
        core = self.attention
        count = core.num_heads if which == "q" else core.num_kv_heads
        size = self.v_head_dim if which == "v" else core.head_dim
        norm = None if which == "v" else getattr(self, f"{which}_norm")
        return form(getattr(self, f"{which}_proj"), norm, tokens, count, size)

    def _project(self, given: LayerInputs, start: int) -> Three:
        """Return queries, keys and values, turned by the positions; by default they count on."""
        query, key = self._heads("q", given.x), self._heads("k", given.source)
        if self.rotary is not None:
            where, seqlens, longest = given.positions, given.seqlens, None
            if where is None:
                tokens, device = given.x.shape[-2], given.x.device
                if given.shards is not None:
                    where, longest = given.shards.places(device, tokens)
                elif seqlens is None:
                    where = counted((tokens,), start, device)
                else:
                    where = counted_in_each(seqlens, tokens, device)
            query, key = (self.rotary.rotate(one, where, longest) for one in (query, key))
        return query, key, self._heads("v", given.of_values)

    def _check(self, given: LayerInputs) -> None:
        """Raise for what cannot be attended to, before anything is computed."""
        widths = self.dim, self.kv_dim, self.v_dim
        given.check_widths(widths, (self.q_proj, self.k_proj, self.v_proj))
        given.check_forms()
        given.check_rotary(self.rotary)
        if given.cache is not None and self.attention._composition.score_fn is not None:
            raise CompositionError(SCORE_WITH_CACHE)
