"""What transformers' own path for NPUs drops without a word, and attnkit does not.

The path is transformers' code as it stands; the kernel that it calls is attnkit's emulator.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.zoo.build import Case, case_of
from tests.zoo.check import Eager, checked, go
from tests.zoo.judge import OUTPUTS, differences
from tests.zoo.ways import WAYS, environment


def by(case: Case, way: str) -> dict[str, Any]:
    """The output of a plain batch, attention computed this way."""
    with environment(way):
        model = copy.deepcopy(case.model)
        WAYS[way](model)
        return go(case, "plain", model)[0]


def without(case: Case) -> dict[str, Any]:
    """Eager's output of the same weights, no window and no sink."""
    model = copy.deepcopy(case.model)
    model.config.sliding_window = 10_000
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 10_000
        if hasattr(layer.self_attn, "sinks"):
            layer.self_attn.sinks.data.fill_(-1e9)
    return go(case, "plain", model)[0]


@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss"])
def test_windows_and_sinks_are_dropped_by_it_and_kept_by_attnkit(model_type, monkeypatch):
    """gpt-oss asks for a kernel of the hub; where none is to be had, nothing else warns."""
    case = case_of(model_type)
    for part in case.model.modules():
        if getattr(type(part), "_compatible_flash_implementations", None):
            monkeypatch.setattr(type(part), "_compatible_flash_implementations", None)
    want, theirs = by(case, "eager"), by(case, "npu-flash")
    assert differences(want, theirs, 0.1) is not None
    assert differences(without(case), theirs, OUTPUTS) is None
    assert checked(Eager(case), "attnkit", ["plain"]) == {"plain": "ok"}


def test_an_additive_bias_becomes_a_mask_of_its_zeros():
    """Its `sdpa` branch asks of Swin's table of biases which entries are 0."""
    case = case_of("swin")
    assert checked(Eager(case), "npu-sdpa", ["plain"])["plain"].startswith("differs")
    assert checked(Eager(case), "attnkit", ["plain"]) == {"plain": "ok"}
