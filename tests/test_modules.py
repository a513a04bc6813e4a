"""MultiHeadAttention against a definition written here, in float64; decoding against the whole."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit import masks, pse
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput
from attnkit.cache import KVCache
from attnkit.decoding import rows_of_text
from attnkit.errors import BackendRefused, CompositionError, CompositionTypeError
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.rotary import Rotary

DIM = 16


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(dim: int = DIM, num_heads: int = 4, **composition) -> MultiHeadAttention:
    torch.manual_seed(0)
    layer = MultiHeadAttention(dim, num_heads, dtype=torch.float64, **composition)
    if layer.attention.sink is not None:
        torch.nn.init.normal_(layer.attention.sink)
    return layer


def define(layer, x, context=None, mask=None, bias=None, softcap=None):
    """One text [s dim], head by head, with the module's weights: what it all means."""
    core, source = layer.attention, x if context is None else context
    n, d = core.num_heads, core.head_dim
    q = layer.q_proj(x).view(len(x), n, d)
    k = layer.k_proj(source).view(len(source), -1, d)
    v = layer.v_proj(source).view(len(source), -1, d)
    if layer.rotary is not None:
        q = layer.rotary.rotate(q, torch.arange(len(x)))
        k = layer.rotary.rotate(k, torch.arange(len(x)))
    heads = []
    for h in range(n):
        shared = h // (n // core.num_kv_heads)
        scores = q[:, h] @ k[:, shared].T * core.composition.scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores + (0 if bias is None else bias[h])
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        if core.sink is not None:
            scores = torch.cat([scores, core.sink[h].double().expand(len(x), 1)], dim=1)
        heads.append(scores.softmax(-1).nan_to_num()[:, : len(source)] @ v[:, shared])
    return layer.out_proj(torch.stack(heads, 1).reshape(len(x), n * d))


def cells(mask, q_len: int, kv_len: int) -> torch.Tensor:
    return mask.materialize(q_len, kv_len)[0, 0]


COMPOSITIONS = {
    "full": {},
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.Causal() & masks.SlidingWindow(3)},
    "alibi": {"mask": masks.Causal(), "pse": pse.ALiBi(4)},
    "rotary": {"mask": masks.Causal(), "rotary": True},
    "gqa": {"num_kv_heads": 2, "mask": masks.Causal()},
    "mqa, interleaved rotary": {
        "num_kv_heads": 1,
        "mask": masks.Causal(),
        "head_dim": 8,
        "rotary": Rotary(base=100.0, rotary_dim=4, pairing="interleaved"),
    },
    "sink": {"mask": masks.Causal(), "sink": True},
    "softcap": {"mask": masks.Causal(), "softcap": 0.5},
    "scale and bias": {"mask": masks.Causal(), "scale": 0.7, "bias": True},
    "two biases": {"mask": masks.Causal(), "pse": pse.ALiBi(4) + pse.SqrtALiBi(4)},
    "top-left": {
        "mask": masks.Causal(align="top_left"),
        "pse": pse.ALiBi(4, align="top_left"),
    },
}


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_self_attention_is_the_definition(composition):
    layer = build(**composition)
    x = noise(2, 7, DIM)
    bias = composition.get("pse")
    bias = None if bias is None else bias.materialize(7, 7, dtype=torch.float64)[0]
    mask = cells(composition.get("mask", masks.Full()), 7, 7)
    expected = [define(layer, row, None, mask, bias, composition.get("softcap")) for row in x]
    assert torch.allclose(layer(x), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["TND", "BSND"])
