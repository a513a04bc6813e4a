"""What a stage is on Ascend: one or two fused calls, and no mask of one entry per cell.

Planned for 64k tokens on 8 ranks, on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnkit import masks, pse
from attnkit.masks import Mask
from attnkit.parallel import Sharding
from attnkit.parallel import plan as plan_of
from attnkit.parallel.plan import ParallelPlan, StagePiece
from attnkit.planner.lower import MOST_MASK_CELLS
from attnkit.pse import Pse
from tests.parallel.cases import at_random

LENGTH, RANKS = 1 << 16, 8
CAUSAL = masks.Causal()
HALF = LENGTH // 2

MASKS: dict[str, Mask] = {
    "full": masks.Full(),
    "causal": CAUSAL,
    "window": CAUSAL & masks.SlidingWindow(4096),
    "first keys and a window": CAUSAL & (masks.Columns(0, 64) | masks.SlidingWindow(4096)),
    "documents": CAUSAL & masks.Documents([LENGTH - 40_000, 13_001, 1, 16_998, 10_000]),
    "prefix": masks.PrefixLM(LENGTH // 4),
    "block diffusion": masks.Chunked(4096) & masks.Columns(0, HALF)
    | masks.BlockCausal(4096) & masks.Columns(HALF, LENGTH),
    "padding": masks.Padding((LENGTH - 5000,)),
    "chunks": CAUSAL & masks.Chunked(8192),
    "band": masks.Band(2048, 2048),
    "global tokens": masks.Band(2048, 2048) | masks.Columns(0, 256) | masks.Rows(0, 256),
}


def planned(mask: Mask, balance: object, bias: Pse | None = None) -> ParallelPlan:
    """The plan of a training step in bfloat16."""
    query = torch.empty(1, LENGTH, 8, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(1, LENGTH, 2, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    how = {"ranks": RANKS, "method": "needed", "stages": 1, "backend": "emulated"}
    return plan_of(query, key, key, mask=mask, pse=bias, balance=balance, **how)


def pieces(plan: ParallelPlan) -> Iterator[StagePiece]:
    """What the first, a middle and the last rank compute."""
    for rank in (0, 3, RANKS - 1):
        for stage in plan.stages(rank):
            yield from plan.pieces(rank, stage.number)


@pytest.mark.parametrize("balance", ["zigzag", "contiguous", "even"])
@pytest.mark.parametrize("name", MASKS)
def test_a_stage_is_one_or_two_calls(name: str, balance: str) -> None:
    plan = planned(MASKS[name], balance)
    assert all(len(plan.pieces(3, stage.number)) <= 1 for stage in plan.stages(3))
    for piece in pieces(plan):
        given = [call.atten_mask for call in piece.plan.calls]
        assert 1 <= len(given) <= 2
        assert all(mask is None or mask.kind != "full" for mask in given)


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_chunks_by_any_rule_need_no_large_mask(name: str) -> None:
    """Several windows of different offsets may be several calls, where these cost less than one."""
    chunks = at_random(64, RANKS).ranks
    sharding = [[(1024 * one.start, 1024 * one.stop) for one in own] for own in chunks]
    plan = planned(MASKS[name], Sharding.of(LENGTH, sharding))
    for piece in pieces(plan):
        assert piece.plan.steps
        given = [call.atten_mask for call in piece.plan.calls]
        full = [mask for mask in given if mask is not None and mask.kind == "full"]
        assert all(mask.cells <= MOST_MASK_CELLS for mask in full)


BIASES: dict[str, Pse] = {
    "slopes": pse.ALiBi(8),
    "trained slopes": pse.ALiBi(8, learnable=True),
    "trained steps": pse.T5Relative(8, 32, 128, bidirectional=False),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_piece_with_a_bias_by_distance_needs_no_matrix(name: str) -> None:
    plan = planned(CAUSAL, "zigzag", BIASES[name])
    found = list(pieces(plan))
    assert len(found) > 6
    for piece in found:
        assert 1 <= len(piece.plan.calls) <= 2
        assert piece.plan.bias_pass is None
        for call in piece.plan.calls:
            assert call.pse is None or len(call.pse.shape) < 4
            assert call.atten_mask is None or call.atten_mask.kind != "full"


@pytest.mark.parametrize("bias", [pse.ALiBi(8), pse.ALiBi(8, learnable=True)], ids=str)
def test_slopes_of_long_texts_are_squares(bias: Pse) -> None:
    """Farther than channels count exactly, the kernel counts distances itself."""
    query = torch.empty(1, 1 << 20, 8, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(1, 1 << 20, 2, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    plan = plan_of(
        query, key, key, ranks=64, mask=CAUSAL, pse=bias, balance="zigzag", backend="emulated",
        method="needed", stages=1,
    )  # fmt: skip
    found = [piece for stage in plan.stages(40) for piece in plan.pieces(40, stage.number)]
    calls = [call for piece in found for call in piece.plan.calls]
    assert len(calls) == len(found) == 129
    assert all(call.pse is None or len(call.pse.shape) < 4 for call in calls)
