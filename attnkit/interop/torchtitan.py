"""torchtitan's models on attnkit (read with 0.3.0).

Its attention modules have an `inner_attention`, one of three classes: `VarlenAttention` for packed
documents, `ScaledDotProductAttention` for one text in a row, and `FlexAttention`, for masks and
scores as functions of indices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.flash_core import WindowSize, window_mask
from attnkit.interop.host import ints_on_host
from attnkit.interop.torch.sdpa import scaled_dot_product_attention
from attnkit.layouts import SeqLens
from attnkit.planner.scoring import ScoreFunction

__all__ = ["by_functions", "enable", "one_text", "packed"]

Transform = Callable[[Tensor, Tensor], Tensor]


def enable(model: nn.Module) -> tuple[str, ...]:
    """Have the inner attention of every module of a model compute by attnkit; return their names.

    To be called on a model that was built, before it is parallelised or compiled. Modules stay what
    they are, with their configuration: a window ``(W, 0)`` keeps ``W + 1`` keys here too. Raises
    `CompositionError` where there is none.
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"enable got {shown(model)}; give a model of torchtitan")
    found: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {}
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "VarlenAttention" in kinds:
            found[name] = module, partial(packed, module.window_size)
        elif "ScaledDotProductAttention" in kinds:
            found[name] = module, one_text
        elif "FlexAttention" in kinds:
            found[name] = module, by_functions
    if not found:
        raise CompositionError(
            f"{type(model).__name__} has no inner attention of torchtitan: no VarlenAttention, no "
            "ScaledDotProductAttention and no FlexAttention"
        )
    for module, forward in found.values():
        module.forward = forward
    return tuple(found)


def packed(
    window_size: WindowSize,
    q_BLNH: Tensor,
    k_BLNH: Tensor,
    v_BLNH: Tensor,
    *,
    attention_masks: Any,
    scale: float | None = None,
    out_transform: Transform | None = None,
    **known: object,
) -> Tensor:
    """`VarlenAttention.forward`: tensors ``[b s n d]`` whose rows together are packed documents.

    `attention_masks` is torchtitan's `VarlenMetadata`. Where it has offsets on the host
    (``include_host_offsets=True``) nothing waits for a device. Computed in the dtype that is
    given, where torchtitan casts to bfloat16.
    """
    _check(known)
    if not hasattr(attention_masks, "cu_seq_q"):
        raise CompositionTypeError(
            f"attention_masks={shown(attention_masks)}; give a VarlenMetadata, as "
            "create_varlen_metadata_for_document makes it"
        )
    host, cu_q = attention_masks.cu_seq_q_host, attention_masks.cu_seq_q
    rows = ints_on_host("cu_seq_q", cu_q if host is None else host)
    alike = attention_masks.cu_seq_k is cu_q
    keys = None if alike else ints_on_host("cu_seq_k", attention_masks.cu_seq_k)
    batch, length = q_BLNH.shape[:2]
    found = attention(
        *(tensor.flatten(0, 1) for tensor in (q_BLNH, k_BLNH, v_BLNH)),
        mask=window_mask(False, window_size),
        layout="TND",
        seqlens=SeqLens.from_cu_seqlens(rows, keys),
        scale=scale,
        return_stats=True,
    )
    output = found.output.reshape(batch, length, *found.output.shape[1:])
    if out_transform is None:
        return output
    return out_transform(output, found.stats.lse.reshape(output.shape[:3]))


def one_text(
    q_BLNH: Tensor,
    k_BLNH: Tensor,
    v_BLNH: Tensor,
    *,
    attention_masks: object = None,
    scale: float | None = None,
    is_causal: bool = True,
    **known: object,
) -> Tensor:
    """`ScaledDotProductAttention.forward`: tensors ``[b s n d]``, causal unless told otherwise."""
    _check(known)
    if attention_masks is not None:
        raise CompositionError(
            "ScaledDotProductAttention takes no attention_masks, in torchtitan either; packed "
            "documents go to VarlenAttention"
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
    output = scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2)


def by_functions(
    q_BLNH: Tensor,
    k_BLNH: Tensor,
    v_BLNH: Tensor,
    *,
    attention_masks: object,
    score_mod: ScoreFunction | None = None,
    scale: float | None = None,
    out_transform: Transform | None = None,
    **known: object,
) -> Tensor:
    """`FlexAttention.forward`: tensors ``[b s n d]``, a `BlockMask`, which is read as a set."""
    # Not before: torch's module of that name loads its compiler, for seconds.
    from attnkit.interop.flex import flex_attention

    _check(known)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
    output, lse = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=attention_masks,
        scale=scale,
        enable_gqa=True,
        return_lse=True,
    )
    output = output.transpose(1, 2)
    return output if out_transform is None else out_transform(output, lse.transpose(1, 2))


def _check(known: dict[str, object]) -> None:
    """Raise for a keyword that is not understood; numbers of heads are those of the tensors."""
    unknown = sorted(known.keys() - {"enable_gqa"})
    if unknown:
        raise CompositionError(
            f"torchtitan hands {', '.join(unknown)} to the inner attention, which attnkit does not "
            "know; this adapter was read with 0.3.0"
        )
