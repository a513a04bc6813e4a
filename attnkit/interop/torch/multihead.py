"""`MultiheadAttention`: torch's module with its parameters and call, computed by attnkit."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.arguments import check_bool
from attnkit.constants import constant
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.extra_key import with_extra_key
from attnkit.functional import attention
from attnkit.interop.torch.reading import terms_of
from attnkit.masks import Causal, Mask
from attnkit.pse import Pse

__all__ = ["MultiheadAttention"]

_TOP_LEFT = Causal(align="top_left")

Terms = tuple[Mask | None, Pse | None]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, with its arguments, parameters and state, on attnkit.

    ``out_proj(softmax(q @ k.T / sqrt(d) + masks) @ v)``; all that torch's page says of the
    constructor and of `forward` holds here. `replace` puts it into models.

    >>> import torch
    >>> theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    >>> ours = MultiheadAttention(16, 2, batch_first=True)
    >>> ours.load_state_dict(theirs.state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(2, 5, 16)
    >>> found, right = (one(x, x, x, need_weights=False)[0] for one in (ours, theirs))
    >>> torch.allclose(found, right, atol=1e-6)
    True
    """

    weights_wanted = True
    """Whether a call that asks for weights, as it does by default, gets them; see `replace`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        extras = add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        super().__init__(embed_dim, num_heads, dropout, bias, *extras)
        self.called_by_layers()

    def called_by_layers(self) -> None:
        """Have torch's encoder layers call this module, whatever they compute.

        In inference they hand its parameters to one operator of torch, and do not call it, unless
        they hold it for one with separate projections.
        """
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        # As torch's, but by what there is, not by what layers are told.
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output in the form of the query, and the weights or None.

        Inputs are ``[s b dim]``, ``[b s dim]`` with `batch_first`, or ``[s dim]`` of one text. In
        a bool mask True means dropped; a float mask is added to the scores. `attn_mask` is
        ``[q_len kv_len]`` or ``[b*n q_len kv_len]``, `key_padding_mask` ``[b kv_len]``. They are
        read as sets, once for each tensor.

        `need_weights` is slow: all weights are computed, ``[b q_len kv_len]`` (``[b n q_len
        kv_len]`` without `average_attn_weights`), in a computation of their own, and
        the output from them, so that dropout is the same in both. A row that sees no key has
        weights and output 0. `is_causal` is a hint that `attn_mask` is causal; as in torch it is
        believed where neither padding nor weights are asked for.

        Raises `CompositionError` for shapes that do not fit, `CompositionTypeError` for nested
        tensors and other dtypes.
        """
        batched = self._check(query, key, value)
        weighted = check_bool("need_weights", need_weights) and self.weights_wanted
        heads = tuple(self._heads(one, batched) for one in self._projected(query, key, value))
        trusted = is_causal and key_padding_mask is None and not weighted
        terms = self._terms(heads, key_padding_mask, attn_mask, is_causal, trusted)
        weights = None
        if weighted:
            output, weights = self._weighted(heads, *terms)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            output = self._attended(heads, *terms)
        output = output.flatten(-2)
        if not batched:
            output = output[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return self.out_proj(output), weights

    # -- from tokens to heads ------------------------------------------------------------

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Raise for what cannot be projected; return whether there is a batch axis."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor) or tensor.is_nested:
                raise CompositionTypeError(
                    f"{name}={shown(tensor)}; give a tensor (nested tensors come from "
                    "nn.TransformerEncoder with enable_nested_tensor=True: build it with False, "
                    "or use attnkit.interop.torch.replace, which turns that off)"
                )
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        widths = (self.embed_dim, self.kdim, self.vdim)
        alike = query.ndim == key.ndim == value.ndim and query.ndim in (2, 3)
        if not alike or (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
            form = "[b, s, dim]" if self.batch_first else "[s, b, dim]"
            raise CompositionError(
                f"{shapes}: give {form}, or [s, dim] of one text, with {widths[0]}, {widths[1]} "
                f"and {widths[2]} features"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (
            query.ndim == 3 and query.shape[batch] != key.shape[batch]
        ):
            raise CompositionError(f"{shapes}: a key has one value, and all have one batch size")
        return query.ndim == 3

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        packed: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        weights: tuple[Tensor, ...]
        if packed is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, packed, bias).chunk(3, -1)
        else:
            weights = packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        sides = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(*side) for side in sides)

    def _heads(self, flat: Tensor, batched: bool) -> Tensor:
        """Return heads ``[b s n d]``."""
        heads = flat.view(*flat.shape[:-1], self.num_heads, self.head_dim)
        if not batched:
            return heads[None]
        return heads if self.batch_first else heads.transpose(0, 1)

    # -- what the masks say --------------------------------------------------------------

    def _terms(
        self,
        heads: tuple[Tensor, ...],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        trusted: bool,
    ) -> Terms:
        """Return the set of allowed cells and the bias of both masks."""
        (batch, q_len), kv_len = heads[0].shape[:2], heads[1].shape[1]
        if check_bool("is_causal", is_causal) and attn_mask is None:
            raise CompositionError(
                "is_causal=True without attn_mask: it is a hint about attn_mask, as in torch; give "
                "the mask too (nn.Transformer.generate_square_subsequent_mask)"
            )
        given = []
        if key_padding_mask is not None:
            one = "key_padding_mask", key_padding_mask, [(batch, kv_len)]
            padding = _checked(*one if batch > 1 else (*one[:2], [(1, kv_len), (kv_len,)]))
            given.append(terms_of(padding.view(batch, 1, 1, kv_len), keep=False))
        if attn_mask is not None:
            shapes = [(q_len, kv_len), (batch * self.num_heads, q_len, kv_len)]
            cells = _checked("attn_mask", attn_mask, shapes)
            if trusted:
                return _TOP_LEFT, None
            if cells.ndim == 3:
                cells = cells.view(batch, self.num_heads, q_len, kv_len)
            given.append(terms_of(cells, keep=False))
        mask, bias = given[0] if given else (None, None)
        for more, added in given[1:]:
            mask = more if mask is None else mask & more
            bias = bias + added if bias is not None and added is not None else bias or added
        return mask, bias

    # -- attention -----------------------------------------------------------------------

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _attended(self, heads: tuple[Tensor, ...], mask: Mask | None, bias: Pse | None) -> Tensor:
        """Return the output ``[b s n d]``."""
        query, key, value = heads
        zero = _zeros(self.num_heads, query.device) if self.add_zero_attn else None
        run: Any = partial(
            attention,
            query,
            key,
            value,
            mask=mask,
            pse=bias,
            dropout=self._dropout,
            sink=zero,  # a key of zeros, whose score is 0, and its value adds nothing
        )
        own = self._own_key()
        if own is None:
            return cast(Tensor, run())
        found = run(return_stats=True)
        return with_extra_key(found, query, *own, self.head_dim**-0.5, self._dropout).output

    def _own_key(self) -> tuple[Tensor, Tensor] | None:
        """Return `bias_k` and `bias_v` as heads ``[n d]``."""
        if self.bias_k is None or self.bias_v is None:
            return None
        sizes = self.num_heads, self.head_dim
        return self.bias_k.view(sizes), self.bias_v.view(sizes)

    def _weighted(
        self, heads: tuple[Tensor, ...], mask: Mask | None, bias: Pse | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output ``[b s n d]`` and the weights ``[b n q_len kv_len]``."""
        query, key, value = heads
        batch, q_len, kv_len = len(query), query.shape[1], key.shape[1]
        key, value = self._extended(key, value)
        extra, scale = (0, key.shape[1] - kv_len), self.head_dim**-0.5
        scores = torch.einsum("bsnd,btnd->bnst", query * scale, key)
        if bias is not None:
            term = bias.term(
                q_len,
                kv_len,
                scale=scale,
                batch=batch,
                heads=self.num_heads,
                dtype=scores.dtype,
                device=scores.device,
            )
            scores = scores + F.pad(term, extra)
        if mask is not None:
            allowed = mask.materialize(q_len, kv_len, batch, self.num_heads, device=scores.device)
            allowed = F.pad(allowed, extra, value=True)
            empty = ~allowed.any(-1, keepdim=True)
            scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
        weights = torch.softmax(scores, -1)
        if mask is not None:
            weights = weights.masked_fill(empty, 0.0)
        weights = F.dropout(weights, self._dropout)
        return torch.einsum("bnst,btnd->bsnd", weights, value), weights

    def _extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with the module's own and with zeros after them."""
        own, zero = self._own_key(), torch.zeros_like(key[:, :1])
        keys, values = [key], [value]
        if own is not None:
            keys.append(own[0].expand_as(zero))
            values.append(own[1].expand_as(zero))
        if self.add_zero_attn:
            keys.append(zero)
            values.append(zero)
        return torch.cat(keys, 1), torch.cat(values, 1)


@constant
def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, device=device)


def _checked(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """Return a mask tensor of one of the shapes."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise CompositionTypeError(
            f"{name}={shown(mask)}; it is a bool tensor (True = dropped), or a float tensor that "
            "is added to the scores"
        )
    if mask.shape not in shapes:
        told = " or ".join(str(list(shape)) for shape in shapes)
        raise CompositionError(f"{name} {list(mask.shape)}; give {told}")
    return mask
