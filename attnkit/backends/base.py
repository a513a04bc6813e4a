"""What every backend is, what it returns, and the registry of backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.errors import Refusal
from attnkit.planner import Composition, Plan, Request
from attnkit.pse import Pse
from attnkit.registry import Registry

__all__ = ["BACKENDS", "AttentionOutput", "Backend", "Deferred", "Operands", "Stats", "register"]


@dataclass(frozen=True, eq=False)
class Stats:
    """Softmax statistics per row: ``lse = max + log(sum)``, natural log.

    float32 (float64 for float64 inputs), [B, N, Sq], or [T, N] for a packed batch, whatever a
    backend stores. Dropout does not enter. A row that sees no key has max = -inf, sum = 0 and
    lse = -inf; with a learnable sink the sink is part of both. No gradient flows through them:
    the fused kernel has none.
    """

    max: Tensor
    sum: Tensor

    @property
    def lse(self) -> Tensor:
        """The log of the softmax denominator."""
        return self.max + self.sum.log()


class Deferred(Stats):
    """Statistics behind a function: a caller who wants the output alone does not pay for them.

    >>> import torch
    >>> later = Deferred(lambda: Stats(torch.zeros(1), torch.ones(1)))
    >>> later.lse
    tensor([0.])
    """

    def __init__(self, make: Callable[[], Stats]) -> None:
        self.__dict__["_make"] = make

    @cached_property
    def _made(self) -> Stats:
        make: Callable[[], Stats] = self.__dict__["_make"]
        return make()

    @property
    def max(self) -> Tensor:
        """The largest score of each row, or the log-sum-exp."""
        return self._made.max

    @property
    def sum(self) -> Tensor:
        """The sum that goes with it."""
        return self._made.sum

    def __repr__(self) -> str:
        return "Deferred(...)"


class AttentionOutput(NamedTuple):
    """The output in the layout of the query, and the softmax statistics."""

    output: Tensor
    stats: Stats


@dataclass(frozen=True, eq=False)
class Operands:
    """The tensors a plan runs on: what a `Request` leaves out."""

    query: Tensor
    key: Tensor
    value: Tensor
    pse: Pse | None = None
    sink: Tensor | None = None


class Backend(ABC):
    """One way to run a request.

    `refusals` gives every reason why it cannot, for "auto" and for an explicit choice alike;
    `plan` says how it would; `run` does it. A new backend is one file with a subclass and one
    ``register(TheBackend())``.
    """

    name: str
    traceable: bool = False
    """Whether `torch.compile` may trace `run`; otherwise a graph holds it as one operator."""

    @abstractmethod
    def refusals(self, request: Request) -> list[Refusal]:
        """Return every reason why this backend cannot run the request; empty if it can."""

    def composition_refusals(self, composition: Composition) -> list[Refusal]:
        """Return the reasons that are certain before any tensor is seen."""
        return []

    def plan(self, request: Request) -> Plan:
        """Return the plan for a request that is not refused."""
        return Plan(self.name, request)

    def yields(self, plan: Plan) -> Refusal | None:
        """Return why "auto" should pass over a plan of this backend: the next one is cheaper."""
        return None

    @abstractmethod
    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Run a plan of this backend."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


BACKENDS: Registry[Backend] = Registry("backend")


def register(backend: Backend) -> Backend:
    """Make a backend known by its name, and return it; a taken name is an error."""
    return BACKENDS.add(backend.name, backend)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores are computed and statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
