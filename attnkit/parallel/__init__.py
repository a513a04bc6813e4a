"""Attention over tokens that are spread over processes: sharded, planned, proven, run."""

from attnkit.parallel.balance import balanced, candidates, even, line
from attnkit.parallel.context import ContextParallel
from attnkit.parallel.load import Load, load_of
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.shards import Shards
from attnkit.parallel.whole import plan

__all__ = [
    "ContextParallel",
    "Load",
    "ParallelPlan",
    "Sharding",
    "Shards",
    "balanced",
    "candidates",
    "even",
    "line",
    "load_of",
    "plan",
]
