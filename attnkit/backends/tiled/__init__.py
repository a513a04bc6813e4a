"""The tiled backend: query blocks over key runs, on torch's own operators.

Three ideas, in the order in which they are read:

1. The schedule (`schedule`, made by `job`, `items` and `columns`): which tiles of which score
   matrices are computed, as values, once per plan.
2. The pass over it (`walk`, `passes`): one walk, on which forward and backward make the same score
   tiles; `tiles` hands out operands, `terms` and `bias` what is added, `dropout` what is dropped,
   and `whole` is what torch's own kernel computes.
3. The face (`backend`): plans, autograd, and what graphs call.
"""

from attnkit.backends.tiled.backend import Tiled, TiledPlan

__all__ = ["Tiled", "TiledPlan"]
