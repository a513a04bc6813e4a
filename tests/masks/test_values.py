"""Masks are values: equality, hash, repr, text, copies, pickles; and pictures of them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from itertools import chain

import pytest
import torch
from hypothesis import given

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import And, Enclosure, Not, Or, parse
from tests.masks.oracle import by_batch_and_head, cases, even_sum
from tests.masks.test_compositions import compositions

CAUSAL, WINDOW = masks.Causal(), masks.SlidingWindow(4)
MADE = [
    CAUSAL & WINDOW,
    CAUSAL | WINDOW | masks.Columns(0, 2),
    ~(CAUSAL & WINDOW),
    ~masks.Dilated(3) - masks.Rows(1),
    (CAUSAL | WINDOW) & ~masks.Prefix(3),
    CAUSAL[2:, 1:],
    (~CAUSAL)[2:, :],
    ~CAUSAL[2:, :],
    (CAUSAL & WINDOW)[1:, 3:][1:, :],
    CAUSAL.cut((0, 2), (1, 3), q_len=4, kv_len=4),
    masks.Columns(1, 3)[:2, 1:4],
    masks.PerHead([CAUSAL, CAUSAL | masks.Prefix(3), masks.Documents([2, 2])]),
    Not(Not(CAUSAL)),
    And((CAUSAL, And((WINDOW, masks.Rows(1))))),
    masks.Documents(range(1, 40)),
]
EVERY = list(dict.fromkeys(chain(MADE, *([case.mask for case in cases(4, 4)],))))
WRITABLE = [mask for mask in EVERY if "Predicate" not in repr(mask)]


@pytest.mark.parametrize("mask", EVERY, ids=repr)
def test_copies_and_pickles_are_equal(mask):
    hash(mask)  # a hash that is kept must not travel
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert hash(twin) == hash(mask)
        assert (repr(twin), str(twin)) == (repr(mask), str(mask))


def test_different_masks_differ():
    for k, mask in enumerate(EVERY):
        assert all(mask != other for other in EVERY[k + 1 :])
        assert mask != "Causal()"
        assert mask != None  # noqa: E711 -- the operator is what is tested
    assert len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize("mask", WRITABLE, ids=repr)
def test_text_is_read_back(mask):
    assert parse(str(mask)) == mask
    assert str(parse(str(mask))) == str(mask)


@given(compositions)
def test_text_of_random_compositions_is_read_back(case):
    if "Predicate" not in str(case.mask):
        assert parse(str(case.mask)) == case.mask


def test_reprs_stay_short():
    assert repr(masks.Documents([7] * 1000)) == "Documents((7, 7, 7, 7, ... 1000 in all))"
    assert str(masks.Documents([7, 8])) == "Documents((7, 8))"
    assert repr(masks.Dense.keep(torch.eye(4).bool())) == "<masks.Dense 1x1x4x4, 4 allowed>"
    assert repr(masks.Predicate(even_sum)) == "<masks.Predicate even_sum>"
    assert repr(masks.Causal(align="top_left")) == "Causal(align='top_left')"


def test_order_and_repetition_do_not_matter():
    a, b, c = CAUSAL, WINDOW, masks.Prefix(2)
    assert a & b == b & a
    assert hash(a & b) == hash(b & a)
    assert (a & b) & c == a & (b & c) == And((c, And((b, a))))
    assert a & a is a
    assert a | b | a == b | a
    assert a & b != a | b
    assert ~~a is a
    assert a - b == a & ~b


def test_equal_cells_of_a_dense_mask_are_equal():
    cells = torch.eye(5).bool()
    packed = masks.Dense.keep(cells)
    assert packed == masks.Dense.keep(cells.clone())
    assert hash(packed) == hash(masks.Dense.keep(cells.clone()))
    assert packed != masks.Dense.keep(cells[None].expand(2, 5, 5))
    assert packed != masks.Dense.drop(cells)


def test_a_predicate_equals_itself_only():
    assert masks.Predicate(even_sum) == masks.Predicate(even_sum)
    assert masks.Predicate(even_sum) != masks.Predicate(by_batch_and_head)
    assert masks.Predicate(even_sum) != masks.Predicate(even_sum, batch=2)


def test_a_kept_hash_does_not_reach_another_process():
    """Strings hash differently there, so a pickled hash would break its dictionaries."""
    mask = masks.Causal("top_left") & masks.SlidingWindow(3)
    hash(mask)
    code = (
        "import pickle, sys; from attnkit import masks; "
        "m = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(m in {masks.Causal('top_left') & masks.SlidingWindow(3)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(mask).hex()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


class Counted(tuple):
    """Lengths that count how often they are hashed."""

    hashed = 0

    def __hash__(self):
        Counted.hashed += 1
        return super().__hash__()

    __eq__ = tuple.__eq__


def test_long_masks_are_hashed_once():
    documents = masks.Documents([5] * 1000)
    object.__setattr__(documents, "lengths", Counted(documents.lengths))
    mask = documents & CAUSAL
    Counted.hashed = 0
    for _ in range(5):
        assert hash(mask) == hash(documents & CAUSAL)
    assert Counted.hashed <= 1


def test_regions_of_documents_are_built_once():
    documents = masks.Documents([5] * 10)
    assert documents.region(50, 50) is documents.region(50, 50) or (
        documents.region(50, 50).strips is documents.region(50, 50).strips
    )


@pytest.mark.parametrize("mask", EVERY[:8], ids=repr)
def test_a_bare_truth_value_is_refused(mask):
    with pytest.raises(TypeError, match=r"use `&`, `\|`, `~`"):
        bool(mask)
    with pytest.raises(TypeError, match="ambiguous"):
        mask and CAUSAL  # noqa: B018 -- the operator is what is tested


def test_a_mask_is_no_sequence():
    for use in (list, iter, lambda mask: 3 in mask):
        with pytest.raises(TypeError, match="iterable"):
            use(CAUSAL)


def test_an_enclosure_says_whether_it_is_exact():
    region = CAUSAL.region(4, 4)
    assert Enclosure(region, region).exact
    assert not Enclosure(Region.empty(), region).exact
    assert WINDOW.enclosure(4, 4) == Enclosure(WINDOW.region(4, 4), WINDOW.region(4, 4))


def test_parts_keep_the_order_they_were_given_in():
    assert str(WINDOW & CAUSAL) == "SlidingWindow(4) & Causal()"
    assert isinstance(WINDOW | CAUSAL, Or)
    assert (WINDOW | CAUSAL).parts == (WINDOW, CAUSAL)


# -- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask", [CAUSAL, masks.Dilated(2), masks.Dense.keep(torch.eye(9).bool())], ids=repr
)
def test_a_small_picture_is_the_mask(mask):
    cells = mask.materialize(9, 9)[0, 0]
    drawn = "\n".join("".join("#" if cell else "." for cell in row) for row in cells.tolist())
    assert mask.show(9, 9) == drawn


def test_a_large_picture_is_a_summary():
    text = CAUSAL.show(1 << 20, 1 << 20, width=16)
    rows = text.splitlines()
    assert len(rows) == 32
    assert {len(row) for row in rows} == {16}
    assert rows[0] == "+" + "." * 15
    assert rows[-1] == "#" * 15 + "+"
    assert masks.Dilated(2).show(100, 100, width=10).splitlines()[0] == "+" * 10
    assert masks.Padding([2, 4]).show(2, 4, batch=1) == "####\n####"


def test_a_figure_shows_the_shares():
    pytest.importorskip("matplotlib")
    figure = CAUSAL.plot(4, 6)
    (image,) = figure.axes[0].images
    coloured = (image.get_array() != 1).any(-1)
    assert coloured.tolist() == CAUSAL.materialize(4, 6)[0, 0].tolist()
    assert figure.axes[0].get_title() == "Causal()"


@pytest.mark.parametrize("mask", [CAUSAL, masks.Dilated(2)], ids=repr)
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 3), (3, 0), (0, 0)])
def test_a_picture_of_no_cells(mask, q_len, kv_len):
    assert mask.show(q_len, kv_len) == "\n".join([""] * q_len)
    pytest.importorskip("matplotlib")
    assert not list(mask.plot(q_len, kv_len).axes[0].images)


def test_a_picture_of_a_head_that_is_not_there():
    """A mask that tells no heads apart answers for any; one that does, for its own."""
    pytest.importorskip("matplotlib")
    heads = masks.PerHead([CAUSAL, masks.Dilated(2)])
    for picture in (heads.plot, heads.show):
        with pytest.raises(CompositionError, match="head=99"):
            picture(4, 4, head=99)
    assert CAUSAL.show(2, 2, head=99) == CAUSAL.show(2, 2)


def test_equal_sets_have_equal_regions_and_masks_that_are_written_alike_are_equal():
    assert masks.Band(3, 0) != masks.SlidingWindow(4)
    assert masks.Band(3, 0).region(9, 7) == masks.SlidingWindow(4).region(9, 7)
    assert CAUSAL & WINDOW == WINDOW & CAUSAL
