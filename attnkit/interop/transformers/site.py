"""`Site`: what the adapter knows of one attention module: its plans, and what came by."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from attnkit.attend import Asked, plan_again
from attnkit.backends import AttentionOutput, Operands, run_plan
from attnkit.kept_plans import KeptPlans, Ran
from attnkit.layouts import SeqLens
from attnkit.masks import Mask

__all__ = ["Site", "calling_module", "site_at", "site_of"]

_NAME = "_attnkit_site"

_MOST_TERMS = 16  # a share of dropout or a scale that changes in each step is nobody's


class Site:
    """Where attention is called: its plans, how often, and what was read or made dense.

    It belongs to the module, and neither pickles nor deep-copies with it: a copy begins anew.
    """

    __slots__ = ("by_terms", "calls", "dense", "masks", "notes", "read")

    def __init__(self) -> None:
        # By what a module is built with, and then as a module keeps its plans.
        self.by_terms: dict[Hashable, KeptPlans] = {}
        self.calls = 0
        self.dense: Counter[str] = Counter()  # operators that made cells of a mask that is a set
        self.read: Counter[str] = Counter()  # what was read cell by cell
        self.notes: Counter[str] = Counter()  # what was computed beside the plan
        self.masks: list[Mask | None] | None = None  # those of each call, while somebody asks

    def __deepcopy__(self, memo: object) -> Site:
        return Site()

    def __reduce__(self) -> tuple[type[Site], tuple[()]]:
        return Site, ()

    def ran(self) -> Iterator[Ran]:
        """Yield the plans that are kept, and how often each ran."""
        for plans in self.by_terms.values():
            yield from plans.ran()

    @property
    def told(self) -> bool:
        """Whether something came by that a report has to tell."""
        return bool(self.calls or self.dense or self.read or self.notes)

    def run(
        self,
        asked: Asked,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None = None,
        seqlens: SeqLens | None = None,
    ) -> AttentionOutput:
        """Attend by a plan that is kept here.

        The mask and the bias are the second of each pair: the first are a module's own, which
        never change.
        """
        terms = asked[3:6], asked.deterministic
        plans = self.by_terms.get(terms)
        if plans is None:
            if len(self.by_terms) >= _MOST_TERMS:
                self.by_terms.clear()
            plans = self.by_terms[terms] = KeptPlans()
        plan = plan_again(plans, asked, query, key, value, sink, seqlens)
        self.calls += 1
        plans.count(plan)
        if self.masks is not None:
            self.masks.append(asked.mask)
        return run_plan(plan, Operands(query, key, value, asked.pse, sink))


def site_of(module: nn.Module) -> Site:
    """Return the site of a module."""
    found: Site | None = module.__dict__.get(_NAME)
    if found is None:
        found = module.__dict__[_NAME] = Site()
    return found


def site_at(module: nn.Module) -> Site | None:
    """Return the site of a module that has one."""
    found: Site | None = module.__dict__.get(_NAME)
    return found


def calling_module() -> nn.Module | None:
    """Return the module in whose code Python is now; None outside of any.

    Only asked where something slow happens that somebody should hear of.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None
