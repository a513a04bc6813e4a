"""Shares of an attention on fused calls: merged, they and their gradients are those of one process.

Every share here is a request of its own, of some rows and some keys, as a rank computes it in a
stage. The definition computes all rows and keys at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.backends import BACKENDS
from attnkit.backends.base import Backend, Kept, Operands, Partial, stats_dtype
from attnkit.backends.choose import make_plan
from attnkit.masks import Mask
from attnkit.parallel.pieces import pieces
from attnkit.parallel.plane import planes
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.planner.decompose import decompositions, partings
from attnkit.planner.lower import on_route
from attnkit.planner.request import Share
from attnkit.planner.routes import Route, routes
from attnkit.planner.search import Search
from attnkit.pse import Pse
from attnkit.ranges import Ranges
from tests.agreement import slopes

Tensors = tuple[torch.Tensor, ...]

LENGTH = 24
ZIGZAG = (
    ((range(4), range(20, 24)), (range(4, 8), range(16, 20)), (range(8, 16),)),
    ((range(4), range(20, 24)), (range(4, 8), range(16, 20)), (range(8, 16),)),
)
UNEVEN = (
    ((range(5),), (range(5, 17),), (range(17, 24),)),
    ((range(9),), (range(9, 12), range(20, 24)), (range(12, 20),)),
)


@dataclass(frozen=True)
class Whole:
    """An attention that is to be taken apart: 2 batch elements, 4 heads on 2 of keys."""

    mask: Mask
    bias: Callable[[Ranges, Ranges], Pse] | None = None
    layout: str = "BSND"
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    backend: str = "emulated"
    device: str = "cpu"

    @property
    def runner(self) -> Backend:
        """The backend by which it is computed."""
        return BACKENDS[self.backend]

    def tensors(self) -> Tensors:
        """Query, key and value."""
        generator = torch.Generator().manual_seed(3)
        form = layouts.get(self.layout)
        sizes = [(4, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.value_dim)]
        shapes = [form.shape(layouts.Sizes(2, LENGTH, *one)) for one in sizes]
        made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return tuple(t.to(self.dtype) for t in made)

    @property
    def heads(self) -> tuple[int, int, int]:
        """The heads of query, key and value."""
        return 4, self.kv_heads, self.kv_heads

    def request(
        self, tensors: Sequence[torch.Tensor], bias: Pse | None, rows: Ranges, keys: Ranges
    ) -> Request:
        """The request of a share."""
        found = read_request(
            Composition(
                self.mask.take(rows, keys, q_len=LENGTH, kv_len=LENGTH),
                bias,
                self.layout,
                dropout=self.dropout,
            ),
            *(t.detach().requires_grad_() for t in tensors),
            num_heads=4,
            num_kv_heads=self.kv_heads,
            training=True,
        )
        share = Share(LENGTH, LENGTH, rows, keys, 4, local_dropout=self.dropout > 0)
        return replace(found, share=share)


@dataclass(frozen=True)
class Done:
    """A share with its plan, its operands and what it answered."""

    rows: Ranges
    keys: Ranges
    plan: Plan
    operands: Operands
    partial: Partial


Sharded = tuple[Sequence[Ranges], Sequence[Ranges]]
Found = dict[str, torch.Tensor]
Variant = Callable[[Plan], Plan]


def indices(ranges: Ranges) -> torch.Tensor:
    """Positions as a tensor."""
    return torch.tensor([i for one in ranges for i in one], dtype=torch.int64)


def by_head(whole: Whole, tensor: torch.Tensor, heads: int = 4) -> torch.Tensor:
    """A tensor of the layout as ``[b n s d]``."""
    return layouts.get(whole.layout).view(tensor, heads)


def stages(sharded: Sharded) -> list[tuple[Ranges, Ranges]]:
    """Each rank's rows with its own keys, and with all others in rising order."""
    found = []
    for rank, rows in enumerate(sharded[0]):
        remote = (one for k, some in enumerate(sharded[1]) if k != rank for one in some)
        found.append((rows, sharded[1][rank]))
        found.append((rows, tuple(sorted(remote, key=lambda one: one.start))))
    return found


