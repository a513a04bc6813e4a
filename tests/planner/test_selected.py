"""Plans of selected blocks: proven for every selection, and not for anything else."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import product

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.selected_units import Laid
from attnkit.geometry import Region
from attnkit.masks import SelectedBlocks
from attnkit.planner import Plan, selected
from attnkit.planner.selected import SelectedPlan
from tests.selections import every_selection


def plan_of(
    q_block: int = 4,
    kv_block: int = 8,
    q_len: int = 16,
    kv_len: int = 16,
    k: int = 1,
    causal: bool = True,
    batch: int = 2,
    **given: torch.Tensor,
) -> SelectedPlan:
    """Return a plan for two batch elements and heads that select apart."""
    query, key = torch.empty(batch, q_len, 4, 8), torch.empty(batch, kv_len, 2, 8)
    indices = torch.zeros(batch, 2, q_len // q_block, k, dtype=torch.int64)
    mask = SelectedBlocks(indices, q_block, kv_block, causal, **given)
    found = ak.plan(query, key, key, mask=mask, backend="emulated")
    assert isinstance(found, SelectedPlan)
    return found


@pytest.mark.parametrize(
    ("q_block", "kv_block", "q_len", "kv_len", "k", "causal"),
    [
        *product((1, 2), (1, 2, 3), (4,), (4, 5), (1, 2), (True,)),
        *product((4,), (2, 3), (8,), (8, 9), (1,), (True,)),
        *product((2,), (2, 3), (4,), (6,), (1, 2), (False,)),
    ],
)
def test_calls_compute_every_selection(
    q_block: int, kv_block: int, q_len: int, kv_len: int, k: int, causal: bool
) -> None:
    """The image of each call's region under the keys that its indices gather is the mask."""
    q_blocks = q_len // q_block
    indices = every_selection(q_block, kv_block, q_blocks, kv_len, k, causal)
    mask = SelectedBlocks(indices, q_block, kv_block, causal=causal)
    query = torch.empty(len(indices), q_len, 1, 2)
    key = torch.arange(len(indices) * kv_len).view(len(indices), kv_len, 1, 1).expand(-1, -1, -1, 2)
    plan = ak.plan(query, key.float(), key.float(), mask=mask, backend="emulated")
    assert isinstance(plan, SelectedPlan)
    plan.verify()
    views = (query.transpose(1, 2), *(key.float().transpose(1, 2),) * 2)
    laid = Laid(plan, views, (indices.flatten(0, 1), None, None))
    found = torch.zeros(len(indices), q_len, kv_len, dtype=torch.int64)
    for part in plan.gathers:
        given = laid.tensors_of(part, laid.gather(part), laid.value)
        keys = given["key"][:, 0, 0].long()
        row = start = 0
        for region, (height, width) in zip(
            part.launch.regions(0), part.launch.call.sequences, strict=True
        ):
            for part_of in region.slices:
                for i in range(part_of.i0, part_of.i1):
                    low, high = max(part_of.j0, i + part_of.lo), min(part_of.j1, i + part_of.hi + 1)
                    at = keys[start + low : start + high]
                    b, place = divmod(row + i, q_len)
                    assert (at // kv_len == b).all()
                    found[b, place].index_add_(0, at % kv_len, torch.ones_like(at))
            row, start = row + height, start + width
    assert torch.equal(found, mask.materialize(q_len, kv_len, len(indices))[:, 0].long())


def tampered(plan: SelectedPlan) -> dict[str, Plan]:
    """Return plans that compute something else."""
    (part,) = plan.gathers
    call = part.launch.call
    assert call.actual_seq_kvlen is not None
    shorter = tuple(end - (k == 1) for k, end in enumerate(call.actual_seq_kvlen))
    changed = {
        "another window": replace(call, sparse_mode=2),
        "no mask": replace(call, atten_mask=None, sparse_mode=0),
        "other lengths": replace(call, actual_seq_kvlen=shorter),
        "another scale": replace(call, scale=2.0),
        "a dropout": replace(call, keep_prob=0.5),
    }
    found = {}
    for name, other in changed.items():
        launch = replace(part.launch, call=other)
        found[name] = replace(plan, steps=(launch,), gathers=(replace(part, launch=launch),))
    return found | {
        "half of the folds": replace(plan, gathers=(replace(part, folds=(0, 2)),)),
        "half of the blocks": replace(plan, gathers=(replace(part, blocks=(0, 2)),)),
        "a part twice": replace(plan, gathers=(part, part), steps=plan.steps * 2),
        "no parts": replace(plan, gathers=()),
        "other steps": replace(plan, steps=()),
        "another request": replace(plan, request=replace(plan.request, scale=2.0)),
        "a bias": replace(plan, request=replace(plan.request, bias=(None,))),  # type: ignore[arg-type]
        "another mask": replace(plan, request=replace(plan.request, mask=masks.Causal())),
        "other sizes": replace(
            plan, request=replace(plan.request, mask=replace_block(plan, kv_block=4))
        ),
        "without causality": replace(
            plan, request=replace(plan.request, mask=replace_block(plan, causal=False))
        ),
    }


def replace_block(plan: SelectedPlan, **changes: object) -> masks.Mask:
    return replace(plan.selection, **changes)  # type: ignore[arg-type]


def test_a_tampered_plan_is_no_proof() -> None:
    plan = plan_of()
    assert plan.disprove() is None
    for name, other in tampered(plan).items():
        assert other.disprove() is not None, name


def test_a_wrong_recipe_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's own definition of a sequence's cells, against lengths that are one block off."""
    plan = plan_of(q_block=8, kv_block=8, k=1)
    sights = type(plan.selection).sights
    monkeypatch.setattr(
        type(plan.selection),
        "sights",
        lambda self, kv_len: tuple(s._replace(start=s.start + 1) for s in sights(self, kv_len)),
    )
    assert plan.disprove() is not None


def test_the_proof_does_not_believe_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and the packed request that they are asked for, both with a key too many."""
    request = plan_of().request
    keys_of = selected.keys_of
    monkeypatch.setattr(selected, "keys_of", lambda *given: keys_of(*given) + 1)
    plan = replace(selected.select(request), backend="emulated")
    wrong = plan.disprove()
    assert wrong is not None
    assert wrong.code == "wrong-cells"


def test_plans_are_values() -> None:
    plan = plan_of()
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    again.verify()
    words = " ".join(plan.explain().split())
    assert "mode 3, selected blocks gathered, 16 sequences" in words
    assert "which cells they are comes with each call" in words
    assert "whatever different blocks come" in words
    assert plan.to_dict()["request"]["mask"].startswith("SelectedBlocks(indices [2, 2, 4, 1]")
    assert plan.plot() is not None
    assert plan.price is not None
    assert plan.price.copy_bytes > 0
    assert plan.inner is plan


def test_a_selection_costs_its_cells_and_not_the_matrix() -> None:
    """16,384 tokens in blocks of 128, for each of 8 heads: one plan, no mask of the matrix."""
    x = torch.empty(1, 16_384, 8, 64, device="meta", dtype=torch.bfloat16)
    indices = torch.empty(1, 8, 128, 8, dtype=torch.int64, device="meta")
    plan = ak.plan(x, x, x, mask=SelectedBlocks(indices, 128, 128, True), backend="emulated")
    assert len(plan.calls) == 2  # of a million tokens each
    assert plan.price is not None
    cells = sum(128 * 128 * min(8, i) + 128 * 129 // 2 for i in range(128))
    assert plan.price.cells == 8 * cells
    assert all(
        call.atten_mask is not None and call.atten_mask.kind == "causal" for call in plan.calls
    )


def test_regions_of_a_form() -> None:
    form = plan_of().selection
    assert form.outer(16, 16) == masks.Causal().region(16, 16)
    assert form.enclosure(16, 16).inner == Region.empty()
    assert not form.is_region(16, 16)
