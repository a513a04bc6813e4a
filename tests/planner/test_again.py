"""`Plan.at` of fused calls: the form that was found before, filled in and proven anew."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnkit as ak
from attnkit import masks as M
from attnkit import pse
from attnkit.planner import again
from attnkit.planner.lower import on_route, search_for
from attnkit.planner.routes import Route, routes
from attnkit.planner.search import Search

BATCH, SIZE = 3, 12


def heads(length: int, seed: int, count: int = 2) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, count, 4, generator=noise, dtype=torch.float64)


def lengths(rng: random.Random, most: int) -> tuple[int, ...]:
    return tuple(rng.randint(0, most) for _ in range(BATCH))


FAMILIES = {
    "causal, right": lambda n: M.Causal() & M.Padding(n),
    "right": lambda n: M.Padding(n),
    "causal, left": lambda n: M.Causal() & ~M.Prefix(n),
    "window, right": lambda n: M.SlidingWindow(4) & M.Padding(n),
    "prefix-LM": lambda n: M.Causal() | M.Prefix(n),
    "window": lambda n: M.SlidingWindow(1 + n[0]),
    "causal": lambda n: M.Causal(),
    "rows": lambda n: M.Rows(0, max(n) + 1) & M.Causal(),
}


@pytest.mark.parametrize("q_len", [1, 3, SIZE])
@pytest.mark.parametrize("name", FAMILIES)
def test_another_plan_of_a_form_is_its_request_and_the_same_numbers(name: str, q_len: int) -> None:
    rng, made = random.Random(5), FAMILIES[name]
    query, known, again_found = heads(q_len, 0), {}, 0
    for kv_len in [SIZE] * 6 + [SIZE + 1, SIZE + 2, 2 * SIZE]:
        key, value = heads(kv_len, 1), heads(kv_len, 2)
        mask = made(lengths(rng, SIZE))
        first = known.setdefault("plan", ak.plan(query, key, value, mask=mask, backend="emulated"))
        plan = first.at(mask, None, kv_len)
        if plan is None:
            continue
        again_found += plan is not first
        plan.verify()
        assert plan.request == ak.plan(query, key, value, mask=mask, backend="emulated").request
        found = ak.backends.run_plan(plan, ak.backends.Operands(query, key, value, None, None))
        meant = ak.attention(query, key, value, mask=mask, backend="reference")
        torch.testing.assert_close(found.output, meant)
    assert again_found >= 4 or name == "window, right"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_the_masks_it_is_proven_or_none(data: st.DataObject) -> None:
    draw = lambda: data.draw(st.sampled_from(list(FAMILIES.values())))(  # noqa: E731
        tuple(data.draw(st.integers(0, SIZE)) for _ in range(BATCH))
    )
    query, key = heads(5, 0), heads(SIZE, 1)
    first = ak.plan(query, key, key, mask=draw(), backend="emulated")
    mask, kv_len = draw(), data.draw(st.integers(SIZE, 3 * SIZE))
    plan = first.at(mask, None, kv_len)
    assert plan is None or plan.disprove() is None
    if plan is not None:
        assert (plan.request.mask, plan.request.kv_len) == (mask, kv_len)


def test_a_form_that_computes_something_else_is_not_taken() -> None:
    query = heads(SIZE, 0)
    causal = ak.plan(query, query, query, mask=M.Causal(), backend="emulated")
    assert causal.calls[0].sparse_mode in (2, 3)
    assert causal.at(M.Chunked(4), None, SIZE) is None
    assert causal.at(M.Full(), None, SIZE) is None


def test_a_module_searches_once_for_masks_of_a_form() -> None:
    layer = ak.Attention(2, 4, mask=M.Causal(), backend="emulated")
    x = heads(SIZE, 0)
    first = layer.plan(x, x, x, mask=M.Padding((3, 12, 7)))
    second = layer.plan(x, x, x, mask=M.Padding((9, 1, 4)))
    assert [one.code for one in second.refusals] == ["as-before"]
    assert "Padding((3, 12, 7)) of 12 keys, planned before" in second.explain()
    assert layer.plan(x, x, x, mask=M.Padding((9, 1, 4))) is second
    assert "as-before" not in [one.code for one in first.refusals]
    assert layer.plan(x, x, x, mask=M.Padding((3, 12, 7))) is first


@pytest.mark.parametrize("backend", ["emulated", "tiled"])
def test_masks_that_take_turns_find_their_plans_and_steps_do_not_drop_the_form(
    backend: str,
) -> None:
    layer = ak.Attention(2, 4, mask=M.Causal(), backend=backend)
    x = heads(SIZE, 0)
    some = [M.Padding((n, 12, 7)) for n in (3, 5)]
    plans = [layer.plan(x, x, x, mask=mask) for mask in some]
    assert all(layer.plan(x, x, x, mask=m) is p for m, p in zip(some, plans, strict=True))
    for kv_len in range(SIZE, SIZE + 40):
        step = layer.plan(x[:, :1], *[x.new_zeros(BATCH, kv_len, 2, 4)] * 2)
        assert (
            backend == "tiled"
            or kv_len in (SIZE, 2 * SIZE + 1, 4 * SIZE + 3)
            or any(reason.code == "as-before" for reason in step.refusals)
        )
    assert len(layer._plans) <= 16


PACKED = {
    "causal": (M.Causal(), None),
    "full": (M.Full(), None),
    "window": (M.SlidingWindow(5), None),
    "a full mask": (M.Causal() & (M.SlidingWindow(3) | M.Prefix(2)), None),
    "causal, slopes": (M.Causal(), lambda: pse.ALiBi(2)),
    "causal, a table that trains": (M.Causal(), lambda: pse.T5Relative(2, 8, 12, False)),
    "window, slopes that train": (M.SlidingWindow(5), lambda: pse.ALiBi(2, learnable=True)),
}


@pytest.mark.parametrize("name", PACKED)
def test_new_lengths_of_packed_sequences_are_no_search_and_find_the_plan_of_one(name: str) -> None:
    mask, made = PACKED[name]
    bias = None if made is None else made()
    layer = ak.Attention(2, 4, mask=mask, pse=bias, layout="TND", backend="emulated").double()
    rng, again_found = random.Random(3), 0
    for _ in range(5):
        lens = ak.SeqLens([rng.randint(9, 15) for _ in range(rng.randint(5, 7))])
        x = torch.randn(lens.total_q, 2, 4, dtype=torch.float64, requires_grad=True)
        plan = layer.plan(x, x, x, seqlens=lens)
        fresh = ak.plan(
            x, x, x, mask=mask, pse=bias, layout="TND", seqlens=lens, backend="emulated"
        )
        assert plan.request == fresh.request
        assert (plan.steps, plan.route) == (fresh.steps, fresh.route)
        assert layer.plan(x, x, x, seqlens=lens) is plan
        again_found += any(reason.code == "as-before" for reason in plan.refusals)
        meant = ak.attention(
            x, x, x, mask=mask, pse=bias, layout="TND", seqlens=lens, backend="reference"
        )
        torch.testing.assert_close(layer(x, x, x, seqlens=lens), meant)
    assert again_found == 4


def test_zones_of_distances_are_filled_in_anew_and_compute_the_same() -> None:
    bias = pse.T5Relative(2, 8, 12, False)
    (table,) = bias.tensors
    table.data = torch.randn(table.shape, dtype=torch.float64)
    x = [heads(SIZE, k).requires_grad_() for k in range(3)]
    first = ak.plan(*x, mask=M.Causal() & M.Padding((12, 5, 9)), pse=bias, backend="emulated")
    ways = [way for way in routes(first.request) if isinstance(way, Route) and way.zones]
    again_found = 0
    for way in ways:
        plan = replace(on_route(first.request, way, Search()), backend="emulated")
        for rest in (M.Padding((7, 12, 1)), M.Padding((12, 6, 8)), M.SlidingWindow(7)):
            mask = M.Causal() & rest
            found = plan.at(mask, bias, SIZE)
            if found is None:
                continue
            again_found += 1
            assert found.route is not None
            assert found.route.zones
            tensors = [*x, table]
            got = ak.backends.run_plan(found, ak.backends.Operands(*x, bias, None)).output
            meant = ak.attention(*x, mask=mask, pse=bias, backend="reference")
            torch.testing.assert_close(got, meant)
            for one, other in zip(
                torch.autograd.grad(got.square().sum(), tensors),
                torch.autograd.grad(meant.square().sum(), tensors),
                strict=True,
            ):
                torch.testing.assert_close(one, other)
    assert again_found >= 4


def test_documents_of_new_lengths_find_their_zones_again() -> None:
    bias = pse.T5Relative(8, bidirectional=False)
    layer = ak.Attention(8, 64, mask=M.Causal(), pse=bias, backend="emulated")
    x = torch.empty(1, 4096, 8, 64, device="meta")
    plans = [layer.plan(x, x, x, mask=M.Documents((n, 2000, 2096 - n))) for n in (900, 1010, 800)]
    assert all(plan.route is not None and plan.route.zones for plan in plans)
    assert [any(r.code == "as-before" for r in plan.refusals) for plan in plans] == [
        False,
        *[True] * 2,
    ]
    for plan in plans[1:]:
        fresh = search_for(plan.request, Search())
        assert (plan.steps, plan.route) == (fresh.steps, fresh.route)


def test_packed_lengths_that_do_not_fit_the_tokens_are_refused_with_a_plan_at_hand() -> None:
    layer = ak.Attention(2, 4, mask=M.Causal(), layout="TND", backend="emulated")
    x = torch.randn(12, 2, 4)
    layer.plan(x, x, x, seqlens=ak.SeqLens([5, 7]))
    for lens in (ak.SeqLens([5, 8]), ak.SeqLens([5, 7], [5, 6]), None):
        with pytest.raises(ak.errors.CompositionError):
            layer.plan(x, x, x, seqlens=lens)
    dense = ak.Attention(2, 4, mask=M.Causal(), backend="emulated")
    dense.plan(x[None], x[None], x[None])
    with pytest.raises(ak.errors.CompositionError):
        dense.plan(x[None], x[None], x[None], seqlens=ak.SeqLens([12]))


def test_many_more_keys_are_a_search() -> None:
    query, key = heads(1, 0), heads(SIZE, 1)
    first = ak.plan(query, key, key, mask=M.Causal(), backend="emulated")
    assert first.at(M.Causal(), None, 2 * SIZE) is not None
    assert first.at(M.Causal(), None, 2 * SIZE + 1) is None
    assert first.at(M.Causal(), None, SIZE // 2 - 1) is None


def test_much_longer_sequences_are_a_search() -> None:
    layer = ak.Attention(2, 4, mask=M.Causal(), layout="TND", backend="emulated")
    for lens, searched in (([8] * 4, True), ([8, 16, 4, 4], False), ([2, 2, 2, 17], True)):
        x = torch.randn(sum(lens), 2, 4)
        plan = layer.plan(x, x, x, seqlens=ak.SeqLens(lens))
        assert searched == ("as-before" not in [reason.code for reason in plan.refusals])


def test_training_with_new_lengths_in_every_step_has_the_gradients_of_the_definition() -> None:
    layer = ak.Attention(2, 4, mask=M.Causal(), backend="emulated")
    for step in range(4):
        mask = M.Padding(lengths(random.Random(step), SIZE))
        given_ = [heads(SIZE, step + k).requires_grad_() for k in range(3)]
        meant_ = [one.detach().clone().requires_grad_() for one in given_]
        found = layer(*given_, mask=mask)
        meant = ak.attention(*meant_, mask=M.Causal() & mask, backend="reference")
        found.square().sum().backward()
        meant.square().sum().backward()
        for one, other in zip([found, *given_], [meant, *meant_], strict=True):
            a, b = (one, other) if one is found else (one.grad, other.grad)
            torch.testing.assert_close(a, b)


def test_a_call_changed_by_hand_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    query = heads(SIZE, 0)
    first = ak.plan(
        query, query, query, mask=M.Causal() & M.Padding((3, 12, 7)), backend="emulated"
    )
    taken = again._like

    def other(*some: object) -> object:
        for route, (one,) in taken(*some):  # type: ignore[arg-type]
            yield route, (replace(one, call=replace(one.call, scale=2.0)),)

    monkeypatch.setattr(again, "_like", other)
    assert first.at(M.Causal() & M.Padding((4, 1, 2)), None, SIZE) is None
