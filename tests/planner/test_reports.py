"""Reports and pictures of plans: there is one for every request, and what they say is proven."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import make_plan
from attnkit.planner import Plan, lower
from attnkit.planner.lower import search_for
from attnkit.planner.request import Share
from attnkit.planner.search import Search
from tests.planner.test_tampering import a_bias, a_mask


def plan_of(mask: masks.Mask, q_len: int, kv_len: int, backend: str = "auto") -> Plan:
    q, k = (torch.empty(1, n, 2, 8) for n in (q_len, kv_len))
    return ak.plan(q, k, k, mask=mask, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "emulated", "reference"])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal("top_left")[:40, :30],
        masks.SlidingWindow(3, "top_left")[:40, :30] & masks.Causal(),
        ~masks.Causal("top_left")[:40, :30],
        masks.Causal().cut((1, 41), (2, 32), q_len=50, kv_len=50),
    ],
    ids=str,
)
def test_cut_masks_are_explained(mask: masks.Mask, backend: str) -> None:
    plan = plan_of(mask, 40, 30, backend)
    assert "proof" in plan.explain()
    assert plan.to_dict()["request"]
    turned = [saving.change for saving in plan.savings if "mask" in saving.change]
    assert not any("Cut" in change for change in turned)


def test_a_reason_that_holds_for_every_call_stands_alone() -> None:
    q = torch.empty(1, 8, 2, 8)
    told = ak.plan(q, q, q, softcap=3.0).explain()
    assert "  refused     softcap=3.0 is a term" in told


def test_sequences_and_savings_are_counted_in_words_that_fit() -> None:
    q = torch.empty(1, 8192, 8, 64, device="meta", dtype=torch.bfloat16)
    mask = masks.Band(64, 64) | masks.Columns(0, 16) | masks.Rows(0, 16)
    told = ak.plan(q, q, q, mask=mask, backend="emulated").explain()
    assert "1 sequence has rows" in told
    assert "62 sequences have rows" in told
    few = plan_of(masks.Causal(), 4, 4, "emulated")
    assert 0.99 < few.savings[0].share < 1
    assert "for each allowed cell: lengths in whole tiles" in few.explain()
    assert "-99." in few.explain()


def test_every_random_request_is_explained() -> None:
    chance, told = random.Random(0), 0
    torch.manual_seed(0)
    for _ in range(20):
        q_len, kv_len = chance.choice([1, 5, 12, 20]), chance.choice([1, 5, 12, 20])
        mask = a_mask(chance, q_len, kv_len, 1, packed=False)
        if chance.random() < 0.6:
            i, j = chance.randrange(q_len), chance.randrange(kv_len)
            mask = mask.cut((i, q_len), (j, kv_len), q_len=q_len, kv_len=kv_len)
            q_len, kv_len = q_len - i, kv_len - j
        q, k = (torch.empty(1, n, 2, 8) for n in (q_len, kv_len))
        try:
            plan = ak.plan(q, k, k, mask=mask, pse=a_bias(chance, q_len, kv_len, packed=False))
        except (ak.CompositionError, ak.BackendRefused):
            continue
        report = plan.explain()
        assert "NONE" not in report
        told += "proof" in report
    assert told > 10


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (3, 5)])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.Full(), ~masks.Full()], ids=str)
def test_empty_matrices_have_reports_and_pictures(mask: masks.Mask, sizes: tuple[int, int]) -> None:
    pytest.importorskip("matplotlib")
    plan = plan_of(mask, *sizes)
    assert "proof  " in plan.explain()
    figure = plan.plot()
    figure.draw_without_rendering()
    assert (f"{sizes[0]} queries" in figure.axes[0].get_title()) == (0 in sizes)


@pytest.mark.parametrize(
    ("batch", "head"),
    [(1, 0), (-1, 0), (0, 2), (0, -1), (True, 0), (0, "0"), (0, 10**30), (0.0, 0)],
)
def test_a_picture_of_no_matrix_is_refused(batch: int, head: int) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ak.CompositionError, match=r"plot\(\) got .* from 0 to"):
        plan_of(masks.Causal(), 4, 4).plot(batch, head)


def test_a_report_prints_no_proof_that_fails() -> None:
    plan = plan_of(masks.SlidingWindow(3), 8, 8, "emulated")
    (step,) = plan.steps
    wrong = replace(plan, steps=(replace(step, call=replace(step.call, pre_tokens=3)),))
    assert "proof       the call's set equals the mask's" in plan.explain()
    assert "proof       NONE: batch element 0, head 0: the calls cover" in wrong.explain()


def test_a_report_names_what_a_mask_is() -> None:
    for mask, told in (
        (masks.Causal() & masks.SlidingWindow(3), "SlidingWindow(3): SlidingWindow(3); 33"),
        (masks.SlidingWindow(3), "mask SlidingWindow(3): 33 of 144 cells"),
        (masks.Chunked(4) & masks.Causal(), "3 diagonal blocks, each Causal(); 30 of 144"),
        (masks.Chunked(4), "Chunked(4): 3 diagonal blocks, each Full(); 48 of 144"),
        (masks.Dense.keep(torch.eye(12) > 0), "SlidingWindow(1); 12 of 144"),
    ):
        report = " ".join(plan_of(mask, 12, 12, "emulated").explain().split())
        assert told in report


def test_a_report_says_what_of_a_larger_attention_a_request_has() -> None:
    whole = plan_of(masks.Full(), 4, 6).request
    share = Share(8, 6, (range(2), range(6, 8)), (range(6),), num_heads=1)
    text = " ".join(make_plan(replace(whole, share=share)).explain().split())
    assert "4 rows in 2 ranges and 6 keys of 8 x 6; its results are merged with others'" in text


def by_classes(mask: masks.Mask, length: int) -> Plan:
    """The plan of one call without a mask whose rows see the same keys, whatever is cheapest."""
    plan = plan_of(mask, length, length, "emulated")
    ways = (plan.solution, *plan.alternatives)
    bare = [w for w in ways if all(one.call.atten_mask is None for one in w.launches)]
    best = min(bare, key=lambda way: sum(len(one.blocks) for one in way.launches))
    return replace(plan, steps=best.launches, alternatives=tuple(w for w in ways if w != best))


@pytest.mark.usefixtures("no_full_masks")
def test_a_report_tells_what_is_gathered_and_merged() -> None:
    returning = masks.SameId([(k % 2, 3) for k in range(12)])
    plan = by_classes(returning, 36)
    report = " ".join(plan.explain().split())
    assert (
        "gathers 2 sequences have rows or keys from several places; all have 18 rows and 18 keys "
        "each, 36 keys in all (1 times K and V); the first has rows 0-2, 6-8, 12-14 and 3 more and "
        "keys 0-2, 6-8, 12-14 and 3 more merge none: every row is answered once"
    ) in report
    cut = search_for(plan.request, Search(gathers=False))
    assert ", merged (" in replace(cut, backend="emulated").explain()
    places = [[a, a + 3, 1] for a in range(0, 36, 6)]
    blocks = json.loads(json.dumps(plan.to_dict()))["plan"]["calls"][0]["blocks"]
    assert blocks[0] == {"batch": 0, "rows": places, "keys": places}

    sunk = masks.SlidingWindow(8) | masks.Causal() & masks.Prefix(1)
    cut = search_for(plan_of(sunk, 64, 64).request, Search(gathers=False))
    told = replace(cut, backend="emulated").explain()
    assert "merge       rows are answered up to 2 times, and merged by their" in told
    assert "gathers" not in told
    assert "merge" not in plan_of(masks.Causal(), 8, 8, "emulated").explain()


@pytest.mark.usefixtures("no_full_masks")
def test_a_picture_shows_the_sequences_of_a_call_that_gathers() -> None:
    pytest.importorskip("matplotlib")
    for count, told in (
        (3, ["1", "2", "3"]),
        (9, ["1, 9", *"2345678"]),
        (18, ["1, 9, ... 17", "2, 10, ... 18", *(f"{k}, {k + 8}" for k in range(3, 9))]),
    ):
        returning = masks.SameId([(k % count, 2) for k in range(2 * count)])
        figure = by_classes(returning, 4 * count).plot()
        (legend,) = figure.legends
        assert [t.get_text() for t in legend.get_texts()] == [
            f"no mask: sequence {k}" for k in told
        ]
        (picture,) = figure.axes[0].get_images()
        colours = picture.get_array()
        assert (colours[0, 0] == colours[0, 2 * count]).all()
        assert (colours[0, 0] == colours[2 * count, 0]).all()
        assert (colours[0, 0] != colours[2, 2]).any()
        assert (colours[0, 2] == 1).all()  # what is masked is white


@pytest.mark.parametrize("merging", [False, True])
def test_layouts_in_packed_order_are_the_cheapest(
    merging: bool, request: pytest.FixtureRequest
) -> None:
    """A report does not plan for other layouts there, and looks at the others elsewhere."""
    if merging:
        request.getfixturevalue("no_full_masks")
    chance = random.Random(1)
    torch.manual_seed(1)
    for _ in range(12):
        mask = a_mask(chance, 6, 6, 2, packed=False)
        q = torch.empty(2, 6, 2, 8)
        asked = ak.plan(q, q, q, mask=mask, backend="reference").request
        prices = {
            name: price.nanoseconds
            for name in ("BSND", "BSH", "BNSD", "SBH")
            if (price := lower(replace(asked, layout=name)).price) is not None
        }
        assert prices["BSND"] == prices["BSH"] == min(prices.values())
        assert prices["BNSD"] == prices["SBH"]
    q = torch.empty(1, 8, 4096, 64, device="meta")
    packed = masks.Documents([64] * 64) & masks.Causal()
    plan = ak.plan(q, q, q, mask=packed, layout="BNSD", backend="emulated")
    assert [saving.change for saving in plan.savings[:3]] == [
        f"layout {name}" for name in ("BSND", "BSH", "SBH")
    ]


# -- requests without a cell ---------------------------------------------------------------------

BIASES = [
    pse.ALiBi(2) + pse.SqrtALiBi(2),
    pse.T5Relative(2, bidirectional=False),
    pse.T5Relative(2) + pse.ALiBi(2),
    pse.ALiBi(2, learnable=True) + pse.T5Relative(2),
    pse.ALiBi(2),
]


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_zero_tokens_have_a_plan(bias: pse.Pse) -> None:
    packed, dense = torch.randn(0, 2, 4), torch.randn(2, 0, 2, 4)
    for backend in ("emulated", "reference", "auto"):
        lens = ak.SeqLens([0, 0])
        out = ak.attention(
            packed, packed, packed, pse=bias, layout="TND", seqlens=lens, backend=backend
        )
        assert isinstance(out, torch.Tensor)
        assert out.shape == packed.shape
        out = ak.attention(dense, dense, dense, mask=masks.Causal(), pse=bias, backend=backend)
        assert isinstance(out, torch.Tensor)
        assert out.shape == dense.shape


def test_a_mask_that_allows_nothing_has_a_plan_beside_a_bias_in_zones() -> None:
    q, k = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 2, 4, requires_grad=True)
    bias = pse.T5Relative(2, 4, 8, bidirectional=False)
    for mask in (
        ~masks.Causal() & masks.Dilated(4),
        ~masks.Full(),
        ~masks.Full() & masks.Dilated(2),
    ):
        out, stats = ak.attention(
            q, k, k, mask=mask, pse=bias, backend="emulated", return_stats=True
        )
        meant = ak.attention(q, k, k, mask=mask, pse=bias, backend="reference", return_stats=True)
        torch.testing.assert_close(out, meant.output)
        torch.testing.assert_close(stats.lse, meant.stats.lse)