def share_of(whole: Whole, rows: Ranges, keys: Ranges, variant: Variant) -> Done:
    """Plan a share and run it forward."""
    axis, runner = layouts.get(whole.layout).length_axis, whole.runner
    places = (rows, keys, keys)
    local = [
        t.index_select(axis, indices(r)).to(whole.device)
        for t, r in zip(whole.tensors(), places, strict=True)
    ]
    bias = None if whole.bias is None else whole.bias(rows, keys)
    request = whole.request(local, bias, rows, keys)
    assert not runner.refusals(request), runner.refusals(request)
    plan = variant(runner.plan(request))
    plan.verify()
    operands = Operands(*local, bias)
    seed = torch.tensor([7]) if whole.dropout else None
    return Done(rows, keys, plan, operands, runner.partial(plan, operands, seed))


def joined(whole: Whole, parts: Sequence[Done]) -> Found:
    """The output ``[b n s d]`` and the log-sum-exp ``[b n s]`` of all rows, over all keys."""
    wide = stats_dtype(whole.dtype)
    out = torch.zeros(2, 4, LENGTH, whole.value_dim, dtype=wide)
    lse = torch.full((2, 4, LENGTH), -torch.inf, dtype=wide)
    for part in parts:
        at, own = indices(part.rows), part.partial.lse.cpu()
        before = lse.index_select(2, at)
        both = torch.logaddexp(before, own)
        finite = both.masked_fill(both == -torch.inf, 0.0)
        old, new = ((some - finite).exp().unsqueeze(-1) for some in (before, own))
        output = by_head(whole, part.partial.output).cpu()
        merged = out.index_select(2, at) * old + output * new
        out.index_copy_(2, at, merged)
        lse.index_copy_(2, at, both)
    return {"out": out, "lse": lse}


def computed(
    whole: Whole, places: Sequence[tuple[Ranges, Ranges]], variant: Variant = lambda plan: plan
) -> tuple[Found, list[Done]]:
    """Take an attention apart, join it, and go back: results by head, whatever the layout."""
    wide, form = stats_dtype(whole.dtype), layouts.get(whole.layout)
    every = [share_of(whole, *place, variant) for place in places]
    found = joined(whole, every)
    for name, tensor, heads in zip(("dq", "dk", "dv"), whole.tensors(), whole.heads, strict=True):
        found[name] = torch.zeros_like(by_head(whole, tensor, heads), dtype=wide)
    dy = slopes(found["out"])
    for part in every:
        at = indices(part.rows)
        three = (found["out"], found["lse"], dy)
        out, lse, grad = (t.index_select(2, at).to(whole.device) for t in three)
        kept = Kept(torch.tensor([7]), form.restore(out), lse, form.restore(grad), grad[..., 0])
        leaves = part.operands.leaves
        wanted = tuple(t is not None and t.is_floating_point() for t in leaves)
        made = whole.runner.partial_gradients(
            part.plan, part.operands, kept, wanted, part.partial.random
        )
        for name, grads, heads, some in zip(
            ("dq", "dk", "dv"), made, whole.heads, (part.rows, part.keys, part.keys), strict=False
        ):
            assert grads is not None
            assert grads.dtype == wide
            found[name].index_add_(2, indices(some), by_head(whole, grads, heads).cpu())
        for n, (grads, want) in enumerate(zip(made[4:], wanted[4:], strict=True)):
            if want and grads is not None:
                before = found.get(f"dbias {n}")
                found[f"dbias {n}"] = grads if before is None else before + grads
    return found, every


def defined(whole: Whole) -> Found:
    """The same by the definition, in float64."""
    every = ((range(LENGTH),),) * 2
    tensors = [t.double().requires_grad_() for t in whole.tensors()]
    bias = None if whole.bias is None else whole.bias(*every)
    leaves = [*tensors, *(t for t in (bias.tensors if bias is not None else ()))]
    leaves = [t for t in leaves if t.requires_grad]
    answer = ak.attention(
        *tensors, mask=whole.mask, pse=bias, layout=whole.layout, num_heads=4,
        num_kv_heads=whole.kv_heads, backend="reference", return_stats=True,
    )  # fmt: skip
    out, lse = by_head(whole, answer.output), answer.stats.lse
    dy = slopes(torch.empty_like(out))
    made = torch.autograd.grad((out, lse), leaves, (dy, dy[..., 0]))
    found = {"out": out.detach(), "lse": lse.detach()}
    for name, grads, heads in zip(("dq", "dk", "dv"), made, whole.heads, strict=False):
        found[name] = by_head(whole, grads, heads)
    return found | {f"dbias {n}": grads for n, grads in enumerate(made[3:])}


