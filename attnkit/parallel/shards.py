"""`Shards`: the tokens of a batch as the processes of a group have them, seen from one of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnkit import layouts
from attnkit.backends import AttentionOutput, Operands
from attnkit.backends.graph import Terms, read_terms, stand_in
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.handles import born
from attnkit.layouts import Layout, SeqLens
from attnkit.parallel.choices import Choices
from attnkit.parallel.graph import SpreadHeld, places_in_graph
from attnkit.parallel.guard import Statement
from attnkit.parallel.loss import IGNORE, labels, loss
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.run import attend
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.wires import Wires
from attnkit.planner import Request
from attnkit.pse import Pse

__all__ = ["Shards", "as_shards", "telling"]

_MOST_PLANS = 64  # the layers of a model that differ, and their modes


class Shards:
    """Which tokens of a batch this process has, and how its layers exchange what they need.

    `ContextParallel.shards` makes it; every layer takes it, as ``shards=``. Tensors are local
    then, ``[b s_local ...]`` (packed ``[t_local ...]``), in the order of `positions`; masks and
    biases speak of the whole text. It is bound to a group: what is printed, compared, hashed and
    pickled is its `sharding`.

    In cross-attention `keys` is the same for the tokens that keys are made of; in self-attention
    it is this object.

    >>> from attnkit import masks
    >>> from attnkit.parallel import ContextParallel
    >>> from attnkit.parallel.wires import Alone
    >>> here = ContextParallel(Alone()).shards(masks.Causal(), tokens=6)
    >>> here, here.sizes, here.positions().tolist()
    (Shards(rank 0 of 1, 6 of 6 tokens), (6,), [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        sharding: Sharding,
        of_keys: Sharding,
        wires: Wires,
        choices: Choices,
        seqlens: SeqLens | None = None,
    ) -> None:
        self.sharding, self.of_keys, self.wires = sharding, of_keys, wires
        self.choices, self.seqlens = choices, seqlens
        self._handle = born(self)  # what a graph knows of it
        self._plans: dict[Hashable, ParallelPlan] = {}
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self.wires.rank

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each rank has."""
        return self.sharding.sizes

    @property
    def size(self) -> int:
        """How many tokens this process has."""
        return self.sizes[self.rank]

    @cached_property
    def keys(self) -> Shards:
        """The shards of the tokens that keys are made of."""
        if self.of_keys is self.sharding:
            return self
        lengths = None if self.seqlens is None else SeqLens(self.seqlens.kv)
        return Shards(self.of_keys, self.of_keys, self.wires, self.choices, lengths)

    def take(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this process's part of a tensor that has all tokens along `dim`.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here = ContextParallel(Alone()).shards(tokens=6)
        >>> here.take(torch.zeros(2, 6, 8)).shape
        torch.Size([2, 6, 8])
        """
        return self.sharding.take(tensor, self.rank, dim)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Return where this process's tokens stand in their text, ``[s_local]``.

        Of a packed batch that is in their own sequence each: what `Rotary` turns by.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> ContextParallel(Alone()).shards(seqlens=SeqLens([2, 3])).positions()
        tensor([0, 1, 0, 1, 2])
        """
        return self.places(torch.device("cpu" if device is None else device))[0]

    def places(self, device: torch.device, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the same on a device, and how many tokens the longest text has.

        In a graph shards are data, and only the number of `tokens` is known.
        """
        if tokens is not None and torch.compiler.is_dynamo_compiling():
            return places_in_graph(self._handle, tokens, device)
        if device not in self._places:
            found, longest = self.sharding.positions(self.rank, "cpu"), self.sharding.length
            if self.seqlens is not None:
                starts, longest = (
                    torch.tensor(self.seqlens.cu_q[:-1], device="cpu"),
                    self.seqlens.max_q,
                )
                found = found - starts[torch.searchsorted(starts, found, right=True) - 1]
            self._places[device] = found.to(device), torch.tensor(longest, device=device)
        return self._places[device]

    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return the whole of every process's `tensor`: all tokens along `dim`, on each of them.

        Its gradient is the part of this process: right where all of them compute the same with
        the whole. For looking at results; attention needs none of it.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here, x = ContextParallel(Alone()).shards(tokens=6), torch.randn(2, 6, 8)
        >>> torch.equal(here.gather(here.take(x)), x)
        True
        """
        with self.wires.telling():
            if tensor.shape[dim] != self.size:
                raise CompositionError(
                    f"gather got {shown(tensor)}, {tensor.shape[dim]} positions along dim {dim}; "
                    f"rank {self.rank} of {self.wires.size} has {self.size} tokens"
                )
            found: Tensor = _Gathered.apply(tensor, self, dim)  # type: ignore[no-untyped-call]
            return found

    def labels(
        self, tokens: Tensor, *, ignore: int = IGNORE, where: Tensor | None = None
    ) -> Tensor:
        """Return this process's labels, of the tokens of the whole text: of each the next one.

        ``[... s]`` to ``[... s_local]``; they are shifted before they are cut, within each sequence
        of a packed batch. See `attnkit.parallel.loss.labels`.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here = ContextParallel(Alone()).shards(tokens=4)
        >>> here.labels(torch.tensor([[5, 6, 7, 8]])).tolist()
        [[6, 7, 8, -100]]
        """
        here = self.sharding, self.rank
        return labels(tokens, *here, ignore=ignore, seqlens=self.seqlens, where=where)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        scale: float = 1.0,
        ignore: int = IGNORE,
        where: Tensor | None = None,
    ) -> Tensor:
        """Return this process's share of the mean cross-entropy: they add up to it.

        Of its own `labels`, whose count the processes add up, or of the `tokens` of the whole text,
        of which each counts them by itself. Gradients of parameters are to be summed over the
        processes; where they are averaged (DDP, FSDP), `scale` makes up for it. See
        `attnkit.parallel.loss.loss`.

        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here, logits = ContextParallel(Alone()).shards(tokens=4), torch.zeros(1, 4, 10)
        >>> here.loss(logits, here.labels(torch.tensor([[5, 6, 7, 8]])))
        tensor(2.3026)
        """
        return loss(
            logits,
            self.sharding,
            self.rank,
            tokens=tokens,
            labels=labels,
            summed=self._summed,
            scale=scale,
            ignore=ignore,
            seqlens=None if tokens is None else self.seqlens,
            where=where,
        )

    def _summed(self, number: Tensor) -> Tensor:
        """Return a number added up over all processes."""
        parts = self._of_all(number[None], [1] * self.wires.size, "the number of labels")
        return torch.cat(parts).sum()

    def _of_all(self, own: Tensor, sizes: Sequence[int], what: str, dim: int = 0) -> list[Tensor]:
        """Return the tensors of all ranks, of some sizes along an axis."""
        rank, own = self.rank, own.contiguous()
        parts = [
            own if one == rank else own.new_empty((*own.shape[:dim], size, *own.shape[dim + 1 :]))
            for one, size in enumerate(sizes)
        ]
        others = [one for one in range(self.wires.size) if one != rank]
        self.wires.begin(
            Statement.of(what, (sizes, own.dtype, own.shape[:dim], own.shape[dim + 1 :]), [])
        )
        arriving = [(one, parts[one]) for one in others]
        self.wires.post([(one, own) for one in others], arriving, what).wait()
        return parts

    # -- what attention asks --------------------------------------------------------------

    def lengths(self, seqlens: SeqLens | None) -> SeqLens | None:
        """Return the lengths of the packed sequences, which a call may say again.

        >>> import attnkit as ak
        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here = ContextParallel(Alone()).shards(seqlens=ak.SeqLens([3, 5]))
        >>> here.lengths(None) == here.lengths(ak.SeqLens([3, 5])) == here.seqlens
        True
        """
        if seqlens is not None and seqlens != self.seqlens:
            raise CompositionError(
                f"seqlens={seqlens} with shards of {self.seqlens or 'a batch that is not packed'}: "
                "lengths are those of the whole batch, and its shards know them; leave seqlens= "
                "out, or make other shards"
            )
        return self.seqlens

    def whole(self, layout: Layout, *tensors: Tensor) -> Sequence[Tensor]:
        """Return stand-ins for query, key and value with the lengths of the whole.

        Raises where a tensor has not the tokens that this process has.

        >>> from attnkit import layouts
        >>> from attnkit.parallel import ContextParallel
        >>> from attnkit.parallel.wires import Alone
        >>> here, x = ContextParallel(Alone()).shards(tokens=8), torch.zeros(1, 8, 2, 4)
        >>> [one.shape[1] for one in here.whole(layouts.get("BSND"), x, x, x)]
        [8, 8, 8]
        """
        sides = (("query", self), ("key", self.keys), ("value", self.keys))
        return [self._whole(layout, t, *side) for t, side in zip(tensors, sides, strict=True)]

    def check(self, name: str, tensor: Tensor, axis: int) -> None:
        """Raise unless a tensor has the tokens of this process along an axis."""
        found, every = tensor.shape[axis], self.sharding.length
        if found == self.size:
            return
        told = "these are all of them, cut them first" if found == every else "cut the whole"
        raise CompositionError(
            f"{name} {list(tensor.shape)} has {found} tokens, and rank {self.rank} of "
            f"{self.wires.size} has {self.size} of {every}; {told}: here.take(tokens), of a "
            "context here.keys.take(tokens)"
        )

    def _whole(self, layout: Layout, tensor: Tensor, name: str, shards: Shards) -> Tensor:
        axis = layout.length_axis
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.ndim != layout.rank:
            return tensor  # the request says what is wrong with it
        shards.check(name, tensor, axis)
        shape = [*tensor.shape]
        shape[axis] = shards.sharding.length
        return stand_in(shape, tensor.dtype, tensor.device, tensor.requires_grad)

    def plan(self, request: Request, pse: Pse | None, backend: str) -> ParallelPlan:
        """Return the plan for a request of the whole, as made before or now: layers share it."""
        found = self._plans.get((request, backend))
        if found is None:
            made = self._made(request, pse, backend)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))  # the oldest
            found = self._plans[request, backend] = made
        return found

    def _made(self, request: Request, pse: Pse | None, backend: str) -> ParallelPlan:
        shardings = self.sharding, self.of_keys
        return ParallelPlan.of(request, pse, *shardings, self.choices, backend)

    def held(
        self, terms: Terms, given: Sequence[tuple[str, Any]], tensors: Sequence[Tensor]
    ) -> SpreadHeld:
        """Return the plan for what a graph asks for, which goes with its tensors of this rank."""
        layout = layouts.get(terms.layout)
        with self.wires.telling():
            request, pse = read_terms(
                terms, given, tensors, lambda *local: self.whole(layout, *local), self.seqlens
            )
            return SpreadHeld.of(self.plan(request, pse, terms.backend), pse, self.wires)

    def attend(self, plan: ParallelPlan, operands: Operands) -> AttentionOutput:
        """Attend with this process's tensors as the plan of all ranks says."""
        dropout = plan.request.dropout
        # On every rank, one without tokens, too: the generators stay in step.
        seed = torch.randint(2**63 - 1, (1,), device="cpu") if dropout else None
        return attend(plan, self.rank, self.wires, operands, seed)

    def __repr__(self) -> str:
        size, all_of = self.wires.size, self.sharding.length
        return f"Shards(rank {self.rank} of {size}, {self.size} of {all_of} tokens)"

    def __reduce__(self) -> NoReturn:
        raise CompositionTypeError(
            f"{self!r} is bound to the processes of a group and stays with them; pickle or copy "
            "its `sharding`, which is a value"
        )


def as_shards(given: Shards | None) -> Shards | None:
    """Return the shards that a call is given, if they are some."""
    if not isinstance(given, Shards | None):
        raise CompositionTypeError(
            f"shards={shown(given)}; give those of this process, "
            "ContextParallel(mesh['cp']).shards(mask, tokens=...)"
        )
    return given


def telling(shards: Shards | None) -> AbstractContextManager[None]:
    """Tell the other ranks what is raised inside, which they would wait for; a graph does it."""
    if shards is None or torch.compiler.is_dynamo_compiling():
        return nullcontext()
    return shards.wires.telling()


class _Gathered(torch.autograd.Function):
    """The parts of all ranks, put together; the gradient of the whole is cut again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: Shards, dim: int) -> Tensor:
        ctx.shards, ctx.dim = shards, dim
        dim = dim % tensor.ndim
        parts = shards._of_all(tensor, shards.sizes, "the parts of a whole", dim)
        return shards.sharding.restore(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shards.take(grad, ctx.dim), None, None
