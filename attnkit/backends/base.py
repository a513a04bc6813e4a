"""What every backend is, what it returns, and the registry of backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from attnkit.errors import BackendRefused, Refusal
from attnkit.planner import Composition, Plan, Request
from attnkit.planner.plan import RUNNERS
from attnkit.pse import Pse
from attnkit.pse.base import rebound
from attnkit.registry import Registry

__all__ = [
    "BACKENDS",
    "AttentionOutput",
    "Backend",
    "Kept",
    "Operands",
    "Partial",
    "Stats",
    "register",
]

Maker = Callable[[], Tensor]


class Stats:
    """Softmax statistics per row, the same on every backend.

    ``lse = log(sum_j exp(score_ij))``, natural log, over the allowed keys; ``max`` is the largest
    of these scores and ``sum = exp(lse - max)``. float32 (float64 for float64 inputs),
    ``[b n s]``, or ``[t n]`` for a packed batch, whatever a backend stores. Dropout does not
    enter. A learnable sink is one more score. A row that sees no key has max = -inf, sum = 0
    and lse = -inf.

    Gradients flow through `lse` (and through nothing else) where the inputs ask for some.
    Either is given as a tensor, or as a function that makes it when somebody looks: fast kernels
    keep one number per row, and the maximum costs them another pass over the scores.

    >>> import torch
    >>> stats = Stats(torch.tensor([1.0]), lambda: torch.tensor([0.0]))
    >>> stats.lse, stats.max, stats.sum
    (tensor([1.]), tensor([0.]), tensor([2.7183]))
    """

    def __init__(self, lse: Tensor | Maker, max: Tensor | Maker) -> None:
        self._lse, self._max = lse, max

    @property
    def lse(self) -> Tensor:
        """The log of the softmax denominator."""
        if not isinstance(self._lse, Tensor):
            self._lse = self._lse()
        return self._lse

    @property
    def max(self) -> Tensor:
        """The largest score of each row, after soft-cap and bias."""
        if not isinstance(self._max, Tensor):
            self._max = self._max()
        return self._max

    @property
    def sum(self) -> Tensor:
        """The softmax denominator over ``exp(max)``."""
        peak = self.max
        return (self.lse.detach() - peak.masked_fill(peak == -torch.inf, 0.0)).exp()


class AttentionOutput(NamedTuple):
    """The output in the layout of the query, and the softmax statistics.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.zeros(1, 4, 2, 8)
    >>> output, stats = ak.attention(x, x, x, return_stats=True)
    >>> output.shape, stats.lse.shape
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """

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
    given: tuple[Tensor, ...] = field(default=(), kw_only=True)
    """The tensors of the mask (`Mask.tensors`), where it comes with the call."""

    @property
    def leaves(self) -> tuple[Any, ...]:
        """Query, key, value, sink (or None), and the tensors of the bias and of the mask."""
        carried = self.pse.tensors if self.pse is not None else ()
        return (self.query, self.key, self.value, self.sink, *carried, *self.given)

    def by_head(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as ``[b n s d]`` views (packed: b is 1)."""
        view, key_heads = request.layout_of.view, request.num_kv_heads
        query = view(self.query, request.num_heads)
        return query, view(self.key, key_heads), view(self.value, key_heads)

    @classmethod
    def of(cls, pse: Pse | None, leaves: Sequence[Any]) -> Operands:
        """Return the operands that have these `leaves`, and a bias like `pse`."""
        query, key, value, sink, *carried = leaves
        count = 0 if pse is None else len(pse.tensors)
        bias = None if pse is None else rebound(pse, carried[:count])
        return cls(query, key, value, bias, sink, given=tuple(carried[count:]))


class Kept(NamedTuple):
    """What a forward pass keeps beside its operands, and the gradients that arrive for its results.

    `seed` is that of the dropout; a gradient that is None is one of zeros.
    """

    seed: Tensor | None
    output: Tensor
    lse: Tensor
    grad: Tensor | None
    grad_lse: Tensor | None

    @property
    def arrived(self) -> Tensor:
        """The gradient of the output, as a tensor."""
        return torch.zeros_like(self.output) if self.grad is None else self.grad


class Partial(NamedTuple):
    """What the rows of a request answer over its keys alone, to be merged with other keys'.

    `output` is in the request's layout and `lse` as in `Stats`, both in the dtype of the
    statistics. `random` is what was drawn, where the gradients must draw it again.
    """

    output: Tensor
    lse: Tensor
    random: object = None


