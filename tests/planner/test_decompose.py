"""Sets of calls for masks that are no band: all heads are in them, or there is a reason."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.errors import Refusal
from attnkit.geometry import Slice
from attnkit.planner import packing
from attnkit.planner.decompose import decompositions
from attnkit.planner.grouping import MOST_WINDOWS, Segment, group


def random_heads(seed: int) -> tuple[masks.Mask, int]:
    """Masks per head of which some are noise: their pieces ask for windows of all kinds."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    length = chance.choice([12, 20, 33])
    heads: list[masks.Mask] = []
    for _ in range(2):
        noise = masks.Dense.keep(torch.rand(length, length) > chance.choice([0.1, 0.5, 0.9]))
        heads.append(chance.choice([noise, noise & masks.Causal(), masks.Causal()]))
    return masks.PerHead(heads), length


@pytest.mark.parametrize("merging", [False, True])
def test_no_head_is_lost(merging: bool, request: pytest.FixtureRequest) -> None:
    if merging:
        request.getfixturevalue("no_full_masks")
    for seed in range(7):
        mask, length = random_heads(seed)
        x = torch.randn(1, length, 2, 4, dtype=torch.float64)
        found, meant = (
            ak.attention(x, x, x, mask=mask, backend=name) for name in ("emulated", "reference")
        )
        torch.testing.assert_close(found, meant, rtol=1e-10, atol=1e-10)
        if length == 20:  # on a CPU, the report is of calls that nobody has verified yet
            report = ak.plan(x, x, x, mask=mask).explain()
            assert "proof       the call" in report


def test_a_head_without_grouping_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, length = random_heads(0)
    x = torch.empty(1, length, 2, 4, device="meta")
    request = ak.plan(x, x, x, mask=mask, backend="reference").request
    monkeypatch.setattr(packing, "group", lambda pieces: group(pieces) if len(pieces) < 9 else [])
    found = list(decompositions(request))
    assert found
    assert {one.code for one in found if isinstance(one, Refusal)} == {"cut-windows"}
    assert all(isinstance(one, Refusal) for one in found)


def test_grouping_gives_every_piece_to_a_window_that_computes_it() -> None:
    odd = [Segment.of(0, Slice(0, 4, 0, 9, k, k + w)) for k, w in product(range(5), range(1, 5))]
    (some,) = group(odd)
    assert len(some) <= MOST_WINDOWS
    taken = sorted(k for _, members in some for k in members)
    assert taken == list(range(len(odd)))
    assert all(window.computes(odd[k]) for window, members in some for k in members)
    widths = range(1, MOST_WINDOWS + 2)
    many = [Segment.of(0, Slice(0, 40, 0, 90, 0, w)) for w in widths]
    assert group(many) == []  # more calls than are ever worth it
