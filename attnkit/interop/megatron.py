"""`CoreAttention`: the attention of Megatron-core and MindSpeed, computed by attnkit.

For the submodule `core_attention` of a layer's spec (`SelfAttentionSubmodules`); its constructor
and its call are those of Megatron-core's `DotProductAttention` (read with 0.16.1), which are also
those of MindSpeed's `CustomDotProductAttention`. Nothing of Megatron is imported: configurations
and enumerations are asked for their fields and names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.flash_core import window_mask
from attnkit.interop.host import ints_on_host
from attnkit.interop.torch.reading import terms_of
from attnkit.layouts import SeqLens
from attnkit.masks import Mask
from attnkit.pse import Pse

__all__ = ["CoreAttention"]

_KINDS = ("no_mask", "padding", "causal", "padding_causal", "arbitrary")


class CoreAttention(nn.Module):
    """Core attention of a Megatron layer: heads ``[s b n d]`` in, ``[s b n*d]`` out.

    Packed (`packed_seq_params`, qkv_format "thd"): ``[t n d]`` in, ``[t n*d]`` out. Of the
    configuration it reads `attention_dropout`, `window_size` (left and right, ends included:
    ``(W, 0)`` keeps ``W + 1`` keys), `window_attn_skip_freq` and `softmax_type`: a sink of 0
    ("off-by-one"), or one that is learned, the parameter `softmax_offset`. Query groups follow
    from the shapes, so that tensor parallelism needs nothing. Context parallelism is refused, as
    in Megatron's own.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(
    ...     attention_dropout=0.0, window_size=None, softmax_type="vanilla", num_attention_heads=2
    ... )
    >>> kind = SimpleNamespace(name="causal")
    >>> core = CoreAttention(config, 1, kind, "self")
    >>> x = torch.randn(5, 1, 2, 8)
    >>> core(x, x, x, None).shape
    torch.Size([5, 1, 16])
    """

    softmax_offset: Tensor | None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if getattr(config, "context_parallel_size", 1) != 1:
            raise CompositionError(
                f"context_parallel_size={config.context_parallel_size}; CoreAttention sees whole "
                "texts, set it to 1"
            )
        self.config = config
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.softmax_scale = softmax_scale
        rate = config.attention_dropout if attention_dropout is None else attention_dropout
        self.attention_dropout = nn.Dropout(rate)  # a module, which Megatron looks for
        self.window_size = (-1, -1)
        if _has_window(config, layer_number):
            self.window_size = tuple(config.window_size)
        self._make_offset(pg_collection)

    def _make_offset(self, pg_collection: Any) -> None:
        """Make the sink: `softmax_offset`, one logit for each head of this process."""
        kind = getattr(self.config, "softmax_type", "vanilla")
        if kind not in ("vanilla", "off-by-one", "learnable"):
            raise CompositionError(
                f"softmax_type={shown(kind)}; it is vanilla, off-by-one or learnable"
            )
        if kind == "vanilla":
            self.register_parameter("softmax_offset", None)
            return
        ranks = 1 if pg_collection is None else pg_collection.tp.size()
        offset = torch.zeros(self.config.num_attention_heads // ranks)
        if kind == "off-by-one":
            self.register_buffer("softmax_offset", offset, persistent=False)
            return
        learned = nn.Parameter(offset.to(getattr(self.config, "params_dtype", None)))
        self.register_parameter("softmax_offset", learned)
        if getattr(self.config, "perform_initialization", False):
            self.config.init_method(learned)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend; `attn_mask_type`, where it is given, stands for that of the layer.

        By its name: "no_mask"; "causal", for as many queries as keys, where `attention_mask` says
        the same and is not read; "padding" and "arbitrary", whose `attention_mask` is a bool
        tensor ``[b 1 1|s s]``, True = dropped; "padding_causal", both. `attention_bias`
        ``[1|b n s s]`` is added after the scale, and trains. `packed_seq_params` says where
        documents end (`cu_seqlens_q`, `cu_seqlens_kv`).
        """
        seqlens = None if packed_seq_params is None else _seqlens(packed_seq_params)
        kind = getattr(
            self.attn_mask_type if attn_mask_type is None else attn_mask_type, "name", None
        )
        if kind not in _KINDS:
            raise CompositionTypeError(
                f"attn_mask_type={shown(attn_mask_type or self.attn_mask_type)}; it is Megatron's "
                f"AttnMaskType: {', '.join(_KINDS)}"
            )
        mask, bias = self._terms(kind, attention_mask, seqlens is not None)
        if seqlens is None and mask is not None and len(query) != len(key) and "causal" in kind:
            raise CompositionError(
                f"attn_mask_type {kind} with {len(query)} queries and {len(key)} keys: Megatron "
                "does not say which of them are last; give attention_mask, of type arbitrary"
            )
        if attention_bias is not None:
            found = terms_of(attention_bias, keep=True, kv_len=key.shape[0])
            mask = found.mask if mask is None else mask & found.mask
            bias = found.bias
        heads = query, key, value
        if seqlens is None:
            heads = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        output = attention(
            *heads,
            mask=mask,
            pse=bias,
            layout="BSND" if seqlens is None else "TND",
            seqlens=seqlens,
            scale=self.softmax_scale,
            dropout=self.attention_dropout.p if self.training else 0.0,
            sink=self.softmax_offset,
        )
        return output.flatten(-2) if seqlens is not None else output.flatten(-2).transpose(0, 1)

    def _terms(
        self, kind: str, attention_mask: Tensor | None, packed: bool
    ) -> tuple[Mask | None, Pse | None]:
        """Return the set that the kind of mask, the window and the mask tensor are."""
        mask = window_mask("causal" in kind, self.window_size)
        if kind in ("no_mask", "causal") or (packed and kind != "arbitrary"):
            return mask, None  # in a packed batch there is no padding
        if attention_mask is None or attention_mask.dtype != torch.bool:
            raise CompositionTypeError(
                f"attn_mask_type is {kind}, attention_mask={shown(attention_mask)}; give a bool "
                "tensor [b, 1, 1 or s, s], True = dropped"
            )
        if packed:
            raise CompositionError("packed documents and an arbitrary mask: give one of them")
        read = terms_of(attention_mask, keep=False).mask
        return read if mask is None else mask & read, None