@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_packed_texts_are_the_texts_one_by_one(composition, layout):
    layer = build(layout=layout, **composition)
    lens = SeqLens([3, 0, 1, 5])
    x = noise(9, DIM)
    packed = layer(x, seqlens=lens)
    alone = [layer(text[None])[0] for text in x.split(lens.q) if len(text)]
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH"])
def test_every_layout_gives_the_same(layout):
    composition = {"mask": masks.Causal(), "num_kv_heads": 2, "rotary": True}
    x = noise(2, 5, DIM)
    got = build(layout=layout, **composition)(x, return_stats=True)
    expected = build(**composition)(x, return_stats=True)
    assert torch.allclose(got.output, expected.output, rtol=0, atol=1e-12)
    assert torch.allclose(got.stats.lse, expected.stats.lse)


def test_cross_attention_is_the_definition_dense_and_packed():
    layer = build(kv_dim=5, num_kv_heads=2, mask=masks.Prefix(4), pse=pse.ALiBi(4))
    x, context = noise(2, 3, DIM), noise(2, 6, 5, seed=1)
    bias = pse.ALiBi(4).materialize(3, 6, dtype=torch.float64)[0]
    mask = cells(masks.Prefix(4), 3, 6)
    expected = torch.stack([define(layer, x[b], context[b], mask, bias) for b in range(2)])
    assert torch.allclose(layer(x, context), expected, rtol=0, atol=1e-12)
    packed = layer(x.flatten(0, 1), context.flatten(0, 1), seqlens=SeqLens([3, 3], [6, 6]))
    assert torch.allclose(packed, expected.flatten(0, 1), rtol=0, atol=1e-12)


def test_a_call_time_mask_is_intersected_and_a_bias_added():
    layer = build(mask=masks.Causal(), pse=pse.ALiBi(4))
    both = build(mask=masks.Causal() & masks.Prefix(3), pse=pse.ALiBi(4) + pse.SqrtALiBi(4))
    x = noise(2, 7, DIM)
    more = {"mask": masks.Prefix(3), "pse": pse.SqrtALiBi(4)}
    assert torch.allclose(layer(x, **more), both(x), rtol=0, atol=1e-12)
    lens = SeqLens([3, 4])
    packed = layer(x[0], seqlens=lens, **more)
    assert torch.allclose(packed, both(x[0], seqlens=lens), rtol=0, atol=1e-12)
    plain = build(mask=masks.Causal())
    assert torch.allclose(
        plain(x, pse=pse.ALiBi(4)), build(mask=masks.Causal(), pse=pse.ALiBi(4))(x)
    )


def test_masks_and_biases_may_be_texts():
    assert build(mask="Causal()", pse="ALiBi(4)").attention.mask == masks.Causal()
    layer, x = build(mask=masks.Causal()), noise(2, 7, DIM)
    meant = layer(x, mask=masks.Prefix(3), pse=pse.ALiBi(4))
    assert torch.equal(layer(x, mask="Prefix(3)", pse="ALiBi(4)"), meant)
    assert layer.plan(x, mask="Prefix(3)") == layer.plan(x, mask=masks.Prefix(3))
    cache = KVCache()
    found = decode(layer, x, [], cache, mask="Prefix(3)", pse="ALiBi(4)")
    assert torch.allclose(found, meant, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_every_parameter_and_are_right(packed):
    weight = torch.nn.Parameter(noise(4, 3, 3))
    layer = build(
        num_kv_heads=2, rotary=True, bias=True, sink=True, mask=masks.Causal(), layout="TND"
    )
    bias = pse.Dense(weight)
    x = noise(6, DIM) if packed else noise(2, 3, DIM)
    x.requires_grad_()
    seqlens = SeqLens([3, 3]) if packed else None
    parameters = [x, weight, *layer.parameters()]
    names = dict(layer.named_parameters())
    assert "attention.sink" in names

    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output.sin() * torch.arange(output.numel()).view_as(output)).sum()

    got = torch.autograd.grad(loss(layer(x, pse=bias, seqlens=seqlens)), parameters)
    rows = x.unflatten(0, (2, 3)) if packed else x
    mask = cells(masks.Causal(), 3, 3)
    defined = torch.stack([define(layer, row, None, mask, weight) for row in rows])
    expected = torch.autograd.grad(loss(defined.view_as(x)), parameters)
    for mine, true in zip(got, expected, strict=True):
        assert torch.allclose(mine.double(), true.double(), rtol=1e-5, atol=1e-5)
    for mine, true in zip(got[:2], expected[:2], strict=True):
        assert torch.allclose(mine, true, rtol=0, atol=1e-10)


