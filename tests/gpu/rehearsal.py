"""The doctor's suite for GPUs on the CPU, with the plans that a GPU would get.

    python -m tests.gpu.rehearsal [arguments of the doctor]

The backends `cuda` and `flex` are asked as if tensors were on a CUDA device, so that their
choices, gradients and statistics run as there. What runs in the place of kernels is torch's own:
`scaled_dot_product_attention` on the CPU, and FlexAttention's eager code. Whether a GPU's
kernels are right is not shown here; that the suite asks them is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attnkit import Refusal
from attnkit.__main__ import main
from attnkit.backends import BACKENDS, Backend
from attnkit.backends.cuda import Cuda
from attnkit.backends.flex import Flex
from attnkit.doctor.findings import GPU_BACKENDS
from attnkit.planner import Request
from tests.backends.flex.eager import eager

ARGUMENTS = [part for name in GPU_BACKENDS for part in ("--backend", name)]


class FlexThere(Flex):
    """The flex backend, asked as on a CUDA device; its eager code computes."""

    def __init__(self) -> None:
        super().__init__(eager)

    def refusals(self, request: Request) -> list[Refusal]:
        return super().refusals(replace(request, device="cuda"))


class CudaThere(Cuda):
    """The cuda backend, asked as on a CUDA device."""

    def __init__(self) -> None:
        super().__init__(FlexThere())

    def refusals(self, request: Request) -> list[Refusal]:
        return super().refusals(replace(request, device="cuda"))


@contextmanager
def rehearsed() -> Iterator[None]:
    """Let these two stand in for the backends of their names."""
    real = {name: BACKENDS[name] for name in ("flex", "cuda")}
    _swap({"flex": FlexThere(), "cuda": CudaThere()})
    try:
        yield
    finally:
        _swap(real)


def _swap(others: dict[str, Backend]) -> None:
    for name, backend in others.items():
        BACKENDS.remove(name)
        BACKENDS.add(name, backend)


if __name__ == "__main__":
    with rehearsed():
        sys.exit(main(["doctor", "--device", "cpu", *ARGUMENTS, *sys.argv[1:]]))
