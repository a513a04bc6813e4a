"""The examples of docs/guides/ascend.md: what stood before and what stands after are alike."""

from __future__ import annotations

import re
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_npu

import attnkit as ak
from attnkit import masks
from tests.agreement import LAST
from tests.npu.device import DEVICE

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "ascend.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
BEFORE = [block for block in BLOCKS if block.startswith("# before")]
AFTER = [block for block in BLOCKS if block.startswith("# after")]


def names() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 320, 8, 64, generator=generator).npu() for _ in range(3))
    modules = {"torch": torch, "F": torch.nn.functional, "torch_npu": torch_npu}
    return {**modules, "ak": ak, "masks": masks, "q": q, "k": k, "v": v}


@pytest.fixture(autouse=True)
def mindspeed(monkeypatch: pytest.MonkeyPatch):
    """MindSpeed's op has the arguments of torch_npu's v2."""
    module = ModuleType("mindspeed.ops.fusion_attention_v2")
    vars(module)["npu_fusion_attention"] = torch_npu.npu_fusion_attention_v2
    for name in ("mindspeed", "mindspeed.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_every_before_has_an_after():
    assert len(BEFORE) == len(AFTER) == 6


@pytest.mark.parametrize(("before", "after"), list(zip(BEFORE, AFTER, strict=False)), ids=count())
def test_same_numbers(before: str, after: str):
    scope = names()
    exec(before, scope)
    exec(after, scope)
    found, wanted = scope["after"].cpu(), scope["before"].cpu()
    # Both sum at most 320 terms in float32, of values of size one.
    limit = LAST * 320 * torch.finfo(torch.float32).eps
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() < limit


def test_the_first_example():
    (block,) = (b for b in BLOCKS if "layer = ak.Attention" in b)
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert scope["y"].shape == scope["x"].shape
    assert scope["layer"].plan(*[scope["x"]] * 3).backend == "ascend"


def test_an_additive_mask_leaves_the_fused_kernel():
    scope = names()
    q, k, v = (scope[name].transpose(1, 2) for name in "qkv")
    allowed = torch.ones(320, 320, dtype=torch.bool).tril()
    additive = torch.zeros(320, 320).masked_fill(~allowed, -torch.inf)
    found = []
    for mask in (allowed, additive):
        with DEVICE.recording() as calls:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.npu())
        found.append([call["op"] for call in calls])
    assert found == [["aclnnFlashAttentionScore"], []]


def test_float64_does_not_exist_on_the_device():
    assert torch.zeros(2).npu().double().dtype == torch.float32
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64).npu()
    with pytest.raises(ak.BackendRefused, match="float64"):
        ak.attention(x, x, x, backend="ascend")