def test_stats_come_on_request_and_describe_the_rows():
    layer = build(mask=masks.Causal())
    result = layer(noise(2, 5, DIM), return_stats=True)
    assert isinstance(result, AttentionOutput)
    assert result.output.shape == (2, 5, DIM)
    assert result.stats.lse.shape == (2, 4, 5)
    packed = layer(noise(5, DIM), seqlens=SeqLens([2, 3]), return_stats=True)
    assert packed.stats.lse.shape == (5, 4)


def test_dropout_is_for_training_only_and_follows_the_generator():
    layer = build(mask=masks.Causal(), dropout=0.5)
    x, lens = noise(2, 9, DIM), SeqLens([4, 5])
    calls = (lambda: layer(x), lambda: layer(x[0], seqlens=lens))
    for call in calls:
        torch.manual_seed(3)
        first = call()
        torch.manual_seed(3)
        assert torch.equal(call(), first)
        assert not torch.equal(call(), first)
    layer.eval()
    still = build(mask=masks.Causal()).eval()
    for call in calls:
        assert torch.equal(call(), call())
    assert torch.allclose(layer(x), still(x))
    assert torch.allclose(layer(x[0], seqlens=lens), still(x[0], seqlens=lens))


# -- decoding ----------------------------------------------------------------------------


def decode(layer, x, cuts, cache, **more) -> torch.Tensor:
    with torch.no_grad():
        steps = torch.tensor_split(x, cuts, dim=1)
        return torch.cat([layer(step, cache=cache, **more) for step in steps], dim=1)


CAUSAL = {name: c for name, c in COMPOSITIONS.items() if "mask" in c} | {
    "prefix, prefilled": {"mask": masks.PrefixLM(3)},
    "documents": {"mask": masks.Causal() & masks.Documents([4, 5]), "pse": pse.ALiBi(4)},
    "dense": {
        "mask": masks.Dense.keep(noise(9, 9).gt(-0.5).tril() | torch.eye(9, dtype=torch.bool)),
        "pse": pse.Dense(noise(4, 9, 9)) + pse.Dense(noise(9, 9, seed=1), before_scale=True),
    },
    "per head": {"mask": masks.PerHead([masks.Causal(), masks.SlidingWindow(2)] * 2)},
    "per batch": {"mask": masks.Causal() & masks.Prefix([4, 9])},
    "chunked": {"mask": masks.Causal() & masks.Chunked(4, align="top_left")},
    "strided": {"mask": masks.Causal(align="top_left") & masks.Dilated(2, align="top_left")},
}


@pytest.mark.parametrize("composition", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("cuts", [[], [3], [3, 4, 5, 6, 7, 8], [5, 7]], ids=str)
@pytest.mark.parametrize("capacity", [None, 9])
def test_decoding_in_steps_equals_the_whole(composition, cuts, capacity):
    layer = build(**composition)
    x = noise(2, 9, DIM)
    cache = KVCache(capacity)
    assert torch.allclose(decode(layer, x, cuts, cache), layer(x), rtol=0, atol=1e-12)
    assert cache.length == 9
    if capacity is None:  # the same cache serves the next text
        cache.reset()
        y = noise(2, 9, DIM, seed=5)
        assert torch.allclose(decode(layer, y, [4], cache), layer(y), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, 39)), st.integers(0, 2**16))
