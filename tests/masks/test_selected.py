"""`SelectedBlocks` as a mask: its cells by the formula, its value, and every wrong argument."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks import SelectedBlocks
from tests.selections import every_selection

ZEROS = torch.zeros(1, 1, 4, 1, dtype=torch.int64)


def by_the_formula(mask: SelectedBlocks, kv_len: int, b: int, h: int, i: int, j: int) -> bool:
    """The docstring's formula, cell by cell."""
    at, place = i + kv_len - mask.indices.shape[2] * mask.q_block, i // mask.q_block
    count = mask.indices.shape[3]
    if mask.counts is not None:
        count = min(count, int(mask.counts[b, h, place]))
    if not mask.causal:
        return j // mask.kv_block in mask.indices[b, h, place, :count].tolist()
    own = (place * mask.q_block + kv_len - mask.indices.shape[2] * mask.q_block) // mask.kv_block
    chosen = mask.indices[b, h, place, : min(count, own)].tolist()
    return j // mask.kv_block in chosen or own * mask.kv_block <= j <= at


@pytest.mark.parametrize(
    ("q_block", "kv_block", "q_blocks", "kv_len", "k", "causal"),
    [
        (2, 2, 4, 8, 2, True),
        (1, 2, 6, 6, 2, True),  # query blocks inside of a key block
        (3, 1, 3, 9, 2, True),  # own keys of several key blocks
        (2, 3, 3, 7, 2, True),  # queries at the end of a longer text
        (2, 2, 2, 6, 2, False),
        (1, 3, 2, 9, 3, False),
    ],
)
def test_cells_are_those_of_the_formula_for_every_selection(
    q_block: int, kv_block: int, q_blocks: int, kv_len: int, k: int, causal: bool
) -> None:
    indices = every_selection(q_block, kv_block, q_blocks, kv_len, k, causal)
    for counts in (None, torch.arange(len(indices) * q_blocks).view(-1, 1, q_blocks) % (k + 1)):
        mask = SelectedBlocks(indices, q_block, kv_block, causal=causal, counts=counts)
        found = mask.materialize(q_blocks * q_block, kv_len, len(indices))
        mask.refuse_wrong(kv_len)
        for b, cells in enumerate(found[:, 0].tolist()):
            for i, row in enumerate(cells):
                wanted = [by_the_formula(mask, kv_len, b, 0, i, j) for j in range(kv_len)]
                assert row == wanted, (b, i)


def test_two_index_tensors_are_two_masks_of_one_form() -> None:
    one, two = (SelectedBlocks(ZEROS.clone(), 2, 2, causal=True) for _ in range(2))
    assert one != two
    assert one == SelectedBlocks(one.indices, 2, 2, causal=True)
    assert one.form == two.form
    assert hash(one.form) == hash(two.form)
    assert one.form != SelectedBlocks(ZEROS, 2, 2, causal=False).form
    assert one.form != SelectedBlocks(ZEROS, 2, 2, causal=True, gates=ZEROS.float()).form
    again = pickle.loads(pickle.dumps(one))
    assert again.form == one.form
    assert torch.equal(again.indices, one.indices)


def test_text_says_what_is_static() -> None:
    mask = SelectedBlocks(ZEROS, 2, 2, causal=True, counts=torch.ones(1, 1, 4).int())
    told = (
        "SelectedBlocks(indices [1, 1, 4, 1], q_block=2, kv_block=2, causal=True, counts [1, 1, 4])"
    )
    assert str(mask) == repr(mask) == str(mask.form) == told
    with pytest.raises(CompositionError, match="SelectedBlocks"):
        masks.parse(told)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"indices": [0]}, "give a torch tensor"),
        ({"indices": ZEROS.float()}, "indices of torch.float32; give int64 or int32"),
        ({"indices": ZEROS[0]}, r"they are \[b, heads, q_blocks, k\]"),
        ({"indices": ZEROS[..., :0]}, r"they are \[b, heads, q_blocks, k\]"),
        ({"q_block": 0}, "q_block=0 is too small"),
        ({"kv_block": 2.0}, "kv_block=2.0 is of type float"),
        ({"causal": 1}, "it is True or False"),
        ({"gates": ZEROS}, "gates of torch.int64"),
        ({"gates": ZEROS.float()[..., 0]}, "they have"),
        ({"counts": ZEROS}, r"they have \[1, 1, 4\]"),
        ({"counts": ZEROS[..., 0].float()}, "counts of torch.float32"),
        ({"counts": ZEROS[..., 0].to("meta")}, "move them to one device"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], told: str) -> None:
    with pytest.raises(CompositionError, match=told):
        SelectedBlocks(**{"indices": ZEROS, "q_block": 2, "kv_block": 2} | given)


