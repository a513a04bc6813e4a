"""StaticCache: every step is the full forward's, the same call, and a graph that replays."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnkit import masks, pse
from attnkit.backends import BACKENDS
from attnkit.errors import BackendRefused, CompositionError, KernelContractError
from attnkit.kernel import AttenMask, KernelCall, TensorSpec
from attnkit.kernel.launch import choose_version, launch
from attnkit.masks.given import GivenCells
from attnkit.modules import MultiHeadAttention
from attnkit.rotary import Dynamic, Rotary
from attnkit.static import StaticCache, cells_at, row_ends

DIM = 8
CAUSAL = masks.Causal()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**terms) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(DIM, 4, dtype=torch.float64, **{"mask": CAUSAL, **terms})


STEP = noise(2, 1, DIM)
LAYERS = {
    "causal": {},
    "rotary, grouped, window": {
        "rotary": True,
        "num_kv_heads": 2,
        "mask": CAUSAL & masks.SlidingWindow(3),
    },
    "sinks, alibi": {
        "mask": CAUSAL & (masks.SlidingWindow(3) | masks.Columns(0, 2)),
        "pse": pse.ALiBi(4) + pse.T5Relative(4, 8, 9, bidirectional=False, table=noise(8, 4)),
    },
    "a mask for each head, a sink": {
        "mask": masks.PerHead([CAUSAL, CAUSAL & masks.SlidingWindow(2)] * 2),
        "sink": True,
    },
    "a mask for each text": {
        "mask": CAUSAL & ~masks.Prefix([0, 2, 5]),
        "qk_norm": "rms",
        "gate": "head",
    },
    "documents": {"mask": CAUSAL & masks.Documents([3, 4, 5, 4])},
    "chunks": {"mask": CAUSAL & masks.Chunked(3), "rotary": True},
}


CAPTURED = {**LAYERS["sinks, alibi"], "rotary": True, "num_kv_heads": 2, "sink": True}


@pytest.mark.parametrize("backend", ["auto", "emulated"])
@pytest.mark.parametrize("how", LAYERS.values(), ids=LAYERS.keys())
@torch.no_grad()
def test_steps_are_the_full_forward(how, backend):
    layer, cache, x = build(backend=backend, **how), StaticCache(16), noise(3, 16, DIM)
    steps = [layer(part, cache=cache) for part in x.split([4, 1, 1, 3, 1, 6], 1)]
    assert torch.allclose(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-12)
    assert cache.lengths == (16, 16, 16)
    cache.reset()
    again = torch.cat([layer(part, cache=cache) for part in x.split(1, 1)], 1)
    assert torch.allclose(again, layer(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_prompts_of_unlike_lengths_continue_as_alone():
    layer, cache, x = (
        build(rotary=True, mask=LAYERS["chunks"]["mask"]),
        StaticCache(16),
        noise(3, 9, DIM),
    )
    lengths = [2, 5, 1]
    layer(x[:, :5], cache=cache)  # padded on the right
    cache.truncate(torch.tensor(lengths))
    texts = [x[b, :n] for b, n in enumerate(lengths)]
    for k in range(3):
        tokens = noise(3, 1, DIM, seed=k + 1)
        texts = [torch.cat(pair) for pair in zip(texts, tokens, strict=True)]
        meant = torch.stack([layer(text[None])[0, -1:] for text in texts])
        assert torch.allclose(layer(tokens, cache=cache), meant, rtol=0, atol=1e-12)
    cache.reorder([1, 1, 0])
    cache.truncate(5)
    assert cache.lengths == (5, 5, 5)


@torch.no_grad()
def test_every_step_is_one_call_with_the_same_arguments(monkeypatch):
    layer, cache, x = build(backend="emulated", rotary=True), StaticCache(32), noise(2, 20, DIM)
    emulated, calls = BACKENDS["emulated"], []
    forward = emulated.forward
    monkeypatch.setattr(
        emulated,
        "forward",
        lambda call, tensors: (
            calls.append((call, tensors["key"].data_ptr())) or forward(call, tensors)
        ),
    )
    for part in x.split(1, 1):
        layer(part, cache=cache)
    assert len(calls) == 20
    assert len(set(calls)) == 1
    assert len(layer.attention._plans) == 1
    call = calls[0][0]
    assert (call.key.shape, call.input_layout) == ((2, 4, 32, 2), "BNSD")
    assert str(call.atten_mask) == "full mask 2x1x1x32, given with each call"


@torch.no_grad()
def test_a_bias_is_a_term_of_the_version_that_graphs_capture():
    layer, cache = build(backend="emulated", **LAYERS["sinks, alibi"]), StaticCache(32)
    layer(STEP, cache=cache)
    (plan,) = layer.attention._plans.values()
    (step,) = plan.steps
    assert step.call.pse is not None
    assert step.call.inexpressible("v3") is None


@torch.no_grad()
def test_the_plan_is_proven_and_says_where_the_mask_comes_from():
    layer, cache = build(backend="emulated"), StaticCache(32)
    layer(STEP, cache=cache)
    (plan,) = layer.attention._plans.values()
    assert "given with each call" in plan.explain()
    for step in plan.steps:
        mask = replace(step.call.atten_mask, with_call=False)
        tampered = replace(step, call=replace(step.call, atten_mask=mask))
        with pytest.raises(KernelContractError, match="for the mask to say"):
            replace(plan, steps=(tampered,)).verify()
    again = pickle.loads(pickle.dumps(plan))
    assert again.request == plan.request


@torch.no_grad()
def test_a_captured_step_serves_every_step():
    """What is captured of one step computes the others: nothing of the host is in it."""
    layer, cache, x = build(backend="reference", **CAPTURED), StaticCache(16), noise(2, 16, DIM)
    layer(x[:, :5], cache=cache)
    layer(x[:, 5:6], cache=cache)  # what is kept between calls is made
    before = [t.clone() for t in (*cache.pair, cache.ends)]
    graph = make_fx(lambda token: layer(token, cache=cache))(x[:, 6:7].clone())
    for tensor, was in zip((*cache.pair, cache.ends), before, strict=True):
        tensor.copy_(was)
    found = [graph(x[:, k : k + 1].clone()) for k in range(6, 16)]
    assert torch.allclose(torch.cat(found, 1), layer(x)[:, 6:], rtol=0, atol=1e-12)
    assert cache.lengths == (16, 16)


def test_a_table_of_ends_holds_every_row():
    for how in LAYERS.values():
        mask, n = how.get("mask", CAUSAL), 16
        table = row_ends(mask, n, torch.device("cpu"))
        meant = mask.materialize(n, n, 3, 4)
        for start in range(n - 2):
            where = torch.arange(start, start + 3).expand(3, 3)
            found = cells_at(table, where, n)
            assert torch.equal(found.expand(3, 4, 3, n), meant[:, :, start : start + 3])


# -- the op that can be captured ---------------------------------------------------------------

SPEC = TensorSpec((2, 4, 8, 16), torch.float16)
V3 = "query key value head_num input_layout atten_mask sparse_mode actual_seq_qlen actual_seq_kvlen"


class Recorder:
    def __init__(self, names: str) -> None:
        arguments = [SimpleNamespace(name=n) for n in names.split()]
        self.default = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))

    def __call__(self, **arguments: object) -> tuple[int, ...]:
        self.arguments = arguments
        return tuple(range(6))


def given(**arguments) -> KernelCall:
    mask = AttenMask("full", (2, 1, 8, 8), with_call=True)
    return KernelCall(SPEC, SPEC, SPEC, 4, "BNSD", atten_mask=mask, sparse_mode=1, **arguments)


def test_masks_that_come_with_the_call_go_to_the_version_that_graphs_capture():
    both = SimpleNamespace(npu_fusion_attention=Recorder(V3), npu_fusion_attention_v3=Recorder(V3))
    old = SimpleNamespace(npu_fusion_attention=Recorder(V3))
    assert choose_version(given(), both) == "v3"
    assert choose_version(given(), old) == "v1"
    assert choose_version(given(seed=3), both) == "v1"  # v3 has no such argument
    unknown = KernelCall(SPEC, SPEC, SPEC, 4, "BNSD", atten_mask=AttenMask.full((8, 8)))
    assert choose_version(unknown, both) == "v1"
    tensors = {n: torch.zeros(2, 4, 8, 16) for n in ("query", "key", "value")}
    tensors["atten_mask"] = torch.zeros(2, 1, 8, 8)
    assert launch(given(), tensors, ops=both) == tuple(range(6))
    assert both.npu_fusion_attention_v3.arguments["atten_mask"] is tensors["atten_mask"]


def test_lengths_of_the_captured_version_are_tensors():
    ops = SimpleNamespace(npu_fusion_attention_v3=Recorder(V3))
    packed = TensorSpec((9, 4, 16), torch.float16)
    call = KernelCall(
        packed,
        packed,
        packed,
        4,
        "TND",
        atten_mask=AttenMask("full", (9, 9), with_call=True),
        actual_seq_qlen=(4, 9),
        actual_seq_kvlen=(4, 9),
    )
    tensors = {n: torch.zeros(9, 4, 16) for n in ("query", "key", "value")}
    launch(call, {**tensors, "atten_mask": torch.zeros(9, 9)}, ops=ops)
    lengths = ops.npu_fusion_attention_v3.arguments["actual_seq_qlen"]
    assert isinstance(lengths, torch.Tensor)
    assert lengths.tolist() == [4, 9]


def test_backends_that_lay_masks_out_refuse_one_that_comes_with_the_call():
    layer, cache = build(backend="tiled"), StaticCache(4)
    with torch.no_grad(), pytest.raises(BackendRefused, match="come with each call"):
        layer(noise(1, 1, DIM), cache=cache)
    with pytest.raises(CompositionError, match="cannot read them"):
        GivenCells((1, 1, 2, 2)).materialize(2, 2)


def used() -> StaticCache:
    cache = StaticCache(8)
    cache.append(noise(2, 5, 3, 4), noise(2, 5, 3, 4))
    return cache


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: StaticCache(0), ["capacity=0"]),
        (lambda: used().append(noise(2, 9, 3, 4), noise(2, 9, 3, 4)), ["9 tokens", "capacity"]),
        (lambda: used().append(noise(1, 1, 3, 4), noise(1, 1, 3, 4)), ["2 texts", "[1, 1, 3, 4]"]),
        (lambda: used().append(noise(2, 1, 3), noise(2, 1, 3)), ["[b, s, n, d]"]),
        (lambda: used().truncate([1, 2, 3]), ["3 lengths"]),
        (lambda: used().truncate(-1), ["truncate"]),
        (lambda: used().reorder([0]), ["KVCache.reorder"]),
        (lambda: StaticCache(2).reorder([0]), ["before the first append"]),
        (lambda: build(mask=masks.Full())(STEP, cache=StaticCache(4)), ["masks.Causal()"]),
        (lambda: build(mask=CAUSAL & masks.Dilated(2))(STEP, cache=StaticCache(4)), ["slices"]),
        (
            lambda: build(mask=CAUSAL & masks.Padding([1, 1], "left"))(STEP, cache=StaticCache(4)),
            ["align='top_left'"],
        ),
        (lambda: build(pse=pse.KeyBias(noise(4)))(STEP, cache=StaticCache(4)), ["distances"]),
        (lambda: build()(STEP, STEP, cache=StaticCache(4)), ["contexts", "KVCache"]),
        (
            lambda: build(rotary=Rotary(scaling=Dynamic(2.0, 2)))(STEP, cache=used()),
            ["turns all keys anew"],
        ),
    ],
)
@torch.no_grad()
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