def test_decoding_in_any_steps_equals_the_whole(cuts, seed):
    layer = build(
        num_kv_heads=2,
        rotary=True,
        pse=pse.ALiBi(4),
        mask=masks.Causal() & (masks.SlidingWindow(7) | masks.Prefix(2)),
        sink=True,
    )
    x = noise(2, 40, DIM, seed=seed)
    assert torch.allclose(decode(layer, x, sorted(cuts), KVCache()), layer(x), rtol=0, atol=1e-12)


def test_call_time_masks_speak_of_the_whole_text_in_every_step():
    layer = build(mask=masks.Causal())
    x = noise(2, 9, DIM)
    more = {"mask": masks.Prefix([5, 9]) | masks.Rows(7, 9), "pse": pse.ALiBi(4)}
    expected = layer(x, **more)
    assert torch.allclose(decode(layer, x, [2, 6, 7], KVCache(), **more), expected, atol=1e-12)


def test_a_rejected_draft_can_be_taken_back():
    layer, cache = build(rotary=True, mask=masks.Causal()), KVCache()
    x = noise(1, 8, DIM)
    decode(layer, torch.cat([x[:, :5], noise(1, 3, DIM, seed=9)], dim=1), [5], cache)
    cache.truncate(5)
    assert torch.allclose(decode(layer, x[:, 5:], [1], cache), layer(x)[:, 5:], atol=1e-12)


@pytest.mark.parametrize(
    "composition",
    [
        {},
        {"pse": pse.Dense(noise(4, 7, 6)), "mask": masks.Prefix([4, 6])},
        {"num_kv_heads": 2, "mask": masks.Causal(align="top_left"), "sink": True},
        {"pse": pse.ALiBi(4, align="top_left"), "mask": masks.Rows(2, 5)},
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_context_is_cached_once(composition, again):
    layer = build(kv_dim=5, **composition)
    x, context = noise(2, 7, DIM), noise(2, 6, 5, seed=1)
    expected = layer(x, context)
    cache, projected = KVCache(), []
    layer.k_proj.register_forward_hook(lambda *call: projected.append(call))
    with torch.no_grad():
        outputs = [layer(x[:, :2], context, cache=cache)]
        for token in x[:, 2:].split(1, dim=1):
            outputs.append(layer(token, context if again else None, cache=cache))
    assert torch.allclose(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)
    assert (cache.length, cache.queries, cache.sealed, len(projected)) == (6, 7, True, 1)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (masks.Full(), ["Full()", "first 4 tokens", "masks.Causal()"]),
        (masks.PrefixLM(6), ["first 4 tokens see keys that came after"]),
        (masks.SlidingWindow(3) | masks.Columns(5, 6), ["first 4 tokens", "Columns"]),
        (masks.Causal() & masks.Padding([3], side="left"), ["moves as the text grows", "top_left"]),
        (masks.PerHead([masks.Causal()] * 3 + [masks.Full()]), ["first 4 tokens"]),
        (masks.Causal() | masks.Prefix([1, 6]), ["first 4 tokens"]),
        (masks.Causal() & masks.Documents([3, 3]), ["6 x 6", "8 tokens"]),
    ],
)
def test_masks_that_steps_cannot_honour_are_refused(mask, words):
    layer, cache = build(mask=mask), KVCache()
    with pytest.raises(CompositionError) as caught:
        decode(layer, noise(mask.batches or 1, 8, DIM), [4], cache)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert cache.length == 4  # the step that failed has not happened


