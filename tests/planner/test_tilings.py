"""Rows in tiles with small masks: proven, equal to the reference, and refused once changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends import BACKENDS
from attnkit.backends.base import Operands
from attnkit.errors import Refusal
from attnkit.geometry import Region, Strip
from attnkit.kernel import AttenMask
from attnkit.planner import (
    Composition,
    Plan,
    Request,
    lattice,
    proof,
    read_request,
    row_groups,
    tilings,
)
from attnkit.planner.calls import Launch
from attnkit.planner.images import uncovered
from attnkit.planner.lattice import GridAxis, axes_of, in_patches
from attnkit.planner.sequences import Block
from attnkit.planner.tiled_rows import Tiles, ranges_of, row_runs
from tests.planner.bruteforce import region_of

Cells = np.ndarray[Any, np.dtype[np.bool_]]
MOST = 2**24


def drawn(region: Region, rows: int, keys: int) -> Cells:
    """Return the cells of a region one by one."""
    out = np.zeros((rows, keys), dtype=np.bool_)
    for i in range(rows):
        for a, b in region.row(i):
            out[i, a:b] = True
    return out


def noise(chance: random.Random, rows: int, keys: int) -> Region:
    """Return cells of any density."""
    share = chance.choice([0.2, 0.5, 0.9])
    return region_of(sum((chance.random() < share) << n for n in range(rows * keys)), (rows, keys))


# -- what a tile is --------------------------------------------------------------------------


def test_a_tile_has_the_keys_that_its_rows_see_and_their_cells() -> None:
    chance = random.Random(0)
    for _ in range(150):
        q_len, kv_len, height = (chance.randint(1, n) for n in (8, 9, 4))
        region = noise(chance, q_len, kv_len)
        runs, cells = row_runs(region, q_len), drawn(region, q_len, kv_len)
        light, heavy = runs.parted(2)
        rows = np.concatenate([light, heavy])
        assert sorted(rows.tolist()) == np.flatnonzero(cells.any(1)).tolist()
        chance.shuffle(rows)  # type: ignore[arg-type]
        tiles = Tiles.of(runs, rows, height) if len(rows) else ()
        for n in range(len(tiles)):
            own, keys, found = tiles.rows_of(n), tiles.keys_of(n), tiles.cells(n)  # type: ignore
            assert keys.tolist() == np.flatnonzero(cells[own].any(0)).tolist()
            assert tiles.sizes[n] == (len(own), len(keys))  # type: ignore[union-attr]
            meant, partial = cells[own][:, keys], found.partial
            assert partial.tolist() == (~meant.all(0)).tolist()
            first = np.concatenate([meant[:, partial], meant[:, ~partial]], axis=1)
            wide = found.pattern.widened(int(partial.sum()), len(keys))
            for part, wanted in ((found, meant), (wide, first)):
                assert (drawn(part.region, *wanted.shape) == wanted).all()
                assert part.region.is_canonical


def test_only_one_way_to_write_cells_is_canonical() -> None:
    chance = random.Random(1)
    for _ in range(50):
        assert noise(chance, 5, 6).is_canonical
    row = ((0, 0, 2, 0),)
    for strips in (
        (Strip(0, 1, row), Strip(1, 2, row)),  # one strip
        (Strip(0, 1, ((0, 0, 1, 0), (1, 0, 2, 0))),),  # one run
        (Strip(0, 1, ((0, 1, 2, 0),)),),  # one row moves nowhere
        (Strip(1, 2, row), Strip(0, 1, row)),
        (Strip(0, 2, ((0, 2, 4, 2),)),),
        (Strip(0, 3, ((0, 1, 2, 0),)),),  # its last row is empty
        (Strip(0, 0, row),),
        (Strip(-1, 1, row),),
        (Strip(0, 1, ((False, 0, 2, 0),)),),
        (Strip(0, 1, ()),),
    ):
        assert not Region(strips).is_canonical


# -- orders of rows --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "axes"),
    [
        (masks.Neighborhood((12, 20), 5), [(1, 20, 5), (20, 12, 5)]),
        (masks.Neighborhood((6, 8, 10), 3), [(1, 10, 3), (10, 8, 3), (80, 6, 3)]),
        (masks.Neighborhood((16, 24), 4, dilation=2), [(2, 24, 4), (48, 8, 4)]),
        (masks.Neighborhood((12, 20), 5) | masks.Columns(0, 2), [(1, 20, 5), (20, 12, 5)]),
        (masks.Causal(), []),
        (masks.SlidingWindow(9) | masks.Columns(0, 1), []),
    ],
    ids=str,
)
def test_the_grid_is_read_off_the_cells(mask: masks.Mask, axes: list[tuple[int, ...]]) -> None:
    length = mask.extent[0] or 240
    if isinstance(mask, masks.Or):
        length = 240
    runs = row_runs(mask.region(length, length), length)
    found = axes_of(runs, np.arange(length))
    assert [tuple(axis) for axis in found] == axes
    if axes:
        for sizes in product((2, 3, 8), repeat=len(axes)):
            order = in_patches(np.arange(length), found, sizes)
            assert sorted(order.tolist()) == list(range(length))


def test_rows_of_a_patch_are_neighbours_and_whole_patches_come_first() -> None:
    order = in_patches(np.arange(15), (GridAxis(1, 5, 3), GridAxis(5, 3, 3)), (2, 2))
    assert order[:8].tolist() == [0, 1, 5, 6, 2, 3, 7, 8]
    dilated = in_patches(np.arange(8), (GridAxis(2, 4, 3), GridAxis(8, 1, 1)), (2, 1))
    assert dilated.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# -- images ----------------------------------------------------------------------------------


def a_block(chance: random.Random, rows: int, keys: int) -> Block:
    """Return some rows and keys in some order, as ranges that go up and down."""

    def some(length: int) -> tuple[range, ...]:
        cuts = sorted({0, length, *(chance.randrange(1, length) for _ in range(3))})
        parts = [range(a, b) for a, b in pairwise(cuts)]
        parts = [part[::-1] if chance.random() < 0.5 else part for part in parts]
        return tuple(chance.sample(parts, chance.randint(1, len(parts))))

    return Block(0, some(rows), some(keys))


def test_images_are_compared_as_sums_of_regions_are() -> None:
    """Equal, too many, too few, twice: the same numbers by runs of rows and by regions."""
    chance, told = random.Random(2), []
    for _ in range(200):
        images = []
        for _ in range(chance.randint(1, 3)):
            block = a_block(chance, 7, 8)
            images.append((block, noise(chance, *block.sizes)))
        every = [block.image(region) for block, region in images]
        whole = Region.union(every)
        for target in (whole, noise(chance, 7, 8), whole | noise(chance, 7, 8)):
            found = uncovered(images, target)
            assert found.partition("(")[0] == proof._uncovered(every, target).partition("(")[0]
            told.append(found)
    assert 100 < sum(map(bool, told)) < len(told)
    block = Block(0, (range(2),), (range(2, 4), range(1)))
    assert uncovered([(block, Region.full(2, 4))], Region.full(2, 4)) != ""


# -- launches --------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows, of which a score matrix of a few rows has several."""
    monkeypatch.setattr(row_groups, "_HEIGHTS", (2, 3))
    for module in (row_groups, tilings):
        monkeypatch.setattr(module, "MOST_PATTERNS", 64)
    monkeypatch.setattr(tilings, "_spares", lambda *given: True)
    monkeypatch.setattr(lattice, "_LEAST_ROWS", 2)
    monkeypatch.setattr(lattice, "_MOST_ROWS", 4)


