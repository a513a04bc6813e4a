"""Attention on ranks and in one process, of the same tensors: cases, and what differs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnkit import layouts, masks
from attnkit.backends import Operands, make_plan
from attnkit.backends.base import BACKENDS, Kept
from attnkit.layouts import SeqLens, Sizes
from attnkit.masks import Mask
from attnkit.parallel.balance import balanced
from attnkit.parallel.choices import Choices
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.run import attend
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.wires import Wires
from attnkit.planner import Composition, Request, read_request
from attnkit.pse import Pse
from attnkit.pse.base import rebound
from docs.make.variants import VARIANTS
from tests.parallel.threads import Delay, run_ranks

__all__ = ["GALLERY", "LENGTH", "SHARDINGS", "Case", "at_random", "run_on_threads", "worst"]

LENGTH = 48
ALL = ("output", "lse", "query", "key", "value", "sink")


def at_random(length: int, ranks: int, seed: int = 0) -> Sharding:
    """Return a sharding where each position is with any rank."""
    dice = random.Random(seed)
    own = [dice.randrange(ranks) for _ in range(length)]
    spans = [[(k, k + 1) for k in range(length) if own[k] == r] for r in range(ranks)]
    return Sharding.of(length, spans)


SHARDINGS: dict[str, Callable[[int, int], Sharding]] = {
    "contiguous": Sharding.contiguous,
    "zigzag": Sharding.zigzag,
    "random": at_random,
}

CAUSAL = masks.Causal()

# Masks of docs/variants.md, of 48 positions.
GALLERY: dict[str, Mask] = {
    variant.name: variant.made(variant.small).mask for variant in VARIANTS if variant.ranks
}


@dataclass(frozen=True)
class Case:
    """Tensors, a composition, and how they are spread over ranks."""

    mask: Mask = CAUSAL
    ranks: int = 2
    sharding: str = "zigzag"
    method: str = "needed"
    heads_ways: int = 1
    stages: int = 1
    keep: bool = False
    backend: str = "tiled"
    bias: Callable[[], Pse] | None = None
    sink: bool = True
    softcap: float | None = None
    dropout: float = 0.0
    layout: str = "BSND"
    seqlens: SeqLens | None = None
    lengths: tuple[int, int] | None = None
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float64
    train: tuple[bool, bool, bool] = (True, True, True)
    seed: int = 0
    spread: tuple[Sharding, Sharding] | None = None
    drops: str = "global"

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """How many rows and keys there are."""
        if self.seqlens is not None:
            return self.seqlens.total_q, self.seqlens.total_kv
        q_len, kv_len = self.mask.extent
        return self.lengths or (q_len or kv_len or LENGTH, kv_len or q_len or LENGTH)

    @cached_property
    def axis(self) -> int:
        return layouts.get(self.layout).length_axis

    @cached_property
    def stats_axis(self) -> int:
        return 0 if self.seqlens is not None else 2

    @cached_property
    def operands(self) -> Operands:
        """The whole tensors, the same in every process."""
        torch.manual_seed(self.seed)
        form, batch = layouts.get(self.layout), 1 if self.seqlens is not None else 2
        (rows, keys), (heads, kv_heads) = self.sizes, self.heads
        three = [
            torch.randn(form.shape(Sizes(batch, length, n, dim)), dtype=self.dtype)
            for length, n, dim in ((rows, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 6))
        ]
        for tensor, train in zip(three, self.train, strict=True):
            tensor.requires_grad_(train)
        sink = torch.randn(heads, dtype=self.dtype).requires_grad_() if self.sink else None
        bias = None if self.bias is None else self.bias()
        if bias is not None:
            made = [
                torch.randn(t.shape, dtype=self.dtype) if t.is_floating_point() else t.clone()
                for t in bias.tensors
            ]
            pairs = zip(made, bias.tensors, strict=True)
            bias = rebound(bias, [t.requires_grad_(old.requires_grad) for t, old in pairs])
        return Operands(*three, bias, sink)

    @cached_property
    def request(self) -> Request:
        one = self.operands
        return read_request(
            Composition(self.mask, one.pse, self.layout, None, self.dropout, self.softcap),
            one.query,
            one.key,
            one.value,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            seqlens=self.seqlens,
            sink=one.sink,
            training=True,
        )

    @cached_property
    def plan(self) -> ParallelPlan:
        (rows, keys), shardings = self.sizes, self.spread
        if shardings is None and self.sharding in SHARDINGS:
            make = SHARDINGS[self.sharding]
            queries = make(rows, self.ranks)
            shardings = queries, queries if rows == keys else make(keys, self.ranks)
        elif shardings is None:
            other = None if rows == keys else keys
            text = (None, None) if self.seqlens is not None else (rows, other)
            shardings = balanced([self.mask], *text, self.seqlens, self.ranks, self.sharding)
        return ParallelPlan.of(
            self.request,
            self.operands.pse,
            *shardings,
            Choices(self.method, self.heads_ways, self.stages, self.keep, self.drops),
            self.backend,
        )

    @cached_property
    def drawn(self) -> Tensor | None:
        """The seed of the dropout."""
        return torch.tensor([self.seed + 17]) if self.dropout else None

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """Gradients of output and log-sum-exp; 0 for the latter of empty rows."""
        made, seen = self.answer
        generator = torch.Generator().manual_seed(self.seed + 1)
        some = [
            torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (made, seen)
        ]
        return some[0].to(made.dtype), some[1].to(seen.dtype)

    @cached_property
    def one(self) -> tuple[Any, Any]:
        """The backend of one process, and its plan."""
        plan = make_plan(self.request, "tiled" if self.dropout else "auto")
        return BACKENDS[plan.backend], plan

    @cached_property
    def answer(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of one process."""
        backend, plan = self.one
        with torch.no_grad():
            made = backend.compute(plan, self.operands, self.drawn)
            return made.output, made.stats.lse

    @cached_property
    def expected(self) -> dict[str, Tensor | None]:
        """Everything of one process."""
        backend, plan = self.one
        wanted = tuple(t is not None and t.requires_grad for t in self.operands.leaves)
        with torch.no_grad():
            kept = Kept(self.drawn, *self.answer, *self.slopes)
            made = backend.gradients(plan, self.operands, kept, wanted)
        found = [one if want else None for one, want in zip(made, wanted, strict=True)]
        return self.named(self.answer, found)

    @cached_property
    def names(self) -> list[str]:
        """Of results and gradients."""
        bias = self.operands.pse
        return [*ALL, *(() if bias is None else bias.tensor_names)]

    def named(self, answer: tuple[Any, Any], slopes: Any) -> dict[str, Tensor | None]:
        return dict(zip(self.names, (*answer, *slopes), strict=True))

    def work(self, wires: Wires) -> dict[str, Any]:
        """Do what a rank does; return what it found, and the bytes that it sent."""
        rank, one = wires.rank, self.operands
        parts = zip((self.plan.queries, self.plan.keys, self.plan.keys), one.leaves, strict=False)
        leaves = [sharding.take(t.detach(), rank, self.axis) for sharding, t in parts]
        leaves += [None if t is None else t.detach() for t in one.leaves[3:]]
        for own, whole in zip(leaves, one.leaves, strict=True):
            if own is not None:
                own.requires_grad_(whole.requires_grad)
        before = list(wires.sent)
        made, stats = attend(self.plan, rank, wires, Operands.of(one.pse, leaves), self.drawn)
        asked = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad((made, stats.lse), asked, self.own_slopes(rank)))
        slopes = [next(grads) if t is not None and t.requires_grad else None for t in leaves]
        found: dict[str, Any] = self.named((made.detach(), stats.lse.detach()), slopes)
        found["sent"] = [a - b for a, b in zip(wires.sent, before, strict=True)]
        return found

    def own_slopes(self, rank: int) -> tuple[Tensor, Tensor]:
        queries, (grad, grad_lse) = self.plan.queries, self.slopes
        return queries.take(grad, rank, self.axis), queries.take(grad_lse, rank, self.stats_axis)

    def whole(self, name: str, parts: list[Tensor]) -> Tensor:
        """Return what all ranks have found together."""
        if name == "lse":
            return self.plan.queries.restore(parts, self.stats_axis)
        if name in ("output", "query"):
            return self.plan.queries.restore(parts, self.axis)
        if name in ("key", "value"):
            return self.plan.keys.restore(parts, self.axis)
        return sum(parts[1:], parts[0])

    @property
    def told(self) -> list[list[int]]:
        """The bytes that the plan says."""
        forward, backward = self.plan.transfers
        return (forward + backward).tolist()


def worst(case: Case, found: list[dict[str, Any]], moved: bool = True) -> float:
    """Return the largest difference to one process.

    Bytes are compared with the plan's, where all that it speaks of is `moved`.
    """
    assert not moved or [one["sent"] for one in found] == case.told
    most = 0.0
    for name, expected in case.expected.items():
        parts = [one[name] for one in found]
        assert all((part is None) == (expected is None) for part in parts), name
        if expected is not None:
            whole = case.whole(name, parts)
            assert whole.dtype == expected.dtype
            apart = torch.where(whole == expected, 0.0, (whole - expected).abs().double())
            assert not apart.isnan().any(), name
            most = max(most, float(apart.max()) if apart.numel() else 0.0)
    return most


def run_on_threads(case: Case, delay: Delay | None = None) -> list[dict[str, Any]]:
    """Return what all ranks find, as threads."""
    for _ in (case.plan.turn, case.answer, case.slopes):  # made once, not by every thread
        continue
    return run_ranks(case.ranks, case.work, delay=delay)
