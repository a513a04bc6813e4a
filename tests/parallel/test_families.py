"""Every family of masks and of biases on ranks is what it is in one process."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest

from attnkit import masks
from attnkit.layouts import SeqLens
from tests.masks.oracle import ALIGNS, anchored_cases, free_cases
from tests.masks.test_taken import samples
from tests.parallel.cases import Case, run_on_threads, worst
from tests.pse.families import BATCH, FAMILIES, HEADS

EXACT = 1e-11

WAYS: list[dict[str, Any]] = [
    {"ranks": 3, "sharding": "zigzag"},
    {"ranks": 2, "sharding": "random", "method": "ring", "keep": True},
    {"ranks": 4, "sharding": "even", "stages": 2, "backend": "reference"},
    {"ranks": 3, "sharding": "contiguous", "method": "gather"},
    {"ranks": 2, "sharding": "zigzag", "method": "ulysses", "heads_ways": 2},
    {"ranks": 4, "sharding": "random", "method": "hybrid", "heads_ways": 2},
    {"ranks": 4, "sharding": "zigzag", "backend": "reference", "dropout": 0.3},
]
"""Not a multiple of the families beside each other, so that those meet different ones."""

PACKED = SeqLens([9, 1, 0, 14], [9, 4, 3, 14])


def check(case: Case) -> None:
    assert worst(case, run_on_threads(case)) < EXACT, case


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), [(6, 6), (8, 14)])
def test_every_mask(q_len: int, kv_len: int) -> None:
    each = [mask for mask in samples(q_len, kv_len) if mask.batches in (None, 2)]
    assert len(each) > 100
    for mask, way in zip(each, cycle(WAYS)):
        heads = (3, 3) if mask.heads == 3 else (2, 1)
        check(Case(mask, lengths=(q_len, kv_len), heads=heads, **way))


@pytest.mark.sweep
def test_every_mask_of_any_length_on_packed_sequences() -> None:
    each = [case.mask for align in ALIGNS for case in anchored_cases(align)]
    each += [case.mask for case in free_cases()]
    each += [masks.Prefix([3, 0, 2, 9]), masks.Chunked(4, phase=(0, 1, 2, 3)) & masks.Causal()]
    each = [mask for mask in each if mask.batches in (None, 4)]
    assert len(each) > 60
    for mask, way in zip(each, cycle(WAYS)):
        heads = (3, 3) if mask.heads == 3 else (4, 2)
        check(Case(mask, layout="TND", seqlens=PACKED, heads=heads, **way))


BIASES = [(name, True) for name in FAMILIES]
BIASES += [(name, False) for name, family in FAMILIES.items() if family.make().batch is None]


@pytest.mark.parametrize(("name", "packed"), BIASES)
def test_every_bias(name: str, packed: bool) -> None:
    bias = FAMILIES[name].make()
    q_len, kv_len = bias.extent
    way = WAYS[sum(map(ord, name)) % len(WAYS)]
    lengths: dict[str, Any] = {"lengths": (q_len or 11, kv_len or 13)}
    if packed:
        own = SeqLens([9, 1, 5], [9, 4, 7])
        if (q_len, kv_len) != (None, None):
            own = SeqLens([q_len or 5] * BATCH, [kv_len or 5] * BATCH)
        lengths = {"layout": "TND", "seqlens": own}
    check(
        Case(masks.Causal("top_left"), bias=FAMILIES[name].make, heads=(HEADS, 1), **lengths, **way)
    )
