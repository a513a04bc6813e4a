"""The rig itself: the real host code runs, and nothing beneath it is pretended."""

from __future__ import annotations

import re

import pytest
import torch

from attnkit import masks
from attnkit.kernel import AttenMask, fusion_attention
from tests.npu.compare import run
from tests.npu.compositions import Case
from tests.npu.device import DEVICE, inside_rig

if not inside_rig():
    pytest.skip("the NPU tests have a rig of their own: make test-npu", allow_module_level=True)


def test_the_device_is_there():
    assert torch.npu.is_available()
    assert torch.npu.get_device_name(0) == "Ascend910B1"
    assert torch.zeros(2, device="npu").device == torch.device("npu:0")


def test_ordinary_operators_are_computed():
    x = torch.randn(3, 4)
    on_npu = x.npu()
    torch.testing.assert_close((on_npu + on_npu).cpu(), x + x)
    torch.testing.assert_close((on_npu @ on_npu.mT).cpu(), x @ x.mT)
    torch.testing.assert_close(on_npu.mT.contiguous().sum(0).cpu(), x.mT.sum(0))


def test_an_operator_without_decoder_raises():
    x = torch.randn(3, 4).npu()
    with pytest.raises(RuntimeError, match="does not run RmsNorm"):
        torch.ops.npu.npu_rms_norm(x, torch.ones(4).npu())
    with pytest.raises(RuntimeError):
        torch.ops.npu.npu_prompt_flash_attention(x[None], x[None], x[None])


def test_the_host_code_is_the_real_one():
    """What its checks refuse never reaches the device."""
    q = torch.randn(1, 8, 2, 16).npu()
    op = torch.ops.npu.npu_fusion_attention
    with DEVICE.recording() as calls:
        for arguments, message in (
            ({"keep_prob": 0.0}, "keep_prob"),
            ({"sparse_mode": 7}, "sparse_mode"),
            ({"softmax_layout": "BSND"}, "softmax_layout"),
        ):
            with pytest.raises(RuntimeError, match=re.compile(message, re.IGNORECASE)):
                op(q, q, q, 2, "BSND", **arguments)
        with pytest.raises(RuntimeError):
            op(q, q, q, 2, "BSND", atten_mask=torch.ones(8, 8, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="pre_tokens"):
            op(q, q, q, 2, "BSND", pre_tokens=4)
    assert not calls


def test_the_device_refuses_what_the_kernel_refuses():
    """And what it would compute wrongly in silence, which no plan of attnkit may ask for."""
    q = torch.randn(1, 8, 2, 16).npu()
    op = torch.ops.npu.npu_fusion_attention
    with pytest.raises(RuntimeError, match="mask-shape"):
        op(q, q, q, 2, "BSND", atten_mask=torch.ones(8, dtype=torch.bool).npu().expand(1, 1, 1, 8))
    with pytest.raises(RuntimeError, match="mode-without-mask"):
        op(q, q, q, 2, "BSND", sparse_mode=2)


def test_numbers_are_those_of_the_emulator_bit_for_bit():
    q = torch.randn(2, 8, 4, 16)
    mask = AttenMask.causal().build()
    arguments = {"scale": 0.25, "sparse_mode": 3}
    wanted = fusion_attention(q, q, q, 4, "BSND", atten_mask=mask, **arguments)
    x = q.npu()
    found = fusion_attention(x, x, x, 4, "BSND", atten_mask=mask.npu(), **arguments)
    for name in ("attention_out", "softmax_max", "softmax_sum"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


def test_calls_go_through_the_vendor_s_forward_and_backward():
    with DEVICE.recording() as calls:
        run(Case("causal", masks.Causal()), "ascend", "npu", torch.float32)
    assert [call["op"] for call in calls] == [
        "aclnnFlashAttentionScore",
        "aclnnFlashAttentionScoreGrad",
    ]
    assert calls[0]["sparse_mode"] == calls[1]["sparse_mode"]
