"""What autograd asks of attention on ranks; the same bits each time; and faults that are seen."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands, make_plan
from attnkit.backends.tiled.backend import Tiled
from attnkit.errors import CompositionError, ExchangeError, KernelContractError
from attnkit.parallel.course import Course, Task
from attnkit.parallel.exchange import Sums
from attnkit.parallel.run import attend
from attnkit.parallel.stages import Stages
from attnkit.parallel.wires import GroupWires, Wires
from tests.parallel.cases import CAUSAL, GALLERY, LENGTH, Case, run_on_threads, worst
from tests.parallel.processes import Pool
from tests.parallel.threads import ThreadWires, run_ranks

EXACT = 1e-12


def t5() -> pse.Pse:
    return pse.T5Relative(4, 8, max_distance=16)


THREE = Case(GALLERY["Longformer"], 3, "random", bias=t5)
TURNED = Case(GALLERY["Longformer"], 4, "random", "hybrid", 2, bias=t5)
both = pytest.mark.parametrize("case", [THREE, TURNED], ids=["needed", "hybrid"])


def ready(case: Case) -> Case:
    """Make what all threads share."""
    for _ in (case.plan.turn, case.expected):
        continue
    return case


def own_leaves(case: Case, rank: int) -> list[Any]:
    """Return a rank's leaves, which ask for the gradients that the whole's do."""
    shardings = case.plan.queries, case.plan.keys, case.plan.keys
    parts = zip(shardings, case.operands.leaves, strict=False)
    leaves: list[Any] = [sharding.take(t.detach(), rank, case.axis) for sharding, t in parts]
    leaves += [None if t is None else t.detach() for t in case.operands.leaves[3:]]
    pairs = zip(leaves, case.operands.leaves, strict=True)
    return [None if a is None else a.clone().requires_grad_(b.requires_grad) for a, b in pairs]


def outcome(case: Case, wires: Wires, leaves: list[Any]) -> tuple[Tensor, Tensor]:
    operands = Operands.of(case.operands.pse, leaves)
    made, stats = attend(case.plan, wires.rank, wires, operands, case.drawn)
    return made, stats.lse


def gradients(case: Case, wires: Wires, leaves: list[Any], made: Any, **how: Any) -> list[Any]:
    asked = [t for t in leaves if t is not None and t.requires_grad]
    slopes = case.own_slopes(wires.rank)
    return list(torch.autograd.grad(made, asked, slopes, **how))


# -- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("ways", [1, 2])
def test_only_some_leaves_ask_for_a_gradient(train: tuple[bool, bool, bool], ways: int) -> None:
    method = "needed" if ways == 1 else "ulysses"
    case = Case(train=train, sink=False, heads_ways=ways, method=method)
    found = run_on_threads(case)
    assert worst(case, found, moved=ways == 1 and any(train[1:])) < EXACT
    if ways == 1 and not any(train[1:]):  # nobody wants the gradients of keys, and none is sent
        least = (case.plan.transfers.forward * 2).tolist()
        assert [one["sent"] for one in found] == least


@both
def test_only_the_bias_and_the_sink_train(case: Case) -> None:
    case = replace(case, train=(False, False, False))
    assert worst(case, run_on_threads(case), moved=False) < EXACT


@both
def test_a_gradient_that_reaches_one_result_only(case: Case) -> None:
    ready(case)

    def work(wires: ThreadWires) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        leaves = own_leaves(case, wires.rank)
        made, slopes = outcome(case, wires, leaves), case.own_slopes(wires.rank)
        keep = {"retain_graph": True}
        apart = [
            torch.autograd.grad(t, leaves, g, **keep) for t, g in zip(made, slopes, strict=True)
        ]
        return list(apart[0]), list(apart[1]), gradients(case, wires, leaves, made)

    for outputs, stats, whole in run_ranks(case.ranks, work):
        for a, b, c in zip(outputs, stats, whole, strict=True):
            torch.testing.assert_close(a + b, c, rtol=0, atol=EXACT)


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_nobody_asks(case: Case, mode: Callable[[], Any]) -> None:
    ready(case)

    def work(wires: ThreadWires) -> Tensor:
        with mode():
            made, lse = outcome(case, wires, own_leaves(case, wires.rank))
        assert not made.requires_grad
        assert not lse.requires_grad
        return made.clone()

    parts = run_ranks(case.ranks, work)
    torch.testing.assert_close(case.whole("output", parts), case.answer[0], rtol=0, atol=EXACT)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_exchanges_again(case: Case, reentrant: bool) -> None:
    ready(case)

    def work(wires: ThreadWires) -> tuple[list[Tensor], list[Tensor], int, int]:
        leaves = own_leaves(case, wires.rank)
        plain = gradients(case, wires, leaves, outcome(case, wires, leaves))
        once = sum(wires.sent)

        def layer(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return outcome(case, wires, list(tensors))

        made = checkpoint(layer, *leaves, use_reentrant=reentrant)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(made, case.own_slopes(wires.rank))
        return plain, [leaf.grad for leaf in leaves], once, sum(wires.sent) - once

    found = run_ranks(case.ranks, work)
    forward = case.plan.transfers.forward.sum(1).tolist()
    for (plain, again, once, more), extra in zip(found, forward, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        assert more == once + extra


@both
def test_autocast_does_not_reach_inside(case: Case) -> None:
    ready(case)

    def work(wires: ThreadWires) -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            return case.work(wires)

    assert worst(case, run_ranks(case.ranks, work)) < EXACT


@both
def test_second_derivatives_are_an_error(case: Case) -> None:
    ready(case)

    def work(wires: ThreadWires) -> None:
        leaves = own_leaves(case, wires.rank)
        found = gradients(case, wires, leaves, outcome(case, wires, leaves), create_graph=True)
        sum(one.sum() for one in found).backward()

    with pytest.raises(KernelContractError, match="no derivative"):
        run_ranks(case.ranks, work)


def test_the_largest_score_is_not_known() -> None:
    case = ready(Case())

    def work(wires: ThreadWires) -> None:
        operands = Operands.of(None, own_leaves(case, wires.rank))
        stats = attend(case.plan, wires.rank, wires, operands)[1]
        with pytest.raises(CompositionError, match=r"use stats\.lse"):
            _ = stats.max

    run_ranks(2, work)


# -- 16 bits -------------------------------------------------------------------------------------


WAYS = [("needed", 1), ("ring", 1), ("gather", 1), ("ulysses", 4), ("hybrid", 2)]
by_all_ways = pytest.mark.parametrize(("method", "ways"), WAYS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_all_ways
def test_sixteen_bits_are_as_exact_as_in_one_process(
    dtype: torch.dtype, method: str, ways: int
) -> None:
    check_sixteen_bits(Case(CAUSAL, 4, method=method, heads_ways=ways, dtype=dtype, sink=False))


@pytest.mark.sweep
@pytest.mark.parametrize("name", GALLERY)
def test_sixteen_bits_of_every_mask(name: str) -> None:
    for sharding, (method, ways) in itertools.product(("random", "even"), WAYS):
        how: dict[str, Any] = {"method": method, "heads_ways": ways, "sink": False}
        case = Case(GALLERY[name], 4, sharding, dtype=torch.bfloat16, **how)
        check_sixteen_bits(case)
        # The fused kernel rounds what each of its calls returns; one process has one such call.
        fused = replace(case, backend="emulated")
        fused.__dict__["one"] = BACKENDS["emulated"], make_plan(case.request, "emulated")
        check_sixteen_bits(fused, most=1.6)


def check_sixteen_bits(case: Case, most: float = 1.1) -> None:
    """Compare the errors of ranks, and of one process, by their squares."""
    exact = replace(case, dtype=torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in case.operands.leaves[:3]]
    exact.__dict__["operands"] = Operands(*leaves)
    exact.__dict__["slopes"] = tuple(t.double() for t in case.slopes)
    found = run_on_threads(case)
    assert [one["sent"] for one in found] == case.told
    for name in ("output", "query", "key", "value"):
        true = exact.expected[name]
        one, many = case.expected[name], case.whole(name, [one[name] for one in found])
        assert many.dtype == case.dtype
        errors = [float((t.double() - true).square().mean().sqrt()) for t in (one, many)]
        assert 0 < errors[1] <= most * errors[0], name


# -- dropout ---------------------------------------------------------------------------------------


@by_all_ways
def test_cells_that_drop_are_those_of_one_process(method: str, ways: int) -> None:
    case = Case(CAUSAL, 4, "random", method, ways, dropout=0.4, sink=False)
    query, key, _, *rest = case.operands.leaves
    cells = torch.eye(LENGTH, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    value = cells.clone().requires_grad_()  # the output is the weight of each cell, or 0
    case.__dict__["operands"] = Operands.of(None, (query, key, value, *rest))
    output = case.whole("output", [one["output"] for one in run_on_threads(case)])
    expected, seen = case.answer[0], CAUSAL.materialize(LENGTH, LENGTH)[0, 0]
    kept = (output != 0).movedim(2, 1)
    assert torch.equal(kept, (expected != 0).movedim(2, 1))
    assert 0.55 < float(kept[..., seen].double().mean()) < 0.65
    torch.testing.assert_close(output, expected, rtol=0, atol=EXACT)


# -- bits that repeat ------------------------------------------------------------------------------


def bits(case: Case, seed: int) -> list[Any]:
    """Return what ranks find that are late by turns."""
    dice = random.Random(seed)
    late = {rank: dice.random() for rank in range(case.ranks)}
    found = run_on_threads(case, lambda rank, what: 0.01 * late[rank] * dice.random())
    return [one[name] for one in found for name in case.expected]


def are_equal(some: list[Any], others: list[Any]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))


SHORT = torch.float32


@pytest.mark.parametrize(
    "case",
    [
        Case(CAUSAL, 4, "random", "gather", dtype=SHORT),
        Case(CAUSAL, 4, "random", stages=2, dtype=SHORT, bias=t5),
        Case(CAUSAL, 4, "random", "ulysses", 4, dtype=SHORT, heads=(4, 1)),
    ],
    ids=["gather", "needed", "ulysses"],
)
def test_bits_repeat_whoever_is_late(case: Case) -> None:
    first = bits(case, 0)
    assert all(are_equal(first, bits(case, seed)) for seed in (1, 2))


# -- faults ----------------------------------------------------------------------------------------


def test_key_gradients_that_arrive_in_another_order_are_seen(monkeypatch: Any) -> None:
    case = Case(CAUSAL, 4, "random", "gather", dtype=SHORT)
    first = bits(case, 0)

    def arrive(self: Sums) -> None:
        if self.coming is not None:
            leg, pending, parts = self.coming
            turned = leg._replace(sends=leg.sends[::-1])
            self.coming = turned, pending, parts[::-1]
            right(self)

    right = Sums._arrive
    monkeypatch.setattr(Sums, "_arrive", arrive)
    assert not are_equal(first, bits(case, 0))


def test_key_gradients_that_stay_away_are_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sums, "_arrive", lambda self: self.coming and self.coming[1].wait())
    assert worst(THREE, run_on_threads(THREE)) > 0.01


def test_cells_that_are_dropped_by_local_positions_are_seen() -> None:
    case = Case(masks.SlidingWindow(9), 3, "random", dropout=0.3)
    right = worst(case, run_on_threads(case))
    for rank in range(3):
        course = Course.of(case.plan, rank)
        legs = [leg._replace(tasks=tuple(map(by_local_position, leg.tasks))) for leg in course.legs]
        case.plan.__dict__["_courses"][rank] = replace(course, legs=tuple(legs))
    assert right < EXACT
    assert worst(case, run_on_threads(case)) > 0.01


def by_local_position(task: Task) -> Task:
    request = task.plan.request
    share = request.share
    assert share is not None
    local = replace(share, rows=(range(request.q_len),), keys=(range(request.kv_len),))
    return task._replace(plan=replace(task.plan, request=replace(request, share=local)))


def test_everything_moved_under_the_name_needed_is_seen() -> None:
    case = Case(masks.SlidingWindow(5), 3)
    told = case.told
    whole = Case(masks.SlidingWindow(5), 3)
    ring = Stages("gather", whole.plan.keys, whole.plan.exchange.seen)
    whole.__dict__["plan"] = replace(whole.plan, exchange=ring)
    found = run_on_threads(whole)
    assert worst(whole, found) < EXACT
    assert [one["sent"] for one in found] != told


def test_a_rank_without_heads_adds_zeros_to_what_trains() -> None:
    # Whoever adds up the gradients of parameters waits for one of each rank.
    case = Case(ranks=3, heads=(2, 2), method="ulysses", heads_ways=3,
                bias=lambda: pse.T5Relative(2, 8, max_distance=16))  # fmt: skip
    found = run_on_threads(case)
    assert worst(case, found) < EXACT
    without = [rank for rank in range(3) if not case.plan.heads(rank)]
    assert len(without) == 1
    assert not found[without[0]]["table"].any()


# -- processes -------------------------------------------------------------------------------------

ON_PROCESSES = {
    "needed": Case(GALLERY["Longformer"], 4, "random"),
    "ring": Case(GALLERY["Packed documents, causal"], 3, "zigzag", "ring", keep=True),
    "hybrid": Case(GALLERY["Prefix LM"], 4, "random", "hybrid", 2, dropout=0.2),
    "few tokens": Case(lengths=(3, 3), ranks=4, method="gather"),
}


# Fused kernels draw of a generator, which threads would share.
DROPS = Case(dropout=0.4, drops="local", backend="emulated", sink=False, ranks=4)
DRAWN = {
    "local dropout": DROPS,
    "local dropout, kept": replace(DROPS, keep=True, bias=t5),
    "local dropout of heads": replace(DROPS, method="hybrid", heads_ways=2),
}


def on_process(group: dist.ProcessGroup, name: str) -> dict[str, Any]:
    case = (ON_PROCESSES | DRAWN)[name]
    case.__dict__["slopes"] = replace(case, dropout=0.0).slopes
    return case.work(GroupWires(group, timeout=120.0))


@pytest.mark.parametrize("name", ON_PROCESSES)
def test_processes_equal_one(processes: Pool, name: str) -> None:
    case = ON_PROCESSES[name]
    assert worst(case, processes.run(on_process, name, ranks=case.ranks)) < EXACT


@pytest.mark.parametrize("name", DRAWN)
def test_local_dropout_drops_the_same_backward(processes: Pool, name: str) -> None:
    case, exact = DRAWN[name], replace(DRAWN[name], dropout=0.0)
    once, twice = (processes.run(on_process, name) for _ in range(2))
    for a, b in zip(once, twice, strict=True):
        assert are_equal([a[key] for key in case.names], [b[key] for key in case.names])
    output, slope = (case.whole(key, [one[key] for one in once]) for key in ("output", "value"))
    assert not torch.allclose(output, exact.answer[0])
    # The output is linear in the values: with the same cells, both sums are over the same terms.
    forward, back = (output * exact.slopes[0]).sum(), (slope * case.operands.value).sum()
    torch.testing.assert_close(back.detach(), forward, rtol=EXACT, atol=EXACT)


def fail_backward(group: dist.ProcessGroup) -> tuple[str, float]:
    wires, start = GroupWires(group, timeout=60.0), time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if wires.rank == 1:
            patch.setattr(Tiled, "partial_gradients", no_room)
        try:
            Case(CAUSAL).work(wires)
        except (ExchangeError, MemoryError) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", 0.0


def no_room(*unused: Any) -> None:
    raise MemoryError("no room for gradients")


def test_what_one_rank_raises_backward_is_told_to_the_others() -> None:
    pool = Pool(2)
    try:
        (waits, took), (raises, _) = pool.run(fail_backward)
    finally:
        pool.close()
    assert raises == "MemoryError: no room for gradients"
    assert waits.startswith("ExchangeError")
    assert "raised MemoryError: no room for gradients" in waits
    assert took < 50
