"""The compiled backend: regions on a kernel in C++, built by torch when it is first asked for.

`kernel.cpp` computes, `library` builds it and hands tensors over, `table` says which keys its
rows read, and `backend` is plans and autograd.
"""

from attnkit.backends.compiled.backend import Compiled, CompiledPlan, prefer

__all__ = ["Compiled", "CompiledPlan", "prefer"]
