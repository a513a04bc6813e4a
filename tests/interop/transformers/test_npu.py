"""On the kernel's emulator: what transformers' own NPU path drops without a word is right here.

transformers' path hands its arguments to `npu_flash_attn_func`, which takes a window and sinks
into ``**kwargs`` and leaves them there. The same models on attnkit go to the same kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import npu_flash_attention

from attnkit.backends import BACKENDS, make_plan
from attnkit.interop.transformers import enable, report
from attnkit.kernel import fusion_attention
from tests.interop.transformers.models import pair


@pytest.fixture
def on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is planned runs on the emulated kernel first, as it does on an NPU."""
    monkeypatch.setattr(BACKENDS["emulated"], "auto", 1, raising=False)
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()


@pytest.mark.parametrize(
    "name", ["mistral", "gpt_oss", "gemma3", "modernbert", "t5", "deepseek_v3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_on_the_kernel(name: str, dtype: torch.dtype, on_the_kernel: None) -> None:
    eager, model, inputs = pair(name)
    wanted = eager(**inputs)[0].detach()
    model = model.to(dtype)
    enable(model)
    found = model(**inputs)[0].float()
    kept = inputs["attention_mask"].bool()
    if "decoder_input_ids" not in inputs:
        wanted, found = wanted[kept], found[kept]
    size = float(wanted.abs().max())
    limit = 2e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit * size)
    found.sum().backward()
    plans = [plan for layer in report(model).layers for plan in layer.plans]
    assert {plan.backend for plan in plans} == {"emulated"}
    assert {len(plan.steps) for plan in plans} == {1}


def _theirs(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], **extra: Any) -> torch.Tensor:
    """One layer by transformers' NPU path, as its flash integration calls it."""
    monkeypatch.setattr(
        npu_flash_attention, "npu_fusion_attention", fusion_attention, raising=False
    )
    return npu_flash_attention.npu_flash_attn_func(**given, causal=True, **extra)


def test_what_their_path_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 12, 2, 16)
    given = {"q": query, "k": query, "v": query}
    plain = _theirs(monkeypatch, given)
    sink = torch.full((2,), 3.0)
    # A window of 4 keys and a sink change nothing on their path.
    assert torch.equal(_theirs(monkeypatch, given, window_size=(3, 3), s_aux=sink), plain)


def test_a_model_with_windows_and_sinks(
    monkeypatch: pytest.MonkeyPatch, on_the_kernel: None
) -> None:
    """gpt-oss: right on attnkit, and what their path computes is another model."""
    eager, model, inputs = pair("gpt_oss")
    del inputs["attention_mask"]
    theirs = copy.deepcopy(eager)
    enable(model)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
        tensors = dict(zip("qkv", (t.transpose(1, 2) for t in (query, key, value)), strict=True))
        scale, sink = given["scaling"], given["s_aux"]
        window = given["sliding_window"]
        sides = {} if window is None else {"window_size": (window - 1, window - 1)}
        extra = {"softmax_scale": scale, "s_aux": sink, **sides}
        return _theirs(monkeypatch, tensors, **extra), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "their_npu_path", attend)
    for module in theirs.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "their_npu_path"
    with torch.no_grad():
        wanted, found, other = (one(**inputs).logits for one in (eager, model, theirs))
    size = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 2e-5 * size
    assert float((other - wanted).abs().max()) > 1e-2 * size
