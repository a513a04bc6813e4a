"""Lint: every planted fault is found, and sound masks have no findings."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import Finding, lint_stack
from attnkit.masks.stack import compose
from tests.masks.test_compositions import compositions

C, W = masks.Causal(), masks.SlidingWindow


def codes(mask, q_len=16, kv_len=None):
    return [finding.code for finding in mask.lint(q_len, kv_len or q_len)]


SOUND = [
    C,
    masks.Full(),
    W(4),
    masks.Documents([6, 10]) & C,
    masks.Padding([3, 16]) & C,
    C & (W(4) | masks.Prefix(2)),
    masks.Chunked(4) & C,
    masks.BlockCausal(4),
    masks.PerHead([C, masks.Documents([6, 10]), masks.Full()]),
    masks.Band(2, 2) | masks.Columns(0, 1) | masks.Rows(0, 1),
    C & masks.Dilated(2),
    masks.Neighborhood((4, 4), 3),
    masks.Tree([-1, 0, 0, *range(1, 14)]),
    masks.Blocks("#.#. ##.. #.#. .###", 4, 4, causal=True),
]


@pytest.mark.parametrize("mask", SOUND[:5] + SOUND[6:10] + SOUND[11:], ids=repr)
def test_sound_masks_have_no_findings(mask):
    assert mask.lint(16, 16) == ()


PLANTED = [
    (C, (6, 4), "empty-rows", r"2 of 6 queries.*rows 0 to 1;.*top_left"),
    (masks.Padding([16, 0]) & C, (16, 16), "empty-rows", "rows 0 to 15 in batch element 1"),
    (C & ~masks.Band(0, 0), (4, 4), "empty-rows", r"1 of 4.*rows 0;.*lse is -inf.*Band\(0, 0\)"),
    (C & masks.Dilated(300) & ~masks.Band(0, 0), (900, 900), "empty-rows", "rows 0 to 299"),
    (C & ~masks.Columns(3, 5), (16, 16), "unseen-keys", "2 of 16 keys: 3 to 4"),
    (W(99), (16, 16), "window-exceeds-sequence", r"SlidingWindow\(99\).*it is Causal\(\)"),
    (W(16), (16, 16), "window-exceeds-sequence", "smaller size"),
    (masks.Band(20, 20), (16, 16), "window-exceeds-sequence", r"Full\(\)"),
    (masks.Chunked(16) & C, (16, 16), "window-exceeds-sequence", r"Chunked\(16\)"),
    (masks.Neighborhood((4, 4), 4), (16, 16), "window-exceeds-sequence", r"4\), 4\).*Full\(\)"),
    (masks.SlidingTiles(16, 4, 4), (16, 16), "window-exceeds-sequence", r"it is Full\(\)"),
    (masks.Tree(range(-1, 15)), (16, 20), "window-exceeds-sequence", r"it is Causal\(\)"),
    (masks.Blocks("## ##", 8, 8, True), (16, 16), "window-exceeds-sequence", r"it is Causal\(\)"),
    (masks.Blocks("#. .#", 8, 8), (16, 16), "equals-a-named-mask", r"equals Chunked\(8\)"),
    (masks.Blocks("## ..", 8, 8), (16, 16), "empty-rows", "rows 8 to 15"),
    (masks.Placed(masks.Full(), 1), (16, 16), "unseen-keys", "1 of 16 keys: 0"),
    (
        masks.Documents([6, 10]) & C | masks.Prefix(2),
        (16, 16),
        "documents-leak",
        r"20 cells between two.*query 6 \(document 1\) and key 0 \(document 0\)",
    ),
    (masks.Documents([6, 10]) | W(2), (16, 16), "documents-leak", r"1 cell between.*query 6 "),
    (masks.PrefixLM(3), (16, 16), "sees-the-future", r"3 cells ahead.*query 0 sees key 2"),
    (W(4) | masks.Rows(2, 3), (16, 16), "sees-the-future", r"query 2 sees key 15"),
    (C & W(4), (16, 16), "part-changes-nothing", r"Causal\(\) changes nothing"),
    (masks.Full() | C, (16, 16), "part-changes-nothing", r"Causal\(\) changes nothing"),
    (C & ~(masks.Columns(1, 2) | masks.Columns(1, 3)), (16, 16), "part-changes-nothing", "1, 2"),
    (masks.Dense.keep(torch.ones(8, 8).tril().bool()), (8, 8), "equals-a-named-mask", "Causal"),
    (
        masks.Predicate(lambda b, h, i, j: i // 4 == j // 4) & C,
        (16, 16),
        "equals-a-named-mask",
        r"write Chunked\(4\)",
    ),
    (C & masks.Dilated(3), (400, 400), "not-a-region", "not looked for"),
]


@pytest.mark.parametrize(("mask", "size", "code", "words"), PLANTED)
def test_planted_faults_are_found(mask, size, code, words):
    found = [finding for finding in mask.lint(*size) if finding.code == code]
    assert found
    assert any(re.search(words, str(finding)) for finding in found), found


def test_what_takes_cells_away_does_not_leak():
    assert "documents-leak" not in codes(C & ~masks.Documents([6, 10]))
    assert "sees-the-future" not in codes(~C)


def test_unseen_keys_that_a_part_rules_out_are_meant():
    assert "unseen-keys" not in codes(masks.Padding([3, 16]) & C)
    assert "unseen-keys" not in codes(masks.Columns(4) & C)
    assert "unseen-keys" not in codes(~masks.Prefix([3, 0]) & C)
    assert "unseen-keys" in codes(masks.Columns(4) & ~masks.Columns(8, 9))
    assert "unseen-keys" in codes(W(2), 1, 16)


def test_heads_are_told_apart():
    mask = masks.PerHead([C, masks.Documents([6, 10]) | masks.Prefix(1)])
    (finding,) = mask.lint(16, 16)
    assert finding.code == "documents-leak"
    assert "in head 1" in finding.message


def test_findings_are_values():
    (finding,) = C.lint(3, 2)
    assert isinstance(finding, Finding)
    assert finding == C.lint(3, 2)[0]
    assert hash(finding) == hash(C.lint(3, 2)[0])
    assert str(finding).endswith("[empty-rows]")
    with pytest.raises(AttributeError):
        finding.code = "other"


def test_lint_checks_the_request():
    with pytest.raises(CompositionError, match="2 batch elements apart, but there are 3"):
        masks.Padding([1, 2]).lint(4, 4, batch=3)
    assert C.lint(0, 4) == ()


@settings(max_examples=30)
@given(compositions, st.integers(0, 9), st.integers(0, 9))
def test_findings_agree_with_the_cells(case, q_len, kv_len):
    found = case.mask.lint(q_len, kv_len)
    cells = case.mask.materialize(q_len, kv_len)[0, 0]
    empty = (~cells.any(dim=1)).sum().item() if kv_len else q_len
    told = [finding for finding in found if finding.code == "empty-rows"]
    assert bool(told) == bool(empty)
    if told:
        assert f"leaves {empty} of {q_len} queries" in told[0].message


# -- stacks ------------------------------------------------------------------------------------


def by_hand(stack, length, residual=True):
    """Compose layers as boolean matrices."""
    reach = torch.eye(length)
    for mask in stack:
        layer = mask.materialize(length, length, heads=mask.heads or 1)[0].any(dim=0)
        if residual:
            layer = layer | torch.eye(length).bool()
        reach = (layer.float() @ reach).clamp(max=1)
    return reach.bool()


def painted(region, length):
    return masks.Slices.of(region, length, length).materialize(length, length)[0, 0]


ATOMS = [C, W(3), masks.Chunked(3), masks.Band(1, -1), masks.Band(-2, 3), masks.Documents([3, 4]),
         masks.Prefix(2), masks.Rows(2, 4), ~masks.BlockCausal(2), C - masks.Columns(1, 4),
         masks.PerHead([W(2), masks.Columns(4)])]  # fmt: skip


@pytest.mark.parametrize("residual", [True, False])
def test_composition_is_exact(residual):
    for stack in product(ATOMS, repeat=2):
        report = lint_stack(stack, 7, residual=residual)
        right = by_hand(stack, 7, residual)
        assert painted(report.reach, 7).equal(right), stack
        assert report.exact


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=6))
def test_deep_stacks(stack):
    report = lint_stack(stack, 7)
    right = by_hand(stack, 7)
    assert painted(report.reach, 7).equal(right)
    i, k = right.nonzero().unbind(1)
    assert report.lookback == (i - k).max()
    assert report.lookahead == (k - i).max()
    told = [finding.code for finding in report.findings]
    assert ("stack-sees-the-future" in told) == bool(right.triu(1).any())
    assert report.lookback < 6 or "stack-is-short-sighted" not in told


def test_the_receptive_field_of_windows():
    report = lint_stack([W(4)] * 5, 1000)
    assert (report.lookback, report.lookahead) == (15, 0)
    assert "16 of 1000 positions" in str(report)
    assert lint_stack([W(4)] * 5 + [C], 1000).findings == ()
    assert (
        lint_stack([W(256), C & (W(64) | masks.Prefix(4))] * 8, 1 << 20).lookback == (1 << 20) - 1
    )


def test_the_future_comes_in_through_one_layer():
    report = lint_stack([C, masks.Chunked(4), W(3)], 16)
    assert report.lookahead == 3
    (finding,) = report.findings
    assert "layers that look ahead by themselves: 1" in finding.message


def test_documents_leak_through_another_layer():
    documents = masks.Documents([6, 10])
    report = lint_stack([documents & C, C], 16)
    assert [finding.code for finding in report.findings] == ["stack-documents-leak"]
    assert "output 6 depends on input 0" in report.findings[0].message
    assert lint_stack([documents & C, documents & W(3)], 16).findings == ()


def test_batches_do_not_mix():
    one = masks.Documents([[4, 12], [16, 0]]) & C
    two = masks.Documents([[4, 12], [8, 8]]) & C
    report = lint_stack([one, two], 16)
    assert {finding.code for finding in report.findings} == {"stack-documents-leak"}
    assert "output 8 depends on input 0" in report.findings[0].message


def test_a_mask_without_a_region_is_bounded():
    report = lint_stack([masks.Dilated(2) & W(9)] * 2, 400)
    assert not report.exact
    assert report.lookback == 16
    assert report.findings[-1].code == "stack-is-bounded"


def test_with_a_cache_the_past_counts_as_inputs():
    report = lint_stack([W(3)] * 4, 4, 16)
    assert report.lookback == 5  # from query 3 to the first cached key that a query reads
    assert report.lookahead == 0
    assert lint_stack([C] * 2, 1, 16).reach.row(15) == ((0, 16),)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: lint_stack([], 4), "list of masks"),
        (lambda: lint_stack(C, 4), "one per layer"),
        (lambda: lint_stack([C, 3], 4), "takes masks"),
        (lambda: lint_stack([C], 4, 2), "kv_len >= q_len"),
        (lambda: lint_stack([masks.Padding([1]), masks.Padding([1, 2])], 4), "batch sizes"),
        (lambda: lint_stack([masks.Documents([3])], 4), "q_len=3"),
    ],
)
def test_bad_stacks(ask, words):
    with pytest.raises(CompositionError, match=words):
        ask()


def test_composition_with_nothing():
    region = C.region(5, 5)
    assert compose(region, Region.empty()) == compose(Region.empty(), region) == Region.empty()
