"""`Padding.of`: what a tokenizer says, as a set; and `PerBatch`, for what differs by text."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.masks import Keys, Padding, PerBatch


def test_every_mask_of_two_texts() -> None:
    """All pairs of rows of up to four tokens: the same keys exist, whichever side is filled up."""
    for size in range(5):
        for rows in product(product((0, 1), repeat=size), repeat=2):
            given = torch.tensor(rows, dtype=torch.int64).view(2, size)
            mask = Padding.of(given)
            assert mask.materialize(3, size, 2).equal(
                given.bool()[:, None, None].expand(2, 1, 3, size)
            )
            lengths = given.sum(1)
            places = torch.arange(size)
            right = torch.equal(given.bool(), places < lengths[:, None])
            left = torch.equal(given.bool(), places >= size - lengths[:, None])
            if left:
                assert mask == ~masks.Prefix(size - lengths)
            elif right:
                assert mask == Padding(lengths)
            else:
                assert isinstance(mask, Keys)


@pytest.mark.parametrize("rows", [[[0, 1, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[1, 0, 1]] * 2])
def test_what_ends_with_the_row_is_the_same_set_as_keys_are_added(rows: list[list[int]]) -> None:
    """With a cache, texts grow at their ends: the mask of the prompt is that of every step."""
    prompt = torch.tensor(rows)
    mask = Padding.of(prompt)
    assert not mask.anchored
    for more in range(1, 4):
        grown = torch.cat([prompt, prompt.new_ones(2, more)], 1)
        assert Padding.of(grown) == mask
        assert all(mask._extends(3, 3 + more, b, 0) for b in range(2))
        meant = grown.bool()[:, None, None].expand(2, 1, 2, 3 + more)
        assert mask.materialize(2, 3 + more, 2).equal(meant)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_any_dtype_of_a_tokenizer(dtype: torch.dtype) -> None:
    assert Padding.of(torch.tensor([[0, 1, 1], [1, 1, 1]]).to(dtype)) == ~masks.Prefix((1, 0))


def test_holes_run_on_every_backend() -> None:
    given = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]])
    mask = Padding.of(given) & masks.Causal()
    x = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    dense = masks.Dense.keep(given.bool()[:, None, None].expand(2, 1, 6, 6)) & masks.Causal()
    meant = ak.attention(x, x, x, mask=dense, backend="reference")
    for backend in ("tiled", "reference", "emulated"):
        torch.testing.assert_close(ak.attention(x, x, x, mask=mask, backend=backend), meant)
    assert masks.parse(str(mask)) == mask


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([[1, 0]], "takes a tensor"),
    "one axis": (torch.ones(3), r"\[b, s\]"),
    "four axes": (torch.ones(2, 1, 3, 3), r"Dense\.keep"),
    "no texts": (torch.ones(0, 3), r"\[b, s\]"),
    "added to scores": (torch.tensor([[0.0, -1e9]]), r"pse\.Dense"),
    "counts": (torch.tensor([[1, 2]]), "other than 0 and 1"),
    "nan": (torch.tensor([[float("nan")]]), "other than 0 and 1"),
    "meta": (torch.ones(2, 3, device="meta"), "meta"),
    "sparse": (torch.ones(2, 3).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given, told = BAD[name]
    with pytest.raises(ak.CompositionError, match=told):
        Padding.of(given)


def test_elements_that_have_entries_themselves_do_not_nest() -> None:
    with pytest.raises(ak.CompositionError, match="one entry per batch element"):
        PerBatch([masks.Padding([1, 2])])
    both = PerBatch([masks.Causal(), masks.Full()])
    assert (both & masks.PerHead([masks.Full()] * 3)).heads == 3
    assert (both.batches, both.heads) == (2, None)


def test_a_mask_that_is_broadcast_already_is_the_same() -> None:
    given = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert masks.Padding.of(given[:, None, None]) == masks.Padding.of(given)
    with pytest.raises(ak.CompositionError, match=r"\[b, s\]"):
        masks.Padding.of(given[:, None, None].expand(2, 1, 3, 3))
