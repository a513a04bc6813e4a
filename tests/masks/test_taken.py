"""Rows, keys and heads that are taken of every family are those of its whole score matrix."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks import Mask
from attnkit.masks.trace import paint
from attnkit.ranges import Excerpt, Ranges
from tests.masks.oracle import cases

SIZES = [(4, 4), (6, 6), (5, 8), (8, 3)]
COUNTS = (2, 3)
"""Batch elements and heads that a mask without its own is asked for."""


def drawn(rng: random.Random, length: int) -> Ranges:
    """Return some positions in ranges of any order and direction; sometimes none."""
    ends = sorted(rng.sample(range(length + 1), rng.choice([0, 2, 2, 4, 4]) if length > 2 else 2))
    found = [range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    rng.shuffle(found)
    return tuple(one[::-1] if rng.random() < 0.2 else one for one in found)


def places(ranges: Ranges) -> torch.Tensor:
    return torch.tensor([position for one in ranges for position in one], dtype=torch.int64)


def cells(mask: Mask, *lengths: int) -> torch.Tensor:
    counts = (own or some for own, some in zip((mask.batches, mask.heads), COUNTS, strict=True))
    return mask.materialize(*lengths, *counts)


def joined(each: list[Mask]) -> list[Mask]:
    """Return masks made of others, whose batches and heads agree."""
    alike = [mask for mask in each if mask.batches is mask.heads is None]
    return [*(a & ~b | c for a, b, c in zip(alike, alike[3:], alike[7:], strict=False)),
            *(mask & masks.PerHead([masks.Causal(), masks.Full(), masks.Dilated(2)])
              for mask in each[::9] if mask.heads in (None, 3))]  # fmt: skip


def samples(q_len: int, kv_len: int) -> list[Mask]:
    each = [case.mask for case in cases(q_len, kv_len)]
    cut = [mask.cut((0, q_len), (0, kv_len), q_len=q_len, kv_len=kv_len) for mask in each[::11]]
    return [*each, *joined(each), *cut, *(~mask for mask in each[::13])]


def check_bounds(mask: Mask, found: torch.Tensor) -> None:
    """What is said to lie inside and around a mask does."""
    lengths = found.shape[2:]
    for b in range(mask.batches or 1):
        for h in range(mask.heads or 1):
            known = mask.enclosure(*lengths, b, h)
            assert not (paint(known.inner, *lengths) & ~found[b, h]).any()
            assert not (found[b, h] & ~paint(known.outer, *lengths)).any()


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_what_is_taken_of_every_family_is_what_it_is_there(q_len: int, kv_len: int) -> None:
    rng = random.Random(q_len)
    for mask in samples(q_len, kv_len):
        rows, keys = drawn(rng, q_len), drawn(rng, kv_len)
        own = mask.take(rows, keys, q_len=q_len, kv_len=kv_len)
        whole = cells(mask, q_len, kv_len)[:, :, places(rows)][..., places(keys)]
        found = cells(own, *whole.shape[2:])
        assert torch.equal(found, whole), (mask, rows, keys)
        assert (own.batches, own.heads) == (mask.batches, mask.heads)
        assert own == mask or own.extent == whole.shape[2:]
        check_bounds(own, found)


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES[1:])
def test_each_sequence_of_a_packed_batch_has_an_excerpt(q_len: int, kv_len: int) -> None:
    rng = random.Random(kv_len)
    for mask in samples(q_len, kv_len):
        count = mask.batches or COUNTS[0]
        chosen = rng.sample(range(count), rng.randint(1, count))
        excerpts = [
            Excerpt(q_len, kv_len, drawn(rng, q_len), drawn(rng, kv_len), b) for b in chosen
        ]
        own = masks.Taken(mask, excerpts)
        whole = cells(mask, q_len, kv_len)
        assert own.batches == len(chosen)
        for k, one in enumerate(excerpts):
            right = whole[one.batch][:, places(one.rows)][..., places(one.keys)]
            for h in range(mask.heads or 1):
                read = own._read(masks.Rectangle(*((0, n) for n in one.sizes), *one.sizes, k, h))
                assert torch.equal(read, right[h]), (mask, one)
            assert own.enclosures(*one.sizes, k + 1)[k] == own.enclosure(*one.sizes, k)


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES[1:3])
def test_heads_of_every_family(q_len: int, kv_len: int) -> None:
    apart = [mask for mask in samples(q_len, kv_len) if mask.heads is not None]
    assert len(apart) > 20
    for mask in apart:
        for start, stop in ((0, 1), (1, 3), (2, 3))[: mask.heads]:
            own = mask.for_heads(start, min(stop, mask.heads))
            whole = cells(mask, q_len, kv_len)[:, start:stop]
            assert own.heads in (None, whole.shape[1])
            found = own.materialize(q_len, kv_len, *whole.shape[:2])
            assert torch.equal(found, whole), (mask, start, stop)
            check_bounds(own, found)
            if "Predicate" not in str(mask):  # a function has no part
                assert "OfHeads" not in str(own)
                assert masks.parse(str(own)) == own
        assert mask.for_heads(0, mask.heads) is mask


def test_a_mask_that_is_alike_for_all_heads_stays() -> None:
    for mask in samples(6, 6):
        if mask.heads is None:
            assert mask.for_heads(1, 3) is mask


def test_an_order_in_which_a_mask_is_a_region_is_one_of_what_is_taken() -> None:
    rng, known = random.Random(3), 0
    for mask in samples(6, 6) + samples(8, 8):
        length = mask.extent[0] or 12
        whole = mask.in_order(length, length)
        own = mask.take(drawn(rng, length), drawn(rng, length), q_len=length, kv_len=length)
        if whole is None or own.extent == (None, None):
            continue
        known += 1
        order = own.in_order(*own.extent)
        assert order.fits(*own.extent)
        rows, keys = (places(side) for side in (order.rows, order.keys))
        inside = paint(order.region, *own.extent)
        found = own.materialize(*own.extent, own.batches or 1, own.heads or 1)[0, 0]
        assert torch.equal(found[rows][:, keys], inside), mask
    assert known > 15


def test_families_that_are_not_built_in_are_taken_too() -> None:
    known = {type(mask).__name__ for mask in samples(6, 6)}
    registered = {family.__name__ for _, family in masks.MASKS.items()}
    assert registered - known <= {"Taken", "OfHeads"}


def test_what_is_taken_of_what_was_taken_is_taken_once() -> None:
    rng = random.Random(5)
    for inner in (masks.Causal(), masks.Dilated(3), masks.Prefix((2, 5, 9))):
        rows, keys = ((range(2, 9), range(11, 9, -1)), (range(4), range(6, 12)))
        first = inner.take(rows, keys, q_len=12, kv_len=12)
        fewer, others = (*drawn(rng, 7)[:1], range(8, 6, -1)), (range(9, 3, -1), range(2))
        again = first.take(fewer, others)
        assert again.mask == inner
        right = cells(first, 9, 10)[:, :, places(fewer)][..., places(others)]
        assert torch.equal(cells(again, *again.extent), right)
        second = masks.Taken(first, [Excerpt(9, 10, fewer, others, b) for b in (2, 0)])
        each = again.materialize(*again.extent, 3)
        assert torch.equal(cells(second, *second.extent), each[[2, 0]][:, :1].expand(2, 3, -1, -1))
        third = second.take([(0, 1)], [(0, 2)])
        assert third.mask == inner
        assert [one.batch for one in third.excerpts] == [2, 0]


def test_a_taken_mask_is_a_value() -> None:
    mask = (masks.Causal() & masks.SlidingWindow(9)).take(
        [range(8), range(31, 23, -1)], [(8, 16), (0, 8)], q_len=32, kv_len=32
    )
    assert mask == masks.parse(str(mask)) == pickle.loads(pickle.dumps(mask)) == copy.deepcopy(mask)
    assert hash(mask) == hash(masks.parse(str(mask)))
    assert mask != mask.mask.take([(0, 8)], [(0, 8)], q_len=32, kv_len=32)
    spans = [(0, 4), (4, 8), (31, 23)], [(8, 16), (0, 8)]
    assert mask == mask.mask.take(*spans, q_len=32, kv_len=32)
    assert eval(repr(mask), {**vars(masks)}) == mask
    many = masks.Causal().take(
        [(k, k + 1) for k in range(0, 99, 2)], [(0, 99)], q_len=99, kv_len=99
    )
    assert len(repr(many)) < 200
    assert masks.Full().take([(0, 2)], [(0, 2)]) == masks.Full()
    assert masks.Columns(1).take([(0, 2)], [(1, 4)]).region(2, 3).area == 6


def test_no_cell_is_read_that_was_not_taken() -> None:
    read = []

    class Watched(masks.Predicate):
        def _cells(self, at, device):
            read.append(at)
            return super()._cells(at, device)

    mask = Watched(lambda b, h, i, j: (i + j) % 3 == 0)
    own = mask.take([(0, 8), (1000, 1008)], [(0, 8), (500, 504)], q_len=1 << 20, kv_len=1 << 20)
    assert int(own.materialize(16, 12).sum()) == 64
    assert sorted({at.shape for at in read}) == [(8, 4), (8, 8)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.Causal().take([(0, 2)], [(0, 2)]), ["q_len= and kv_len="]),
        (lambda: masks.Documents([4]).take([(0, 5)], [(0, 2)]), ["rows=((0, 5),)", "of 0 to 3"]),
        (lambda: masks.Documents([4]).take([(0, 2)], [(0, 2)], q_len=5), ["q_len=4", "leave it"]),
        (lambda: masks.Full().take([(0, 2), (1, 3)], [(0, 2)]), ["taken once"]),
        (lambda: masks.Full().take(3, [(0, 2)]), ["rows=3", "list of ranges"]),
        (lambda: masks.Full().take([(0, 2.0)], [(0, 2)]), ["(0, 2.0)", "two ints"]),
        (lambda: masks.Full().take([range(0, 4, 2)], [(0, 2)]), ["range(0, 4, 2)", "step 1 or -1"]),
        (lambda: masks.Taken(masks.Causal(), []), ["list of excerpts"]),
        (lambda: masks.Taken(masks.Causal(), [(2, 2)]), ["(2, 2)", "q_len, kv_len"]),
        (lambda: masks.Taken(masks.Causal(), [(2, 2, [(0, 1)], [(0, 1)])] * 2), ["2 excerpts"]),
        (lambda: masks.Taken(masks.Prefix([1]), [(2, 2, [], [], 1)]), ["batch element 1"]),
        (lambda: masks.Taken(masks.Documents([3]), [(2, 2, [], [])]), ["q_len=3"]),
        (lambda: masks.Taken("x", [(2, 2, [], [])]), ["takes a mask"]),
        (lambda: masks.Causal().take([(0, 2)], [], q_len=2, kv_len=2).region(1, 2), ["q_len=2"]),
        (lambda: masks.Causal().for_heads(2, 2), ["heads 2 to 2"]),
        (lambda: masks.Causal().for_heads(-1, 2), ["start=-1"]),
        (lambda: masks.PerHead([masks.Full(), masks.Causal()]).for_heads(1, 3), ["tells 2 apart"]),
        (lambda: masks.OfHeads(masks.Causal(), 0, 1), ["does not tell heads apart"]),
    ],
)  # fmt: skip
def test_errors_say_what_was_given_and_what_to_do(call, words) -> None:
    with pytest.raises((CompositionError, CompositionTypeError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_ranks_take_theirs_of_one_whole() -> None:
    made = []

    class Counted(masks.SlidingWindow):
        def _region(self, q_len, kv_len, batch, head):
            made.append((q_len, kv_len))
            return super()._region(q_len, kv_len, batch, head)

    mask = Counted(9)
    for length in (64, 64, 32, 64):
        for rank in range(4):
            rows = [(rank * length // 4, (rank + 1) * length // 4)]
            own = mask.take(rows, [(0, length)], q_len=length, kv_len=length)
            whole = masks.SlidingWindow(9).region(length, length)
            assert own.region(length // 4, length) == whole.cut(rows[0], (0, length))
    assert made == [(64, 64), (32, 32), (64, 64)]
    assert pickle.loads(pickle.dumps(masks.Causal())) == masks.Causal()
    assert "_wholes" not in copy.deepcopy(mask).__getstate__()