def test_a_mask_that_sees_past_the_text_so_far_is_refused_at_once():
    mask = masks.Dense.keep(torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(CompositionError, match="tokens 0 to 3 see keys that come later"):
        decode(build(mask=mask), noise(1, 8, DIM), [4], KVCache())


def test_every_step_of_every_small_mask_is_its_rows_or_refused():
    families = [
        masks.Causal(),
        masks.Causal(align="top_left"),
        masks.SlidingWindow(2),
        masks.Band(1, 1),
        masks.Full(),
        masks.Prefix(2),
        masks.PrefixLM(2),
        masks.Columns(1, 3),
        masks.Rows(1, 3),
        masks.Causal() & ~masks.Columns(0, 1),
        masks.BlockCausal(2, align="top_left"),
    ]
    honoured = 0
    for mask, total, start in itertools.product(families, range(1, 7), range(6)):
        if start >= total:
            continue
        whole, before = cells(mask, total, total), cells(mask, start, start)
        settled = torch.equal(whole[:start, :start], before) and not whole[:start, start:].any()
        try:
            rows, _ = rows_of_text(mask, None, start, total)
        except CompositionError:
            assert not settled
            continue
        assert settled
        honoured += 1
        assert torch.equal(cells(rows, total - start, total), whole[start:])
    assert honoured > 100


# -- bad input ---------------------------------------------------------------------------


def full_cache() -> KVCache:
    cache = KVCache(4)
    decode(build(mask=masks.Causal()), noise(1, 4, DIM), [], cache)
    return cache


def context_cache() -> KVCache:
    cache = KVCache()
    with torch.no_grad():
        build()(noise(1, 2, DIM), noise(1, 6, DIM), cache=cache)
    return cache


@torch.no_grad()
def call(x, context=None, *, layer=None, **more):
    return (layer or build(mask=masks.Causal()))(x, context, **more)


X = noise(1, 3, DIM)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: build(10, 4), ["dim=10", "num_heads=4", "head_dim="]),
        (lambda: build(0), ["dim=0"]),
        (lambda: build(DIM, 0), ["num_heads=0"]),
        (lambda: build(DIM, 4, num_kv_heads=3), ["num_heads=4", "num_kv_heads=3"]),
        (lambda: build(DIM, 4, head_dim=7, rotary=True), ["head of 7"]),
        (lambda: build(DIM, 4, rotary=10000.0), ["rotary=10000.0"]),
        (lambda: build(DIM, 4, pse=pse.ALiBi(8)), ["8 heads", "num_heads=4"]),
        (lambda: build(2**40), ["dim=1099511627776", "at most 2,147,483,647"]),
        (lambda: build(DIM, 2**40), ["num_heads=1099511627776", "at most"]),
        (lambda: build(DIM, 2**20, head_dim=2**20), ["num_heads * head_dim=1099511627776"]),
        (lambda: build(2**30, 2**20), ["q_proj has 1,073,741,824 x", "no memory"]),
        (lambda: build(DIM, True), ["num_heads=True"]),
        (lambda: build(DIM, 4, bias="no"), ["bias='no'", "True or False", "pse="]),
        (lambda: build(DIM, 4, bias=None), ["bias=None"]),
        (lambda: MultiHeadAttention(DIM, 4, dtype="float32"), ["dtype='float32'", "torch.float16"]),
        (lambda: MultiHeadAttention(DIM, 4, dtype=torch.int64), ["dtype=torch.int64"]),
        (lambda: MultiHeadAttention(DIM, 4, dtype=torch.float8_e5m2), ["float8_e5m2"]),
        (lambda: MultiHeadAttention(DIM, 4, dtype=[]), ["dtype=[]"]),
        (lambda: MultiHeadAttention(DIM, 4, dtype=np.ones(2)), ["dtype=array"]),
        (lambda: build(device=1.5), ["device=1.5"]),
        (lambda: build(device=True), ["device=True"]),
        (lambda: build(device="abacus"), ["device='abacus'", "not there"]),
        (lambda: build(device="xpu:77"), ["device='xpu:77'", "not there"]),
        (lambda: call(X.to_sparse()), ["x is a sparse_coo tensor", "SeqLens"]),
        (lambda: call(torch.nested.nested_tensor([X[0], X[0]])), ["x is a nested tensor"]),
        (lambda: call(X, mask="causal"), ["cannot read the mask 'causal'", "SlidingWindow"]),
        (lambda: call(X, mask=masks.Causal), ["is the class", "mask=Causal(...)"]),
        (lambda: call(X, mask=X > 0), ["mask=<tensor", "Dense.keep", "Padding.of"]),
        (lambda: call(X, pse=noise(3, 3)), ["pse=<tensor [3, 3]", "pse.Dense(t)"]),
        (lambda: call(X, pse=noise(3, 3), cache=KVCache()), ["pse=<tensor [3, 3]"]),
        (lambda: call(X, cache=True), ["cache=True", "KVCache()"]),
        (lambda: call(X, cache=KVCache), ["cache=<class", "KVCache()"]),
        (lambda: call(X, cache=0), ["cache=0"]),
        (lambda: build(DIM, 4, layout="bsdn"), ["'BSND'"]),
        (lambda: call([1.0]), ["x is a list"]),
        (lambda: call(noise(1, 3, 5)), ["[1, 3, 5]", "[b, s, 16]", "dim=16"]),
        (lambda: call(noise(1, 1, 3, DIM)), ["[b, s, 16]"]),
        (lambda: call(X.float()), ["float32", "float64", "cast"]),
        (lambda: call(X.to("meta")), ["meta", "cpu"]),
        (lambda: call(X, noise(1, 3, 5)), ["context", "[1, 3, 5]", "kv_dim=16"]),
        (lambda: call(X, noise(2, 3, DIM)), ["one batch size"]),
        (lambda: call(X, noise(3, DIM)), ["both packed"]),
        (lambda: call(X, X.float()), ["context is torch.float32"]),
        (lambda: call(X, layer=build(kv_dim=5)), ["cross-attention", "pass context"]),
        (lambda: call(X, X, layer=build(rotary=True)), ["rotary", "rotary=False"]),
        (lambda: call(X[0]), ["packed", "seqlens"]),
        (lambda: call(X[0], seqlens=[3]), ["SeqLens(lengths)", "from_cu_seqlens"]),
        (lambda: call(X, seqlens=SeqLens([3])), ["batch axis", "masks.Padding"]),
        (lambda: call(X[0], seqlens=SeqLens([4])), ["sum to 4", "3 tokens"]),
        (lambda: call(X[0], seqlens=SeqLens([3], [2])), ["as many keys as queries"]),
        (lambda: call(X[0], X[0], seqlens=SeqLens([3], [2])), ["sum to 2", "3 tokens"]),
        (lambda: call(X, cache=[]), ["cache=[]"]),
        (
            lambda: call(X[0], X[0], seqlens=SeqLens([3]), cache=KVCache()),
            ["packed", "one length for all"],
        ),
        (lambda: call(X[0], cache=KVCache()), ["packed", "seqlens"]),
        (lambda: call(X, cache=full_cache()), ["capacity of 4"]),
        (lambda: call(noise(2, 1, DIM), cache=full_cache()), ["batch 1", "has 2"]),
        (lambda: call(X, X, cache=full_cache()), ["in use already"]),
        (lambda: call(X, noise(1, 5, DIM), cache=context_cache()), ["6 positions", "reset()"]),
        (lambda: call(noise(2, 1, DIM), cache=context_cache(), layer=build()), ["batch"]),
        (lambda: call(X, cache=context_cache()), ["q_len", "Causal()"]),
        (lambda: build(mask=masks.Causal())(X, cache=KVCache()), ["no_grad"]),
        (lambda: call(X, mask=masks.Documents([2, 2])), ["q_len=4", "q_len=3"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(bad, words):
    with pytest.raises(CompositionError) as caught:
        bad()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_type_errors_are_type_errors():
    with pytest.raises(CompositionTypeError):
        call(X.float())
    with pytest.raises(CompositionTypeError):
        call(X[0], seqlens=[3])


def test_a_backend_that_cannot_is_refused_when_the_module_is_built():
    with pytest.raises(BackendRefused):
        build(softcap=1.0, backend="emulated")


def test_a_step_that_fails_inside_attention_leaves_the_cache_as_it_was():
    layer, cache = build(mask=masks.Causal()), KVCache()
    decode(layer, X, [], cache)
    with pytest.raises(CompositionError), torch.no_grad():
        layer(X, cache=cache, pse=pse.ALiBi(3))
    assert cache.length == 3
    fresh = KVCache()
    with pytest.raises(CompositionError), torch.no_grad():
        layer(X, X, cache=fresh, pse=pse.ALiBi(3, align="top_left"))
    assert (fresh.length, fresh.sealed) == (0, False)


# -- as a module -------------------------------------------------------------------------


def test_weights_save_load_and_copy():
    layer = build(num_kv_heads=2, sink=True, bias=True, mask=masks.Causal())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    other = MultiHeadAttention(
        DIM, 4, num_kv_heads=2, sink=True, bias=True, mask=masks.Causal(), dtype=torch.float64
    )
    x = noise(2, 5, DIM)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_dtype_and_device_are_those_asked_for():
    layer = MultiHeadAttention(DIM, 4, dtype=torch.bfloat16, rotary=True, mask=masks.Causal())
    assert layer(noise(2, 5, DIM).bfloat16()).dtype == torch.bfloat16
    empty = MultiHeadAttention(DIM, 4, sink=True, device="meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_autocast_runs_in_its_dtype():
    layer = MultiHeadAttention(DIM, 4, rotary=True, mask=masks.Causal())
    x = noise(2, 5, DIM).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.plan(x).request.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["BSND", "TND", "BSH"])
@pytest.mark.parametrize("packed", [False, True])
def test_plan_is_the_plan_that_forward_runs(layout, packed, monkeypatch):
    layer = build(num_kv_heads=2, mask=masks.Causal(), pse=pse.ALiBi(4), layout=layout)
    x = noise(6, DIM) if packed else noise(2, 3, DIM)
    lens = SeqLens([2, 4]) if packed else None
    ran = []
    from attnkit.backends import BACKENDS

    backend = type(BACKENDS["tiled"])
    run = backend.run

    def spy(self, plan, operands):
        ran.append(plan)
        return run(self, plan, operands)

    monkeypatch.setattr(backend, "run", spy)
    layer(x, seqlens=lens, mask=masks.SlidingWindow(2))
    found = layer.plan(x, seqlens=lens, mask=masks.SlidingWindow(2))
    assert ran[0].request == found.request
    assert "tiled" in layer.explain(x, seqlens=lens)


def test_repr_shows_the_composition():
    text = repr(build(kv_dim=5, mask=masks.Causal()))
    assert "dim=16, kv_dim=5" in text
    assert "Causal()" in text
    assert "rotary=Rotary" in repr(build(rotary=True))


def test_the_core_is_attention_with_the_composition():
    layer = build(num_kv_heads=2, mask=masks.Causal(), pse=pse.ALiBi(4), dropout=0.1)
    core = layer.attention
    assert isinstance(core, Attention)
    assert (core.mask, core.pse, core.num_kv_heads) == (masks.Causal(), pse.ALiBi(4), 2)
    assert core.composition.dropout == 0.1


def public(module):
    """Yield the public classes and functions of a module, and what they define in public."""
    for name in module.__all__:
        entry = getattr(module, name)
        if inspect.isclass(entry) or inspect.isfunction(entry):
            yield name, entry
        for part, member in vars(entry).items() if inspect.isclass(entry) else ():
            own = getattr(member, "__func__", member)  # what a classmethod wraps
            documented = inspect.isfunction(own) or isinstance(own, property | cached_property)
            if documented and not part.startswith("_"):
                yield f"{name}.{part}", own


@pytest.mark.parametrize("name", ["cache", "decoding", "layouts", "modules", "rotary"])
def test_every_public_name_has_an_example(name):
    module = importlib.import_module(f"attnkit.{name}")
    assert [path for path, entry in public(module) if ">>>" not in (entry.__doc__ or "")] == []