def check(
    whole: Whole, sharded: Sharded = ZIGZAG, variant: Variant = lambda plan: plan
) -> list[Done]:
    """Shares together are one process, in float64 to 1e-12 of it; return how they were computed."""
    return check_places(whole, stages(sharded), variant)


def check_places(
    whole: Whole, places: Sequence[tuple[Ranges, Ranges]], variant: Variant = lambda plan: plan
) -> list[Done]:
    """The same of shares of any rows and keys."""
    found, every = computed(whole, places, variant)
    exact = defined(whole)
    limit = 1e-12 if whole.dtype == torch.float64 else 3e-6
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        most = max(1.0, tensor.nan_to_num(neginf=0.0).abs().max().item())
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=limit * most)
    return every


# -- every mask, every way ---------------------------------------------------------------------

CAUSAL = masks.Causal()
MASKS = {
    "full": masks.Full(),
    "causal": CAUSAL,
    "window": CAUSAL & masks.SlidingWindow(5),
    "first keys and a window": CAUSAL & (masks.Columns(0, 2) | masks.SlidingWindow(5)),
    "documents": CAUSAL & masks.Documents([7, 11, 6]),
    "prefix": masks.PrefixLM(6),
    "prefix per batch element": masks.PrefixLM((6, 11)),
    "blocks": masks.BlockCausal(5),
    "chunks": CAUSAL & masks.Chunked(8),
    "padding": masks.Padding((24, 13)),
    "padding on the left": masks.Padding((24, 13), side="left") & CAUSAL,
    "empty rows": masks.Rows(3, 9),
    "a corner": masks.Rows(3, 9) & masks.Columns(0, 4),
    "heads": masks.PerHead([CAUSAL, CAUSAL, masks.SlidingWindow(4), masks.SlidingWindow(4)]),
    "four heads": masks.PerHead([CAUSAL, masks.Full(), masks.SlidingWindow(4), masks.Rows(2, 9)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_shares_together_are_one_process(name: str) -> None:
    other = "BNSD" if len(name) % 2 else "BSH"  # by no rule
    for layout, sharded in (("BSND", ZIGZAG), (other, UNEVEN)):
        check(Whole(MASKS[name], layout=layout), sharded)


def proven(plan: Plan, ways: Iterable[object], **change: Any) -> Plan:
    """The plan with calls that are proven to compute it, where there are some."""
    for way in ways:
        if isinstance(way, tuple) and way and plan.in_order is None:
            found = replace(plan, steps=way, back=(), **change)
            if found.disprove() is None:
                return found
    return plan


def gathered(plan: Plan) -> Plan:
    """Calls that gather the keys of their rows, and others that gather the rows of their keys."""
    found = proven(plan, partings(plan.request))
    for back in partings(plan.request, by_keys=True):
        turned = replace(found, back=back) if isinstance(back, tuple) else found
        if turned.back and turned.disprove() is None:
            return turned
    return found


def in_parts(plan: Plan) -> Plan:
    """Calls that answer parts of rows."""
    ways = decompositions(plan.request, None, Search(), math.inf)
    several = (way for way in ways if isinstance(way, tuple) and len(way) > 1)
    return proven(plan, several)


@pytest.mark.parametrize("variant", [gathered, in_parts])
def test_any_calls_that_compute_a_share(variant: Variant) -> None:
    names = ("causal", "window", "first keys and a window", "prefix", "blocks", "empty rows")
    some = [MASKS[name] for name in names]
    every = [done for mask in some for done in check(Whole(mask, kv_heads=4), ZIGZAG, variant)]
    if variant is gathered:
        assert sum(bool(done.plan.back) for done in every) > 10
    else:
        several = [one.plan for one in every if len(one.plan.steps) > 1]
        assert sum(not parts.once for plan in several for parts in plan.by_heads) > 10


# -- biases, other sizes, dropout --------------------------------------------------------------

HALVES = (((range(10),), (range(10, 24),)),) * 2
TABLE = torch.randn(4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)).double()


def part_of(bias: Pse) -> Callable[[Ranges, Ranges], Pse]:
    """Rows and keys of a bias; its tensors are those of all."""
    return lambda rows, keys: bias.take(rows, keys, q_len=LENGTH, kv_len=LENGTH)


def trained(bias: Pse) -> Pse:
    """The same bias in float64, with numbers that are no accident."""
    generator = torch.Generator().manual_seed(6)
    for tensor in bias.tensors:
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.requires_grad_()
    return bias


BIASES = {
    "slopes": pse.ALiBi(4),
    "roots": pse.SqrtALiBi(4),
    "a matrix": pse.Dense(TABLE),
    "before the scale": pse.Dense(TABLE, before_scale=True),
    "trained slopes": trained(pse.ALiBi(4, learnable=True)),
    "trained steps": trained(pse.T5Relative(4, 8, 12)),
    "a trained matrix": trained(pse.Dense(TABLE.clone())),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_and_their_gradients(name: str) -> None:
    for mask in (CAUSAL, masks.Full(), CAUSAL & masks.SlidingWindow(5)):
        check(Whole(mask, part_of(BIASES[name])), HALVES)


def in_pieces(whole: Whole, sharded: Sharded) -> list[tuple[Ranges, Ranges]]:
    """The stages of all ranks, each in the pieces in which fused calls take it."""
    every = (range(LENGTH),)
    bias = None if whole.bias is None else whole.bias(every, every)
    request = replace(whole.request(whole.tensors(), bias, every, every), share=None)
    regions = planes(request)
    return [
        piece for place in stages(sharded) for piece in pieces(request, regions, *place, "emulated")
    ]


def on_a_route(plan: Plan) -> Plan:
    """The same bias as channels, and as levels where it has some."""
    request = plan.request
    ways = [way for way in routes(request, sloped=True) if isinstance(way, Route)]
    plans = [replace(on_route(request, way, Search()), backend=plan.backend) for way in ways]
    return max(plans, key=lambda one: (len(one.route.levels) if one.route else -1, -len(one.steps)))


@pytest.mark.parametrize(
    ("name", "mask", "sharded"),
    [
        ("slopes", masks.Full(), UNEVEN),
        ("roots", CAUSAL, ZIGZAG),
        ("trained slopes", CAUSAL, ZIGZAG),
        ("trained slopes", masks.Full(), UNEVEN),
        ("trained steps", CAUSAL, ZIGZAG),
        ("a sum", CAUSAL, ZIGZAG),
    ],
)
def test_biases_by_distance_are_numbers_in_every_piece(
    name: str, mask: Mask, sharded: Sharded
) -> None:
    bias = BIASES["trained slopes"] + BIASES["trained steps"] if name == "a sum" else BIASES[name]
    whole = Whole(mask, part_of(bias))
    places = in_pieces(whole, sharded)
    assert len(places) > len(stages(sharded))
    check_places(whole, places)
    if bias.requires_grad:  # small pieces are cheaper as a matrix; channels are for large ones
        done = check_places(whole, places, on_a_route)
        assert all(one.plan.route is not None for one in done)
        assert not any(call.pse for one in done for call in one.plan.calls)
        assert any(one.partial.random for one in done) == (name != "trained slopes")


@pytest.mark.parametrize("name", ["slopes", "trained slopes"])
def test_far_pieces_are_squares_that_the_kernel_counts_in(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("attnkit.parallel.pieces", "attnkit.planner.routes"):
        monkeypatch.setattr(f"{module}.MOST_POSITIONS", 6)
    whole = Whole(CAUSAL, part_of(BIASES[name]))
    done = check_places(whole, in_pieces(whole, ZIGZAG))
    far = [one for one in done if one.rows[0].start - one.keys[0].start > 6]
    assert all(len(one.rows[0]) == len(one.keys[0]) for one in far)
    if name == "slopes":
        assert all(one.plan.calls[0].q_start_idx for one in far)


@pytest.mark.parametrize("sizes", [(2, 8, 16), (2, 16, 8), (4, 8, 8), (1, 8, 8)])
def test_other_sizes(sizes: tuple[int, int, int]) -> None:
    kv_heads, dim, value_dim = sizes
    check(Whole(CAUSAL, kv_heads=kv_heads, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("variant", [lambda plan: plan, in_parts], ids=["one call", "in parts"])
def test_16_bits_lose_what_the_kernel_rounds_and_no_more(variant: Variant) -> None:
    """Each share's output is rounded once, as it is in one process; merges and sums are wide.

    So the error before the result is rounded is that of one process, and after it somewhat more.
    """
    whole = Whole(CAUSAL, dtype=torch.bfloat16)
    found, _ = computed(whole, stages(ZIGZAG), variant)
    one, _ = computed(whole, [((range(LENGTH),),) * 2])
    exact = defined(whole)
    for name in ("out", "dq", "dk", "dv"):
        some = found[name], found[name].to(whole.dtype), one[name]
        own, rounded, alone = ((t - exact[name]).norm() for t in some)
        assert own < 1.1 * alone, name
        assert rounded < 1.4 * alone, name


@pytest.mark.parametrize("variant", [lambda plan: plan, gathered], ids=["as planned", "gathered"])
def test_local_dropout_is_the_same_in_both_passes(variant: Variant) -> None:
    """The output is linear in the values: its slopes are what the backward says, where they agree.

    And so it is for the bias's pass, which reads what each call dropped.
    """
    rows, keys = (range(10),), (range(10, 24),)
    for bias in (None, part_of(BIASES["a trained matrix"])):
        whole, runner = Whole(masks.Full(), bias, dropout=0.4), BACKENDS["emulated"]
        done = share_of(whole, rows, keys, variant)
        again = share_of(whole, rows, keys, variant)
        assert torch.equal(done.partial.output, again.partial.output)
        dy = slopes(done.partial.output)
        kept = Kept(None, done.partial.output, done.partial.lse, dy, None)
        wanted = tuple(leaf is not None for leaf in done.operands.leaves)
        made = runner.partial_gradients(done.plan, done.operands, kept, wanted, done.partial.random)
        value = done.operands.value
        assert torch.isclose((dy * done.partial.output).sum(), (made[2] * value).sum())
        # Scores move by a number per row and nothing changes: so do their gradients add up to 0.
        if bias is not None:
            assert made[4] is not None
            assert made[4].sum(-1).abs().max() < 1e-12
        probe = torch.randn_like(done.operands.query)
        slope = [
            share_of_query(done, runner, done.operands.query + step * probe)
            for step in (1e-5, -1e-5)
        ]
        measured = (dy * (slope[0] - slope[1])).sum() / 2e-5
        assert torch.isclose(measured, (made[0] * probe).sum(), rtol=1e-6)


def share_of_query(done: Done, runner: Backend, query: torch.Tensor) -> torch.Tensor:
    """The output of a share for another query, with what was drawn before."""
    operands = replace(done.operands, query=query)
    return runner.partial(done.plan, operands, torch.tensor([7])).output


def test_shares_drop_other_cells_than_each_other() -> None:
    whole = Whole(masks.Full(), dropout=0.5)
    some, other = (
        share_of(whole, (range(8),), keys, lambda plan: plan)
        for keys in ((range(8),), (range(8, 16),))
    )
    assert not torch.equal(some.partial.random[0], other.partial.random[0])


def test_what_the_kernel_cannot_do_for_a_share_is_refused() -> None:
    whole, runner = Whole(CAUSAL, dropout=0.1), BACKENDS["emulated"]
    rows = (range(LENGTH),)
    local = whole.request(whole.tensors(), None, rows, rows)
    assert not runner.refusals(local)
    assert local.share is not None
    world = replace(local, share=replace(local.share, local_dropout=False))
    assert [r.code for r in runner.refusals(world)] == ["dropout-positions"]
    assert "dropout='local'" in runner.refusals(world)[0].reason
    assert [r.code for r in runner.refusals(replace(local, sink=True))] == ["share-sink"]
    half = make_plan(replace(local, dtype=torch.bfloat16), "emulated")
    assert "what a fused call rounds itself" in " ".join(half.explain().split())


def test_a_share_leaves_the_generator_of_all_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = Whole(masks.Full(), dropout=0.5), (range(8),)
    before = share_of(whole, rows, rows, lambda plan: plan)

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("another thread would draw other numbers")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.random, "fork_rng", refuse)
    again = share_of(whole, rows, rows, lambda plan: plan)
    assert torch.equal(before.partial.output, again.partial.output)
