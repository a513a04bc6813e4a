"""`Plan`: a backend, the kernel calls that compute a request, their price, and the refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from attnkit.errors import KernelContractError, Refusal
from attnkit.kernel import KernelCall
from attnkit.planner.candidates import Form
from attnkit.planner.certificate import disprove_plan, readable
from attnkit.planner.price import Price, price_call
from attnkit.planner.request import Request
from attnkit.planner.routes import Route
from attnkit.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RUNNERS", "Launch", "Plan", "Runner", "Solution"]


@dataclass(frozen=True)
class Launch:
    """One kernel call of a plan: what it is, where its sequences lie, what it costs.

    `copied_bytes` are moved around the call to bring its tensors into order and back, by
    `small_launches` elementwise kernels.
    """

    label: str
    call: KernelCall
    form: Form
    copied_bytes: int = 0
    small_launches: int = 0

    @cached_property
    def price(self) -> Price:
        """What the call costs; counted when somebody asks, for a packed batch is many regions."""
        return price_call(self.call, self.copied_bytes, self.small_launches)


@dataclass(frozen=True)
class Solution:
    """Kernel calls that compute a request together: one, or several whose outputs merge."""

    launches: tuple[Launch, ...]

    @property
    def label(self) -> str:
        """The calls' names, equal ones counted."""
        counts = Counter(launch.label for launch in self.launches)
        return " + ".join(f"{n} x {label}" if n > 1 else label for label, n in counts.items())

    @property
    def price(self) -> Price:
        """The sum of the calls' prices; calls share one compressed mask."""
        masks, prices = set(), []
        for launch in self.launches:
            price, mask = launch.price, launch.call.atten_mask
            if mask in masks:
                rest = price.peak_bytes - price.mask_bytes
                price = replace(price, mask_bytes=0, peak_bytes=rest)
            masks.add(mask)
            prices.append(price)
        return Price.total(prices)


@dataclass(frozen=True)
class Plan:
    """How a request runs, and the proof that it runs right.

    `steps` are the kernel calls in order; a backend that computes the composition by itself
    (the reference) has none. `refusals` are the candidates that were dropped, `passed_over`
    the reasons of the backends that "auto" asked before this one; `alternatives` are calls
    that would compute the same, but dearer. `in_order` is what the calls compute where
    positions are sorted before them (`residues`), and put back after. `route` says how biases
    reach the calls that cannot reach them as biases (`routes`).

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 64, 2, 16, device="meta")
    >>> plan = ak.plan(x, x, x, mask=ak.masks.Causal(), backend="reference")
    >>> plan.backend, plan.calls
    ('reference', ())
    """

    backend: str
    request: Request
    steps: tuple[Launch, ...] = ()
    alternatives: tuple[Solution, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    passed_over: tuple[Refusal, ...] = ()
    in_order: Request | None = None
    route: Route | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Plans are keys of caches on the call path, and a packed one has many blocks.
        return hash((self.backend, self.request, tuple(step.call for step in self.steps)))

    def __getstate__(self) -> dict[str, Any]:
        # What is kept beside the fields is of this process: hashes, schedules, numbers of graphs.
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def calls(self) -> tuple[KernelCall, ...]:
        """The kernel calls in order."""
        return tuple(step.call for step in self.steps)

    @property
    def price(self) -> Price | None:
        """What the plan costs; None where no kernel call is made."""
        return Solution(self.steps).price if self.steps else None

    @cached_property
    def on_channels(self) -> Plan:
        """The plan of the calls alone, for query and key that have the channels of the route."""
        return self if self.route is None else replace(self, request=self.route.request, route=None)

    def disprove(self) -> Refusal | None:
        """Return why the plan does not compute its request, with the cells; None if it does.

        Every call is about this request and finds its sequences in place, every argument is what
        request and blocks say or is judged by the set of cells it stands for, the sets are
        disjoint, their union is the request, and no row is averaged. Cost follows slices, not
        cells. A backend that computes by itself needs no calls; it is asked whether it refuses.

        >>> import torch
        >>> import attnkit as ak
        >>> x = torch.empty(1, 64, 2, 8, device="meta")
        >>> plan = ak.plan(x, x, x, mask=ak.masks.SlidingWindow(9), backend="emulated")
        >>> plan.disprove() is None
        True
        >>> replace(plan, steps=()).disprove().code
        'no-calls'
        """
        if not isinstance(self.backend, str) or self.backend not in RUNNERS:
            return Refusal("other-backend", f"no backend has the name {str(self.backend)[:80]!r}")
        runner = RUNNERS[self.backend]
        if not isinstance(self, runner.plan_type):
            return Refusal("other-backend", f"backend {self.backend!r} runs plans of its own kind")
        if not runner.by_calls:
            refused = readable(lambda: next(iter(runner.refusals(self.request)), None))
            if refused is not None or not self.steps:
                return refused
        return disprove_plan(self.request, self.steps, self.in_order, self.route)

    def verify(self) -> None:
        """Check the certificate; see `disprove` for what is proven.

        Raises `KernelContractError` that says what is wrong, and for no plan anything else.
        """
        wrong = self.disprove()
        if wrong is not None:
            mask = repr(getattr(self.request, "mask", self.request))[:300]
            raise KernelContractError(
                f"this plan does not compute {mask}: {wrong.reason}; this is a "
                "bug in attnkit, please report it with the plan's explain()",
                [wrong.code],
            )

    def explain(self) -> str:
        """Return a short report: what was understood, what will run, what it costs, and why."""
        from attnkit.planner.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what `explain` tells as plain data: strings, numbers, lists and dicts.

        >>> import torch
        >>> import attnkit as ak
        >>> x = torch.empty(1, 4, 2, 16, device="meta")
        >>> ak.plan(x, x, x, backend="reference").to_dict()["backend"]
        'reference'
        """
        from attnkit.planner.explain import as_data

        return as_data(self)

    def plot(self, batch: int = 0, head: int = 0) -> Figure:
        """Return a matplotlib figure of one score matrix, each call's cells in a colour."""
        from attnkit.planner.picture import plot

        return plot(self, batch, head)

    def __str__(self) -> str:
        return self.explain()


class Runner(Protocol):
    """What a proof asks of a backend: what its plans are, and whether they are made of calls."""

    plan_type: type[Plan]
    by_calls: bool

    def refusals(self, request: Request) -> list[Refusal]:
        """Return every reason why the backend cannot run the request."""


RUNNERS: Registry[Runner] = Registry("backend", "attnkit.backends")
"""The backends by name: the registry that `attnkit.backends` fills."""
