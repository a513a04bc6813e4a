"""diffusers' models, with attnkit as one of their attention backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop import diffusers as interop
from attnkit.interop.torch import routed

diffusers = pytest.importorskip("diffusers")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:diffusers.*"),
]


@pytest.fixture(autouse=True)
def _default_backend() -> Iterator[None]:
    before = dispatch._AttentionBackendRegistry._active_backend
    yield
    dispatch._AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    original = interop.scaled_dot_product_attention

    def spy(*args: Any, **named: Any) -> Tensor:
        seen.append(args)
        return original(*args, **named)

    monkeypatch.setattr(interop, "scaled_dot_product_attention", spy)
    return seen


def flux() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    given = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(5, 3),
    }
    return model, given


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    exists = torch.ones(2, 7).bool()
    exists[0, 4:] = False
    given = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": exists,
        "timestep": torch.tensor([1.0, 0.5]),
        "img_shapes": [(1, 4, 4)] * 2,
    }
    return model, given


def unet() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    exists = torch.tensor([[True, True, True, False], [True] * 4])
    given = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([1.0, 3.0]),
        "encoder_hidden_states": torch.randn(2, 4, 16),
        "encoder_attention_mask": exists,
    }
    return model, given


@pytest.mark.parametrize(("make", "count"), [(flux, 2), (qwen, 2)])
def test_models_that_dispatch(make: Any, count: int, calls: list[Any]) -> None:
    model, given = make()
    theirs, right = model(**given)[0], []
    right = torch.autograd.grad(theirs.square().sum(), list(model.parameters()), allow_unused=True)
    report = interop.enable(model)
    assert len(report.switched) == count
    assert str(report).startswith(f"{count} attention modules dispatch to attnkit")
    ours = model(**given)[0]
    assert len(calls) == count
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(ours.square().sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    report.undo()
    model(**given)
    assert len(calls) == count


def test_diffusers_own_ways_to_choose(calls: list[Any]) -> None:
    assert interop.register() == interop.register() == "attnkit"
    names = list(dispatch.AttentionBackendName.__members__)
    assert len(names) == len(set(names))
    assert dispatch.AttentionBackendName("native").value == "native"
    model, given = flux()
    with dispatch.attention_backend("attnkit"):
        model(**given)
    assert len(calls) == 2
    model.set_attention_backend("attnkit")
    model(**given)
    assert len(calls) == 4
    model.reset_attention_backend()


def test_a_unet_is_routed() -> None:
    model, given = unet()
    with pytest.raises(CompositionError, match=r"AttnProcessor2_0 does not dispatch.*routed"):
        interop.enable(model)
    right = model(**given)[0]
    with routed() as seen:
        found = model(**given)[0]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    attentions = [one for one in model.modules() if hasattr(one, "processor")]
    assert seen.routed == len(attentions) > 0


@pytest.mark.parametrize("mask", [None, "keys", "keys4", "cells", "float"])
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_every_argument_of_the_dispatcher(mask: str | None, gqa: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    interop.register()
    query = torch.randn(2, 5, 4, 8)
    key, value = (torch.randn(2, 6, 2 if gqa else 4, 8) for _ in range(2))
    keys = torch.rand(2, 6) > 0.4
    keys[:, 0] = True
    masks = {
        "keys": keys,
        "keys4": keys[:, None, None],
        "cells": torch.rand(2, 1, 5, 6) > -1,
        "float": torch.randn(1, 4, 5, 6),
    }
    causals = (False, True) if mask is None else (False,)
    for causal in causals:
        found, right = (
            dispatch.dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=masks.get(mask or ""),
                is_causal=causal,
                scale=scale,
                enable_gqa=gqa,
                backend=backend,
            )
            for backend in ("attnkit", "native")
        )
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_what_is_not_understood_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    interop.register()
    x = torch.randn(1, 3, 2, 8)
    for checked in (False, True):
        monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_checks_enabled", checked)
        for kwargs, told in [
            ({"block_mask": 1}, "'block_mask'"),
            ({"window_size": (3, 0), "return_lse": False}, "'window_size'"),
            ({"return_lse": True}, "log-sum-exps"),
        ]:
            with pytest.raises(CompositionError, match=told):
                dispatch.dispatch_attention_fn(x, x, x, attention_kwargs=kwargs, backend="attnkit")
    with pytest.raises(CompositionError, match="context parallelism"):
        dispatch.dispatch_attention_fn(x, x, x, backend="attnkit", parallel_config=object())
    with pytest.raises(CompositionTypeError, match="of a pipeline its part"):
        interop.enable("pipe")  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match="none at all"):
        interop.enable(nn.Linear(2, 2))
