"""PagedCache: the same tokens as in a KVCache, on pages that nobody loses or takes twice."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from attnkit import masks, pse
from attnkit.cache import KVCache
from attnkit.errors import CompositionError
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.pages import PagedCache

DIM = 8
CAUSAL = masks.Causal()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**terms) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(DIM, 4, dtype=torch.float64, **{"mask": CAUSAL, **terms})


def check_pages(cache: PagedCache) -> None:
    """Every page is listed as often as it has owners, and no text lists one twice."""
    tables = cache._memory.tables
    listed = [page for row in tables for page in row]
    assert cache._memory.owners == [listed.count(page) for page in range(cache.pages)]
    assert cache.free == cache.pages - len(set(listed))
    for row, text in zip(tables, cache.texts * (len(tables) // len(cache.texts)), strict=True):
        assert len(set(row)) == len(row) == -(-text.held // cache.page)


@pytest.mark.parametrize("page", [1, 2, 5])
@pytest.mark.parametrize("seed", range(12))
def test_random_use_holds_what_a_cache_of_rows_holds(seed: int, page: int):
    draw = random.Random(seed)
    paged, rows = PagedCache(pages=80, page=page), KVCache()
    batch = draw.randint(1, 3)
    for step in range(25):
        kind = draw.choice(["packed", "packed", "dense", "truncate", "reorder", "expand"])
        if kind == "packed" or step == 0:
            counts = [draw.randint(0, 4) for _ in range(batch)]
            new = noise(sum(counts), 2, 3, seed=step), noise(sum(counts), 2, 1, seed=step + 50)
            args = (*new, counts)
        elif kind == "dense":
            args = (noise(batch, 1, 2, 3, seed=step), noise(batch, 1, 2, 1, seed=step + 50))
        if kind in ("packed", "dense") or step == 0:
            before = copy.deepcopy((paged._memory and paged._memory.tables, paged.texts))
            try:
                paged.append(*args)
            except CompositionError:
                assert (paged._memory.tables, paged.texts) == before
                break
            rows.append(*args)
        elif kind == "truncate":
            lengths = [draw.randint(0, n) for n in rows.lengths]
            paged.truncate(lengths)
            rows.truncate(lengths)
        elif kind == "reorder":
            batch = draw.randint(1, 4)
            chosen = [draw.randrange(rows.batch) for _ in range(batch)]
            paged.reorder(chosen)
            rows.reorder(torch.tensor(chosen))
        elif batch < 4:
            batch *= 2
            paged.expand(2)
            rows.expand(2)
        check_pages(paged)
        assert paged.lengths == rows.lengths
        for mine, meant in zip(paged.read(), rows.read(), strict=True):
            for b, length in enumerate(rows.lengths):
                assert torch.equal(mine[b, :length], meant[b, :length])


LAYERS = {
    "rotary, grouped": {"rotary": True, "num_kv_heads": 2},
    "sinks, alibi": {
        "mask": CAUSAL & (masks.SlidingWindow(3) | masks.Columns(0, 2)),
        "pse": pse.ALiBi(4),
    },
}


@pytest.mark.parametrize("rolling", [False, True], ids=["whole", "rolling"])
@pytest.mark.parametrize("how", LAYERS.values(), ids=LAYERS.keys())
@torch.no_grad()
def test_each_text_goes_on_as_it_would_alone(how, rolling):
    layer, texts = build(**how), noise(3, 24, DIM)
    pages = 16 if rolling and "mask" in how else 40
    cache, ends = PagedCache(pages=pages, page=2, rolling=rolling), [0, 0, 0]
    alone = [layer(text[None])[0] for text in texts]
    for counts in ([3, 7, 1], None, [2, 0, 5], None, None, [1, 1, 1], None, [0, 3, 2], *[None] * 6):
        new = counts or [1, 1, 1]
        spans = [slice(end, end + n) for end, n in zip(ends, new, strict=True)]
        parts = [text[span] for text, span in zip(texts, spans, strict=True)]
        meant = [one[span] for one, span in zip(alone, spans, strict=True)]
        ends = [end + n for end, n in zip(ends, new, strict=True)]
        if counts is None:
            found = layer(torch.stack(parts), cache=cache).flatten(0, 1)
        else:
            found = layer(torch.cat(parts), seqlens=SeqLens(counts), cache=cache)
        assert torch.allclose(found, torch.cat(meant), rtol=0, atol=1e-12)
        check_pages(cache)
    assert cache.lengths == tuple(ends)
    assert any(text.forgotten for text in cache.texts) == (pages == 16)


@torch.no_grad()
def test_copies_share_their_prompt_until_they_write():
    layer, cache, prompt = build(rotary=True), PagedCache(pages=12, page=4), noise(1, 10, DIM)
    layer(prompt, cache=cache)
    assert cache.free == 9
    cache.expand(4)
    assert cache.free == 9
    tokens = noise(4, 1, DIM, seed=1)
    found = layer(tokens, cache=cache)
    assert cache.free == 6  # three have copied the last page, one has kept it
    whole = layer(torch.cat([prompt.expand(4, -1, -1), tokens], 1))
    assert torch.allclose(found, whole[:, -1:], rtol=0, atol=1e-12)
    assert len({row[0] for row in cache.table.tolist()}) == 1
    cache.reorder([2])
    assert cache.free == 9
    cache.truncate(0)
    assert cache.free == 12


def test_the_last_page_is_counted_for_each_copy():
    for pages, all_fit, one_fits in [(2, False, False), (3, False, True), (4, True, True)]:
        cache = PagedCache(pages, page=4)
        cache.append(noise(1, 6, 1, 2), noise(1, 6, 1, 2))
        cache.expand(3)
        for counts, fits in (([0, 1, 0], one_fits), ([1, 1, 1], all_fit)):
            some = copy.deepcopy(cache)
            new = noise(sum(counts), 1, 2)
            if fits:
                some.append(new, new, counts)
                check_pages(some)
            else:
                with pytest.raises(CompositionError, match="lacks"):
                    some.append(new, new, counts)


@torch.no_grad()
def test_pages_that_lack_are_told_before_anything_is_written():
    layer, cache = build(), PagedCache(pages=3, page=4)
    layer(noise(9, DIM), seqlens=SeqLens([4, 5]), cache=cache)
    before = copy.deepcopy(cache._memory.tables)
    with pytest.raises(CompositionError, match=r"lacks 2 pages for \(1, 4\) tokens more"):
        layer(noise(5, DIM), seqlens=SeqLens([1, 4]), cache=cache)
    with pytest.raises(CompositionError, match="heads"):
        layer(noise(2, 1, DIM)[:, :0], cache=cache, pse=pse.ALiBi(3))
    assert cache._memory.tables == before
    assert repr(cache) == "PagedCache(lengths=(4, 5), free=0, pages=3, page=4)"
    cache.truncate([0, 5])  # the first text has ended: its page serves the other one
    layer(noise(3, DIM), seqlens=SeqLens([0, 3]), cache=cache)
    assert cache.free == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PagedCache(0), ["pages=0"]),
        (lambda: PagedCache(4, 2.5), ["page=2.5"]),
        (lambda: PagedCache(4, rolling=3), ["rolling=3"]),
        (lambda: PagedCache(4).read(), ["before the first append"]),
        (lambda: PagedCache(4).table, ["before the first append"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