@pytest.mark.parametrize("backend", ["emulated", "tiled", "reference"])
@pytest.mark.parametrize(
    ("indices", "given", "told"),
    [
        ([[0], [0], [2], [0]], {"causal": True}, r"indices\[0, 0, 2, 0\] is 2.*own, 0 to 1"),
        ([[0], [0], [3], [0]], {"causal": True}, "before its own"),
        ([[0], [-1], [0], [0]], {"causal": True}, r"indices\[0, 0, 1, 0\] is -1, out of range"),
        ([[0], [4], [0], [0]], {}, "blocks of 2 of 8 keys are 0 to 3"),
        ([[0, 1], [2, 2], [0, 1], [0, 1]], {}, r"indices\[0, 0, 1, .\] is 2, and so is another"),
        ([[0, 1], [0, 1], [0, 0], [0, 1]], {}, r"indices\[0, 0, 2, .\] is 0, and so is another"),
        ([[0, 1]] * 4, {"counts": [0, 1, 3, 0]}, r"counts\[0, 0, 2\] is 3; .* room for 0 to 2"),
        ([[0, 1, 2, 3, 0]] * 4, {}, "has room for 5 different blocks, and 8 keys are 4"),
        ([[0]] * 4, {"kv_block": 3}, "8 keys are not a multiple of 3"),
        ([[0]] * 3, {}, "built for q_len=6, but the score matrix has q_len=8"),
        ([[[0]] * 4] * 3, {}, "selects for 3 heads, and there are 2 query heads"),
    ],
)
def test_wrong_numbers(backend: str, indices: Any, given: dict[str, Any], told: str) -> None:
    found, x = torch.tensor(indices), torch.zeros(1, 8, 2, 4)
    found = found.view(1, *found.shape) if found.dim() == 3 else found.view(1, 1, *found.shape)
    counts = given.get("counts")
    if counts is not None:
        given = given | {"counts": torch.tensor(counts).view(1, 1, -1)}
    mask = SelectedBlocks(found, **{"q_block": 2, "kv_block": 2} | given)
    with pytest.raises(CompositionError, match=told):
        ak.attention(x, x, x, mask=mask, backend=backend)


def test_what_is_not_read_may_be_anything() -> None:
    indices = torch.tensor([[7, -7], [0, 9], [1, 0], [2, 2]]).view(1, 1, 4, 2)
    counts = torch.tensor([0, 2, 2, 1]).view(1, 1, 4)
    mask = SelectedBlocks(indices, 2, 2, causal=True, counts=counts)
    mask.refuse_wrong(8)
    assert int(mask.materialize(8, 8).sum()) == 4 * 3 + 2 * (2 + 4 + 2)


def test_it_stands_alone() -> None:
    mask, x = SelectedBlocks(ZEROS, 2, 2, causal=True), torch.zeros(1, 8, 2, 4)
    with pytest.raises(CompositionError, match="comes with each call"):
        mask & masks.Padding([8])
    with pytest.raises(CompositionError, match="comes with each call"):
        ak.Attention(2, 4, mask=masks.Causal())(x, x, x, mask=mask)
    with pytest.raises(CompositionError, match="give it to forward"):
        ak.Attention(2, 4, mask=mask)
    with pytest.raises(CompositionTypeError, match="come with each call"):
        mask.form.materialize(8, 8)
