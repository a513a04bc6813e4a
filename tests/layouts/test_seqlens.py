"""SeqLens: lengths and running totals are never mistaken for one another."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.layouts import SeqLens

lengths_lists = st.lists(st.integers(0, 50), min_size=1, max_size=12)


@given(lengths_lists)
def test_totals_and_running_totals_follow_from_lengths(lengths):
    lens = SeqLens(lengths)
    assert lens.q == lens.kv == tuple(lengths)
    assert lens.cu_q == tuple(np.cumsum([0, *lengths]).tolist()) == lens.cu_kv
    assert lens.total_q == lens.total_kv == sum(lengths)
    assert lens.max_q == lens.max_kv == max(lengths)
    assert len(lens) == len(lengths)
    lens.check_totals(sum(lengths), sum(lengths))


@given(lengths_lists, st.data())
def test_cumulative_lengths_build_the_same_value(lengths, data):
    kv = data.draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))
    lens = SeqLens(lengths, kv)
    assert SeqLens.from_cu_seqlens(lens.cu_q, lens.cu_kv) == lens
    assert (lens.max_q, lens.max_kv) == (max(lengths), max(kv))
    assert (lens.total_q, lens.total_kv) == (sum(lengths), sum(kv))
    assert SeqLens.from_cu_seqlens(list(lens.cu_q)) == SeqLens(lengths)


@pytest.mark.parametrize(
    "given_as",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
        lambda x: [np.int64(v) for v in x],
    ],
)
def test_every_accepted_container_gives_host_ints(given_as):
    lens = SeqLens(given_as([3, 5]))
    assert lens == SeqLens((3, 5))
    assert all(type(length) is int for length in lens.q + lens.kv)
    assert SeqLens.from_cu_seqlens(given_as([0, 3, 8])) == lens


def test_range_is_accepted():
    assert SeqLens(range(3)).q == (0, 1, 2)


def refused_containers():
    yield "35", "str"
    yield {3, 5}, "set"
    yield 8, "int"
    yield None, "NoneType"
    yield (x for x in (3, 5)), "generator"
    yield [3, 5.0], "q[1]=5.0 is of type float"
    yield [3, "5"], "q[1]='5' is of type str"
    yield [True, False], "q[0]=True is of type bool"
    yield torch.tensor([3.0, 5.0]), "float32"
    yield torch.tensor([True, False]), "torch.bool"
    yield torch.tensor([[3, 5]]), "a 1-D tensor of integers"
    yield torch.tensor(8), "a 1-D tensor of integers"
    yield torch.ones(2, dtype=torch.int64, device="meta"), "tensor on meta"
    yield torch.tensor([3, 5]).to_sparse(), "a sparse_coo tensor"
    yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"
    yield np.ones((2, 2), int), "array of shape (2, 2)"
    yield np.array(5), "array of shape ()"
    yield np.array([3.0, 5.0]), "float64"
    yield np.array(["3", "5"]), "<U1"
    yield np.array([True, False]), "bool"
    yield b"12", "bytes"
    yield bytearray(b"12"), "bytearray"
    yield memoryview(b"12"), "memoryview"
    yield [3, float("nan")], "q[1]=nan is of type float"
    yield [3, None], "q[1]=None is of type NoneType"
    yield {3: 5}, "dict"


@pytest.mark.parametrize(("values", "word"), list(refused_containers()))
def test_other_containers_are_type_errors(values, word):
    with pytest.raises(CompositionTypeError, match="SeqLens") as caught:
        SeqLens(values)
    assert word in str(caught.value)


def test_a_tensor_on_a_device_is_refused_with_the_remedy():
    with pytest.raises(CompositionTypeError, match="keep the lengths on the host"):
        SeqLens.from_cu_seqlens(torch.ones(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SeqLens([]), ["q is empty"]),
        (lambda: SeqLens([3], []), ["kv is empty"]),
        (lambda: SeqLens([3, -1]), ["q[1]=-1", ">= 0"]),
        (lambda: SeqLens([3, 4], [3]), ["2 query lengths", "1 key lengths"]),
        (lambda: SeqLens.from_cu_seqlens([]), ["cu_q is empty"]),
        (lambda: SeqLens.from_cu_seqlens([0]), ["q is empty"]),
        (lambda: SeqLens.from_cu_seqlens([3, 8]), ["starts with 3", "prepend", "SeqLens(...)"]),
        (lambda: SeqLens.from_cu_seqlens([0, 8, 3]), ["falls from 8 to 3 at index 2"]),
        (lambda: SeqLens.from_cu_seqlens([0, 3], [1, 3]), ["cu_kv starts with 1"]),
        (lambda: SeqLens.from_cu_seqlens([0, 3], [0, 3, 5]), ["1 query", "2 key"]),
        (lambda: SeqLens([3, 5]).check_totals(9, 8), ["q lengths (3, 5)", "sum to 8", "holds 9"]),
        (lambda: SeqLens([3, 5], [4, 4]).check_totals(8, 9), ["kv lengths (4, 4)", "9 tokens"]),
        (lambda: SeqLens([0, 3, 8]).check_totals(8, 8), ["running totals", "from_cu_seqlens"]),
        (lambda: SeqLens([3, 8]).check_totals(8, 8), ["running totals", "from_cu_seqlens"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_lengths_that_could_be_totals_are_taken_as_lengths():
    assert SeqLens([0, 3, 8]).total_q == 11


@given(lengths_lists, lengths_lists)
def test_equality_and_hash_are_those_of_the_lengths(left, right):
    assert (SeqLens(left) == SeqLens(right)) == (left == right)
    assert hash(SeqLens(left)) == hash(SeqLens(list(left), list(left)))


def test_a_value_survives_pickling_and_copying_without_its_cached_hash():
    lens = SeqLens([3, 5], [4, 9])
    assert (hash(lens), lens.cu_q) == (hash(lens), (0, 3, 8))
    again = pickle.loads(pickle.dumps(lens))
    assert again == lens == copy.deepcopy(lens)
    assert hash(again) == hash(lens)
    assert b"_hash" not in pickle.dumps(lens)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        SeqLens([3]).q = (4,)


def test_repr_is_code_when_short_and_cut_when_long():
    for q, kv in itertools.product([(1,), (3, 0)], repeat=2):
        if len(q) == len(kv):
            assert eval(repr(SeqLens(q, kv))) == SeqLens(q, kv)
    assert repr(SeqLens(range(1000))) == "SeqLens(q=(0, 1, 2, 3, 4, 5, ..., 999; 1000 in all))"
    assert len(str(SeqLens(range(1000), range(1, 1001)))) < 120


def test_the_hash_of_a_thousand_sequences_is_computed_once(monkeypatch):
    lens = SeqLens(range(1000))
    first = hash(lens)
    monkeypatch.setattr(SeqLens, "_hash", property(lambda self: 1 / 0))
    fresh = SeqLens(range(1000))
    with pytest.raises(ZeroDivisionError):
        hash(fresh)
    monkeypatch.undo()
    assert hash(lens) == first
    assert lens.__dict__["_hash"] == first


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([3, -1], ["q[1]=-1", ">= 0"]),
        ([2**63], ["too large", "64-bit"]),
        ([2**62, 2**62], ["more tokens in all"]),
        ([-(10**30)], ["q[0]=-1000"]),
        (range(10**12), ["entries", "at most 16777216"]),
    ],
)
def test_numbers_that_are_no_lengths_are_refused(lengths, words):
    with pytest.raises(CompositionError) as caught:
        SeqLens(lengths)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("tokens", [None, 8.0, True, "8", torch.ones(2), np.ones(2)])
def test_totals_are_numbers_of_tokens(tokens):
    with pytest.raises(CompositionTypeError, match="two numbers of tokens"):
        SeqLens([8]).check_totals(tokens, 8)