class Backend(ABC):
    """One way to run a request.

    `refusals` gives every reason why it cannot, for "auto" and for an explicit choice alike;
    `plan` says how it would; `run` does it. A new backend is one file with a subclass and one
    ``register(TheBackend())``.
    """

    name: str
    auto: ClassVar[int | None] = None
    """Its place among the backends that "auto" asks, the smallest first; None: by name only."""
    plan_type: type[Plan] = Plan
    """The class of the plans that `run` takes."""
    by_calls: bool = False
    """Whether a plan is its kernel calls, and not just a request."""

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
        """Run a plan of this backend; autograd records what it does."""

    # -- inside of graphs, where nothing is recorded: see `attnkit.backends.graph` -----------

    saves_lse: ClassVar[bool] = False
    """Whether `gradients` needs the log-sum-exp of the forward pass."""

    def compute(self, plan: Plan, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Run a plan on random numbers that follow from `seed`; nothing is recorded."""
        with torch.no_grad():
            return self.run_on(seed, plan, operands)

    def run_on(self, seed: Tensor | None, plan: Plan, operands: Operands) -> AttentionOutput:
        """Run a plan on random numbers that follow from `seed`; autograd records what it does."""
        with seeded(seed, operands.query.device):
            return self.run(plan, operands)

    def gradients(
        self, plan: Plan, operands: Operands, kept: Kept, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value, sink and the tensors of the bias.

        `wanted` says which are asked for. By default the forward is computed again, as activation
        checkpointing does.
        """
        apart = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(operands.leaves, wanted, strict=True)
        ]
        again = Operands.of(operands.pse, apart)
        with recorded():
            output, stats = self.run_on(kept.seed, plan, again)
            made = [(output, kept.grad)]
            made += [] if kept.grad_lse is None else [(stats.lse, kept.grad_lse)]
            return gradients_of(made, apart)

    # -- shares of a larger attention: requests with a `share` ------------------------------

    def partial(self, plan: Plan, operands: Operands, seed: Tensor | None) -> Partial:
        """Run a plan whose request has a `Share`, on its dropout's seed; nothing is recorded."""
        raise BackendRefused(*_no_shares(self.name))

    def partial_gradients(
        self,
        plan: Plan,
        operands: Operands,
        kept: Kept,
        wanted: tuple[bool, ...],
        random: object = None,
    ) -> tuple[Tensor | None, ...]:
        """Return what a share gives to the gradients of its `leaves`, in the statistics' dtype.

        `kept` has the output and the log-sum-exp of whole rows, over the keys of all shares, with
        the sink; it may have them in the dtype of the statistics. ``kept.seed`` is the seed that
        `partial` was given, `random` what it drew.
        """
        raise BackendRefused(*_no_shares(self.name))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _no_shares(name: str) -> tuple[str, list[Refusal]]:
    reason = "it computes whole rows, and a share needs their statistics from outside"
    return f"backend {name!r} runs no share of an attention: {reason}", [
        Refusal("share", reason, name)
    ]


def without_shares(request: Request, name: str) -> list[Refusal]:
    """Return why a backend that computes whole rows cannot run a share of an attention."""
    return [] if request.share is None else _no_shares(name)[1]


@contextmanager
def seeded(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed, and leave the generators as they were."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def reached(*names: str) -> Iterator[None]:
    """Let operators reach parts of torch that it leaves out inside of an operator."""
    with torch._C._PreserveDispatchKeyGuard():
        for name in names:
            key = getattr(torch._C.DispatchKey, name)
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


@contextmanager
def recorded() -> Iterator[None]:
    """Record gradients, inside of an operator, too."""
    with reached("AutogradFunctionality"), torch.enable_grad():
        yield


BACKENDS = cast("Registry[Backend]", RUNNERS)


def register(backend: Backend) -> Backend:
    """Make a backend known by its name, and return it; a taken name is an error."""
    return BACKENDS.add(backend.name, backend)


def untransformed(request: Request, name: str) -> list[Refusal]:
    """Return why a kernel cannot run a request inside of a transform of `torch.func`."""
    if not request.transformed:
        return []
    reason = (
        "a transform of torch.func (grad, vjp, jvp, vmap) is at work, and it follows torch's own "
        "operators only; backend='reference' is made of them"
    )
    return [Refusal("transform", reason, name)]


def without_cells(request: Request, name: str) -> list[Refusal]:
    """Return why a backend that lays out a mask cannot run one whose cells come with the call."""
    if not request.mask.comes_with_call:
        return []
    reason = "the cells of the mask come with each call, and this backend plans by what they are"
    return [Refusal("mask-given", reason, name)]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores are computed and statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unrounded(operands: Operands, wanted: Sequence[bool] = ()) -> Operands:
    """Return operands in the dtype of the statistics: what is made of them is not rounded again.

    Tensors of the bias are cast where a gradient of them is `wanted`, which has their dtype.
    """
    wide = stats_dtype(operands.query.dtype)
    query, key, value, sink, *carried = operands.leaves
    asked = wanted[4:] or (False,) * len(carried)
    cast_ = (t.to(wide) if want else t for t, want in zip(carried, asked, strict=True))
    return Operands.of(operands.pse, (query.to(wide), key.to(wide), value.to(wide), sink, *cast_))


def of_whole_rows(kept: Kept, dtype: torch.dtype) -> Kept:
    """Return what is kept of whole rows in the dtype of the statistics.

    The lse of empty rows is -inf whatever the operands are, so what arrives for it counts for
    nothing.
    """
    grad_lse = kept.grad_lse
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(kept.lse == -torch.inf, 0.0).to(dtype)
    return kept._replace(
        output=kept.output.to(dtype), grad=kept.arrived.to(dtype), grad_lse=grad_lse
    )


def added(*parts: Tensor | None) -> Tensor | None:
    """Return the sum of what there is."""
    some = [part for part in parts if part is not None]
    return sum(some[1:], some[0]) if some else None


def gradients_of(
    pairs: Iterable[tuple[Tensor | None, Tensor | None]],
    leaves: Sequence[Tensor | None],
    retain: bool | None = None,
    further: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what gradients of some tensors, in pairs, give to those leaves that ask for one.

    Without keys there is nothing that a result could depend on, and all of them get None.
    """
    some = [(t, g) for t, g in pairs if t is not None and g is not None and t.requires_grad]
    if not some:
        return (None,) * len(leaves)
    ends, slopes = zip(*some, strict=True)
    asked = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            ends, asked, slopes, retain_graph=retain, create_graph=further, allow_unused=True
        )
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in leaves)
