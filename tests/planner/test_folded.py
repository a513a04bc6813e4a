"""Heads folded into the batch: masks of their own in one call, equal to the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.base import BACKENDS, Operands
from attnkit.errors import KernelContractError, Refusal
from attnkit.masks import Dense, PerHead
from attnkit.planner import Plan, read_request
from attnkit.planner.folded import Folded, folded
from attnkit.planner.lower import in_other_order, lower
from attnkit.planner.request import Composition, Request
from attnkit.planner.search import Search


def blocks(seed: int, q_len: int, kv_len: int, size: int = 3, share: float = 0.4) -> masks.Mask:
    """Return a mask of random blocks, some rows of which may be empty."""
    drawn = torch.Generator().manual_seed(seed)
    table = torch.rand(-(-q_len // size), -(-kv_len // size), generator=drawn) < share
    cells = table.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return Dense.keep(cells[:q_len, :kv_len])


EIGHT = PerHead([blocks(n, 11, 13) for n in range(8)])
PAIRS = PerHead([blocks(n // 2, 11, 13) for n in range(8)])  # query heads of a key head are alike
EMPTY = PerHead([blocks(0, 11, 13), ~masks.Full(), masks.Causal(), masks.Causal()] * 2)
ANY = [masks.Causal(), masks.SlidingWindow(3), masks.Band(2, 1), masks.Full()]
OF_ANY_LENGTH = PerHead([ANY[n // 2] for n in range(8)])
MIXED = PerHead([*ANY, *ANY])
APART = PerHead(
    [masks.Causal() & masks.Padding([7, 13]), masks.SlidingWindow(4), *ANY, masks.Full(), ANY[1]]
)

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "BSND": ((2, 11, 8, 4), (2, 13, 4, 4)),
    "BNSD": ((2, 8, 11, 4), (2, 4, 13, 4)),
    "BSH": ((2, 11, 32), (2, 13, 16)),
    "SBH": ((11, 2, 32), (13, 2, 16)),
    "TND": ((15, 8, 4), (20, 4, 4)),
}
LENS = ak.SeqLens([9, 0, 6], [9, 5, 6])


class Case:
    """A mask on tensors of a layout, with sinks, and what the reference says."""

    def __init__(self, mask: masks.Mask, layout: str, heads: int = 4, sink: bool = True) -> None:
        torch.manual_seed(0)
        shapes = (SHAPES[layout][0], SHAPES[layout][1], SHAPES[layout][1])
        tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        if heads == 8 and not layout.endswith("H"):
            axis = layout.index("N")
            tensors[1:] = [t.repeat_interleave(2, axis) for t in tensors[1:]]
        elif heads == 8:
            tensors[1:] = [torch.cat([t, t], -1) for t in tensors[1:]]
        self.lens = LENS if layout == "TND" else None
        sinks = [torch.randn(8, dtype=torch.float64)] if sink else []
        self.leaves = [t.requires_grad_() for t in (*tensors, *sinks)]
        self.given = {"num_heads": 8, "num_kv_heads": heads, "seqlens": self.lens}
        self.given["sink"] = sinks[0] if sink else None
        self.mask, self.layout = mask, layout

    def request(self) -> Request:
        composition = Composition(mask=self.mask, layout=self.layout)
        return read_request(composition, *self.leaves[:3], **self.given)

    def answers(self, out: ak.AttentionOutput) -> list[torch.Tensor]:
        """Return output, log-sum-exp and every gradient."""
        dy = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64).view(out.output.shape)
        seen = out.stats.lse.masked_fill(out.stats.lse.isinf(), 0.0)
        loss = (out.output * dy).sum() + seen.square().sum()
        return [out.output, out.stats.lse, *torch.autograd.grad(loss, self.leaves)]

    def reference(self) -> list[torch.Tensor]:
        asked = {"mask": self.mask, "layout": self.layout, "backend": "reference", **self.given}
        return self.answers(ak.attention(*self.leaves[:3], return_stats=True, **asked))

    def run(self, plan: Plan) -> list[torch.Tensor]:
        operands = Operands(*self.leaves[:3], sink=self.given["sink"])
        return self.answers(BACKENDS["emulated"].run(plan, operands))


def folded_plan(request: Request) -> Plan:
    """Return the plan with heads folded, whatever it costs."""
    other = folded(request)
    assert isinstance(other, Request)
    plan = replace(in_other_order(request, other, Search()), backend="emulated")
    plan.verify()
    assert plan.in_order is other
    return plan


DENSE = [(layout, mask) for layout in ("BSND", "BNSD", "BSH", "SBH") for mask in (EIGHT, PAIRS)]
MORE = [("BSND", EMPTY), ("BNSD", APART), ("TND", OF_ANY_LENGTH), ("TND", MIXED)]


@pytest.mark.parametrize(("layout", "mask"), DENSE + MORE)
def test_folded_heads_equal_the_reference(layout: str, mask: Any) -> None:
    """Equal and different heads of a group, odd sizes, empty rows and heads, sinks."""
    for sink, heads in ((True, 4), (False, 4), (True, 8)):
        case = Case(mask, layout, heads, sink)
        plan = folded_plan(case.request())
        for found, meant in zip(case.run(plan), case.reference(), strict=True):
            torch.testing.assert_close(found, meant, atol=1e-10, rtol=0)


def test_an_element_is_a_key_head_where_its_queries_see_alike() -> None:
    for mask, heads, count, each in ((PAIRS, 4, 4, 2), (EIGHT, 4, 8, 1), (PAIRS, 8, 8, 1)):
        other = folded(Case(mask, "BSND", heads).request())
        assert isinstance(other, Request)
        assert (other.batch, other.num_heads, other.num_kv_heads) == (2 * count, each, 1)
    packed = folded(Case(OF_ANY_LENGTH, "TND").request())
    assert isinstance(packed, Request)
    assert packed.seqlens == ak.SeqLens(LENS.q * 4, LENS.kv * 4)


def test_equal_masks_and_biases_are_not_folded() -> None:
    alike = Case(PerHead([masks.SlidingWindow(3)] * 8), "BSND").request()
    assert folded(alike) is None
    assert folded(replace(alike, mask=masks.Causal())) is None
    assert folded(replace(alike, mask=PerHead([~masks.Full()] * 8))) is None
    unknown = PerHead([masks.Dilated(2), *[masks.Causal()] * 7])
    assert folded(replace(alike, mask=unknown)) is None
    x = torch.empty(1, 11, 8, 4)
    asked = Composition(mask=OF_ANY_LENGTH, pse=ak.pse.ALiBi(8))
    refused = folded(read_request(asked, x, x, x))
    assert isinstance(refused, Refusal)
    assert refused.code == "bias-per-head"
    found = lower(read_request(asked, x, x, x))
    assert "bias-per-head" in {reason.code for reason in found.refusals} or found.route


def test_eight_heads_with_block_masks_are_one_call() -> None:
    """The price decides: less than half of what a call for each head costs."""
    mask = PerHead([blocks(n, 2048, 2048, 128, 0.3) | masks.Chunked(128) for n in range(8)])
    for layout, shape in (("BSND", (1, 2048, 8, 64)), ("BNSD", (1, 8, 2048, 64))):
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        plan = ak.plan(x, x, x, mask=mask, layout=layout, backend="emulated")
        assert plan.in_order is not None
        assert isinstance(plan.in_order.mask, Folded)
        assert len(plan.calls) == 1
        (apart,) = [reason for reason in plan.refusals if reason.code == "dearer-order"]
        assert apart.subject == "tokens where they are"
        assert apart.reason.startswith("8 x ")
        assert plan.price is not None
        assert plan.price.nanoseconds < 150_000  # of 320 us for calls per head
        calls = lower(plan.in_order).price  # what they copy by themselves
        assert calls is not None
        assert plan.price.copy_bytes == calls.copy_bytes + 2 * 4 * x.nbytes


def test_few_heads_that_differ_stay_calls_of_their_own() -> None:
    """Copies cost: two long calls on tokens in their places are cheaper than one on moved ones."""
    x = torch.empty(1, 8192, 8, 64, device="meta", dtype=torch.bfloat16)
    mask = PerHead([masks.Causal()] * 4 + [masks.SlidingWindow(4096)] * 4)
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    assert plan.in_order is None
    assert len(plan.calls) == 2
    # A packed batch of many lengths is not planned a second time where copies alone cost more.
    lens = ak.SeqLens([300 + n for n in range(64)])
    x = torch.empty(lens.total_q, 8, 64, device="meta", dtype=torch.bfloat16)
    mask = PerHead([masks.Causal()] * 4 + [masks.SlidingWindow(128)] * 4)
    plan = ak.plan(x, x, x, mask=mask, layout="TND", seqlens=lens, backend="emulated")
    (told,) = [reason.reason for reason in plan.refusals if reason.code == "dearer-order"]
    assert told.startswith("moving tokens and computing their cells would cost")


def test_tampered_requests_are_refused() -> None:
    plan = folded_plan(Case(PAIRS, "BSND").request())
    inner = plan.in_order
    assert inner is not None
    assert isinstance(inner.mask, Folded)
    places = inner.mask.places
    swapped = replace(inner.mask, places=(places[1], places[0], *places[2:]))
    wrong = [
        replace(plan, in_order=None),
        replace(plan, in_order=replace(inner, mask=swapped)),
        replace(plan, in_order=replace(inner, mask=replace(inner.mask, mask=EIGHT))),
        replace(plan, in_order=replace(inner, scale=1.0)),
        replace(plan, in_order=replace(inner, sink=False)),
        replace(plan, request=replace(plan.request, mask=EIGHT)),
        replace(plan, steps=plan.steps[:-1]),
    ]
    for other in wrong:
        with pytest.raises(KernelContractError):
            other.verify()


def test_one_sink_for_all_elements_would_be_caught() -> None:
    """Planted fault: a call on whole rows, which takes the sinks of one element for all."""
    case = Case(PerHead([masks.PrefixLM(n) for n in range(1, 9)]), "BSND", 8, sink=False)
    plan = folded_plan(case.request())
    assert not plan.steps[0].partial
    sink = replace(plan.request, sink=True), replace(plan.in_order, sink=True)
    wrong = replace(plan, request=sink[0], in_order=sink[1]).disprove()
    assert wrong is not None
    assert "a part of their sum" in wrong.reason
    # With sinks, the same heads run as parts, and the merge knows whose row has which sink.
    own = Case(case.mask, "BSND", 8)
    assert all(step.partial for step in folded_plan(own.request()).steps)


def test_heads_that_are_folded_and_sorted_are_reported() -> None:
    one = [[1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]]
    other = [[0, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 0]]
    table = torch.tensor([one, other])
    mask = masks.Dilated(2) & masks.Blocks(table.bool(), 1, 1)
    query, key = (torch.randn(2, heads, 4, 2, dtype=torch.float64) for heads in (2, 1))
    plan = ak.plan(
        query, key, key, mask=mask, layout="BNSD", sink=query[0, 0, 0], backend="emulated"
    )
    assert plan.in_order is not None
    assert len(plan.in_order.sequences) > len(plan.request.sequences)
    cells = int(mask.materialize(4, 4, 2, 2).sum())
    assert f"{cells} of 64 cells" in " ".join(plan.explain().split())
