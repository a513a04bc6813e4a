"""KVCache: what goes in comes out, in order, and misuse is an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.cache import KVCache
from attnkit.errors import CompositionError


def tokens(count: int, start: int = 0, batch: int = 2) -> torch.Tensor:
    flat = torch.arange(start * 12.0, (start + count) * 12.0).view(count, 3, 4)
    return flat.expand(batch, count, 3, 4)


@given(st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_appended_tokens_come_back_in_order(steps, grows):
    total = sum(steps)
    cache = KVCache(None if grows else max(total, 1))
    for count in steps:
        keys, values = cache.append(tokens(count, cache.length), -tokens(count, cache.length))
        assert torch.equal(keys, tokens(cache.length))
        assert torch.equal(values, -tokens(cache.length))
    assert cache.length == cache.queries == total
    assert grows or not steps or cache.capacity == max(total, 1)


def test_preallocated_memory_never_moves_and_growth_doubles():
    cache = KVCache(64)
    places = {cache.append(tokens(1, i), tokens(1, i))[0].data_ptr() for i in range(64)}
    assert len(places) == 1
    growing, capacities = KVCache(), []
    for i in range(100):
        growing.append(tokens(1, i), tokens(1, i))
        capacities.append(growing.capacity)
    assert sorted(set(capacities)) == [16, 32, 64, 128]
    assert growing.nbytes == 2 * 2 * 128 * 3 * 4 * 4


def test_views_of_earlier_steps_stay_what_they_were():
    cache = KVCache()
    early, _ = cache.append(tokens(3), tokens(3))
    for i in range(3, 40):
        cache.append(tokens(1, i), tokens(1, i))
    assert torch.equal(early, tokens(3))


def test_truncate_and_reset():
    cache = KVCache()
    cache.append(tokens(5), tokens(5))
    cache.truncate(2)
    keys, _ = cache.append(tokens(1, 2), tokens(1, 2))
    assert torch.equal(keys, tokens(3))
    cache.reset()
    assert (cache.length, cache.capacity, cache.nbytes) == (0, 0, 0)
    cache.append(tokens(1, batch=5), tokens(1, batch=5))


def test_inference_mode_and_no_grad_mix():
    cache = KVCache()
    with torch.inference_mode():
        cache.append(tokens(3) * 1, tokens(3) * 1)
    with torch.no_grad():
        keys, _ = cache.append(tokens(1, 3), tokens(1, 3))
    assert torch.equal(keys, tokens(4))


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(1, 3, 4), torch.zeros(2, 3, 4)])


def sealed() -> KVCache:
    cache = KVCache()
    cache.seal(tokens(5), tokens(5))
    return cache


def used() -> KVCache:
    cache = KVCache(capacity=8)
    cache.append(tokens(5), tokens(5))
    return cache


def test_a_sealed_cache_is_read_and_counts_queries():
    cache = sealed()
    cache.answered(2)
    assert (cache.length, cache.queries, cache.sealed) == (5, 2, True)
    assert torch.equal(cache.read()[0], tokens(5))
    cache.reset()
    assert not cache.sealed


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KVCache(0), ["capacity=0"]),
        (lambda: KVCache(2.5), ["capacity=2.5"]),
        (lambda: KVCache(True), ["capacity=True"]),
        (lambda: KVCache(10**30), ["capacity=", "at most", "None"]),
        (lambda: KVCache(2**55).append(tokens(1), tokens(1)), ["capacity of", "bytes", "None"]),
        (lambda: KVCache(2**63 - 1).append(tokens(1), tokens(1)), ["bytes", "[2, 9223372"]),
        (lambda: KVCache().append(3, 3), ["key is a int"]),
        (lambda: KVCache().append(tokens(1), None), ["value is a NoneType"]),
        (lambda: KVCache().append(tokens(1).int(), tokens(1).int()), ["torch.int32", "floating"]),
        (lambda: KVCache().append(tokens(1) > 0, tokens(1) > 0), ["torch.bool"]),
        (lambda: KVCache().append(tokens(1), tokens(1).double()), ["torch.float64", "alike"]),
        (lambda: KVCache().append(tokens(1), tokens(1).to("meta")), ["on meta", "alike"]),
        (lambda: KVCache().append(tokens(1).to_sparse(), tokens(1)), ["sparse", "to_dense"]),
        (lambda: KVCache().append(nested(), nested()), ["nested"]),
        (lambda: used().truncate(1.0), ["length=1.0", "int"]),
        (lambda: used().truncate(True), ["length=True", "int"]),
        (lambda: used().truncate(None), ["length=None", "int"]),
        (lambda: used().truncate(-1), ["length=-1", ">= 0"]),
        (lambda: used().truncate(10**30), ["length=1000", "too large"]),
        (lambda: sealed().answered(1.0), ["queries=1.0"]),
        (lambda: used().answered(1), ["no context"]),
        (lambda: used().append(tokens(4), tokens(4)), ["5 tokens and 4 more", "capacity of 8"]),
        (lambda: used().append(tokens(1, batch=3), tokens(1, batch=3)), ["batch 2", "has 3"]),
        (lambda: used().append(tokens(1)[:, :, :2], tokens(1)[:, :, :2]), ["heads 3", "has 2"]),
        (lambda: used().append(tokens(1)[..., :2], tokens(1)), ["head dim 4", "has 2"]),
        (lambda: used().append(tokens(1).double(), tokens(1)), ["float32", "float64"]),
        (lambda: used().append(tokens(1).to("meta"), tokens(1)), ["device cpu", "meta"]),
        (lambda: used().append(tokens(1), tokens(2)), ["[2, 1, 3, 4]", "[2, 2, 3, 4]"]),
        (lambda: used().append(tokens(1)[0], tokens(1)), ["[b, s, n, d]"]),
        (lambda: used().append((tokens(1) * 1).requires_grad_(), tokens(1)), ["no_grad"]),
        (lambda: used().truncate(6), ["truncated to 6"]),
        (lambda: used().seal(tokens(1), tokens(1)), ["in use already"]),
        (lambda: sealed().append(tokens(1), tokens(1)), ["cross-attention"]),
        (lambda: sealed().seal(tokens(1), tokens(1)), ["in use already"]),
        (lambda: sealed().truncate(1), ["reset()"]),
        (lambda: KVCache().read(), ["before the first append"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_refused_append_leaves_the_cache_as_it_was():
    cache = used()
    with pytest.raises(CompositionError):
        cache.append(tokens(4), tokens(4))
    with pytest.raises(CompositionError):
        cache.append(tokens(1), tokens(1).double())
    assert cache.length == 5
    assert torch.equal(cache.read()[0], tokens(5))


def test_it_copies_and_pickles_with_its_content():
    for again in (copy.deepcopy(used()), pickle.loads(pickle.dumps(used()))):
        assert repr(again) == repr(used()) == "KVCache(length=5, capacity=8)"
        keys, _ = again.append(tokens(1, 5), tokens(1, 5))
        assert torch.equal(keys, tokens(6))
    assert repr(sealed()) == "KVCache(length=5, capacity=16, sealed)"
