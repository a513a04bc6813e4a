"""Every set of cells that three masks can make, at every small size: planned, proven, computed.

Sets are met once each, whatever compositions give them. All are computed, forward and backward,
as batch elements with a mask each; the smaller ones get a plan of their own as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, product

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.geometry import Region
from attnkit.masks import Mask
from attnkit.planner.calls import Launch
from tests.agreement import near, results

pytestmark = pytest.mark.usefixtures("no_full_masks")

SIDES = range(1, 7)
ALONE = 4
BATCH = 64


@dataclass(frozen=True, repr=False)
class OfBatch(Mask):
    """One region for each batch element, of one size."""

    parts: tuple[Region, ...]

    @property
    def batches(self) -> int:
        return len(self.parts)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return self.parts[batch]


def atoms(q_len: int, kv_len: int) -> Iterator[Mask]:
    """Every structured family, with both anchors and arguments inside the matrix."""
    yield masks.Full()
    for align in ("bottom_right", "top_left"):
        yield masks.Causal(align)
        yield masks.SlidingWindow(2, align)
        yield masks.Band(1, 1, align)
        yield masks.Chunked(2, align)
        yield masks.BlockCausal(2, align)
        yield masks.PrefixLM(2, align)
    yield masks.Columns(1, 3)
    yield masks.Rows(1, 3)
    yield masks.Prefix(2)
    yield masks.Padding([max(kv_len - 1, 0)])
    if q_len > 2 and kv_len > 2:
        yield masks.Documents((1, q_len - 1), (kv_len - 2, 2))


def sets(q_len: int, kv_len: int) -> list[Region]:
    """Return the distinct regions that up to three atoms make."""
    first = dict.fromkeys(mask.region(q_len, kv_len) for mask in atoms(q_len, kv_len))
    level = first
    for _ in range(2):
        level = level | dict.fromkeys(
            joined for a, b in product(level, first) for joined in (a & b, a | b, a - b)
        )
    return list(level)


def chunks(regions: list[Region]) -> Iterator[tuple[Region, ...]]:
    left = iter(regions)
    while chunk := tuple(islice(left, BATCH)):
        yield chunk


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), list(product(SIDES, SIDES)))
def test_every_set_is_planned_proven_and_computed(q_len: int, kv_len: int) -> None:
    known, gathered = sets(q_len, kv_len), 0
    q = torch.empty(1, q_len, 1, 8, device="meta", requires_grad=True)
    k = torch.empty(1, kv_len, 1, 8, device="meta", requires_grad=True)
    for region in known if max(q_len, kv_len) <= ALONE else ():
        plan = ak.plan(q, k, k, mask=OfBatch((region,)), backend="emulated")
        plan.verify()
        assert not any(c.atten_mask and c.atten_mask.kind == "full" for c in plan.calls), region
        solutions = [plan.solution, *plan.alternatives]
        some = [one.launches for one in solutions if any(map(gathers, one.launches))]
        for launches in some:  # weights that somebody measures may choose any
            replace(plan, steps=launches, alternatives=()).verify()
        gathered += bool(some)
    assert gathered > (50 if min(q_len, kv_len) == ALONE == max(q_len, kv_len) else -1)
    for some in chunks(known):
        compared(OfBatch(some), len(some), q_len, kv_len)


def gathers(launch: Launch) -> bool:
    """Whether a sequence of a call has rows or keys from several places."""
    return not all(block.is_rectangle for block in launch.blocks)


def compared(mask: Mask, batch: int, q_len: int, kv_len: int) -> None:
    """Check output, statistics and gradients of the emulated plan against the reference."""
    shapes = ((batch, q_len, 2, 3), (batch, kv_len, 1, 3), (batch, kv_len, 1, 2))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found, meant = (results(name, tensors, mask=mask) for name in ("emulated", "reference"))
    near(found, meant, 1e-10, 1e-10)
