"""Which schedules reach keys that nobody sees, or those of a neighbour; most do not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.tiled.job import Job, schedule
from attnkit.backends.tiled.schedule import RowBlock, Schedule, Whole
from attnkit.backends.tiled.walk import guarded
from attnkit.backends.unseen import unseen_keys
from attnkit.planner import Composition, Request, read_request
from attnkit.strips import seen_spans

LENGTHS = [(300, 300), (1100, 1100), (1, 700), (130, 777), (777, 130)]


def request(mask: masks.Mask, q_len: int, kv_len: int, batch: int = 1, **how: object) -> Request:
    q, k = (torch.empty(batch, n, 2, 8, device="meta") for n in (q_len, kv_len))
    return read_request(Composition(mask, **how), q, k, k)  # type: ignore[arg-type]


def read_keys(made: Schedule, kv_len: int) -> torch.Tensor:
    """Which keys some tile of the first batch element holds."""
    held = torch.zeros(kv_len, dtype=torch.bool)
    for lane in made.lanes:
        if lane.batches[0]:
            continue
        for item in lane.items:
            runs = (
                [run for chunk in item.chunks for run in chunk.runs]
                if hasattr(item, "chunks")
                else [(item.key - item.before, item.key + item.keys, item.step)]
            )
            for a, b, step in runs:
                for repeat in range(item.times):
                    held[a + repeat * step : b + repeat * step] = True
    return held


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        masks.Full(),
        masks.Causal(),
        masks.Causal("top_left"),
        masks.SlidingWindow(100),
        masks.Band(20, 31),
        masks.Chunked(77),
        masks.Prefix(45) | masks.SlidingWindow(33),
        masks.Columns(3, 64),
    ],
    ids=str,
)
def test_common_masks_pay_nothing(mask: masks.Mask, lengths: tuple[int, int]) -> None:
    made = schedule(request(mask, *lengths))
    assert not made.strays
    assert not made.mixes
    job = Job(request(mask, *lengths))
    x = torch.zeros(1, 2, lengths[1], 8)
    same, key, value = guarded(job, x, x)
    assert same is job
    assert key is x
    assert value is x


def test_padding_pays_nothing() -> None:
    for mask in (masks.Padding([700, 301]), masks.Padding([650, 33], side="left")):
        for more in (masks.Full(), masks.Causal(), masks.SlidingWindow(90)):
            made = schedule(request(mask & more, 700, 700, batch=2))
            assert not made.strays


@pytest.mark.parametrize("seed", range(60))
def test_schedules_know_what_they_reach(seed: int) -> None:
    """A schedule that does not say so holds no key that nobody sees."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    q_len, kv_len = number(1, 600), number(1, 600)
    mask: masks.Mask = [masks.Causal(), masks.Full(), masks.SlidingWindow(number(1, 200))][seed % 3]
    for _ in range(number(1, 4)):
        start = number(0, kv_len)
        hole = masks.Columns(start, min(kv_len, start + number(1, 80)))
        mask = mask - hole if number(0, 2) else mask | (hole & masks.Rows(0, q_len // 2))
    made = schedule(asked := request(mask, q_len, kv_len))
    unseen = unseen_keys(asked, torch.device("cpu"))
    cells = mask.materialize(q_len, kv_len)[0, 0].any(0)
    assert torch.equal(
        cells, torch.ones(kv_len, dtype=torch.bool) if unseen is None else ~unseen[0, 0, :, 0]
    )
    held = read_keys(made, kv_len)
    assert held[cells].all()
    assert made.strays == bool((held & ~cells).any())


def test_seen_spans_are_maximal() -> None:
    for mask in (masks.Causal(), masks.Band(1, 1), masks.Dilated(1), masks.Columns(2, 3)):
        for q_len in range(5):
            for kv_len in range(6):
                cells = mask.materialize(q_len, kv_len)[0, 0].any(0)
                spans = seen_spans(mask.region(q_len, kv_len).strips)
                held = torch.zeros(kv_len, dtype=torch.bool)
                for a, b in spans:
                    held[a:b] = True
                assert torch.equal(held, cells)
                assert all(x[1] < y[0] for x, y in pairwise(spans))


def test_tiny_packed_sequences_share_tiles_until_one_is_wild() -> None:
    lens = ak.SeqLens([5, 9, 3, 20])
    x = torch.empty(37, 2, 8, device="meta")
    asked = read_request(Composition(masks.Causal(), layout="TND"), x, x, x, seqlens=lens)
    job = Job(asked)
    assert job.schedule.mixes
    tame = torch.zeros(1, 2, 37, 8)
    assert guarded(job, tame, tame)[0] is job
    for wild in (torch.nan, torch.inf, 1e30):
        other = tame.clone()
        other[0, 0, 7, 1] = wild
        for key, value in ((other, tame), (tame, other)):
            apart, _, _ = guarded(job, key, value)
            assert not apart.schedule.mixes
            assert len(apart.schedule.lanes) == 4
    long = read_request(
        Composition(masks.Causal(), layout="TND"),
        *[torch.empty(900, 2, 8, device="meta")] * 3,
        seqlens=ak.SeqLens([300] * 3),
    )
    assert not schedule(long).mixes


def test_a_tiny_document_beside_a_large_one_is_a_call_by_itself() -> None:
    def items(*lengths: int) -> tuple[RowBlock | Whole, ...]:
        x = torch.empty(sum(lengths), 8, 64, device="meta")
        asked = Composition(masks.Causal(), layout="TND")
        (lane,) = schedule(read_request(asked, x, x, x, seqlens=ak.SeqLens(lengths))).lanes
        return lane.items

    for lengths in ((4, 244), (244, 4), (26, 180, 12)):
        made = items(*lengths)
        assert [item.rows for item in made] == list(lengths)
        assert all(isinstance(item, Whole) and item.causal for item in made)
    assert len(items(3, 5, 4, 2, 9)) == 1  # each by itself would be more calls than work


def test_full_documents_of_middle_length_are_calls_of_torchs_kernel() -> None:
    x = torch.empty(900, 8, 64, device="meta")
    for lengths in ([300, 600], [200, 700]):
        asked = read_request(Composition(layout="TND"), x, x, x, seqlens=ak.SeqLens(lengths))
        (lane,) = schedule(asked).lanes
        assert [item.rows for item in lane.items if isinstance(item, Whole)] == lengths
