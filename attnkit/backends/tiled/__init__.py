"""The tiled backend: query blocks over key runs, on torch's own operators."""

from attnkit.backends.tiled.backend import Tiled, TiledPlan

__all__ = ["Tiled", "TiledPlan"]