def request_of(mask: masks.Mask, q_len: int, kv_len: int, **given: Any) -> Request:
    q, k = (torch.empty(1, n, 1, 8, device="meta") for n in (q_len, kv_len))
    return read_request(Composition(mask=mask), q, k, k, **given)


def plans(request: Request, most: int = MOST) -> Iterator[Plan]:
    """Yield the plans in tiles, proven."""
    for parts in tilings.tilings(request, most):
        assert not isinstance(parts, Refusal), parts
        lowered = (part.as_part(request.token_starts[0][-1]) for part in parts)
        plan = Plan("emulated", request, tuple(lowered))
        plan.verify()
        assert all(part.once for part in plan.by_heads)
        yield plan


def spread(plan: Plan) -> set[bool]:
    """Which kinds of mask a plan has: shared by packed tiles, one for each tile."""
    return {step.call.is_packed for step in plan.steps}


@pytest.mark.usefixtures("small")
def test_every_mask_of_three_by_three_is_tiles() -> None:
    """All 512, those with empty rows included; the largest mask allowed is of 6 cells."""
    for cells in range(512):
        region = region_of(cells, (3, 3))
        request = request_of(masks.Slices.of(region, 3, 3), 3, 3)
        found = list(plans(request, 6))
        for plan in found:
            ranges = (r for step in plan.steps for block in step.blocks for r in block.rows)
            assert sorted(i for r in ranges for i in r) == [i for i in range(3) if region.row(i)]
            sizes = [step.call.atten_mask.cells for step in plan.steps if step.call.atten_mask]
            assert max(sizes, default=0) <= 6
        assert all(len(spread(plan)) == 1 for plan in found)


