"""Shares of an attention through torch_npu: merged, they are one process, and so are gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from attnkit import pse
from attnkit.backends.base import Kept
from tests.backends.test_fused_shares import (
    CAUSAL,
    MASKS,
    UNEVEN,
    ZIGZAG,
    Whole,
    check,
    check_places,
    in_pieces,
    part_of,
    share_of,
    stages,
)
from tests.npu.device import DEVICE

NAMES = ("causal", "window", "first keys and a window", "documents", "prefix", "padding", "heads")


def on_npu(whole: Whole) -> Whole:
    """The same as the device computes it."""
    return replace(whole, dtype=torch.float32, backend="ascend", device="npu")


@pytest.mark.parametrize(("name", "layout"), [*zip(NAMES, cycle(["BSND", "BNSD", "BSH"]))])
def test_shares_together_are_one_process(name: str, layout: str) -> None:
    whole = on_npu(Whole(MASKS[name], layout=layout))
    with DEVICE.recording() as calls:
        check(whole, ZIGZAG if layout == "BSND" else UNEVEN)
    made = [call["op"] for call in calls if "FlashAttention" in call["op"]]
    assert sum("Grad" in op for op in made) >= len(stages(ZIGZAG)) // 2
    assert sum("Grad" not in op for op in made) >= len(stages(ZIGZAG)) // 2


@pytest.mark.parametrize("bias", [pse.ALiBi(4), pse.SqrtALiBi(4)], ids=str)
def test_biases_by_distance_in_pieces(bias: pse.Pse) -> None:
    whole = on_npu(Whole(CAUSAL, part_of(bias)))
    check_places(whole, in_pieces(replace(whole, backend="emulated", device="cpu"), ZIGZAG))


def test_the_backward_of_a_share_draws_what_its_forward_drew() -> None:
    whole = on_npu(Whole(CAUSAL, dropout=0.3))
    with DEVICE.recording() as calls:
        done = share_of(whole, *stages(ZIGZAG)[0], lambda plan: plan)
        again = share_of(whole, *stages(ZIGZAG)[0], lambda plan: plan)
        made, ones = done.partial, torch.ones_like(done.partial.output)
        kept = Kept(None, made.output, made.lse, ones, None)
        wanted = tuple(leaf is not None for leaf in done.operands.leaves)
        whole.runner.partial_gradients(done.plan, done.operands, kept, wanted, made.random)
    assert torch.equal(made.output, again.partial.output)  # from the same seed
    drawn = [call for call in calls if call["op"].startswith("aclnnDropoutGenMaskV2")]
    first, second, back = ([call[name] for name in ("seed", "offset", "shape")] for call in drawn)
    assert first == second == back
