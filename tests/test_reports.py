"""`ak.report`: which plans the layers of a model ran, and how often; `ak.expect` relies on it."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import attnkit as ak
from attnkit import masks
from attnkit.interop.transformers import enable
from attnkit.kept_plans import MOST_PLANS, KeptPlans
from tests.interop.transformers.models import pair


class Blocks(nn.Module):
    """A window in all layers but the last."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        windows = (masks.SlidingWindow(4), masks.SlidingWindow(4), masks.Causal())
        self.blocks = nn.ModuleList(
            ak.MultiHeadAttention(16, 2, mask=mask, backend=backend) for mask in windows
        )

    def forward(self, x: torch.Tensor, caches: list[ak.KVCache] | None = None) -> torch.Tensor:
        for k, block in enumerate(self.blocks):
            x = x + block(x, cache=None if caches is None else caches[k])
        return x


def test_every_layer_is_told_with_its_plans_and_their_runs() -> None:
    model = Blocks()
    assert [(layer.calls, layer.plans) for layer in ak.report(model).layers] == [(0, ())] * 3
    for length in (64, 64, 64, 48):
        model(torch.randn(2, length, 16))
    found = ak.report(model)
    assert found.calls == 12
    assert [layer.name for layer in found.layers] == [f"blocks.{k}.attention" for k in range(3)]
    for layer, mask in zip(
        found.layers, ("SlidingWindow(4)", "SlidingWindow(4)", "Causal()"), strict=True
    ):
        assert layer.times == (3, 1)
        assert [plan.request.q_len for plan in layer.plans] == [64, 48]
        assert repr(layer.plans[0].request.mask) == mask
        assert layer.fused
    assert "blocks.*.attention (2 modules): Attention, 4 calls" in str(found)
    assert f"64 x 64, {masks.Causal()!r}, training (3 times)" in str(found).replace(";", ",")


def test_looking_at_a_plan_is_no_run() -> None:
    layer, x = ak.Attention(2, 8), torch.randn(1, 4, 2, 8)
    layer.plan(x, x, x)
    layer.explain(x, x, x)
    assert ak.report(layer).layers[0].plans == ()
    with pytest.raises(ak.CompositionError, match="the module itself: Attention, 0 calls"):
        ak.expect(layer)


@torch.no_grad()
def test_steps_of_a_cache_are_one_plan_of_any_number_of_keys() -> None:
    model, caches = Blocks().eval(), [ak.KVCache() for _ in range(3)]
    model(torch.randn(1, 40, 16), caches)
    for _ in range(30):
        model(torch.randn(1, 1, 16), caches)
    for layer in ak.report(model).layers:
        assert layer.calls == 31
        assert sum(layer.times) == 31
        assert len(layer.plans) == 2
        assert layer.times == (1, 30)
    told = str(ak.report(model))
    assert f"1 x any number, the last row of {masks.SlidingWindow(4)!r} (30 times)" in told


@torch.no_grad()
def test_plans_that_left_are_still_calls() -> None:
    layer = ak.Attention(1, 4, mask=masks.Causal())
    for length in range(33, 33 + 40):
        layer(*[torch.randn(1, length, 1, 4)] * 3)
    (found,) = ak.report(layer).layers
    assert found.calls == 40
    assert found.times == (1,) * 16
    assert len(layer._plans._uses) == 16


def test_threads_that_share_a_layer_keep_and_count_its_plans() -> None:
    kept, each, turns = KeptPlans(), 4, 1_000
    plans: list[Any] = [object() for _ in range(3 * MOST_PLANS)]

    def use(thread: int) -> None:
        for turn in range(turns):
            number = (turn * (2 * thread + 1)) % len(plans)
            like = kept.renewed("any length")
            kept.keep(number, plans[number], like)
            kept.keep("any length", plans[-1])
            kept.count(plans[number])
            kept.ran()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(each) as threads:
            list(threads.map(use, range(each)))  # raises what a thread raised
    finally:
        sys.setswitchinterval(before)
    assert kept.calls == each * turns
    assert len(kept) == MOST_PLANS
    assert not pickle.loads(pickle.dumps(kept))


@torch.no_grad()
def test_a_static_cache_is_counted_and_copies_begin_anew() -> None:
    layer = ak.MultiHeadAttention(16, 2, mask=masks.Causal(), rotary=True)
    cache = ak.StaticCache(16)
    for _ in range(5):
        layer(torch.randn(1, 1, 16), cache=cache)
    assert ak.report(layer).layers[0].times == (5,)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert ak.report(twin).calls == 0
        twin(torch.randn(1, 4, 16))
        assert ak.report(twin).calls == 1


def test_the_same_calls_for_another_backend() -> None:
    model = Blocks()
    model(torch.randn(2, 64, 16))
    model(torch.randn(2, 64, 16))
    there = ak.report(model, backend="emulated")
    assert [(len(layer.plans[0].steps), layer.times) for layer in there.layers] == [(1, (2,))] * 3
    capped = ak.Attention(2, 8, softcap=30.0)
    capped(*[torch.randn(1, 4, 2, 8)] * 3)
    (found,) = ak.report(capped, backend="emulated").layers
    assert ([r.code for r in found.refused], found.plans, found.times) == (["softcap"], (), ())
    with pytest.raises(ak.CompositionError, match="did you mean 'emulated'"):
        ak.report(model, backend="emulatd")


def test_expect_names_the_layers_that_ran_elsewhere() -> None:
    model = Blocks()
    model(torch.randn(2, 64, 16))
    assert ak.expect(model, backend="tiled").calls == 3
    model.blocks[1].attention.backend = "reference"
    model.blocks[1](torch.randn(2, 32, 16))
    for asked in ({"backend": "tiled"}, {}):
        with pytest.raises(ak.CompositionError, match=r"blocks\.1\.attention") as raised:
            ak.expect(model, **asked)
        assert "blocks.0" not in str(raised.value)
    with pytest.raises(ak.CompositionError, match="no attention of attnkit"):
        ak.expect(nn.Linear(2, 2))
    with pytest.raises(ak.CompositionError, match="takes a model, got str"):
        ak.report("blocks")  # type: ignore[arg-type]


@torch.no_grad()
def test_own_layers_and_switched_ones_are_in_one_report() -> None:
    _, model, inputs = pair("llama")
    enable(model)
    both = nn.ModuleDict({"theirs": model, "ours": Blocks()})
    model(**inputs)
    both["ours"](torch.randn(1, 8, 16))
    found = ak.report(both)
    names = [layer.name.partition(".")[0] for layer in found.layers]
    assert names == ["theirs"] * 2 + ["ours"] * 3
    assert found.calls == 5


def test_a_profiler_sees_each_call_by_its_backend_and_mask() -> None:
    layer, x = ak.Attention(2, 8, mask=masks.Causal()), torch.randn(1, 4, 2, 8)
    long = masks.Documents([1] * 4000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(x, x, x)
        ak.attention(*[torch.randn(1, 4000, 1, 1)] * 3, mask=long, backend="tiled")
    names = [event.key for event in profiler.key_averages() if event.key.startswith("attnkit ")]
    assert "attnkit tiled 4x4 Causal()" in names
    assert len(names) == 2
    assert max(map(len, names)) < 200
