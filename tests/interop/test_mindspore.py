"""MindSpore's two functions, against the formulas of its pages."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch

import attnkit as ak
from attnkit.errors import KernelContractError
from attnkit.interop import mindspore as ops
from tests.interop.formulas import near, softmax_attention
from tests.interop.test_flash_attn import drawn
from tests.interop.test_npu import CAUSAL, HEADS, LAYOUTS, UNBOUNDED, bias_of, kept, laid

KINDS = {0: (1, HEADS, 4, 4), 1: (2, HEADS, 4, 4), 2: (HEADS,), 3: (HEADS,)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5])
def test_every_layout_mode_and_bias(layout: str, mode: int) -> None:
    q, k, v = drawn(2, HEADS, 4, 8), drawn(2, 2, 4, 8), drawn(2, 2, 4, 8, seed=1)
    drops = drawn(2, 1, 4, 4) > 0.3
    drops[..., 0] = False
    mask = CAUSAL if mode in (2, 3, 4) else drops
    pre, ahead = (2, 0) if mode == 4 else (UNBOUNDED, UNBOUNDED)
    prefix = [2, 4] if mode == 5 else None
    cells = kept(mode, 4, 4, pre, ahead, mask=mask)
    heads = [laid(x, layout) for x in (q, k, v)]
    for kind, starts in product((None, 0, 1, 2, 3), (None, ([1], [0]))):
        if starts and kind not in (2, 3):
            continue
        pse = None if kind is None else drawn(*KINDS[kind]).abs()
        named = {"pse": pse, "atten_mask": mask, "scale": 0.3, "sparse_mode": mode}
        named |= {"pre_tokens": pre, "next_tokens": ahead, "prefix": prefix}
        named |= {} if kind is None else {"pse_type": kind}
        named |= {} if starts is None else dict(zip(STARTS, starts, strict=True))
        found = ops.speed_fusion_attention(*heads, HEADS, layout, **named)
        bias = bias_of(kind, pse, 4, 4, 1 if starts else 0)
        meant, lse = softmax_attention(q, k, v, cells, scale=0.3, bias=bias, before_scale=kind == 1)
        near(found[0], laid(meant, layout))
        near((found[1] + found[2].log())[..., 0], lse)
        if kind in (None, 1):
            score = ops.flash_attention_score(
                *heads,
                HEADS,
                None if pse is None else pse / 0.3,
                attn_mask=mask,
                prefix=prefix,
                pre_tokens=pre,
                next_tokens=ahead,
                input_layout=layout,
                sparse_mode=mode,
            )
            # A scale of 1: there the formula of the page and of the operator are one.
            bias = None if pse is None else pse / 0.3
            near(score, laid(softmax_attention(q, k, v, cells, scale=1.0, bias=bias)[0], layout))


STARTS = ("q_start_idx", "kv_start_idx")


@pytest.mark.parametrize("mode", [2, 3])
def test_packed(mode: int) -> None:
    lens = (3, 2), (4, 5)
    q, k, v = (drawn(sum(n), h, 8) for n, h in zip((*lens, lens[1]), (HEADS, 2, 2), strict=True))
    ends = [torch.tensor(n).cumsum(0) for n in lens]
    named = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": tuple(ends[1].tolist())}
    named |= {"sparse_mode": mode, "pre_tokens": 10, "next_tokens": 0}
    one = ops.speed_fusion_attention(q, k, v, HEADS, "TND", atten_mask=CAUSAL, scale=0.3, **named)
    two = ops.flash_attention_score(
        q, k, v, HEADS, attn_mask=CAUSAL, scalar_value=0.3, input_layout="TND", **named
    )
    texts = zip(q.split(lens[0]), k.split(lens[1]), v.split(lens[1]), strict=True)
    meant = [
        softmax_attention(
            *(x.transpose(0, 1)[None] for x in own),
            kept(mode, n, m, 0, 0, mask=CAUSAL),
            scale=0.3,
        )[0][0].transpose(0, 1)
        for n, m, own in zip(*lens, texts, strict=True)
    ]
    near(one[0], torch.cat(meant))
    near(two, torch.cat(meant))


def test_what_scales_a_shift_is_told() -> None:
    x, shift = drawn(1, 4, HEADS, 8), drawn(1, HEADS, 4, 4)
    with pytest.warns(UserWarning, match="pse_type=0"):
        found = ops.flash_attention_score(
            x, x, x, HEADS, shift, scalar_value=0.3, input_layout="BSND"
        )
    op = ak.fusion_attention(x, x, x, HEADS, "BSND", pse=shift, scale=0.3)
    near(found, op.attention_out)


def test_decisions_of_the_caller_are_refused() -> None:
    x = torch.zeros(1, 8, 32)
    for how in ({"keep_prob": 0.5}, {"drop_mask": torch.zeros(1, 2, 8, 1, dtype=torch.uint8)}):
        with pytest.raises(KernelContractError, match="draws its own"):
            ops.flash_attention_score(x, x, x, 2, **how)


def test_names_order_and_defaults() -> None:
    recorded = {
        "speed_fusion_attention": "query, key, value, head_num, input_layout, *, pse=None, "
        "padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0, pre_tokens=2147483647, "
        "next_tokens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None, "
        "actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, pse_type=1, "
        "q_start_idx=None, kv_start_idx=None",
        "flash_attention_score": "query, key, value, head_num, real_shift=None, drop_mask=None, "
        "padding_mask=None, attn_mask=None, prefix=None, actual_seq_qlen=None, "
        "actual_seq_kvlen=None, keep_prob=1.0, scalar_value=1.0, pre_tokens=2147483647, "
        "next_tokens=2147483647, inner_precise=0, input_layout='BSH', sparse_mode=0",
    }
    assert sorted(recorded) == ops.__all__ == sorted(ops.__all__)
    for name, text in recorded.items():
        bare = inspect.signature(getattr(ops, name))
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
        found = bare.replace(parameters=plain, return_annotation=inspect.Signature.empty)
        assert str(found) == f"({text})"
