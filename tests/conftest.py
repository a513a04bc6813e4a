"""What every test shares: one torch thread per worker, and hypothesis without a stop-watch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings

from attnkit.backends import make_plan
from attnkit.planner import lower
from attnkit.planner.search import Search

# Workers share the cores; more threads than cores only make them wait for each other.
torch.set_num_threads(1)

# Wall time is no criterion on a shared machine, so no deadline. Under CI the examples are the
# same every time: a failure there can be repeated anywhere.
settings.register_profile(
    "attnkit",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("attnkit")


@pytest.fixture
def no_full_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan as for lengths at which no full mask is weighed: several calls are merged instead.

    At the sizes of a test one mask of all cells is nearly always cheaper than two calls.
    """
    caches = (make_plan, lower)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(sys.modules["attnkit.planner.lower"], "MOST_MASK_CELLS", 0)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan without sequences that gather their keys from several places: pieces are merged."""
    caches = (make_plan, lower)
    for cache in caches:
        cache.cache_clear()
    lowering = sys.modules["attnkit.planner.lower"]
    monkeypatch.setattr(lowering, "Search", partial(Search, gathers=False))
    yield
    for cache in caches:
        cache.cache_clear()