LAYOUTS = {
    "BSND": ((2, 12, 4, 4), (2, 12, 2, 4)),
    "SBH": ((12, 2, 16), (12, 2, 8)),
    "TND": ((24, 4, 4), (24, 2, 4)),
}
GRID = masks.Neighborhood((3, 4), 3)
DILATED = masks.Dense.keep(masks.Dilated(3).materialize(12, 12)[0, 0])
MASKS = [
    ("BSND", GRID),
    ("SBH", GRID & masks.Padding([12, 7])),
    ("TND", GRID),
    ("BSND", GRID - masks.Rows(5, 7)),
    ("BSND", masks.PerHead([GRID, DILATED, GRID, masks.Causal()])),
    ("BSND", GRID | masks.Rows(0, 1) | masks.Columns(3, 4)),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("most", [MOST, 40])
@pytest.mark.parametrize(("layout", "mask"), MASKS, ids=str)
def test_tiles_equal_the_reference(layout: str, mask: masks.Mask, most: int) -> None:
    """Heads that share keys, batches, empty rows and heads, sinks; output, lse, all gradients."""
    torch.manual_seed(0)
    shapes = (LAYOUTS[layout][0], LAYOUTS[layout][1], LAYOUTS[layout][1])
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randn(4, dtype=torch.float64))]
    lens = ak.SeqLens([12, 12], [12, 12]) if layout == "TND" else None
    given: Any = {"num_heads": 4, "num_kv_heads": 2, "seqlens": lens, "sink": leaves[3]}

    def answers(out: ak.AttentionOutput) -> list[torch.Tensor]:
        dy = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64)
        loss = (out.output * dy.view(out.output.shape)).sum() + out.stats.lse.square().sum()
        return [out.output, out.stats.lse, *torch.autograd.grad(loss, leaves)]

    asked = {"mask": mask, "layout": layout, "backend": "reference", "return_stats": True}
    meant = answers(ak.attention(*leaves[:3], **asked, **given))
    request = read_request(Composition(mask=mask, layout=layout), *leaves[:3], **given)
    found = list(plans(request, most))
    assert {kind for plan in found for kind in spread(plan)} == {True, False} or most < MOST
    for plan in found:
        out = BACKENDS["emulated"].run(plan, Operands(*leaves[:3], sink=leaves[3]))
        for one, other in zip(answers(out), meant, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("small")
def test_tiles_of_every_size_are_given_out() -> None:
    """Masks of noise at odd sizes; rows that see most are in tiles of their own."""
    chance = random.Random(3)
    seen = set()
    for _ in range(60):
        q_len, kv_len = chance.randint(1, 9), chance.randint(1, 11)
        region = noise(chance, q_len, kv_len)
        request = request_of(masks.Slices.of(region, q_len, kv_len), q_len, kv_len)
        for plan in plans(request, chance.choice([MOST, 30])):
            seen |= {(step.call.is_packed, step.call.atten_mask is None) for step in plan.steps}
    assert len(seen) == 4


LENGTH = 24


def planned_tiles(shared: bool) -> Plan:
    """Return a plan of several tiles with masks of one kind."""
    request = request_of(masks.Neighborhood((6, 4), 3), LENGTH, LENGTH)
    return next(plan for plan in plans(request) if spread(plan) == {shared})


def changed(plan: Plan, fault: str) -> Plan:
    """Return a plan with one thing wrong in the first call with a mask."""
    k, step = next((k, s) for k, s in enumerate(plan.steps) if s.call.atten_mask is not None)
    n = max(range(len(step.blocks)), key=lambda n: len(step.targets[n].strips))
    block, other = step.blocks[n], step.blocks[n - 1]
    mask = step.call.atten_mask
    rows, keys = ([i for one in side for i in one] for side in (block.rows, block.keys))
    unseen = next(j for j in range(LENGTH) if j not in keys)
    moved = {
        "keys swapped": (rows, keys[::-1]),
        "key twice": (rows, [*keys[:-1], keys[0]]),
        "other key": (rows, [unseen, *keys[1:]]),
        "rows swapped": (rows[::-1], keys),
        "row of another": ([other.rows[0][0], *rows[1:]], keys),
        "key outside": (rows, [*keys[:-1], LENGTH]),
    }
    if fault in moved:
        sides = (ranges_of(np.array(side)) for side in moved[fault])
        wrong: Launch = replace(
            step, blocks=(*step.blocks[:n], Block(0, *sides), *step.blocks[n + 1 :])
        )
    elif fault == "no mask":
        wrong = replace(step, call=replace(step.call, atten_mask=None, sparse_mode=0))
    else:
        region, *rest = mask.regions or ()
        mask = AttenMask.full(mask.shape, (region ^ Region.full(1, 1), *rest))
        wrong = replace(step, call=replace(step.call, atten_mask=mask))
        if fault == "mask and target":
            wrong = replace(wrong, targets=tuple(wrong.call.regions()))
    return replace(plan, steps=(*plan.steps[:k], wrong, *plan.steps[k + 1 :]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("fault", "codes"),
    [
        ("keys swapped", ("cover",)),
        ("other key", ("cover",)),
        ("rows swapped", ("cover",)),
        ("row of another", ("cover",)),
        ("key twice", ("misplaced",)),
        ("key outside", ("misplaced",)),
        ("mask", ("cover", "wrong-cells")),
        ("mask and target", ("cover",)),
        ("no mask", ("cover",)),
    ],
)
def test_changed_tiles_are_refused(shared: bool, fault: str, codes: tuple[str, ...]) -> None:
    with pytest.raises(ak.KernelContractError) as error:
        changed(planned_tiles(shared), fault).verify()
    assert error.value.codes[0] in codes


# -- what is chosen --------------------------------------------------------------------------


def test_a_neighborhood_of_an_image_is_one_call_with_masks_of_its_tiles() -> None:
    length = 128 * 128
    x = torch.empty(1, length, 8, 64, dtype=torch.bfloat16, device="meta")
    request = read_request(Composition(mask=masks.Neighborhood((128, 128), 7)), x, x, x)
    *_, parts = tilings.tilings(request, MOST)
    assert isinstance(parts, tuple)
    (step,) = parts
    assert (step.call.input_layout, step.call.sparse_mode) == ("BSND", 1)
    assert step.call.atten_mask is not None
    # 128 patches of 8 x 16 see 14 x 22 keys at most, of which a full mask would have 16,384.
    assert step.call.atten_mask.shape == (128, 1, 128, 14 * 22)
    assert len({id(region) for region in step.targets}) == 9  # corners, edges and the inside
    plan = Plan("emulated", request, (step.as_part(length),))
    plan.verify()
    assert plan.steps[0].price.nanoseconds < 450_000


def test_blocks_with_summaries_share_a_mask() -> None:
    """The Sparse Transformer's fixed pattern: own block, and the last keys of those before."""
    length, block, last = 2048, 128, 16
    q = np.arange(length)
    keys = (q[None] // block == q[:, None] // block) | (q[None] % block >= block - last)
    mask = masks.Dense.keep(torch.from_numpy(keys & (q[None] <= q[:, None])))
    x = torch.empty(1, length, 8, 64, dtype=torch.bfloat16, device="meta")
    request = read_request(Composition(mask=mask), x, x, x)
    found = [parts for parts in tilings.tilings(request, MOST) if not isinstance(parts, Refusal)]
    (step,) = found[0]
    assert step.label == "mode 1, one mask for all tiles"
    assert len({block.sizes for block in step.blocks}) > 1  # with as many full keys as came before
    Plan("emulated", request, (step.as_part(length),)).verify()


def test_tiles_are_left_out_where_they_cost_more_or_spare_nothing() -> None:
    length = 512
    x = torch.empty(1, length, 2, 64, device="meta")
    torch.manual_seed(0)
    cells = masks.Dense.keep(torch.rand(96, length) < 0.3)
    few = read_request(Composition(mask=cells), x[:, :96], x, x)
    assert list(tilings.tilings(few, MOST)) == []  # all keys are in the union of 64 rows
    grid = read_request(Composition(mask=masks.Neighborhood((16, 32), 3)), x, x, x)
    assert list(tilings.tilings(grid, MOST))
    assert list(tilings.tilings(grid, MOST, bound=1.0)) == []
    assert list(tilings.tilings(grid, 64)) == []
    biased = read_request(Composition(mask=GRID, pse=ak.pse.ALiBi(2)), *[x[:, :12]] * 3)
    assert list(tilings.tilings(biased, MOST)) == []


def test_calls_on_tiles_take_no_more_memory_than_is_allowed() -> None:
    x = torch.empty(1, 2048, 8, 64, dtype=torch.bfloat16, device="meta")
    limit = 6_000_000
    asked = Composition(mask=masks.Neighborhood((32, 64), 7), memory_limit=limit)
    request = read_request(asked, x, x, x)
    found = list(plans(request))
    assert found
    for plan in found:
        assert plan.price is not None
        assert len(plan.steps) > 1
        assert plan.price.peak_bytes <= limit
        assert max(step.price.peak_bytes for step in plan.steps) > limit / 2


def test_rows_of_too_many_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilings, "_MOST_RUNS", 10)
    (found,) = tilings.tilings(request_of(GRID, 12, 12), MOST)
    assert isinstance(found, Refusal)
    assert found.code == "tile-runs"


def test_rows_that_no_call_can_hold_are_refused_before_tiles_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tilings._HeadGroup, "calls", None)  # nothing is counted tile by tile
    for mask in (masks.Causal(), masks.Causal() & (masks.Prefix(9) | masks.SlidingWindow(4))):
        region = mask.region(12, 12)
        widest = int(mask.materialize(12, 12).sum(-1).max())
        assert tilings._widest(region) == widest
        monkeypatch.setattr(tilings, "_MOST_TOKENS", widest - 1)
        (found,) = tilings.tilings(request_of(mask, 12, 12), MOST)
        assert isinstance(found, Refusal)
        assert (found.code, found.remedy[:18]) == ("length-limit", "Split the sequence")


@pytest.mark.usefixtures("small")
def test_packed_calls_have_as_many_tiles_as_the_contract_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tilings, "_MOST_SEQUENCES", 1)
    plan = planned_tiles(shared=True)
    assert len(plan.steps) == sum(len(step.blocks) for step in plan.steps) > 1
    assert prod(plan.request.shapes()[0]) > 0
