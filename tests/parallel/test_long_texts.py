"""What is promised of shardings of long texts: the table of benchmarks/parallel.py, in numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attnkit.parallel import Sharding, even, load_of

FILE = Path(__file__).parents[2] / "benchmarks" / "_long_masks.py"
MILLION, FEWER = 1 << 20, 1 << 17
GLOBAL = "window and 256 global rows"
# One global row is 12 % of a rank's cells on 512 ranks: the nearest is half of it.
OVER = {(GLOBAL, tokens, 512): 0.06 for tokens in (MILLION, FEWER)}


@pytest.fixture(scope="module")
def long_masks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_long_masks", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_long_masks"] = module  # where its dataclass looks for its names
    spec.loader.exec_module(module)
    return module


def check(long_masks: ModuleType, tokens: int, ranks: int) -> None:
    for name, mask in long_masks.masks_of(tokens).items():
        load, region = load_of([mask], tokens), mask.region(tokens, tokens)
        dealt = even(load, ranks)
        assert max(dealt.sizes) - min(dealt.sizes) <= 1
        assert load.imbalance(dealt) <= OVER.get((name, tokens, ranks), 0.0021), name
        if name != GLOBAL:  # whose heap leaves the global rows with a few ranks
            ours = long_masks.Travel.of(region, dealt)
            others = long_masks.Travel.of(region, long_masks.heap(load, ranks))
            assert ours.mean <= 0.9 * others.mean, name


def test_a_million_tokens_on_512_ranks_are_even_in_tokens_and_cells(
    long_masks: ModuleType,
) -> None:
    check(long_masks, MILLION, 512)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("tokens", "ranks"), [(MILLION, 8), (MILLION, 64), (FEWER, 8), (FEWER, 64), (FEWER, 512)]
)
def test_long_texts_are_even_in_tokens_and_cells(
    long_masks: ModuleType, tokens: int, ranks: int
) -> None:
    check(long_masks, tokens, ranks)


def test_the_known_cases_are_what_one_knows_them_to_be(long_masks: ModuleType) -> None:
    known = long_masks.masks_of(MILLION)
    assert even(load_of([known["causal"]], MILLION), 64) == Sharding.zigzag(MILLION, 64)
    window = load_of([known["window of 4,096"]], MILLION)
    assert even(window, 64) == Sharding.contiguous(MILLION, 64)
    region = known["causal"].region(MILLION, MILLION)
    # A quarter less than a ring moves, as the study of needed keys under zigzag has it.
    ring = MILLION - MILLION // 64
    assert long_masks.Travel.of(region, Sharding.zigzag(MILLION, 64)).mean == 0.75 * ring
