"""MindSpeed's fused attention, and what the flags of its training scripts mean.

    from attnkit.interop.mindspeed import npu_fusion_attention
    # was: from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention

The function is read and planned as those of `attnkit.interop.npu`; MindSpeed is not needed.

Sources: mindspeed/ops/fusion_attention_v2.py, and generate_mask.py and adaptor.py of
mindspeed/core/transformer/flash_attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnkit.arguments import check_bool, check_choice, check_int
from attnkit.errors import CompositionError
from attnkit.interop.npu import FusedResult, run_call
from attnkit.kernel.sizes import UNBOUNDED
from attnkit.masks import Band, Causal, Lifted, Mask, SlidingWindow

__all__ = ["npu_fusion_attention", "read_flags"]

Ints = Sequence[int] | Tensor

_TYPES = {
    "causal": "MindSpeed makes the mask",
    "general": "the model passes it",
}


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Ints | None = None,
    kv_start_idx: Ints | None = None,
) -> FusedResult:
    """Attend as ``mindspeed.ops.fusion_attention_v2.npu_fusion_attention`` does.

    With `keep_prob` below 1 there is dropout here; MindSpeed's own binding loses it.

    >>> import torch
    >>> x = torch.randn(6, 1, 32)
    >>> npu_fusion_attention(x, x, x, 2, "SBH", scale=0.25).attention_out.shape
    torch.Size([6, 1, 32])
    """
    return run_call(locals(), "mindspeed")


def read_flags(
    *,
    seq_length: int,
    use_flash_attn: bool = False,
    use_fusion_attn_v2: bool = False,
    attention_mask_type: str = "causal",
    sparse_mode: int = 0,
    pre_tockens: int = 65536,
    next_tockens: int = 0,
) -> Lifted:
    """Return the mask that a training script's flags give every layer, with how it comes about.

    Names and defaults are those of ``--use-flash-attn``, ``--sparse-mode``, ``--pre-tockens`` and
    the like. With flash attention and a causal mask the sparse mode becomes 2, and the tokens are
    not read: a window asked for by ``--pre-tockens`` is lost. Without flash attention they are
    read, and count distances: W behind keeps W + 1 keys.

    Raises `CompositionError` where the flags do not say the mask, and where the op would reject the
    call or compute what is not defined.

    >>> print(read_flags(seq_length=8192, use_flash_attn=True, pre_tockens=1024))
    Causal(align='top_left'), of MindSpeed's flags: --use-flash-attn and a causal mask set
    sparse_mode=2; --pre-tockens 1024 is not read: no window
    >>> read_flags(seq_length=8192, pre_tockens=1024).mask
    SlidingWindow(1025)
    """
    check_int("seq_length", seq_length, 1)
    check_choice("attention_mask_type", attention_mask_type, _TYPES)
    ends = (
        check_int("pre_tockens", pre_tockens, None),
        check_int("next_tockens", next_tockens, None),
    )
    if attention_mask_type == "general":
        raise CompositionError(
            "attention_mask_type='general': the model passes its mask, and the flags do not say "
            "it; read it with masks.from_torch(mask, keep=False)"
        )
    if not check_bool("use_flash_attn", use_flash_attn):
        told = f"without --use-flash-attn, {ends[0]} behind and {ends[1]} ahead, both included"
        return Lifted(_window(*ends, seq_length), "MindSpeed's flags", (told,))
    reaches = ends[0] >= seq_length - 1
    if not check_bool("use_fusion_attn_v2", use_fusion_attn_v2):
        lost = () if reaches else (f"--pre-tockens {ends[0]} is not read: no window",)
        parts = ("--use-flash-attn and a causal mask set sparse_mode=2", *lost)
        return Lifted(Causal("top_left"), "MindSpeed's flags", parts)
    return _of_whole_mask(seq_length, sparse_mode, *ends)


def _of_whole_mask(seq_length: int, sparse_mode: int, pre: int, ahead: int) -> Lifted:
    """With version 2 the mask is a causal one of all cells, whatever the sparse mode."""
    check_int("sparse_mode", sparse_mode, 0)
    source, whole = "MindSpeed's flags", f"a causal mask of {seq_length} x {seq_length} cells"
    if sparse_mode in (2, 3, 4) and seq_length != 2048:
        raise CompositionError(
            f"--use-fusion-attn-v2 with --sparse-mode {sparse_mode} passes {whole}, where this "
            "mode reads one of 2048 x 2048, and the op rejects it; leave --sparse-mode at 0"
        )
    if sparse_mode == 0 and (pre < seq_length - 1 or ahead < 0):
        raise CompositionError(
            f"--use-fusion-attn-v2 with --pre-tockens {pre} --next-tockens {ahead} passes {whole}; "
            "in mode 0 the window only skips tiles, so what lies outside of it is computed or not "
            "as tiles fall; leave the tokens at 65536 (or seq-length) and 0"
        )
    if sparse_mode == 4:
        told = f"sparse_mode=4: {pre} behind and {ahead} ahead, both included"
        return Lifted(_window(pre, ahead, seq_length), source, (told,))
    if sparse_mode > 4:
        raise CompositionError(
            f"--sparse-mode {sparse_mode} takes a prefix or cut sequences, which no flag says"
        )
    return Lifted(Causal("top_left"), source, (f"{whole}, as sparse_mode={sparse_mode} has it",))


def _window(pre: int, ahead: int, length: int) -> Mask:
    """Return the band of some lengths by its shortest name."""
    left = None if pre >= length - 1 else pre
    if ahead == 0:
        return Causal("top_left") if left is None else SlidingWindow(left + 1)
    return Band(left, None if ahead >= length - 1 else ahead)
