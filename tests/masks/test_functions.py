"""A mask function is asked for one cell at a time, as FlexAttention asks it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import attnkit as ak
from attnkit import masks
from attnkit.backends.flex.blocks import tables_of
from attnkit.errors import CompositionError, CompositionTypeError

FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
DOCUMENT = torch.tensor([0, 0, 1, 1, 1, 2])

FUNCTIONS = {
    "a product of features": lambda b, h, i, j: (FEATURES[i] * FEATURES[j]).sum() > 0,
    "the larger of two": lambda b, h, i, j: torch.maximum(i, j).max() < 4,
    "a stack of both": lambda b, h, i, j: torch.stack([i, j]).sum() % 3 == 0,
    "no axis of keys": lambda b, h, i, j: i % 2 == 0,
    "no axis at all": lambda b, h, i, j: torch.ones((), dtype=torch.bool),
    "a table": lambda b, h, i, j: DOCUMENT[i] == DOCUMENT[j],
    "a choice": lambda b, h, i, j: torch.where(i < 3, j <= i, j > i),
    "comparisons": lambda b, h, i, j: (i >= j) & ((i - j < 2) | (j < 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_cell_is_what_flex_attention_gives(name):
    fn = FUNCTIONS[name]
    right = create_mask(fn, 1, 1, 6, 6, device="cpu")[0, 0]
    assert masks.Predicate(fn).materialize(6, 6)[0, 0].equal(right)
    found = masks.recover(fn, 6, 6)
    assert found.mask.materialize(6, 6)[0, 0].equal(right)
    for i in range(6):
        alone = [bool(fn(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(6)]
        assert right[i].tolist() == alone
    (bits,) = tables_of(masks.Predicate(fn), 6, 6).bits
    assert [[bool(row >> j & 1) for j in range(6)] for (row,) in bits.tolist()] == right.tolist()
    x = torch.randn(1, 6, 2, 8)
    outputs = [
        ak.attention(x, x, x, mask=masks.Predicate(fn), backend=backend)
        for backend in ("reference", "tiled", "emulated")
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_rows_are_read_in_blocks(monkeypatch):
    seen = []

    def fn(b, h, i, j):
        seen.append(1)
        return (i >= j) & (i % 3 != 0)

    monkeypatch.setattr("attnkit.masks.trace.CHUNK_CELLS", 40)
    drawn = masks.Predicate(fn).materialize(10, 10)[0, 0]
    i, j = torch.arange(10)[:, None], torch.arange(10)[None]
    assert drawn.equal((i >= j) & (i % 3 != 0))
    assert len(seen) == 3  # four rows at a time, each of them once


@pytest.mark.parametrize(
    ("fn", "kind", "words"),
    [
        (lambda b, h, i, j: True, CompositionTypeError, "returned bool"),
        (lambda b, h, i, j: i - j, CompositionTypeError, "returned torch.int64"),
        (lambda b, h, i, j: FEATURES[i] > 0, CompositionError, r"\(4,\) for one cell"),
        (lambda b, h, i, j: i if i > j else j, CompositionError, "without `if`"),
        (lambda b, h, i, j: torch.tensor(i.item() > 0), CompositionError, "without `if`"),
    ],
)
def test_a_function_that_cannot_be_asked(fn, kind, words):
    for ask in (masks.Predicate(fn).materialize, lambda *size: masks.recover(fn, *size)):
        with pytest.raises(kind, match=words):
            ask(3, 3)


def test_batch_and_head_are_plain_numbers():
    lengths = [2, 4]
    mask = masks.Predicate(lambda b, h, i, j: j < lengths[int(b)] - int(h), batch=2, num_heads=2)
    counts = mask.materialize(3, 5, 2, 2).sum(dim=(2, 3)).tolist()
    assert counts == [[6, 3], [12, 9]]
