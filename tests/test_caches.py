"""Caches that forget, texts of unlike lengths, beams: each step equals the text alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from attnkit import masks, memory, pse
from attnkit.cache import KVCache
from attnkit.decoding import seen_later
from attnkit.errors import CompositionError
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.texts import HeldText

DIM = 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**terms) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(DIM, 4, dtype=torch.float64, **{"mask": masks.Causal(), **terms})


@pytest.fixture
def small(monkeypatch):
    """Memory that is full at once."""
    monkeypatch.setattr(memory, "_FIRST_ROOM", 1)


# -- rolling -----------------------------------------------------------------------------------

CAUSAL = masks.Causal()
FORGETS = {
    "window": (CAUSAL & masks.SlidingWindow(4), 3),
    "sinks": (CAUSAL & (masks.SlidingWindow(3) | masks.Columns(0, 2)), 4),
    "sinks apart": (CAUSAL & (masks.SlidingWindow(3) | masks.Columns(1, 2)), 3),
    "chunks": (CAUSAL & masks.Chunked(5), 4),
    "blocks": (masks.BlockCausal(1) & masks.SlidingWindow(2), 1),
    "documents": (CAUSAL & masks.Documents([7, 11, 6, 16]), 15),
    "left padding": (CAUSAL & ~masks.Prefix([3, 0]) & masks.SlidingWindow(5), 4),
    "a window for each head": (
        masks.PerHead([CAUSAL & masks.SlidingWindow(k) for k in (2, 5, 3, 1)]),
        4,
    ),
    "every second key of a window": (CAUSAL & masks.SlidingWindow(6) & masks.Dilated(2), 5),
}
CUTS = [[], list(range(1, 40)), [9, 10, 11, 30, 31], [1, 2, 3, 20]]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("cuts", CUTS, ids=["once", "tokens", "chunks", "late chunk"])
@pytest.mark.parametrize(("mask", "most"), FORGETS.values(), ids=FORGETS.keys())
@torch.no_grad()
def test_a_rolling_cache_is_exact_and_bounded(mask, most, cuts):
    layer, cache = build(mask=mask, num_kv_heads=4, rotary=True), KVCache(rolling=True)
    x = noise(2, 40, DIM)
    steps = []
    for part in x.tensor_split(cuts, dim=1):
        steps.append(layer(part, cache=cache))
        if part.shape[1] == 1 and cache.texts[0].since == cache.length - 1:
            assert cache.texts[0].held - 1 <= most  # it has forgotten all that it could
    assert torch.allclose(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-12)
    longest = max(b - a for a, b in itertools.pairwise([0, *cuts, 40]))
    assert cache.capacity <= max(2 * (most + longest), 40 if not cuts else 0)
    assert cache.length == 40


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "mask", [FORGETS["window"][0], FORGETS["sinks"][0]], ids=["one run", "two"]
)
@pytest.mark.parametrize(
    "bias",
    [
        pse.ALiBi(4),
        pse.T5Relative(4, 8, 9, bidirectional=False, table=noise(8, 4)),
        pse.KeyBias(noise(30)) + pse.SqrtALiBi(4),
        pse.Dense(noise(4, 30, 30), before_scale=True),
    ],
    ids=lambda bias: type(bias).__name__,
)
@torch.no_grad()
def test_biases_keep_their_places(mask, bias):
    layer, cache = build(mask=mask, pse=bias), KVCache(rolling=True)
    x = noise(2, 30, DIM)
    steps = [layer(part, cache=cache) for part in x.tensor_split([4, 5, 6, 7, 12, 13, 14], 1)]
    assert torch.allclose(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-12)
    assert cache.texts[0].forgotten


@torch.no_grad()
def test_what_shows_everything_forgets_nothing():
    layer, cache = build(), KVCache(rolling=True)
    x = noise(1, 70, DIM)
    steps = [layer(part, cache=cache) for part in x.split(1, 1)]
    assert torch.allclose(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-12)
    assert repr(cache) == "KVCache(length=70, capacity=128, rolling=True)"


@torch.no_grad()
def test_a_capacity_bounds_what_is_held_not_the_text():
    layer = build(mask=CAUSAL & masks.SlidingWindow(4))
    cache = KVCache(8, rolling=True)
    places = set()
    for part in noise(1, 60, DIM).split(1, 1):
        layer(part, cache=cache)
        places.add(cache.read()[0].data_ptr())
    assert len(places) == 1
    assert cache.capacity == 8
    assert "KVCache(length=60, held=" in repr(cache)
    with pytest.raises(CompositionError, match="capacity of 8"):
        layer(noise(1, 6, DIM), cache=cache)
    layer(noise(1, 5, DIM), cache=cache)


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_rows_that_see_again_what_was_forgotten_are_refused():
    late = CAUSAL & (masks.SlidingWindow(2) | masks.Rows(30, 31))
    layer, cache, x = build(mask=late), KVCache(rolling=True), noise(1, 40, DIM)
    for part in x[:, :30].split(1, 1):
        layer(part, cache=cache)
    with pytest.raises(CompositionError, match=r"tokens 30 to 30 see .* forgotten"):
        layer(x[:, 30:31], cache=cache)
    assert cache.length == 30
    other, cache = build(mask=CAUSAL & masks.SlidingWindow(9)), KVCache(rolling=True)
    for part in x[:, :20].split(1, 1):
        other(part, cache=cache, mask=masks.SlidingWindow(3))
    with pytest.raises(CompositionError, match="the same mask in every call"):
        other(x[:, 20:21], cache=cache)


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_a_draft_is_taken_back_as_far_as_its_call():
    layer, cache = build(mask=CAUSAL & masks.SlidingWindow(4)), KVCache(rolling=True)
    x = noise(1, 30, DIM)
    for n in range(0, 24, 3):
        start = cache.length
        layer(noise(1, 5, DIM, seed=n), cache=cache)  # a draft of five
        cache.truncate(start)
        layer(x[:, n : n + 3], cache=cache)
    found = layer(x[:, 24:25], cache=cache)
    assert torch.allclose(found, layer(x[:, :25])[:, 24:], rtol=0, atol=1e-12)
    with pytest.raises(CompositionError, match=r"cannot be truncated to 3 tokens: .* rolling"):
        cache.truncate(3)


def test_later_rows_are_asked_as_a_set():
    """The runs that later rows see, against the cells of every small mask."""
    n, stop = 12, 6
    for mask, _ in FORGETS.values():
        if mask.extent != (None, None) or mask.heads:
            continue
        cells = mask.materialize(n, n, mask.batches or 1)[:, 0]
        batches = range(mask.batches or 1)
        runs = seen_later(mask, HeldText().grown(stop), 1, batches)
        seen = {j for a, b in runs for j in range(a, b)}
        shown = cells[:, stop:, :stop].any(0).any(0)
        assert seen >= set(shown.nonzero().flatten().tolist()), mask
        if mask.is_region(n, n):
            assert len(seen) == shown.sum(), mask


# -- texts of unlike lengths -------------------------------------------------------------------

UNLIKE = {
    "causal": {},
    "rotary, grouped, window": {
        "rotary": True,
        "num_kv_heads": 2,
        "mask": CAUSAL & masks.SlidingWindow(3),
    },
    "sinks, alibi": {"mask": FORGETS["sinks"][0], "pse": pse.ALiBi(4), "sink": True},
    "chunks, rotary, gate": {
        "mask": CAUSAL & masks.Chunked(3),
        "rotary": True,
        "gate": "head",
        "qk_norm": "rms",
    },
    "every second key": {"mask": CAUSAL & masks.Dilated(2), "softcap": 3.0},
    "a table": {"pse": pse.Dense(noise(1, 4, 20, 20)), "mask": CAUSAL},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rolling", [False, True], ids=["whole", "rolling"])
@pytest.mark.parametrize("how", UNLIKE.values(), ids=UNLIKE.keys())
@torch.no_grad()
def test_each_text_goes_on_as_it_would_alone(how, rolling):
    layer, draw = build(**how), random.Random(1)
    cache, ends = KVCache(rolling=rolling), [0, 0, 0]
    texts = noise(3, 20, DIM)
    alone = [layer(text[None])[0] for text in texts]
    for counts in ([3, 7, 1], None, [2, 0, 5], None, None, [1, 1, 1], None, [0, 3, 2]):
        new = counts or [1, 1, 1]
        parts = [text[end : end + n] for text, end, n in zip(texts, ends, new, strict=True)]
        meant = [one[end : end + n] for one, end, n in zip(alone, ends, new, strict=True)]
        ends = [end + n for end, n in zip(ends, new, strict=True)]
        if counts is None:
            found = layer(torch.stack(parts), cache=cache).flatten(0, 1)
        else:
            found = layer(torch.cat(parts), seqlens=SeqLens(counts), cache=cache)
        assert torch.allclose(found, torch.cat(meant), rtol=0, atol=1e-12)
        assert cache.lengths == tuple(ends)
        if draw.random() < 0.5:  # the last token of two texts comes once more
            back = [max(end - 1, 0) if n else end for end, n in zip(ends, new, strict=True)]
            back[1] = ends[1]
            cache.truncate(back)
            ends = back
    assert repr(cache).startswith("KVCache(lengths=(")


@torch.no_grad()
def test_texts_with_a_mask_of_their_own():
    mask = CAUSAL & masks.PerBatch([masks.SlidingWindow(2), masks.SlidingWindow(4)])
    layer, cache, texts = build(mask=mask), KVCache(), noise(2, 9, DIM)
    whole = layer(texts)
    prompt = torch.cat([texts[0, :2], texts[1, :6]])
    found = [layer(prompt, seqlens=SeqLens([2, 6]), cache=cache)]
    found.append(
        layer(torch.cat([texts[0, 2:9], texts[1, 6:9]]), seqlens=SeqLens([7, 3]), cache=cache)
    )
    meant = [whole[0, :2], whole[1, :6], whole[0, 2:9], whole[1, 6:9]]
    assert torch.allclose(torch.cat(found), torch.cat(meant), rtol=0, atol=1e-12)
    assert len(cache.texts) == 1  # alike once more


@torch.no_grad()
def test_packed_statistics_are_those_of_each_token():
    layer, cache, texts = build(), KVCache(), noise(2, 6, DIM)
    tokens = torch.cat([texts[0, :2], texts[1, :5]])
    found = layer(tokens, seqlens=SeqLens([2, 5]), cache=cache, return_stats=True)
    meant = layer(texts, return_stats=True).stats
    for name in ("lse", "max", "sum"):
        mine, whole = getattr(found.stats, name), getattr(meant, name).transpose(1, 2)
        assert torch.allclose(mine, torch.cat([whole[0, :2], whole[1, :5]]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_step_that_fails_leaves_unlike_texts_as_they_were():
    layer, cache = build(), KVCache(capacity=8)
    layer(noise(5, DIM), seqlens=SeqLens([2, 3]), cache=cache)
    with pytest.raises(CompositionError, match="capacity of 8"):
        layer(noise(7, DIM), seqlens=SeqLens([1, 6]), cache=cache)
    with pytest.raises(CompositionError, match="heads"):
        layer(noise(2, 1, DIM), cache=cache, pse=pse.ALiBi(3))
    assert cache.lengths == (2, 3)


# -- beams and copies --------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lengths", [[6, 6], [6, 4]], ids=["alike", "unlike"])
@pytest.mark.parametrize("rolling", [False, True], ids=["whole", "rolling"])
@torch.no_grad()
def test_beams_take_over_each_others_past(lengths, rolling):
    """A search with two prompts and three beams each, against texts written out."""
    layer = build(rotary=True, mask=CAUSAL & masks.SlidingWindow(5))
    prompts = [noise(n, DIM, seed=k) for k, n in enumerate(lengths)]
    cache, draw = KVCache(rolling=rolling), random.Random(2)
    layer(torch.cat(prompts), seqlens=SeqLens(lengths), cache=cache)
    cache.expand(3)
    texts = [prompt for prompt in prompts for _ in range(3)]
    for k in range(6):
        chosen = [draw.randrange(3) + 3 * (b // 3) for b in range(6)]
        indices = torch.tensor(chosen) if k % 2 else chosen
        cache.reorder(indices)
        tokens = noise(6, 1, DIM, seed=10 + k)
        texts = [torch.cat([texts[c], token]) for c, token in zip(chosen, tokens, strict=True)]
        found = layer(tokens, cache=cache)
        meant = torch.stack([layer(text[None])[0, -1:] for text in texts])
        assert torch.allclose(found, meant, rtol=0, atol=1e-12)
    cache.reorder([4])  # the best one alone
    token = noise(1, 1, DIM, seed=99)
    meant = layer(torch.cat([texts[4][None], token], 1))[:, -1:]
    assert torch.allclose(layer(token, cache=cache), meant, rtol=0, atol=1e-12)


@torch.no_grad()
def test_reordering_stays_in_place_and_holds_for_a_context():
    cache, context = KVCache(), noise(3, 5, 4, 2)
    cache.seal(context, -context)
    place = cache.read()[0].data_ptr()
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.read()[0].data_ptr() == place
    assert torch.equal(cache.read()[1], -context[[2, 0, 0]])
    cache.expand(2)
    assert torch.equal(cache.read()[0], context[[2, 2, 0, 0, 0, 0]])
    assert cache.sealed


def used(**how) -> KVCache:
    cache = KVCache(**how)
    cache.append(noise(2, 5, 3, 4), noise(2, 5, 3, 4))
    return cache


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KVCache(rolling=1), ["rolling=1"]),
        (lambda: used().append(noise(4, 3, 4), noise(4, 3, 4), [1, 2]), ["sum to 3", "[4, 3, 4]"]),
        (lambda: used().append(noise(3, 3, 4), noise(3, 3, 4), [1, 1, 1]), ["batch 2", "has 3"]),
        (lambda: used().append(noise(2, 1, 3, 4), noise(2, 1, 3, 4), [1, 1]), ["packed"]),
        (lambda: used().append(noise(1, 3, 4), noise(1, 3, 4), [2, -1]), ["counts[1]=-1"]),
        (lambda: used().truncate([1, 2, 3]), ["3 lengths", "each of the 2"]),
        (lambda: used().truncate([6, 5]), ["truncated to 6"]),
        (lambda: used().reorder([0, 2]), ["index 2", "2 texts"]),
        (lambda: used().reorder([0.5]), ["indices[0]=0.5"]),
        (lambda: used().reorder(torch.tensor([True])), ["indices"]),
        (lambda: used().reorder([]), ["empty"]),
        (lambda: KVCache().reorder([0]), ["before the first append"]),
        (lambda: used().expand(0), ["copies=0"]),
        (lambda: used().keep([(), (), ()]), ["3 texts"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_explain_tells_what_a_step_reads():
    cache = used(capacity=10)
    cache.truncate([5, 3])
    told = cache.explain()
    assert "KVCache(lengths=(5, 3), capacity=10)" in told
    assert f"{2 * 2 * 5 * 3 * 4 * 8:,} bytes of keys" in told
