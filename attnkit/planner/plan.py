"""`Plan`: a backend, the kernel calls that compute a request, their price, and the refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from attnkit.display import Text
from attnkit.errors import KernelContractError, Refusal
from attnkit.explorer import save
from attnkit.kernel import KernelCall
from attnkit.masks import Full
from attnkit.planner.again import has_form, in_same_form
from attnkit.planner.backward import disprove_backward
from attnkit.planner.bias_pass import BiasPass, disprove_pass, frozen
from attnkit.planner.biases import lacking
from attnkit.planner.calls import Launch, Parts, Solution, by_heads, widened
from attnkit.planner.orders import Positions, only_merges, restated
from attnkit.planner.parted import Parted, as_they_stand
from attnkit.planner.price import Price
from attnkit.planner.proof import disprove_calls, disprove_cover, disprove_places
from attnkit.planner.request import Request, bias_terms, check_fits, state_of
from attnkit.planner.route_proof import disprove_route
from attnkit.planner.routes import Route, in_parts, routes
from attnkit.registry import Registry

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from typing_extensions import Self

    from attnkit.display.figure import Figure
    from attnkit.layouts import SeqLens
    from attnkit.masks import Mask
    from attnkit.planner.nearby import Saving
    from attnkit.pse import Pse

__all__ = ["RUNNERS", "Plan", "Runner", "disprove_calls_of", "disprove_plan", "inconsistent"]

# What reading a record that was changed by hand may raise. All of attnkit's errors are among them.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_MOST = 2_000_001  # the kernel's largest number of anything is two million batch elements


@dataclass(frozen=True)
class Plan:
    """How a request runs, and the proof that it runs right.

    `steps` are the kernel calls in order; a backend that computes the composition by itself
    (the reference) has none. `refusals` are the candidates that were dropped, `passed_over`
    the reasons of the backends that "auto" asked before this one; `alternatives` are calls
    that would compute the same, but dearer. `in_order` is what the calls compute where
    tokens are moved before them (`orders`), and put back after. `route` says how biases
    reach the calls that cannot reach them as biases (`routes`), and `bias_pass` makes the gradient
    of those that do, which no call writes. `back` are the calls whose grad calls make the
    gradients, where they are not those of the steps (`backward`).

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
    bias_pass: BiasPass | None = None
    back: tuple[Launch, ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Plans are keys of caches on the call path, and a packed one has many blocks.
        return hash((self.backend, self.request, tuple(step.call for step in self.steps)))

    # What is kept beside the fields is of this process: hashes, schedules, numbers of graphs.
    __getstate__ = state_of

    def after(self, passed_over: Sequence[Refusal]) -> Self:
        """Return the same plan, taken after these refusals, with all that it has worked out.

        >>> import torch
        >>> import attnkit as ak
        >>> x = torch.empty(1, 64, 2, 16, device="meta")
        >>> found = ak.plan(x, x, x, backend="reference")
        >>> found.after([Refusal("mine", "not today", "tiled")]).passed_over[0].code
        'mine'
        """
        if not passed_over:
            return self
        found = replace(self, passed_over=tuple(passed_over))
        vars(found).update({**vars(self), **state_of(found)})
        return found

    @property
    def of_any_length(self) -> bool:
        """Whether `at` may have a plan for other masks, biases and numbers of keys.

        Of fused calls: where it is one, on whole matrices that are regions. What is new is proven
        for the same kind of call, and no other kind is looked for.
        """
        return has_form(self)

    def at(
        self, mask: Mask, pse: Pse | None, kv_len: int, seqlens: SeqLens | None = None
    ) -> Plan | None:
        """Return the plan with another mask, bias and number of keys, where nothing is searched.

        A packed one also with other lengths of its sequences, which say how many tokens there are.
        Checks that all of it fits. None where such a mask needs a search of its own. The latest
        one is kept, for the layers that take the same step.

        >>> import torch
        >>> import attnkit as ak
        >>> query, keys = torch.zeros(1, 1, 2, 16), torch.zeros(1, 64, 2, 16)
        >>> step = ak.plan(query, keys, keys, mask=ak.masks.Causal(), backend="tiled")
        >>> step.of_any_length, step.at(ak.masks.SlidingWindow(8), None, 65).request.kv_len
        (True, 65)
        """
        if not self.of_any_length:
            return None
        step = (mask, None if pse is None else pse.key(), kv_len, seqlens)
        latest: tuple[object, Plan | None] | None = self.__dict__.get("_latest")
        if latest is None or latest[0] != step:
            asked = replace(self.request, mask=mask, bias=bias_terms(pse), kv_len=kv_len)
            if seqlens is not None:
                asked = replace(asked, seqlens=seqlens, batch=len(seqlens), q_len=seqlens.total_q)
            check_fits(asked, mask, pse)
            latest = step, self._at(asked)
            self.__dict__["_latest"] = latest
        return latest[1]

    def _at(self, request: Request) -> Plan | None:
        """Return the plan of a request that differs in its mask, bias and number of keys."""
        return in_same_form(self, request)

    @property
    def calls(self) -> tuple[KernelCall, ...]:
        """The kernel calls in order."""
        return tuple(step.call for step in self.steps)

    @cached_property
    def solution(self) -> Solution:
        """The steps together, with what is done beside them."""
        return Solution(self.steps, self.bias_pass)

    @cached_property
    def by_heads(self) -> tuple[Parts, ...]:
        """The steps by the heads that they have: those of the same heads are merged."""
        if self.in_order is not None:
            return self.inner.by_heads
        return by_heads(self.steps, self.back)

    @property
    def price(self) -> Price | None:
        """What the plan costs, its pass included; None where no kernel call is made."""
        return self.solution.price if self.steps else None

    @cached_property
    def positions(self) -> Positions | None:
        """Where tokens come from whose positions are sorted around the calls."""
        return Positions.of(self.request, self.in_order)

    @cached_property
    def inner(self) -> Plan:
        """The plan of the calls themselves, without the outermost of what is done around them.

        That is query and key with the dimensions of wider values, the pass for the gradient of
        a bias, the route, or tokens in another order.
        """
        wide = widened(self.request)
        if wide is not self.request:
            return replace(self, request=wide)
        if self.bias_pass is not None:
            request = frozen(self.request, self.bias_pass.terms)
            return replace(self, request=request, bias_pass=None)
        if self.route is not None:
            return replace(self, request=self.route.request, route=None)
        if self.in_order is not None and isinstance(self.in_order.mask, Parted):
            # Every key is seen by a part, so there is none to keep from the calls.
            steps, back = (
                tuple(as_they_stand(self.request, self.in_order, launches))
                for launches in (self.steps, self.back)
            )
            whole = replace(self.request, mask=Full())
            return replace(self, request=whole, steps=steps, back=back, in_order=None)
        if self.in_order is not None:
            return replace(self, request=self.in_order, in_order=None)
        return self

    @cached_property
    def savings(self) -> tuple[Saving, ...]:
        """What would make the plan cheaper: requests close by, planned when somebody asks."""
        from attnkit.planner.nearby import savings

        return savings(self.request)

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
            return Refusal("other-backend", f"backend {self.backend!r} runs plans of another kind")
        if not runner.by_calls:
            refused = _readable(lambda: next(iter(runner.refusals(self.request)), None))
            if refused is not None or not self.steps:
                return refused
        return disprove_plan(self)

    def _disproof(self) -> Refusal | None:
        """Return why the calls do not compute the request; reading a broken plan may raise."""
        return _disproof(self)

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

    def explain(self) -> Text:
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
        """Return a matplotlib figure of one score matrix, each call's cells in a colour.

        As the value of a notebook's cell it is shown once; a plan itself is shown as a page, too.
        """
        from attnkit.planner.picture import plot

        return plot(self, batch, head)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write one HTML page that shows the plan's cells, calls and rivals; return its path.

        The page needs no network and no other file. Each cell of it tells which call computes it.

        Raises `CompositionTypeError` for what is no path, and `OSError` for a file that cannot be
        written.

        >>> from tempfile import mkdtemp
        >>> import torch
        >>> import attnkit as ak
        >>> x = torch.empty(1, 64, 2, 16, device="meta")
        >>> plan = ak.plan(x, x, x, mask=ak.masks.Causal(), backend="emulated")
        >>> plan.to_html(mkdtemp() + "/plan.html").name
        'plan.html'
        """
        from attnkit.planner.explored import as_page

        return save(as_page(self), path)

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        """Return the calls for a notebook: coloured cells, a table, refusals folded away."""
        from attnkit.planner.shown import page

        return page(self)


class Runner(Protocol):
    """What a proof asks of a backend: what its plans are, and whether they are made of calls."""

    plan_type: type[Plan]
    by_calls: bool

    def refusals(self, request: Request) -> list[Refusal]:
        """Return every reason why the backend cannot run the request."""


RUNNERS: Registry[Runner] = Registry("backend", "attnkit.backends")
"""The backends by name: the registry that `attnkit.backends` fills."""


# -- the proof of a whole plan ---------------------------------------------------------------


def disprove_plan(plan: Plan) -> Refusal | None:
    """Return why the calls of a plan do not compute its request; None if they do.

    A plan that cannot even be read, such as one with a sequence fewer in one of two lists, is not
    proven either, so that is an answer as well and no exception.
    """
    return _readable(plan._disproof)


def disprove_calls_of(request: Request, launch: Launch) -> Refusal | None:
    """Return why one call does not compute a request by itself; None if it does."""
    return _disproof(Plan("", request, (launch,)))


def _disproof(plan: Plan) -> Refusal | None:
    steps, in_order, route, found = plan.steps, plan.in_order, plan.route, plan.bias_pass
    asked = widened(plan.request)
    taken = {part for one in route.channels for part in one.parts} if route else set()
    rest = tuple(k for k in range(len(asked.bias)) if k not in taken)
    request = asked if found is None else frozen(asked, found.terms)
    inner = route.request if route else request
    computed = in_order or inner
    every = (plan.request, request, inner, computed)
    return (
        next(filter(None, map(inconsistent, dict.fromkeys(every))), None)
        or disprove_pass(asked, rest, found)
        or _other_request(request, in_order, route)
        or _unmergeable(computed, steps)
        or disprove_places(computed, steps, route)
        or disprove_cover(computed, steps)
        or _other_route(request, route, steps, in_order)
        or disprove_calls(computed, steps)
        or disprove_backward(computed, steps, plan.back, route)
        or (_other_route(request, route, plan.back, in_order) if plan.back else None)
    )


def _readable(check: Callable[[], Refusal | None]) -> Refusal | None:
    """Return what a check of a record finds, or that the record cannot be read."""
    try:
        return check()
    except _UNREADABLE as error:
        return Refusal("unreadable", f"it is not a plan ({type(error).__name__}: {error})"[:400])


def inconsistent(request: Request) -> Refusal | None:
    """Return why no tensors of such sizes exist, which nobody could ask for; None if they do."""
    heads, kv_heads = request.num_heads, request.num_kv_heads
    lengths = (request.batch, request.q_len, request.kv_len)
    counts = (*lengths, heads, kv_heads, request.head_dim, request.value_dim)
    plain = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
    if not plain or not all(n in range(_MOST) for n in counts) or not kv_heads or heads % kv_heads:
        return Refusal("other-request", f"no tensors have the sizes {counts}"[:200])
    lens = request.seqlens
    fits = request.layout_of.packed == (lens is not None)
    fits &= lens is None or lengths == (len(lens), lens.total_q, lens.total_kv)
    return None if fits else Refusal("other-request", "the lengths are not those of its layout")


def _other_request(
    request: Request, in_order: Request | None, route: Route | None
) -> Refusal | None:
    """Check that no term is lost, and that moved tokens are those of this request."""
    for sizes in set(request.sequences):
        request.mask.check(*sizes, request.batch, request.num_heads)  # raises what is caught above
        for term in request.bias:
            if any(n not in (None, size) for n, size in zip(term.extent, sizes, strict=True)):
                return Refusal("other-request", f"{term.text} is not for score matrices of {sizes}")
    lacks = lacking(request)
    if lacks:
        return lacks[0]
    if in_order is not None and in_order not in restated(route.request if route else request):
        return Refusal("other-request", "the calls are for other positions than asked for")
    return None


def _unmergeable(request: Request, steps: Sequence[Launch]) -> Refusal | None:
    """Check that there is one call, or that all are parts, in groups of heads that are disjoint."""
    if not steps:
        return Refusal("no-calls", "it has no calls")
    if only_merges(request) and not all(step.partial for step in steps):
        return Refusal("misplaced", "a call answers whole rows, and has but a part of their sum")
    if len(steps) == 1 and not steps[0].partial:
        return None
    if not all(step.partial for step in steps):
        return Refusal("misplaced", "a call that answers whole rows is among several")
    groups = {step.heads: step.kv_heads for step in steps}
    heads = [head for group in groups for head in group or ()]
    if (None in groups and len(groups) > 1) or len(set(heads)) < len(heads):
        reason = "a head is in calls of several groups of heads, each of which merges by itself"
        return Refusal("levels-per-head", reason)
    if any(step.kv_heads != groups[step.heads] for step in steps):
        return Refusal("misplaced", "calls of the same heads read other key heads")
    return None


def _other_route(
    request: Request, route: Route | None, steps: Sequence[Launch], in_order: Request | None
) -> Refusal | None:
    """Check what goes around the calls: that it adds the bias, in a way that the planner knows."""
    if route is None:
        zoned = any(step.zone is not None for step in steps)
        return Refusal("other-sign", "a call is for a zone of no route") if zoned else None
    wrong = disprove_route(request, route, steps, in_order)
    if wrong is not None:
        return wrong
    if route not in _routes(request, len(steps) > 1):
        return Refusal("other-route", f"{route} is not a way around the calls of this request")
    if any((step.zone in route.zones) != bool(route.zones) for step in steps):
        return Refusal("other-zone", "the zones of the calls are not those of the route")
    return None


def _routes(request: Request, in_several: bool) -> Iterator[Route]:
    """Yield the routes of a request, as they are where one call or several have the keys."""
    for way in chain(routes(request), routes(request, sloped=True)):
        found = in_parts(request, way) if isinstance(way, Route) and in_several else way
        if isinstance(found, Route):
            yield found
            if not in_several:
                # For a mask that allows nothing zones differ in nothing.
                yield replace(found, zones=())