def _has_window(config: Any, layer_number: int) -> bool:
    """As Megatron's `is_layer_window_attention`: every n-th layer, or those named, have none."""
    if getattr(config, "window_size", None) is None:
        return False
    skips: int | Sequence[int] | None = getattr(config, "window_attn_skip_freq", None)
    if skips is None:
        return True
    return layer_number % skips != 0 if isinstance(skips, int) else bool(skips[layer_number - 1])


def _seqlens(params: Any) -> SeqLens:
    """Return the lengths of packed documents."""
    if params.qkv_format != "thd":
        _refuse(f"qkv_format={shown(params.qkv_format)}; packed_seq_params are of format thd")
    if getattr(params, "local_cp_size", None) not in (None, 1):
        _refuse(f"local_cp_size={params.local_cp_size}; CoreAttention sees whole texts")
    rows = _ends(params, "cu_seqlens_q")
    alike = params.cu_seqlens_kv is None or params.cu_seqlens_kv is params.cu_seqlens_q
    return SeqLens.from_cu_seqlens(rows, None if alike else _ends(params, "cu_seqlens_kv"))


def _ends(params: Any, name: str) -> tuple[int, ...]:
    """Return where documents end, which must be where their tokens in memory do."""
    given, padded = getattr(params, name), getattr(params, f"{name}_padded", None)
    ends = ints_on_host(name, given)
    if padded is not None and padded is not given and ints_on_host(name, padded) != ends:
        _refuse(f"{name}_padded: documents with gaps between them; pack them end to end")
    return ends


def _refuse(told: str) -> NoReturn:
    raise CompositionError(told)
