"""What `enable` switches, what it leaves and says so, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnkit.errors import CompositionError
from attnkit.interop.transformers import NAME, enable, report
from attnkit.interop.transformers.switching import _check_version
from tests.interop.transformers.models import (
    BERT,
    TEXT,
    VISION,
    Case,
    _eager,
    _of,
    ids,
    padded,
    pair,
)

QWEN = {
    "text_config": {
        **{k: TEXT[k] for k in TEXT if k not in ("head_dim", "pad_token_id")},
        "vocab_size": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}


def _pictures() -> dict[str, Any]:
    grid = torch.tensor([[1, 8, 8], [1, 4, 8]])
    first, second = (int(each.prod()) // 4 for each in grid)
    row = [5, 122, *[120] * first, 123, 6, 122, *[120] * second, 123, 7, 8]
    words = torch.tensor([row])
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (words == 120).int(),
    }


def test_a_tower_gives_all_its_pictures_to_one_call() -> None:
    torch.manual_seed(0)
    eager = _of("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", **QWEN)().eval()
    _eager(eager)
    model, inputs = copy.deepcopy(eager), _pictures()
    switched = enable(model)
    assert switched.packed == tuple(f"model.visual.blocks.{k}.attn" for k in range(2))
    with torch.no_grad():
        wanted, found = eager(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    layers = {layer.name: layer for layer in report(model).layers}
    assert [layer.calls for layer in layers.values()] == [1, 1, 1, 1]
    (whole,) = layers["model.visual.blocks.1.attn"].plans
    assert whole.request.seqlens is not None
    assert whole.request.seqlens.q == (64, 32)
    (windows,) = layers["model.visual.blocks.0.attn"].plans
    assert len(windows.request.seqlens.q) > 2


BY_HAND = {
    "bloom": Case(
        _of("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        padded,
        2,
    ),
    "falcon": Case(
        _of(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        padded,
        2,
    ),
    "deberta": Case(_of("DebertaModel", "DebertaConfig", **BERT), padded, 2),
    "sam": Case(
        _of(
            "SamVisionModel",
            "SamVisionConfig",
            **{k: v for k, v in VISION.items() if k != "intermediate_size"},
            output_channels=16,
            window_size=2,
            mlp_dim=48,
            global_attn_indexes=[1],
        ),
        lambda: {"pixel_values": torch.randn(1, 3, 16, 16)},
        2,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_written_by_hand_is_computed_too(name: str) -> None:
    torch.manual_seed(0)
    eager = BY_HAND[name].build().eval()
    _eager(eager)
    model, inputs = copy.deepcopy(eager), BY_HAND[name].inputs()
    assert len(enable(model).watched) == 2
    with torch.no_grad():
        wanted, found = eager(**inputs)[0], model(**inputs)[0]
    if "attention_mask" in inputs:
        kept = inputs["attention_mask"].bool()
        wanted, found = wanted[kept], found[kept]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert report(model).calls == BY_HAND[name].calls


def test_enable_again_changes_nothing() -> None:
    for build in (lambda: pair("llama")[1], BY_HAND["bloom"].build):
        model = build()
        assert enable(model) == enable(model)


def test_torch_modules_inside_are_replaced() -> None:
    torch.manual_seed(0)
    head = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.Sequential(copy.deepcopy(head))
    assert enable(model).replaced == ("0",)
    assert enable(model).replaced == ("0",)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model[0](x, x, x)[0], head(x, x, x)[0], rtol=0, atol=1e-5)


def test_nothing_to_switch_is_an_error() -> None:
    with pytest.raises(CompositionError, match="nothing was switched"):
        enable(nn.Linear(2, 2))
    assert not enable(nn.Linear(2, 2), strict=False)
    with pytest.raises(TypeError, match="takes a model"):
        enable("llama")  # type: ignore[arg-type]


def test_a_model_is_built_and_loaded_by_name(tmp_path: Any) -> None:
    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**TEXT), attn_implementation=NAME
    )
    inputs = ids()
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
    assert report(model).calls == 2
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, rtol=0, atol=0)
    assert report(again).calls == 2


def test_another_version_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    _check_version("5.23.1")
    assert not recwarn
    for version in ("4.57.0", "5.24.0", "6.0.0.dev0"):
        with pytest.warns(UserWarning, match=r"tested with transformers 5\.23\.0 to 5\.23\.0"):
            _check_version(version)
