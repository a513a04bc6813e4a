"""Recovery: every family comes back with its cells, and with its name where it has one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice
from attnkit.masks import Dense, PerHead, Predicate, Slices, parse, recover
from attnkit.masks.naming import name
from attnkit.masks.trace import count_slices, mask_rows, trace
from tests.masks.oracle import SIZES, cases
from tests.masks.test_compositions import composable, compositions

C, W = masks.Causal(), masks.SlidingWindow
LATE = masks.Causal("top_left")


def drawn(mask, q_len, kv_len):
    return mask.materialize(q_len, kv_len, mask.batches or 1, mask.heads or 1)


def check(found, cells):
    """The mask has the cells; where it is exact, its regions are the cells too."""
    batch, heads, q_len, kv_len = cells.shape
    again = found.mask.materialize(q_len, kv_len, batch, heads)
    assert again.equal(cells), found
    assert found.exact == bool(found.regions)
    for b in range(batch) if found.exact else ():
        for h in range(heads):
            row = found.regions[min(b, len(found.regions) - 1)]
            painted = Slices.of(row[min(h, len(row) - 1)], q_len, kv_len)
            assert painted.materialize(q_len, kv_len)[0, 0].equal(cells[b, h])


@pytest.mark.parametrize(("q_len", "kv_len"), [*SIZES[::5], (6, 5)])
def test_every_family_comes_back(q_len, kv_len):
    for case in cases(q_len, kv_len):
        cells = drawn(case.mask, q_len, kv_len)
        found = recover(cells)
        assert found.exact, case.mask
        check(found, cells)


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_every_family_comes_back_at_every_size(q_len, kv_len):
    test_every_family_comes_back(q_len, kv_len)


NAMED = [
    masks.Full(),
    ~masks.Full(),
    C,
    W(7),
    masks.Band(3, 5),
    masks.Band(None, 5),
    masks.Band(3, None),
    masks.Columns(3, 9),
    masks.Columns(4),
    masks.Prefix(5),
    masks.Rows(3, 8),
    masks.Rows(40),
    masks.PrefixLM(11),
    masks.Documents([20, 30, 46]),
    masks.Documents([20, 30, 46], [40, 0, 56]),
    masks.Documents([20, 30, 46]) & C,
    masks.Documents([20, 30, 46]) & W(8),
    masks.Documents([20, 30, 46]) | masks.Prefix(4),
    masks.Chunked(16),
    masks.Chunked(20),
    masks.Chunked(16) & C,
    masks.BlockCausal(16),
    masks.Padding([5, 96, 40]),
    masks.Padding([5, 96, 40], "left"),
    masks.Padding([5, 96, 40]) & C,
    masks.Padding([5, 96, 40], "left") & W(9),
    masks.PrefixLM([3, 9]),
    masks.Documents([[20, 76], [40, 56]]) & C,
    C & (W(16) | masks.Prefix(4)),
    W(16) | masks.Prefix(4),
    masks.Band(8, 8) | masks.Columns(3, 5) | masks.Rows(3, 5),
    C | (masks.Rows(11, 20) & masks.Columns(11, 20)),
    C & ~masks.Columns(3, 7),
    C & ~(masks.Columns(3, 7) | masks.Columns(50, 53)),
    ~(masks.Columns(3, 7) | masks.Rows(8, 12)),
    C & masks.Columns(40),
]


@pytest.mark.parametrize("mask", NAMED, ids=repr)
def test_named_masks_come_back_by_name(mask):
    found = recover(drawn(mask, 96, 96))
    assert found.named
    check(found, drawn(mask, 96, 96))
    assert len(str(found.mask)) <= len(str(mask)), found.mask
    assert parse(str(found.mask)) == found.mask


@pytest.mark.parametrize("size", [(64, 100), (100, 64)])
@pytest.mark.parametrize(
    "mask",
    [C, LATE, W(7), W(7, "top_left"), masks.Band(3, 2, "top_left"), masks.Chunked(16),
     masks.Chunked(16, "top_left"), masks.BlockCausal(16), masks.BlockCausal(16, "top_left"),
     masks.Chunked(16) & C],
    ids=repr,
)  # fmt: skip
def test_anchors_come_back(mask, size):
    assert recover(drawn(mask, *size)).mask == mask


def test_packed_documents_of_many_lengths():
    lengths = [3 + k % 17 for k in range(400)]
    mask = masks.Documents(lengths) & C
    found = name((mask.region(sum(lengths), sum(lengths)),), sum(lengths), sum(lengths))
    assert found == mask


WHOLE = [
    masks.Blocks("#.#. ##.. #.## .#.#", 16, 8),
    masks.Blocks("#.#. ##.. #.## .#.#", 16, 8, q_len=59, kv_len=27),
    masks.Blocks("#... .#.. #.#. .#.#", 16, 16, causal=True),
    masks.Blocks("#... .#.. #.#. .#.#", 16, 16, causal=True, align="top_left", q_len=50),
    masks.Blocks(torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0)) < 0.5, 8, 8),
    masks.Tree([-1, 0, 0, 1, 3, 3, 2], prefix=9),
    masks.Tree([3, 3, 0, -1, 2, 0, 0], prefix=0),
    masks.Tree([[-1, 0, 0, 1, 1], [-1, 0, 1, 1, 0]], prefix=2),
    masks.Neighborhood((8, 12), 5),
    masks.Neighborhood((8, 12), (3, 4), causal=(True, False)),
    masks.Neighborhood((4, 6, 8), (3, 3, 5), causal=(True, False, False)),
]


@pytest.mark.parametrize("mask", WHOLE, ids=repr)
def test_tables_trees_and_neighborhoods_come_back_by_name(mask):
    found = recover(drawn(mask, *mask.extent))
    assert (found.mask, found.exact, found.named) == (mask, True, True)


def test_what_is_nearly_a_table_a_tree_or_a_neighborhood_is_none():
    for mask in WHOLE:
        cells = drawn(mask, *mask.extent).clone()
        cells[0, 0, -1, :3] ^= True
        found = recover(cells)
        check(found, cells)
        assert type(found.mask) is not type(mask) or found.mask != mask


def test_heads_and_batches():
    per_head = PerHead([C, W(3), masks.Documents([20, 12]), C])
    found = recover(drawn(per_head, 32, 32))
    assert found.mask == per_head
    assert found.named
    with pytest.raises(CompositionError, match=r"3 regions differ.*regions\[batch\]\[head\]"):
        found.region  # noqa: B018 -- the property is what is tested
    same = C.materialize(8, 8, 3, 2).clone()
    assert recover(same).mask == C
    mixed = torch.stack([drawn(C, 16, 16)[0], drawn(C, 16, 16)[0].flip(-1)])
    found = recover(mixed)
    assert isinstance(found.mask, Slices)
    assert found.mask.batches == 2
    assert not found.named
    check(found, mixed)


def test_an_expanded_axis_is_read_once():
    cells = C.materialize(64, 64, batch=100_000, heads=64)
    assert recover(cells).mask == C


# -- sources -----------------------------------------------------------------------------------


def test_polarity():
    cells = drawn(C, 8, 8)
    assert recover(cells).mask == C
    assert recover(~cells, keep=False).mask == C
    assert "True = masked out" in recover(~cells, keep=False).reason
    assert recover(lambda b, h, i, j: j > i, 8, 8, keep=False).mask == C
    assert recover(cells[0, 0].numpy()).mask == C


def test_functions_of_flex_attention_and_transformers():
    ids = torch.tensor([0] * 20 + [1] * 12)
    documents = recover(lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j), 32, 32)
    assert documents.mask == C & masks.Documents([20, 12])

    def and_masks(*functions):
        def joined(batch_idx, head_idx, q_idx, kv_idx):
            result = q_idx.new_ones((), dtype=torch.bool)
            for function in functions:
                result = result & function(batch_idx, head_idx, q_idx, kv_idx)
            return result

        return joined

    def causal(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx <= q_idx

    def window(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx > q_idx - 8

    padding = torch.arange(32) < torch.tensor([[32], [20]])
    exists = and_masks(causal, lambda b, h, i, j: padding[b, j])
    assert recover(and_masks(causal, window), 32, 32).mask == W(8)
    assert recover(exists, 32, 32, batch=2).mask == C & masks.Padding([32, 20])
    assert recover(causal, 4, 32, q_offset=28).mask == C
    by_head = recover(lambda b, h, i, j: i - j == h, 8, 8, heads=2)
    assert by_head.mask.region(8, 8, head=1) == masks.Band(1, -1).region(8, 8)


def test_a_function_that_reads_more_than_was_said():
    def by_batch(b, h, i, j):
        return j < 3 + b

    with pytest.raises(CompositionError, match=r"by_batch reads b, and batch= was not said"):
        recover(by_batch, 8, 8)
    assert recover(by_batch, 8, 8, batch=2).mask == masks.Padding([3, 4])
    with pytest.raises(CompositionError, match="reads h"):
        recover(lambda b, h, i, j: torch.ones(4, 8)[h, j] > 0, 8, 8)


def test_row_bounds():
    assert recover([(0, i + 1) for i in range(9)], kv_len=9).mask == C
    pairs = torch.tensor([[[0, 2], [0, 1]], [[0, 2], [4, 4]], [[2, 4], [2, 3]], [[3, 4], [2, 3]]])
    assert recover(pairs, kv_len=4).mask == masks.Chunked(2)
    assert recover(pairs[:, 0].numpy()[:2], kv_len=4).mask == masks.Prefix(2)
    assert recover([[], [(0, 4)]], kv_len=4).mask == masks.Rows(1)
    assert recover([], 0, kv_len=4).mask == masks.Full()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: recover(lambda b, h, i, j: i >= j), "q_len=None.*say both"),
        (lambda: recover([(0, 1)]), "kv_len"),
        (lambda: recover([(0, 9)], kv_len=4), "0 <= j < 9 for row 0.*kv_len=4"),
        (lambda: recover([(0, 1, 2)], kv_len=4), r"row 0; a row is \(start, stop\)"),
        (lambda: recover([(0, 1)], kv_len=4, keep=False), "~mask"),
        (lambda: recover([(0, 1)], 3, kv_len=4), "q_len=1, but was told q_len=3"),
        (lambda: recover(C, 4, 4, keep=False), "~mask"),
        (lambda: recover(C), "say both"),
        (lambda: recover(torch.ones(3, 3)), "bool tensor"),
        (lambda: recover(torch.ones(3, 3).bool(), 4), "q_len=3, but was told q_len=4"),
        (lambda: recover(torch.ones(3, 3).bool(), batch=2), "belong to a function"),
        (lambda: recover(torch.ones(3, 3).bool(), keep=1), "keep=1"),
        (lambda: recover("Causal()", kv_len=3), "'Causal"),
        (lambda: recover(lambda b, h, i, j: i - j, 3, 3), "returned torch.int64"),
        (lambda: recover(torch.ones(3, 3).bool(), max_slices=0), "max_slices=0"),
    ],
)
def test_bad_requests(ask, words):
    with pytest.raises(CompositionError, match=words):
        ask()


# -- what has no name --------------------------------------------------------------------------


def test_what_is_no_small_region_stays_as_it_is():
    noise = torch.rand(90, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    found = recover(noise)
    assert not found.exact
    assert not found.named
    assert found.mask == Dense.keep(noise)
    assert "max_slices=424" in found.reason
    with pytest.raises(CompositionError, match="not a small region"):
        found.region  # noqa: B018 -- the property is what is tested
    assert recover(noise, keep=False).mask == Dense.drop(noise)

    def even(b, h, i, j):
        return (i + j) % 2 == 0

    assert recover(even, 400, 400).mask == Predicate(even)
    moved = recover(even, 400, 400, q_offset=1, keep=False)
    assert moved.mask.materialize(400, 400).equal(Predicate(even).materialize(400, 400))
    check(recover(noise, max_slices=9000), noise[None, None])


def test_a_region_without_a_name_is_held_literally():
    region = Region.of(
        *(Slice(9 * k, 9 * k + 7, 5 * k, 5 * k + 11 + k, k - 40, k * k) for k in range(9))
    )
    cells = drawn(Slices.of(region, 96, 96), 96, 96)
    found = recover(cells)
    assert found.mask == Slices.of(region, 96, 96)
    assert found.exact
    assert not found.named
    assert found.region == region


def test_a_cell_more_or_less_is_noticed():
    """A name is given to equal cells only, whichever cell is the wrong one."""
    generator = torch.Generator().manual_seed(0)
    for mask in (C, W(5), masks.Chunked(6), masks.Documents([10, 14]), masks.PrefixLM(4)):
        for _ in range(3):
            cells = drawn(mask, 24, 24).clone()
            i, j = torch.randint(0, 24, (2,), generator=generator).tolist()
            cells[0, 0, i, j] ^= True
            found = recover(cells)
            assert found.mask != mask
            check(found, cells)


# -- simplify ----------------------------------------------------------------------------------


def test_simplify():
    assert Dense.keep(drawn(W(3), 12, 12)).simplify() == W(3)
    assert (C & W(64)).simplify(32, 32) == C
    assert (C & W(64)).simplify(128, 128) == W(64)
    assert (W(4) | masks.Dilated(2)).simplify(512, 512) == W(4) | masks.Dilated(2)
    assert Predicate(lambda b, h, i, j: i >= j).simplify(16, 16) == C
    assert (C & Predicate(lambda b, h, i, j: i - j < 4)).simplify(64, 64) == W(4)
    assert Slices.of(C.region(9, 9), 9, 9).simplify() == C
    assert PerHead([C, C]).simplify(9, 9) == C
    with pytest.raises(CompositionError, match="say both"):
        C.simplify()


@settings(max_examples=40)
@given(compositions, st.integers(0, 12), st.integers(0, 12))
def test_simplified_compositions_are_equal(case, q_len, kv_len):
    simple = case.mask.simplify(q_len, kv_len)
    assert drawn(simple, q_len, kv_len).equal(drawn(case.mask, q_len, kv_len))


@settings(max_examples=40)
@given(st.sampled_from(composable), st.sampled_from(composable), st.sampled_from("&|-"),
       st.integers(1, 40), st.integers(1, 40))  # fmt: skip
def test_pairs_come_back_equal(x, y, sign, q_len, kv_len):
    mask = {"&": x.mask & y.mask, "|": x.mask | y.mask, "-": x.mask - y.mask}[sign]
    cells = drawn(mask, q_len, kv_len)
    found = recover(cells)
    check(found, cells)


# -- size --------------------------------------------------------------------------------------


def window_function(b, h, i, j):
    return (i >= j) & (i - j < 4096)


@pytest.fixture
def one_thread():
    """Threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tallest_chunk(function, length):
    """Recover a function; return the answer and the most cells it was asked for at once."""
    most = 0

    def watched(b, h, i, j):
        nonlocal most
        most = max(most, i.numel() * j.numel())
        return function(b, h, i, j)

    tracemalloc.start()
    found = recover(watched, length, length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, most, peak


def test_a_large_function_is_read_in_chunks(one_thread):
    found, most, peak = tallest_chunk(window_function, 8192)
    assert found.mask == W(4096)
    assert most <= 1 << 20
    assert peak < 64 << 20


def test_progress_is_told_after_each_chunk(monkeypatch):
    monkeypatch.setattr("attnkit.masks.trace.CHUNK_CELLS", 16)
    told = []
    cells = drawn(PerHead([C, W(2)]), 6, 8)
    recover(cells, progress=lambda done, every: told.append((done, every)))
    assert told == [(done, 12) for done in (2, 4, 6, 8, 10, 12)]


@pytest.mark.parametrize("ask", [recover, masks.Mask.lint, masks.Mask.show])
def test_a_function_is_asked_for_the_cells_inside_its_bound_alone(ask, monkeypatch):
    monkeypatch.setattr("attnkit.masks.trace.CHUNK_CELLS", 64 * 4)
    asked = []

    def evaluate(fn, b, h, rows, keys):
        asked.append((rows.tolist(), keys.tolist()))
        return torch.ones(len(rows), len(keys), dtype=torch.bool)

    monkeypatch.setattr("attnkit.masks.predicate.evaluate", evaluate)
    ask(W(5) & Predicate(lambda b, h, i, j: i == i), 64, 64)
    rows = [row for found, _ in asked for row in found]
    assert rows[:64] == list(range(64))
    assert all(len(keys) <= len(rows) + 4 for rows, keys in asked[:16])


def test_a_function_that_is_the_mask_is_read_once_by_lint(monkeypatch):
    asked = []

    def even(b, h, i, j):
        asked.append(0)
        return (i + j) % 2 == 0

    Predicate(lambda b, h, i, j: even(b, h, i, j) | (i >= j)).lint(8, 8)
    assert len(asked) == 1


def test_a_large_dense_mask_is_enclosed_in_chunks(one_thread):
    """What is unpacked at a time is a chunk, not the score matrix."""
    mask = Dense.keep(torch.ones(8192, 8192, dtype=torch.bool).tril_())
    noise = Dense.keep(torch.rand(2048, 2048) < 0.5)
    tracemalloc.start()
    assert mask.enclosure(8192, 8192).inner == C.region(8192, 8192)
    assert not noise.enclosure(2048, 2048).inner
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.sweep
def test_64k_rows_are_read_in_chunks(one_thread):
    found, most, peak = tallest_chunk(window_function, 1 << 16)
    assert found.mask == W(4096)
    assert most <= 1 << 20
    assert peak < 64 << 20


@pytest.mark.parametrize("height", [1, 2, 3, 7, 100])
def test_the_height_of_a_chunk_does_not_matter(height, monkeypatch):
    monkeypatch.setattr("attnkit.masks.trace.CHUNK_CELLS", 96 * height)
    for mask in NAMED[:20]:
        cells = drawn(mask, 96, 96)[0, 0]
        traced = trace(lambda i0, i1, c=cells: c[i0:i1], 96, 96, 1000)
        assert traced == mask.region(96, 96)


def test_the_limit_counts_slices_not_chunks(monkeypatch):
    monkeypatch.setattr("attnkit.masks.trace.CHUNK_CELLS", 64)
    rows = mask_rows(Predicate(lambda b, h, i, j: i >= j), 64, 64, 0, 0)
    assert trace(rows, 64, 64, max_slices=1) == C.region(64, 64)
    chunks = mask_rows(Predicate(lambda b, h, i, j: i // 2 == j // 2), 64, 64, 0, 0)
    assert isinstance(trace(chunks, 64, 64, max_slices=32), Region)
    stopped = trace(chunks, 64, 64, max_slices=31)
    assert isinstance(stopped, str)
    assert "max_slices=31" in stopped


# -- Slices ------------------------------------------------------------------------------------


def test_slices_are_values():
    one = Slices([(0, 4, 0, 2, None, None), (0, 4, 2, 4, None, None)], 4, 4)
    assert one == Slices.of(Region.full(4, 4), 4, 4)
    assert one != Slices.of(Region.full(4, 4), 4, 5)
    assert parse(str(one)) == one
    assert one.region(4, 4) == Region.full(4, 4)
    both = Slices([[(0, 2, 0, 2, None, 0)], []], 2, 2)
    assert both.batches == 2
    assert parse(str(both)) == both
    assert not both.region(2, 2, batch=1)
    assert Slices([], 3, 3).region(3, 3) == Region.empty()
    assert one[1:3, :].region(2, 4) == Region.full(2, 4)
    assert count_slices(one.region(4, 4)) == 1


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: Slices(3, 4, 4), "list of slices"),
        (lambda: Slices([(0, 1)], 4, 4), r"a slice is \(i0, i1"),
        (lambda: Slices([(0, 5, 0, 4, None, None)], 4, 4), "outside of the 4 x 4"),
        (lambda: Slices([(0, 4, 0, 4.0, None, None)], 4, 4), "j1=4.0"),
        (lambda: Slices([(0, 1, 0, 1, 0, 0), [(0, 1, 0, 1, 0, 0)]], 4, 4), "a slice is"),
        (lambda: Slices([], -1, 4), "q_len=-1"),
        (lambda: Slices.of(C.region(4, 4), 4, 4).region(4, 5), "kv_len=4.*kv_len=5"),
    ],
)
def test_bad_slices(ask, words):
    with pytest.raises(CompositionError, match=words):
        ask()


def test_numpy_arrays_of_several_heads():
    cells = np.stack([np.tri(5, dtype=bool), np.ones((5, 5), dtype=bool)])
    assert recover(cells).mask == PerHead([C, masks.Full()])
