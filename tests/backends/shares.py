"""An attention in shares on one process: partial answers merged, and their gradients added up."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.base import BACKENDS, Kept, Operands, Partial
from attnkit.backends.choose import make_plan
from attnkit.backends.partials import Merging
from attnkit.layouts import Layout
from attnkit.parallel.local import excerpts, key_heads, local_bias, local_request
from attnkit.planner import Composition, Request, read_request
from attnkit.pse.base import rebound
from attnkit.ranges import Ranges, in_order
from tests.agreement import Results, slopes

__all__ = ["Whole", "dealt", "in_shares", "whole_of"]


@dataclass(frozen=True)
class Whole:
    """A request of all rows and keys, its operands, and what arrives for its results."""

    request: Request
    operands: Operands
    grad: Tensor
    grad_lse: Tensor
    seed: Tensor | None = None

    @property
    def wanted(self) -> tuple[bool, ...]:
        """Of which leaves gradients are asked for: of all that there are."""
        return tuple(leaf is not None for leaf in self.operands.leaves)

    def by(self, backend: str) -> Results:
        """What one process makes of it."""
        plan = make_plan(self.request, backend)
        with torch.no_grad():
            output, stats = BACKENDS[backend].compute(plan, self.operands, self.seed)
            kept = Kept(self.seed, output, stats.lse, self.grad.to(output.dtype), self.grad_lse)
            found = BACKENDS[backend].gradients(plan, self.operands, kept, self.wanted)
        return {"output": output, "lse": stats.lse, **_named(found)}


def _named(found: Sequence[Tensor | None]) -> Results:
    names = ("dq", "dk", "dv", "dsink", *(f"dbias {k}" for k in range(len(found) - 4)))
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def whole_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    composition: Composition,
    *,
    sink: Tensor | None = None,
    seed: int | None = None,
    **how: Any,
) -> Whole:
    """Return a whole attention of these tensors, with gradients that arrive for all of it."""
    asked = [t.detach().requires_grad_() for t in tensors]
    pse = composition.pse
    request = read_request(composition, *asked, sink=sink, training=True, **how)
    packed, heads = request.seqlens is not None, request.num_heads
    rows = (request.q_len, heads) if packed else (request.batch, heads, request.q_len)
    like = list(request.shapes()[0])
    like[-1] = like[-1] // request.head_dim * request.value_dim
    wide = torch.float64 if request.dtype == torch.float64 else torch.float32
    return Whole(
        request,
        Operands(*tensors, None if pse is None else rebound(pse, pse.tensors), sink),
        slopes(torch.empty(like, dtype=wide)),
        slopes(torch.empty(rows, dtype=wide)).flip(0),
        None if seed is None else torch.tensor([seed]),
    )


def dealt(rng: random.Random, length: int, shares: int) -> list[Ranges]:
    """Return which positions each share has: ranges of any lengths, some shares without any."""
    count = min(length + 1, 2 * shares + 1)
    ends = sorted({0, length, *rng.sample(range(length + 1), count)})
    hands: list[list[range]] = [[] for _ in range(shares)]
    for a, b in pairwise(ends):
        rng.choice(hands).append(range(a, b))
    return [in_order(hand) for hand in hands]


Changed = Callable[[Request], Request]


def in_shares(
    whole: Whole,
    backend: str,
    rows: Sequence[Ranges],
    keys: Sequence[Ranges],
    heads: Sequence[range] = (),
    *,
    rounded: bool = False,
    changed: Changed = lambda request: request,
) -> Results:
    """What shares of `rows` over `keys` make of it, each on its own.

    With `rounded` partial answers are what a kernel of 16 bits gives. `changed` is a fault.
    """
    found = [
        _of_heads(whole, backend, rows, keys, group, rounded, changed)
        for group in heads or [range(whole.request.num_heads)]
    ]
    layout, packed = whole.request.layout_of, whole.request.seqlens is not None
    joined: Results = {}
    for name in found[0]:
        parts = [one[name] for one in found]
        if name == "lse":
            joined[name] = torch.cat(parts, 1)
        elif name in ("output", "dq"):
            own = zip(parts, heads or [range(whole.request.num_heads)], strict=True)
            views = [layout.view(part, len(group)) for part, group in own]
            joined[name] = layout.restore(torch.cat(views, 1))
        else:  # each group has a share of it
            joined[name] = sum(parts[1:], parts[0])
    assert not packed or joined["lse"].shape == whole.grad_lse.shape
    return joined


def _of_heads(
    whole: Whole,
    backend: str,
    rows: Sequence[Ranges],
    keys: Sequence[Ranges],
    heads: range,
    rounded: bool,
    changed: Changed,
) -> Results:
    request, operands = whole.request, whole.operands
    layout, wide = request.layout_of, whole.grad.dtype
    locals_ = [
        _Local(whole, backend, local_request(request, operands.pse, own, some, heads), changed)
        for own in rows
        for some in keys
        if (excerpts(request, own, some) if layout.packed else own and some)
    ]
    grad = _some(layout, whole.grad, request.num_heads, heads)
    grad_lse = whole.grad_lse[:, heads.start : heads.stop]
    merging = Merging(request.layout, torch.zeros_like(grad), torch.full_like(grad_lse, -torch.inf))
    for one in locals_:
        part = one.answer(whole.seed)
        assert part.output.dtype == part.lse.dtype == wide
        if rounded:
            part = part._replace(output=part.output.to(request.dtype).to(wide))
        merging.add(part, one.share.rows)
    sink = None if operands.sink is None else operands.sink[heads.start : heads.stop]
    output, lse, _ = merging.answer(sink)
    sums = [None if t is None else torch.zeros_like(t, dtype=wide) for t in operands.leaves]
    sums[0], sums[3] = (
        torch.zeros_like(_some(layout, operands.query, request.num_heads, heads)).to(wide),
        None,
    )
    for one in locals_:
        one.add(sums, Kept(whole.seed, output, lse, grad, grad_lse))
    return {"output": output, "lse": lse, **_named(sums)}


def _some(
    layout: Layout, tensor: Tensor, count: int, heads: range, tokens: Ranges | None = None
) -> Tensor:
    """Return some heads and tokens of a tensor, in its layout."""
    own = layout.view(tensor, count)[:, heads.start : heads.stop]
    return layout.restore(own if tokens is None else own[:, :, _index(tokens)])


def _index(tokens: Ranges) -> Tensor:
    return torch.tensor([k for one in tokens for k in one], dtype=torch.int64)


class _Local:
    """A share: its plan, and its operands."""

    def __init__(self, whole: Whole, backend: str, request: Request, changed: Changed) -> None:
        assert request.share is not None
        self.share, self.backend, self.whole = request.share, BACKENDS[backend], whole
        self.heads = range(self.share.first_head, self.share.first_head + request.num_heads)
        self.key_heads = key_heads(whole.request, self.heads)
        self.plan = make_plan(changed(request), backend)
        given, every = whole.operands, whole.request
        layout, rows, keys = every.layout_of, self.share.rows, self.share.keys
        self.operands = Operands(
            _some(layout, given.query, every.num_heads, self.heads, rows),
            _some(layout, given.key, every.num_kv_heads, self.key_heads, keys),
            _some(layout, given.value, every.num_kv_heads, self.key_heads, keys),
            local_bias(every, given.pse, rows, keys, self.heads),
        )

    def answer(self, seed: Tensor | None) -> Partial:
        """Return what the rows answer over the keys."""
        return self.backend.partial(self.plan, self.operands, seed)

    def add(self, sums: list[Tensor | None], kept: Kept) -> None:
        """Add the share of the gradients."""
        layout, every, rows = self.whole.request.layout_of, len(self.heads), self.share.rows
        own = [_some(layout, t, every, range(every), rows) for t in (kept.output, kept.arrived)]
        axis = 0 if layout.packed else 2
        lse, grad_lse = (
            None if t is None else t.index_select(axis, _index(rows))
            for t in (kept.lse, kept.grad_lse)
        )
        assert lse is not None
        wanted = tuple(leaf is not None for leaf in self.operands.leaves)
        here = Kept(kept.seed, own[0], lse, own[1], grad_lse)
        found = self.backend.partial_gradients(self.plan, self.operands, here, wanted)
        wide = kept.lse.dtype
        assert all(grad is None or grad.dtype == wide for grad in found)
        keys, count = self.share.keys, self.whole.request.num_kv_heads
        heads = ((every, range(every), rows), (count, self.key_heads, keys))
        for total, grad, (of, some, tokens) in zip(sums, found, (*heads, heads[1]), strict=False):
            if total is not None and grad is not None:
                view = layout.view(total, of)[:, some.start : some.stop]
                view.index_add_(2, _index(tokens), layout.view(grad, len(some)))
        for k in range(4, len(sums)):
            total, grad = sums[k], found[k]
            if total is not None and grad is not None:
                total += grad
