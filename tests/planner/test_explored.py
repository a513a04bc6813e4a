"""The data of a plan's page: every cell as the mask and the calls have it, in few numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionTypeError, Refusal
from attnkit.explorer import save, write
from attnkit.masks import Mask
from attnkit.planner import sheet
from attnkit.planner.explored import as_page
from attnkit.planner.folded import Folded
from attnkit.planner.lower import in_other_order
from attnkit.planner.orders import Sorted, restated
from attnkit.planner.parted import Parted
from attnkit.planner.search import Search

HALF = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.5
CAUSAL = masks.Causal()
MASKS: dict[str, Mask] = {
    "one call": CAUSAL,
    "several calls": CAUSAL | masks.Columns(3, 5),
    "gathered": CAUSAL & (masks.Columns(0, 2) | masks.SlidingWindow(5)),
    "sorted": masks.Dilated(3) & CAUSAL,
    "parts of a union": masks.Dilated(4) | masks.SlidingWindow(3),
    "heads": masks.PerHead([CAUSAL, masks.SlidingWindow(4), CAUSAL, masks.Dilated(2)]),
    "heads as elements": masks.PerHead([CAUSAL, CAUSAL, masks.Full(), masks.Full()]),
    "batch elements": masks.Padding([20, 24, 20]),
    "read": masks.Dense.keep(HALF),
    "predicate": masks.Predicate(lambda b, h, i, j: (i + 2 * j) % 3 == 0),
    "nothing": masks.Columns(0, 4) & masks.Columns(8, 9),
    "empty rows": CAUSAL & masks.Columns(6, 12),
}


def planned(mask: Mask, batch: int = 1, length: int = 24, backend: str = "emulated") -> ak.Plan:
    x = torch.empty(batch, length, 4, 16, device="meta")
    return ak.plan(x, x, x, mask=mask, backend=backend)


def places(ends: list[int]) -> list[int]:
    each = zip(ends[::3], ends[1::3], ends[2::3], strict=True)
    return [position for one in each for position in range(*one)]


def painted(data: dict[str, Any], patches: list[Any], batch: int, head: int) -> Tensor:
    """Return how many of some patches have each cell of a score matrix."""
    cells = torch.zeros(*data["sizes"][batch], dtype=torch.int64)
    for _, own, first, last, rows, keys, region, _ in patches:
        if own != batch or head not in range(first, last):
            continue
        i, j = places(rows), places(keys)
        for i0, i1, *runs in data["regions"][region]:
            for u in range(i0, i1):
                for a, da, b, db in zip(*(runs[k::4] for k in range(4)), strict=True):
                    for v in range(a + da * (u - i0), b + db * (u - i0)):
                        cells[i[u], j[v]] += 1
    return cells


def calls_of(view: dict[str, Any]) -> list[Any]:
    return [patch for call in view["calls"] for patch in call["patches"]]


@pytest.mark.parametrize("name", MASKS)
def test_every_cell_is_as_the_mask_and_the_calls_have_it(name: str) -> None:
    mask = MASKS[name]
    batch = mask.batches or 1
    data = json.loads(json.dumps(as_page(planned(mask, batch))))
    truth = mask.materialize(24, 24, batch, 4)
    for b, _ in data["batches"]:
        for h, _ in data["heads"]:
            allowed = truth[b, h].long()
            assert torch.equal(painted(data, data["allowed"], b, h), allowed)
            for view in data["views"]:
                if view["calls"]:
                    assert torch.equal(painted(data, calls_of(view), b, h), allowed), view["label"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sorted", Sorted), ("parts of a union", Parted), ("folded", Folded), ("both", Folded)],
)
def test_tokens_that_were_moved_are_where_they_stand(name: str, kind: type[Mask]) -> None:
    both = masks.PerHead([masks.Dilated(2), masks.Dilated(2) & CAUSAL] * 2)
    apart = masks.PerHead([CAUSAL, masks.SlidingWindow(3), masks.Full(), CAUSAL])
    mask = {**MASKS, "folded": apart, "both": both}[name]
    request = planned(mask).request
    ways = [way for way in restated(request) if not isinstance(way, Refusal)]
    (way,) = (way for way in ways if isinstance(way.mask, kind))
    found = replace(in_other_order(request, way, Search()), backend="emulated")
    assert found.in_order is not None
    data = as_page(found)
    truth = mask.materialize(24, 24, 1, 4)
    for h in range(4):
        assert torch.equal(painted(data, data["allowed"], 0, h), truth[0, h].long())
        assert torch.equal(painted(data, calls_of(data["views"][0]), 0, h), truth[0, h].long())


def test_what_is_alike_is_shown_once() -> None:
    data = as_page(planned(MASKS["batch elements"], 3))
    assert [told for _, told in data["batches"]] == ["batch elements 0, 2", "batch element 1"]
    data = as_page(planned(MASKS["heads as elements"]))
    assert data["heads"] == [[0, "heads 0 to 1"], [2, "heads 2 to 3"]]


def test_packed_sequences_are_score_matrices_of_their_own() -> None:
    x = torch.empty(60, 4, 16, device="meta")
    found = ak.plan(
        x, x, x, mask=CAUSAL, layout="TND", seqlens=ak.SeqLens([10, 0, 50]), backend="emulated"
    )
    data = as_page(found)
    assert data["sizes"] == [[10, 10], [0, 0], [50, 50]]
    assert data["starts"] == [[0, 10, 10, 60]] * 2
    for b, (q_len, kv_len) in enumerate(data["sizes"]):
        truth = CAUSAL.materialize(q_len, kv_len)[0, 0].long()
        assert torch.equal(painted(data, data["allowed"], b, 0), truth)
        assert torch.equal(painted(data, calls_of(data["views"][0]), b, 0), truth)


def test_a_plan_without_calls_shows_those_of_ascend_and_says_so() -> None:
    data = as_page(planned(CAUSAL, backend="tiled"))
    assert "computes this by itself" in data["note"]
    assert data["views"][0]["calls"]
    x = torch.empty(1, 24, 4, 16, device="meta")
    data = as_page(ak.plan(x, x, x, mask=CAUSAL, softcap=3.0, backend="reference"))
    assert not data["views"][0]["calls"]
    assert any("soft" in reason for _, reason, _ in data["refusals"])


def test_cells_that_nobody_can_tell_are_bounded_and_said_to_be_unsure() -> None:
    far = masks.Predicate(lambda b, h, i, j: (i * j) % 3 == 0) & masks.SlidingWindow(8)
    data = as_page(planned(far, length=4096))
    assert [patch[7] for patch in data["allowed"]] == [0]
    assert all(patch[7] == 0 for patch in calls_of(data["views"][0]))
    chosen = masks.SelectedBlocks(torch.zeros(1, 4, 3, 1).long(), 8, 8, causal=True)
    data = as_page(planned(chosen))
    assert data["per_call"]
    assert not data["views"][0]["calls"]
    assert "comes with each call" in data["note"]


@pytest.mark.parametrize(
    ("mask", "length", "most"),
    [
        (CAUSAL, 1_000_000, 10_000),
        (CAUSAL & (masks.Columns(0, 4) | masks.SlidingWindow(4096)), 2**20, 60_000),
        (masks.Documents([2048] * 512), 2**20, 120_000),
    ],
    ids=["causal", "sink and window", "documents"],
)
def test_a_million_tokens_are_a_small_page(mask: Mask, length: int, most: int) -> None:
    data = as_page(planned(mask, length=length))
    assert len(json.dumps(data)) < most
    assert data["left_out"] == [0, 1]


def test_thousands_of_sequences_are_less_than_a_megabyte() -> None:
    lengths = ak.SeqLens([1 + k % 50 for k in range(4096)])
    x = torch.empty(lengths.total_q, 4, 16, device="meta")
    found = ak.plan(x, x, x, mask=CAUSAL, layout="TND", seqlens=lengths, backend="emulated")
    data = as_page(found)
    assert len(data["batches"]) == 4096
    assert len(json.dumps(data)) < 1_000_000


def test_what_would_make_a_page_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(MASKS["gathered"], length=512)
    assert all("patches" in call for view in as_page(found)["views"] for call in view["calls"])
    first = as_page(found)
    monkeypatch.setattr(sheet, "MOST_NUMBERS", 150)
    data = as_page(found)
    assert [call["patches"] for call in data["views"][0]["calls"]]
    assert any("patches" not in call for view in data["views"][1:] for call in view["calls"])
    assert len(json.dumps(data)) < len(json.dumps(first))
    monkeypatch.setattr(sheet, "MOST_NUMBERS", 0)
    assert as_page(found)["left_out"] == [1, 1]
    lengths = ak.SeqLens([*range(1, 101)])
    x = torch.empty(sum(range(101)), 4, 16, device="meta")
    monkeypatch.setattr(sheet, "MOST_NUMBERS", 1_000)
    data = as_page(ak.plan(x, x, x, mask=CAUSAL, layout="TND", seqlens=lengths, backend="emulated"))
    left, every = data["left_out"]
    assert every == 100
    assert 0 < left < 100
    assert len(data["batches"]) == len({patch[1] for patch in data["allowed"]}) == 100 - left


def test_a_plan_that_was_changed_by_hand_is_shown_as_it_is() -> None:
    found = planned(CAUSAL)
    (launch,) = found.steps
    wrong = replace(launch, call=replace(launch.call, sparse_mode=4, pre_tokens=3, next_tokens=0))
    data = as_page(replace(found, steps=(wrong,)))
    cells = painted(data, calls_of(data["views"][0]), 0, 0)
    assert not torch.equal(cells, painted(data, data["allowed"], 0, 0))
    assert torch.equal(cells, masks.SlidingWindow(4).materialize(24, 24)[0, 0].long())
    assert "NONE" in data["report"]


def test_what_a_command_cannot_say_is_told() -> None:
    x, key = torch.empty(1, 8, 4, 16, device="meta"), torch.empty(1, 8, 2, 16, device="meta")
    bias = ak.pse.ALiBi(4)
    found = ak.plan(x, key, key, mask=CAUSAL, pse=bias, scale=0.5, backend="emulated")
    assert as_page(found)["unsaid"] == ["the bias", "2 key heads", "the scale"]
    assert as_page(planned(CAUSAL))["unsaid"] == []


def test_the_page_is_one_file_in_which_no_data_is_markup(tmp_path: Path) -> None:
    def sly(b: int, h: int, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    sly.__name__ = sly.__qualname__ = "</script><img src=x onerror=alert(1)>"
    found = planned(masks.Predicate(sly))
    page = found.to_html(tmp_path / "plan.html").read_text()
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "src=" not in page.replace("img src=x", "")
    assert "default-src 'none'" in page
    assert page.count("http") == page.count("http-equiv")


def test_paths_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CompositionTypeError, match=r"to_html.*path=3; give the name of the file"):
        planned(CAUSAL).to_html(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        planned(CAUSAL).to_html(tmp_path / "none" / "plan.html")
    assert save({"title": "a"}, str(tmp_path / "a.html")).read_text() == write({"title": "a"})
