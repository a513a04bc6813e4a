"""Ranks that do not make the same call, over gloo, as a user makes it: told, soon, and no hang."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import attnkit as ak
from attnkit import masks
from attnkit.errors import AttnkitError
from attnkit.parallel import ContextParallel
from tests.parallel.processes import Pool

BUSY = 20.0
"""Seconds that a busy machine may take for what a quiet one does in half a second."""

RIGHT: dict[str, Any] = {
    "mask": masks.Causal(),
    "tokens": 12,
    "dtype": torch.float64,
    "heads": (4, 2),
    "method": "needed",
    "dropout": 0.5,
    "seed": 1,
}
OTHERS: dict[str, tuple[Any, str, str]] = {
    "mask": (masks.SlidingWindow(4), "mask Causal()", "mask SlidingWindow(4)"),
    "tokens": (14, "tokens 12", "tokens 14"),
    "dtype": (torch.float32, "dtype float64", "dtype float32"),
    "heads": ((4, 4), "heads 4 and 2 of keys", "heads 4 and 4 of keys"),
    "method": ("ring", "method needed", "method ring"),
    "dropout": (0.25, "dropout 0.5", "dropout 0.25"),
    "seed": (2, "dropout seed", "dropout seed"),
}


def call(group: dist.ProcessGroup, timeout: float = 60.0, **given: Any) -> torch.Tensor:
    """Attend a text on the ranks of a group."""
    tokens, dtype, heads = given["tokens"], given["dtype"], given["heads"]
    here = ContextParallel(group, method=given["method"], balance="zigzag", timeout=timeout)
    here = here.shards(tokens=tokens)
    torch.manual_seed(given["seed"])
    q, k, v = (torch.ones(1, here.size, n, 8, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    return ak.attention(q, k, v, mask=given["mask"], dropout=given["dropout"], shards=here)


def differ(group: dist.ProcessGroup) -> dict[str, tuple[str, float]]:
    """Return what this rank is told in each case, and after which time; calls that agree go on."""
    found = {}
    alone = dist.new_group([0, 1, 2])
    if group.rank() > 2:
        return {}
    call(alone, **RIGHT)  # what is imported and planned first
    for name, (other, *_) in OTHERS.items():
        dist.barrier(alone)
        start = time.monotonic()
        try:
            call(alone, **RIGHT | ({name: other} if group.rank() == 1 else {}))
        except AttnkitError as error:
            found[name] = str(error), time.monotonic() - start
        call(alone, **RIGHT)
    return found


def test_every_way_to_disagree_is_told_on_every_rank(processes: Pool) -> None:
    found = processes.run(differ)[:3]
    for name, (_, right, wrong) in OTHERS.items():
        told, times = zip(*(one[name] for one in found), strict=True)
        assert told[0] == told[1] == told[2]
        assert f"  ranks 0, 2: {right}" in told[0]
        assert f"  rank 1: {wrong}" in told[0]
        assert max(times) < BUSY, (name, times)


def absent(group: dist.ProcessGroup, timeout: float) -> tuple[str, float]:
    """Rank 1 makes no call; the error of the others, and after which time."""
    alone = dist.new_group([0, 1, 2])
    if group.rank() in (1, 3):
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(AttnkitError) as error:
        call(alone, timeout, **RIGHT)
    return str(error.value), time.monotonic() - start


def test_a_rank_that_is_absent_is_an_error_at_the_deadline(processes: Pool) -> None:
    found = processes.run(absent, 0.5)
    told = [found[0], found[2]]
    for words, took in told:
        assert "rank 1" in words
        assert 0.4 < took < BUSY
    assert any("rank 1 of 3 did not come to call 1 (forward" in words for words, _ in told)
