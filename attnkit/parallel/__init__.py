"""Attention over tokens that are spread over processes: sharded, planned, proven, run."""

from attnkit.parallel.balance import balanced, candidates, even, line
from attnkit.parallel.load import Load, load_of
from attnkit.parallel.sharding import Sharding

__all__ = ["Load", "Sharding", "balanced", "candidates", "even", "line", "load_of"]
