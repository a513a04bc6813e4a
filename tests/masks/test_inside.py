"""Documents that have a mask each, and lint for one that runs through all of them."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks import Causal, Documents

ROWS, KEYS = (2, 3, 1), (4, 3, 2)


def each(rows, keys, inside, b=0, h=0):
    """The mask of each document, drawn alone and put in its place."""
    out = torch.zeros(sum(rows), sum(keys), dtype=torch.bool)
    i = j = 0
    for r, k in zip(rows, keys, strict=True):
        alone = inside.materialize(r, k, inside.batches or 1, inside.heads or 1)
        out[i : i + r, j : j + k] = alone[min(b, len(alone) - 1), min(h, alone.shape[1] - 1)]
        i, j = i + r, j + k
    return out


@pytest.mark.parametrize(
    "inside",
    [
        Causal(),
        Causal("top_left"),
        masks.SlidingWindow(2) | masks.Prefix(1),
        masks.Dilated(2) & Causal(),
        masks.Predicate(lambda b, h, i, j: (i + j) % 2 == 0),
        masks.Chunked(2),
    ],
    ids=repr,
)
def test_each_document_has_the_mask_for_itself(inside):
    mask = Documents(ROWS, KEYS, inside=inside)
    assert mask.materialize(6, 9)[0, 0].equal(each(ROWS, KEYS, inside))
    assert mask.outer(6, 9) <= Documents(ROWS, KEYS).region(6, 9)
    cut = mask[1:5, 2:8]
    assert cut.materialize(4, 6)[0, 0].equal(each(ROWS, KEYS, inside)[1:5, 2:8])


def test_batches_and_heads_inside():
    inside = masks.PerHead([Causal(), masks.Full()]) & masks.Prefix([1, 2])
    mask = Documents((ROWS, ROWS[::-1]), (KEYS, KEYS), inside=inside)
    assert (mask.batches, mask.heads) == (2, 2)
    drawn = mask.materialize(6, 9, 2, 2)
    for b, rows in enumerate((ROWS, ROWS[::-1])):
        for h in range(2):
            assert drawn[b, h].equal(each(rows, KEYS, inside, b, h))


def test_equal_lengths_are_as_they_were():
    inside = Documents([3, 3], inside=Causal())
    assert inside.region(6, 6) == (Documents([3, 3]) & Causal()).region(6, 6)
    assert inside.lint(6, 6) == ()


@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
def test_unequal_lengths_are_attended_one_by_one(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (6, 9, 9))
    mask = Documents(ROWS, KEYS, inside=Causal())
    output = ak.attention(q, k, v, mask=mask, backend=backend)
    i = j = 0
    for r, n in zip(ROWS, KEYS, strict=True):
        one = ak.attention(q[:, i : i + r], k[:, j : j + n], v[:, j : j + n], mask=Causal())
        torch.testing.assert_close(output[:, i : i + r], one)
        i, j = i + r, j + n


def test_a_mask_through_all_documents_is_told():
    mask = Documents(ROWS, KEYS) & Causal()
    (found,) = [f for f in mask.lint(6, 9) if f.code == "documents-share-positions"]
    assert "document 0 of 2 x 4 has 8 cells of it and not 7" in found.message
    assert "Documents((2, 3, 1), (4, 3, 2), inside=Causal())" in found.remedy
    fixed = Documents(ROWS, KEYS, inside=Causal())
    assert all(f.code != "documents-share-positions" for f in fixed.lint(6, 9))
    square = Documents(ROWS) & Causal()
    assert square.lint(6, 6) == ()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Documents([2], inside=3), CompositionTypeError, "a mask for inside, got 3"),
        (lambda: Documents([2, 3], inside=masks.Padding([3])), CompositionError, "kv_len is 2"),
        (
            lambda: Documents([[2], [2]], inside=masks.Padding([1, 1, 1])),
            CompositionError,
            "batch sizes",
        ),
    ],
)
def test_an_inside_that_does_not_fit(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
