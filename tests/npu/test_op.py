"""The op itself on NPU tensors: `fusion_attention` and its gradient, argument by argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnkit.errors import KernelContractError
from attnkit.kernel import (
    AttenMask,
    FusionOutput,
    dropout_mask,
    fusion_attention,
    fusion_attention_grad,
)
from tests.npu.device import DEVICE

HEADS, DIM = 4, 16
DENSE = {
    "BSH": (2, 12, HEADS * DIM),
    "SBH": (12, 2, HEADS * DIM),
    "BSND": (2, 12, HEADS, DIM),
    "BNSD": (2, HEADS, 12, DIM),
}
PACKED: dict[str, Any] = {"actual_seq_qlen": [5, 5, 12], "actual_seq_kvlen": [5, 5, 12]}
CUT: dict[str, Any] = {"actual_seq_qlen": [5, 12], "actual_seq_kvlen": [5, 12]}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COMPRESSED = AttenMask.causal().build()
DRAWN = torch.ones(12, 12, dtype=torch.bool).triu(3)
HOLED = DRAWN | (torch.arange(12)[:, None] % 5 == 2)
SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mode 0": {"atten_mask": DRAWN, "next_tokens": 2},
    "mode 1": {"atten_mask": DRAWN, "sparse_mode": 1},
    "mode 2": {"atten_mask": COMPRESSED, "sparse_mode": 2},
    "mode 3": {"atten_mask": COMPRESSED, "sparse_mode": 3},
    "mode 4": {
        "atten_mask": COMPRESSED,
        "sparse_mode": 4,
        "pre_tokens": 3,
        "next_tokens": 1,
    },
    "mode 5": {
        "atten_mask": DRAWN.expand(2, 1, 12, 12).contiguous(),
        "sparse_mode": 5,
        "prefix": [4, 7],
    },
    "mode 6": {"atten_mask": AttenMask.prefix().build(), "sparse_mode": 6, "prefix": [4, 7]},
    "a mask of bytes": {"atten_mask": DRAWN.to(torch.uint8), "sparse_mode": 1},
    "invalid rows": {"atten_mask": HOLED, "sparse_mode": 1, "inner_precise": 2},
    "bias before the scale": {"pse": normal(2, HEADS, 12, 12), "pse_type": 1},
    "bias after the scale": {"pse": normal(1, HEADS, 12, 12), "pse_type": 0},
    "bias per key": {"pse": normal(2, HEADS, 1, 12), "pse_type": 0},
    "slopes": {"pse": SLOPES, "pse_type": 2},
    "slopes of a square root": {"pse": SLOPES, "pse_type": 3},
    "slopes from a start": {
        "pse": SLOPES,
        "pse_type": 2,
        "q_start_idx": [3],
        "kv_start_idx": [1],
    },
    "sink": {"sink": normal(HEADS, seed=4), "atten_mask": COMPRESSED, "sparse_mode": 2},
}

PACKED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": PACKED,
    "mode 0": {"atten_mask": DRAWN[:7, :7].contiguous(), "next_tokens": 2, **PACKED},
    "mode 1": {"atten_mask": DRAWN[:7, :7].contiguous(), "sparse_mode": 1, **PACKED},
    "mode 2": {**ARGUMENTS["mode 2"], **PACKED},
    "mode 3": {**ARGUMENTS["mode 3"], **PACKED},
    "mode 4": {**ARGUMENTS["mode 4"], **PACKED},
    "mode 6": {**ARGUMENTS["mode 6"], **CUT},
    "mode 7": {**ARGUMENTS["mode 3"], "sparse_mode": 7, "next_tokens": 0, **CUT},
    "mode 8": {**ARGUMENTS["mode 3"], "sparse_mode": 8, "next_tokens": 0, **CUT},
    "statistics in order": {**ARGUMENTS["mode 3"], "softmax_layout": "TND", **PACKED},
    "sink": {**ARGUMENTS["sink"], "sparse_mode": 3, **PACKED},
    "sink, statistics in order": {
        **ARGUMENTS["sink"],
        "sparse_mode": 3,
        "softmax_layout": "TND",
        **PACKED,
    },
    "slopes": {**ARGUMENTS["slopes"], **CUT},
}

DENSE_CASES = [(layout, name) for layout in DENSE for name in ARGUMENTS]
PACKED_CASES = [("TND", name) for name in PACKED_ARGUMENTS]


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def both(layout: str, name: str) -> dict[str, tuple[FusionOutput, list[torch.Tensor], Any]]:
    """Return what the op and its grad op give, on the CPU and on the NPU."""
    shape = (12, HEADS, DIM) if layout == "TND" else DENSE[layout]
    arguments = (PACKED_ARGUMENTS if layout == "TND" else ARGUMENTS)[name]
    found = {}
    for device in ("cpu", "npu"):
        leaves = [normal(*shape, seed=k).to(device).requires_grad_() for k in range(3)]
        dy = normal(*shape, seed=3).to(device)
        given = moved(arguments, device)
        out = fusion_attention(*leaves, HEADS, layout, scale=0.25, **given)
        out.attention_out.backward(dy)
        with torch.no_grad():
            again = fusion_attention_grad(
                *leaves,
                dy,
                HEADS,
                layout,
                scale=0.25,
                softmax_max=out.softmax_max,
                softmax_sum=out.softmax_sum,
                attention_in=out.attention_out,
                numels=out.numels,
                **given,
            )
        gradients = [leaf.grad.cpu() for leaf in leaves if leaf.grad is not None]
        found[device] = (out, gradients, again)
    return found


@pytest.mark.parametrize(("layout", "name"), [*DENSE_CASES, *PACKED_CASES])
def test_equals_the_emulator_bit_for_bit(layout: str, name: str):
    found = both(layout, name)
    (here, gradients, again), (there, gradients_there, again_there) = found["cpu"], found["npu"]
    for field in ("attention_out", "softmax_max", "softmax_sum"):
        assert torch.equal(getattr(there, field).cpu(), getattr(here, field)), field
    assert there.softmax_out.numel() == here.softmax_out.numel() == 0
    assert (there.seed, there.offset, there.numels) == (here.seed, here.offset, here.numels)
    for one, other in zip(gradients, gradients_there, strict=True):
        assert torch.equal(one, other)
    for field in ("query", "key", "value"):
        assert torch.equal(getattr(again_there, field).cpu(), getattr(again, field)), field
    if again.sink is not None:
        assert torch.equal(again_there.sink.cpu(), again.sink)


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_rows_without_a_key_tell_the_modes_of_precision_apart(device: str):
    """Were inner_precise lost on its way, they would hold the mean of the values."""
    q = normal(*DENSE["BSND"]).to(device)
    given = moved({"atten_mask": HOLED}, device)
    zero, mean = (
        fusion_attention(
            q, q, q, HEADS, "BSND", sparse_mode=1, inner_precise=n, allow_silent=True, **given
        ).attention_out.cpu()
        for n in (2, 0)
    )
    empty = HOLED.all(-1)
    assert empty.any()
    assert not zero[:, empty].any()
    wanted = q.cpu().mean(1, keepdim=True).expand_as(zero)[:, empty]
    torch.testing.assert_close(mean[:, empty], wanted)
    assert torch.equal(zero[:, ~empty], mean[:, ~empty])


OPS = {
    ("BSND", "mode 3"): "Score ScoreGrad",
    ("BSND", "slopes"): "ScoreV2 ScoreGradV2",
    ("BSND", "sink"): "ScoreV3 ScoreGradV3",
    ("TND", "mode 3"): "VarLenScore UnpaddingScoreGrad",
    ("TND", "slopes"): "VarLenScoreV2 UnpaddingScoreGradV2",
    ("TND", "statistics in order"): "VarLenScoreV4 UnpaddingScoreGradV4",
    ("TND", "sink"): "VarLenScoreV5 UnpaddingScoreGradV5",
}


@pytest.mark.parametrize(("layout", "name"), OPS)
def test_reaches_the_operator_that_the_arguments_call_for(layout: str, name: str):
    with DEVICE.recording() as calls:
        both(layout, name)
    forward, backward = (f"aclnnFlashAttention{op}" for op in OPS[layout, name].split())
    assert [call["op"] for call in calls] == [forward, backward, backward]


@pytest.mark.parametrize("layout", [*DENSE, "TND"])
def test_dropout_seeds_go_round(layout: str):
    """What the forward returns lets the grad op draw the same bits again."""
    torch.npu.manual_seed(11)
    shape = (12, HEADS, DIM) if layout == "TND" else DENSE[layout]
    lists = CUT if layout == "TND" else {}
    leaves = [normal(*shape, seed=k).npu().requires_grad_() for k in range(3)]
    dy = normal(*shape, seed=3).npu()
    out = fusion_attention(*leaves, HEADS, layout, scale=0.25, keep_prob=0.7, **lists)
    out.attention_out.backward(dy)
    again = fusion_attention_grad(
        *(leaf.detach() for leaf in leaves),
        dy,
        HEADS,
        layout,
        scale=0.25,
        keep_prob=0.7,
        softmax_max=out.softmax_max,
        softmax_sum=out.softmax_sum,
        attention_in=out.attention_out.detach(),
        seed=out.seed,
        offset=out.offset,
        numels=out.numels,
        **lists,
    )
    for leaf, gradient in zip(leaves, again[:3], strict=True):
        assert torch.equal(leaf.grad.cpu(), gradient.cpu())


def test_dropout_bits_of_one_s_own():
    q = normal(*DENSE["BNSD"])
    bits = dropout_mask(2 * HEADS * 12 * 12, 0.7, seed=5, offset=2)
    arguments = {"keep_prob": 0.7, "seed": 5, "offset": 2, "allow_silent": True}
    wanted = fusion_attention(q, q, q, HEADS, "BNSD", dropout_mask=bits, **arguments)
    x = q.npu()
    found = fusion_attention(x, x, x, HEADS, "BNSD", dropout_mask=bits.npu(), **arguments)
    assert torch.equal(found.attention_out.cpu(), wanted.attention_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_equals_the_emulator(dtype: torch.dtype):
    q = normal(*DENSE["BSND"]).to(dtype)
    wanted = fusion_attention(q, q, q, HEADS, "BSND", scale=0.25)
    x = q.npu()
    found = fusion_attention(x, x, x, HEADS, "BSND", scale=0.25)
    assert found.attention_out.dtype == dtype
    assert torch.equal(found.attention_out.cpu(), wanted.attention_out)


def test_mistakes_are_told_before_the_device_is_asked():
    x = normal(*DENSE["BSND"]).npu()
    with DEVICE.recording() as calls, pytest.raises(KernelContractError, match="mode-without-mask"):
        fusion_attention(x, x, x, HEADS, "BSND", sparse_mode=3)
    with pytest.raises(KernelContractError, match="different devices"):
        fusion_attention(x, x.cpu(), x, HEADS, "BSND")
    assert not calls
