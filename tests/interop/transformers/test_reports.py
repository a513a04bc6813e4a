"""The report tells what ran, what was made dense and by what, and what Ascend would take."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.interop.transformers import enable, expect, masks_of, report
from tests.interop.transformers.models import pair


def test_a_report_before_and_after_a_run() -> None:
    _, model, inputs = pair("gemma3")
    enable(model)
    before = report(model)
    assert (before.calls, len(before.layers)) == (0, 2)
    with pytest.raises(CompositionError, match="does not run as expected"):
        expect(model)
    with torch.no_grad():
        model(**inputs)
    after = expect(model, sets=True)
    assert after.calls == 2
    assert [layer.plans[0].backend for layer in after.layers] == ["tiled", "tiled"]
    assert "SlidingWindow(4) & Padding((10, 7))" in str(after)


def test_the_same_calls_planned_for_ascend() -> None:
    for name, steps in (("gpt_oss", 1), ("deepseek_v3", 1), ("bert", 1)):
        _, model, inputs = pair(name)
        enable(model)
        with torch.no_grad():
            model(**inputs)
        found = report(model, backend="emulated")
        assert not any(layer.refused for layer in found.layers)
        assert {len(plan.steps) for layer in found.layers for plan in layer.plans} == {steps}


def test_a_soft_cap_is_refused_there_and_said() -> None:
    _, model, inputs = pair("gemma2")
    enable(model)
    with torch.no_grad():
        model(**inputs)
    found = report(model, backend="emulated")
    assert {r.code for layer in found.layers for r in layer.refused} == {"softcap"}
    assert "softcap" in str(found)


def test_masks_by_layer() -> None:
    _, model, inputs = pair("mistral")
    enable(model)
    assert masks_of(model, **inputs) == {
        f"model.layers.{k}.self_attn": masks.SlidingWindow(4) & masks.Padding((10, 7))
        for k in range(2)
    }


def test_two_ports_of_a_model_are_proven_equal_or_the_first_cell_is_shown() -> None:
    stacks = []
    for window in (4, 4, 5):
        model, _, inputs = pair("mistral")
        model.config.sliding_window = window
        with pytest.raises(CompositionError, match=r"masks_of\(model"):
            masks.diff(model, model, 10)
        enable(model)
        stacks.append(masks_of(model, **inputs))
    assert masks.diff(*stacks[:2], 10).equal
    found = masks.diff(stacks[0], stacks[2], 10)
    assert found.differing == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert found.first is not None
    assert (found.first.i, found.first.j, found.first.allowed_by) == (4, 0, "b")


def test_plans_stay_behind_in_copies() -> None:
    _, model, inputs = pair("llama")
    enable(model)
    with torch.no_grad():
        wanted = model(**inputs)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report(other).calls == 0
        with torch.no_grad():
            torch.testing.assert_close(other(**inputs)[0], wanted, rtol=0, atol=0)
