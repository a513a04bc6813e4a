"""Backends: ways to run a plan, and the rule that chooses one."""

from attnkit.backends.ascend import Ascend
from attnkit.backends.base import (
    BACKENDS,
    AttentionOutput,
    Backend,
    Operands,
    Stats,
    register,
)
from attnkit.backends.choose import auto_order, make_plan, run_plan
from attnkit.backends.compiled import Compiled
from attnkit.backends.cuda import Cuda
from attnkit.backends.emulated import Emulated
from attnkit.backends.flex import Flex
from attnkit.backends.partials import merge
from attnkit.backends.reference import Reference
from attnkit.backends.tiled import Tiled

__all__ = [
    "BACKENDS",
    "Ascend",
    "AttentionOutput",
    "Backend",
    "Compiled",
    "Cuda",
    "Emulated",
    "Flex",
    "Operands",
    "Reference",
    "Stats",
    "Tiled",
    "auto_order",
    "make_plan",
    "merge",
    "register",
    "run_plan",
]
