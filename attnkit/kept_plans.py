"""`KeptPlans`: the plans that a module keeps, and how often each of them ran."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock
from typing import Any

from attnkit.parallel.plan import ParallelPlan
from attnkit.planner import Plan

__all__ = ["MOST_PLANS", "KeptPlans", "Ran"]

Ran = tuple[Plan | ParallelPlan, int]
"""A plan, and how often it ran."""

# Plans kept by a module. Packed batches have new lengths in every step, so there is no end to
# them; what is dropped here is still found in the planner's own cache for a while.
MOST_PLANS = 16


class _Tally:
    """How often a plan ran, with those of other lengths that it was made again for."""

    __slots__ = ("entries", "times")

    def __init__(self) -> None:
        self.times = 0
        self.entries = 0  # that are kept


class KeptPlans(dict[Hashable, Any]):
    """The latest plans of a module, by what its calls depend on; for threads that share it, too.

    `calls` counts all runs. What a graph of `torch.compile` runs, it plans for itself: nothing of
    it is counted here. A copy, or what a pickle holds, begins anew.

    >>> import torch
    >>> import attnkit as ak
    >>> layer, x = ak.Attention(2, 8), torch.zeros(1, 4, 2, 8)
    >>> _ = layer(x, x, x), layer(x, x, x), layer.plan(x, x, x)
    >>> layer._plans.calls, [times for _, times in layer._plans.ran()]
    (2, [2])
    """

    __slots__ = ("_lock", "_uses", "calls")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._uses: dict[int, _Tally] = {}  # by the identity of a plan that is kept
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[KeptPlans], tuple[()]]:
        return KeptPlans, ()

    def renewed(self, known: Hashable) -> Any:
        """Return what is kept for a call, and make it the newest; None where nothing is."""
        with self._lock:
            plan = self.pop(known, None)
            if plan is not None:
                self[known] = plan
            return plan

    def keep(self, known: Hashable, plan: Plan | ParallelPlan, like: Plan | None = None) -> None:
        """Keep a plan, counted with the one that it was made `like`; an old one leaves."""
        with self._lock:
            uses = self._uses.get(id(plan if like is None else like)) or _Tally()
            if known in self:
                self._drop(known)
            elif len(self) >= MOST_PLANS:
                self._drop(self._least())
            self[known] = plan
            self._uses[id(plan)] = uses
            uses.entries += 1

    def count(self, plan: Plan | ParallelPlan) -> None:
        """Count a run."""
        with self._lock:
            self.calls += 1
            uses = self._uses.get(id(plan))
            if uses is not None:  # a plan of arguments without a key is not kept
                uses.times += 1

    def ran(self) -> list[Ran]:
        """Return the plans that are kept and ran, and how often; of those made alike the latest."""
        with self._lock:
            latest = {id(self._uses[id(plan)]): plan for plan in self.values()}
            counted = [(plan, self._uses[id(plan)].times) for plan in latest.values()]
        return [(plan, times) for plan, times in counted if times]

    def _least(self) -> Hashable:
        """Return the oldest of a kind that others are kept of, or else the oldest."""
        # A step's plan is made again in no time; that of the prompt before it is not.
        several = (known for known, plan in self.items() if self._uses[id(plan)].entries > 1)
        return next(several, next(iter(self)))

    def _drop(self, known: Hashable) -> None:
        plan = self.pop(known)
        self._uses[id(plan)].entries -= 1
        if not any(kept is plan for kept in self.values()):
            del self._uses[id(plan)]
