"""Attention over tokens that are spread over processes: sharded, planned, proven, run."""

from attnkit.parallel.sharding import Sharding

__all__ = ["Sharding"]
