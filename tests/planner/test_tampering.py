"""Plans changed by hand, every field of every record: caught, or the numbers are the same.

A mutant differs from a proven plan in one field, at any depth: of the plan, a step, its call, a
tensor's description, its form, a block, a zone, the route or the request. Its value is that of
another plan, a neighbour, or of another kind altogether. Nothing here knows what a field means:
`Plan.verify` raises its own error, or the mutant runs and is the definition of its request.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.backends import BACKENDS, run_plan
from attnkit.backends.base import Operands
from attnkit.planner import Plan
from attnkit.planner.calls import Block, bare_call

HEADS = 2
Tensors = tuple[Tensor, ...]


# -- plans -----------------------------------------------------------------------------------


def a_mask(chance: random.Random, q_len: int, kv_len: int, batch: int, packed: bool) -> masks.Mask:
    align = chance.choice(["bottom_right", "top_left"])
    short = st_length(chance, kv_len)
    some = [
        masks.Full(),
        masks.Causal(align),
        masks.SlidingWindow(chance.randint(1, 4), align),
        masks.Band(chance.choice([None, 1, 2]), chance.choice([None, -1, 0, 2]), align),
        masks.PrefixLM(chance.randint(0, 4)),
        masks.Causal() & (masks.SlidingWindow(2) | masks.Columns(0, 2)),
        masks.Band(1, 1) | masks.Columns(0, 1) | masks.Rows(0, 1),
        masks.Chunked(3) & masks.Causal(),
        masks.BlockCausal(3),
        masks.BlockCausal(3) & masks.Keys([(0, 1), (2, None)]),
        masks.Dilated(2) & masks.SlidingWindow(5),
        masks.Dilated(2),
        masks.Rows(1, 3),
        masks.Predicate(lambda b, h, i, j: (i + 2 * j) % 3 != 0),
        masks.PerHead([masks.Causal(), masks.SlidingWindow(2)]),
        masks.PerHead([masks.SlidingWindow(2) | masks.Columns(0, 1), masks.Rows(0, 2)]),
    ]
    if not packed:
        cells = torch.tensor([chance.random() < 0.6 for _ in range(q_len * kv_len)])
        some += [
            masks.Padding([short] * batch) & masks.Causal(),
            masks.Padding([st_length(chance, kv_len) for _ in range(batch)]),
            masks.Dense.keep(cells.view(q_len, kv_len)),
        ]
        if q_len == kv_len > 3:
            some.append(masks.Documents((3, q_len - 3)) & chance.choice(some[:3]))
    return chance.choice(some)


def st_length(chance: random.Random, longest: int) -> int:
    return chance.randint(0, longest)


def a_bias(chance: random.Random, q_len: int, kv_len: int, packed: bool) -> pse.Pse | None:
    wide: dict[str, Any] = {"dtype": torch.float64}
    align = chance.choice(["bottom_right", "top_left"])

    def t5() -> pse.Pse:
        table = torch.randn(8, HEADS, **wide)
        return pse.T5Relative(HEADS, 8, 6, bidirectional=False, table=table)

    some: list[pse.Pse | None] = [
        None,
        None,
        pse.ALiBi(HEADS, align=align),
        pse.SqrtALiBi(HEADS, align=align),
        pse.ALiBi(HEADS, learnable=True),
        t5(),
        t5() + pse.ALiBi(HEADS),
    ]
    if not packed:
        table = pse.Dense(
            torch.randn(HEADS, q_len, kv_len, **wide), before_scale=align == "top_left"
        )
        keys = pse.KeyBias(nn.Parameter(torch.randn(kv_len, **wide)))
        trained = pse.Dense(nn.Parameter(torch.randn(1, HEADS, q_len, kv_len, **wide)))
        some += [table, keys, keys + pse.SqrtALiBi(HEADS), trained, trained + t5()]
    return chance.choice(some)


def make(seed: int) -> tuple[Plan, pse.Pse | None] | None:
    """A random plan of the emulated backend, and its bias; None where it is refused."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    layout = chance.choice([*layouts.LAYOUTS][:5])
    packed, batch = layouts.get(layout).packed, chance.choice([1, 2])
    seqlens = None
    q_len = chance.choice([1, 4, 6, 7])
    kv_len = chance.choice([q_len, q_len, 3, 7])
    if packed:
        q_lens = [chance.choice([2, 4, 5]) for _ in range(batch)]
        seqlens = ak.SeqLens(q_lens, [q + chance.choice([0, 0, 2]) for q in q_lens])
        q_len, kv_len = seqlens.total_q, seqlens.total_kv
    kv_heads = chance.choice([1, HEADS])
    shapes = (
        (q_len, HEADS, 4),
        (kv_len, kv_heads, 4),
        (kv_len, kv_heads, chance.choice([4, 2, 6])),
    )
    form, rows = layouts.get(layout), 1 if packed else batch
    tensors = [
        torch.randn(form.shape(layouts.Sizes(rows, *shape)), dtype=torch.float64)
        for shape in shapes
    ]
    bias = a_bias(chance, q_len, kv_len, packed)
    try:
        plan = ak.plan(
            *(t.requires_grad_() for t in tensors),
            mask=a_mask(chance, q_len, kv_len, batch, packed),
            pse=bias,
            layout=layout,
            seqlens=seqlens,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            sink=torch.zeros(HEADS, dtype=torch.float64) if chance.random() < 0.2 else None,
            scale=chance.choice([None, 0.3, -1.0]),
            backend="emulated",
        )
    except ak.BackendRefused:
        return None
    return plan, bias


# -- mutants ---------------------------------------------------------------------------------

Pool = dict[tuple[type, str], list[Any]]


def pool_of(plans: list[Plan]) -> Pool:
    """Every value that some plan has in a field, by class and field."""
    found: Pool = defaultdict(list)

    def walk(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                walk(item)
        elif is_dataclass(value) and not isinstance(value, masks.Mask | type):
            for item in fields(value):
                inside = getattr(value, item.name)
                if inside not in found[type(value), item.name]:
                    found[type(value), item.name].append(inside)
                walk(inside)

    for plan in plans:
        walk(replace(plan, refusals=(), passed_over=(), alternatives=()))
    return found


def changes(value: Any, known: list[Any], pool: Pool, chance: random.Random) -> Iterator[Any]:
    """Values that a field might have instead."""
    yield from chance.sample(known, min(2, len(known)))
    yield chance.choice([None, "?", -1, 3.5, ()])
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value - 1, value + 2**40)
    elif isinstance(value, float):
        yield from (value * 1.5, -value, 0.0, float("nan"))
    elif isinstance(value, range):
        yield from (value[::-1], value[1:], value[:0], value[::2])
        yield from (range(value.start + n, value.stop + n, value.step) for n in (1, -1))
    elif isinstance(value, tuple) and value:
        at = chance.randrange(len(value))
        yield from (value[:-1], value[1:], value[::-1], (*value, value[0]))
        yield (*value[:at], value[0], *value[at + 1 :])
        for one in changes(value[at], [], pool, chance):
            yield (*value[:at], one, *value[at + 1 :])
    elif is_dataclass(value) and not isinstance(value, masks.Mask | type):
        yield from mutants(value, pool, chance)


def mutants(record: Any, pool: Pool, chance: random.Random) -> Iterator[Any]:
    """The record with one of its fields changed, every field in turn."""
    for item in fields(record):
        value = getattr(record, item.name)
        if not item.init or item.name in ("refusals", "passed_over", "alternatives", "device"):
            continue  # what was not done, and where
        for one in changes(value, pool.get((type(record), item.name), []), pool, chance):
            try:
                mutant = replace(record, **{item.name: one})
            except (ak.errors.AttnkitError, TypeError, ValueError, ArithmeticError):
                continue  # a record that checks itself
            yield mutant


# -- what they compute -----------------------------------------------------------------------


def run(plan: Plan, backend: str, tensors: Tensors, bias: pse.Pse | None) -> Tensors:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    given = Operands(*leaves[:3], bias, leaves[3] if plan.request.sink else None)
    found = BACKENDS[backend].run(plan, given) if backend == "reference" else run_plan(plan, given)
    wanted = [*leaves, *(bias.tensors if bias is not None else ())]
    wanted = [leaf for leaf in wanted if leaf.requires_grad]
    slope = torch.linspace(-1, 1, found.output.numel(), dtype=torch.float64)
    grads = torch.autograd.grad(
        found.output, wanted, slope.view_as(found.output), allow_unused=True
    )
    zeros = (torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))
    return found.output.detach(), found.stats.lse.detach(), *zeros


@cache
def tensors_of(shapes: tuple[tuple[int, ...], ...], heads: int) -> Tensors:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (heads,)))


def is_caught(mutant: Plan) -> bool:
    found: list[ak.KernelContractError] = []
    try:
        mutant.verify()
    except ak.KernelContractError as error:
        found.append(error)
    assert all(error.codes and len(str(error)) < 2000 for error in found)
    return bool(found)


def judge(mutant: Plan, bias: pse.Pse | None) -> str:
    """Return "caught" or "same"; anything else is a failure."""
    if is_caught(mutant):
        return "caught"
    if mutant.request.dropout or mutant.backend == "ascend":
        return "not run"
    request = mutant.request
    tensors = tensors_of(request.shapes(), request.num_heads)
    meant = run(Plan("reference", request), "reference", tensors, bias)
    found = run(mutant, mutant.backend, tensors, bias)
    for one, other in zip(found, meant, strict=True):
        near = 1e-9 if other.dtype == torch.float64 else 1e-5  # learnable slopes are float32
        torch.testing.assert_close(one, other, rtol=near, atol=near)
    return "same"


def campaign(seeds: range, share: float) -> Counter[str]:
    plans = [found for found in map(make, seeds) if found is not None]
    pool, tally = pool_of([plan for plan, _ in plans]), Counter[str]()
    chance = random.Random(seeds.start)
    for plan, bias in plans:
        assert judge(plan, bias) in ("same", "not run"), plan
        tally["plans"] += 1
        for mutant in mutants(plan, pool, chance):
            if mutant == plan or chance.random() > share:
                continue
            try:
                tally[judge(mutant, bias)] += 1
            except Exception as error:
                raise AssertionError(
                    f"passed, and then: {error!r}\n{told(plan, mutant)}"
                ) from error
    return tally


def told(one: Any, other: Any, path: str = "plan") -> str:
    """Where two records differ."""
    if type(one) is type(other) and is_dataclass(one) and not isinstance(one, masks.Mask):
        names = [f.name for f in fields(one)]
        parts = [(getattr(one, n), getattr(other, n), f"{path}.{n}") for n in names]
        return "\n".join(told(a, b, where) for a, b, where in parts if a != b)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return "\n".join(told(a, b, f"{path}[{k}]") for k, (a, b) in pairs if a != b)
    return f"{path}: {one!r} -> {other!r}"


@pytest.mark.parametrize("merging", [False, True])
def test_a_field_changed_by_hand_is_caught_or_changes_no_number(
    merging: bool, request: pytest.FixtureRequest
) -> None:
    if merging:
        request.getfixturevalue("no_full_masks")
    tally = campaign(range(16), share=0.2)
    assert tally["plans"] >= 14
    assert tally["caught"] > 3 * tally["same"] > 300, tally


@pytest.mark.sweep
@pytest.mark.parametrize("merging", [False, True])
def test_every_field_of_many_plans(merging: bool, request: pytest.FixtureRequest) -> None:
    if merging:
        request.getfixturevalue("no_full_masks")
    tally = Counter[str]()
    for start in range(10_000 + 1_000 * merging, 10_320 + 1_000 * merging, 40):
        tally += campaign(range(start, start + 40), share=0.3)
    print(tally)
    assert tally["plans"] >= 300
    assert tally["caught"] > 3 * tally["same"] > 3_000, tally


# -- holes that there were ---------------------------------------------------------------------

SINK = masks.Causal() & (masks.SlidingWindow(4) | masks.Columns(0, 2))


def one_step(plan: Plan, other: dict[str, Any] | None = None, **call: Any) -> Plan:
    (step,) = plan.steps
    step = replace(step, call=replace(step.call, **call), **(other or {}))
    return replace(plan, steps=(step,))


def plan_of(mask: masks.Mask, bias: pse.Pse | None = None, **rest: Any) -> Plan:
    x = torch.empty(1, 8, HEADS, 4, device="meta")
    return ak.plan(x, x, x, mask=mask, pse=bias, backend="emulated", **rest)


def caught(plan: Plan) -> str:
    with pytest.raises(ak.KernelContractError, match="does not compute") as error:
        plan.verify()
    return error.value.codes[0]


def test_the_kind_of_a_bias_is_proven() -> None:
    sqrt, dense = pse.SqrtALiBi(HEADS), pse.Dense(torch.zeros(HEADS, 8, 8, device="meta"))
    assert caught(one_step(plan_of(masks.Causal(), sqrt), pse_type=2)) == "other-bias"
    assert caught(one_step(plan_of(masks.Causal(), pse.ALiBi(HEADS)), pse_type=3)) == "other-bias"
    for kind in (1, 2, -1):
        assert caught(one_step(plan_of(masks.Causal(), dense), pse_type=kind))


def test_a_plan_of_calls_has_calls() -> None:
    assert caught(replace(plan_of(masks.Causal()), steps=())) == "no-calls"
    whole = ak.plan(*3 * [torch.empty(1, 8, HEADS, 4)], backend="tiled")
    assert caught(replace(whole, backend="emulated")) == "no-calls"
    assert caught(replace(plan_of(masks.Causal()), backend="tiled")) == "other-backend"
    assert caught(replace(plan_of(masks.Causal()), backend="none")) == "other-backend"


def test_the_mask_of_a_request_of_unknown_cells_is_its_own() -> None:
    plan = plan_of(masks.Predicate(lambda b, h, i, j: i != j))
    (call,) = plan.calls
    assert caught(one_step(plan, atten_mask=None, inner_precise=0)) == "cover"
    known = replace(call.atten_mask, regions=(masks.Full().region(8, 8),))
    assert caught(one_step(plan, atten_mask=known)) == "cover"
    assert caught(one_step(plan, atten_mask=replace(call.atten_mask, shape=(9, 8)))) == "mask-shape"


@pytest.mark.usefixtures("no_full_masks")
def test_a_part_leaves_no_row_without_a_key() -> None:
    """Its maximum there is a number like any other to the merge."""
    plan = plan_of(SINK)
    first, *rest = plan.steps
    assert first.partial
    assert not first.call.inner_precise
    step = replace(first, call=replace(first.call, inner_precise=2))
    assert caught(replace(plan, steps=(step, *rest))) == "mean-of-values"
    assert caught(replace(plan, steps=(*plan.steps, first))) == "cover"


@pytest.mark.usefixtures("no_full_masks")
def test_where_the_tokens_of_a_batch_element_begin_is_proven() -> None:
    plan = plan_of(SINK)
    first, *rest = plan.steps
    for starts in (((1, 9), (0, 8)), ((0, 8), (0, 9)), ((0,), (0,)), None):
        moved = replace(first, starts=starts)  # type: ignore[arg-type]
        assert caught(replace(plan, steps=(moved, *rest))) == "misplaced"


def test_what_cannot_be_read_is_not_proven() -> None:
    plan = plan_of(masks.Causal())
    for fault in (
        one_step(plan, {"blocks": None}),
        one_step(plan, query=None),
        one_step(plan, atten_mask=3),
        one_step(plan, sparse_mode=None),
        replace(plan, request=None),
        replace(plan, steps=(None,)),
        replace(plan, in_order=plan.request),
        replace(plan, back=None),
    ):
        assert caught(fault)  # type: ignore[arg-type]


# -- keys from several places ------------------------------------------------------------------


def gathered(batch: int = 1) -> Plan:
    """Two sequences in each batch element, of which the first has rows and keys from two places."""
    x = torch.empty(batch, 8, HEADS, 4, device="meta", requires_grad=True)
    runs = [[(0, 2), (1, 4), (0, 2)], [(0, 3), (1, 4), (0, 1)]][:batch]
    plan = ak.plan(x, x, x, mask=masks.SameId(runs), backend="emulated")
    ends = (range(2), range(6, 8))
    meant = (Block(0, ends, ends), Block.at(0, 2, 6, 2, 6))
    ways = (way.launches for way in (plan.solution, *plan.alternatives))
    way = next(way for way in ways if len(way) == 1 and way[0].blocks[:2] == meant)
    assert way[0].call.atten_mask is None
    plan = replace(plan, steps=way)
    plan.verify()
    return plan


def with_block(plan: Plan, at: int = 0, **changed: Any) -> Plan:
    blocks = list(plan.steps[0].blocks)
    blocks[at] = replace(blocks[at], **changed)
    return one_step(plan, {"blocks": tuple(blocks)})


@pytest.mark.usefixtures("no_full_masks")
@pytest.mark.parametrize("side", ["rows", "keys"])
def test_rows_and_keys_of_a_gathered_sequence_are_proven(side: str) -> None:
    plan = gathered()
    for ranges, code in (
        ((range(2), range(2)), "misplaced"),  # twice
        ((range(2), range(1, 3)), "misplaced"),
        ((range(3), range(2, 3)), "misplaced"),
        ((range(2), range(7, 9)), "misplaced"),  # outside
        ((range(-2, 0), range(6, 8)), "misplaced"),
        ((range(2), range(6, 10, 2)), "misplaced"),  # not side by side
        ((range(2), range(0), range(6, 8)), "misplaced"),
        ((range(2), range(5, 7)), "cover"),  # another one
        ((range(1, 3), range(6, 8)), "cover"),
        ((range(2), range(6, 7)), "misplaced"),  # one is missing
        ((range(2), (6, 7)), "unreadable"),
    ):
        assert caught(with_block(plan, **{side: ranges})) == code, ranges
    # Without a mask rows and keys come in any order, as long as it is that of the answers.
    ends = (range(7, 5, -1), range(2))
    with_block(plan, **{side: ends}).verify()


@pytest.mark.usefixtures("no_full_masks")
def test_a_gathered_sequence_is_of_one_batch_element() -> None:
    plan = gathered(2)
    assert [block.batch for block in plan.steps[0].blocks] == [0, 0, 1, 1]
    assert caught(with_block(plan, batch=1)) == "cover"
    for batch in (2, -1, None):
        assert caught(with_block(plan, batch=batch)) == "misplaced"


@pytest.mark.usefixtures("no_full_masks")
def test_every_row_is_in_a_gathered_sequence() -> None:
    plan = gathered()
    (step,) = plan.steps
    assert caught(one_step(plan, {"blocks": step.blocks[:1]})) == "misplaced"
    part = (HEADS, HEADS)
    for some in (step.blocks[:1], step.blocks + step.blocks[:1]):
        call = bare_call(plan.request, "TND", some, part)
        targets = (step.targets * 2)[: len(some)]
        launch = replace(step, call=call, blocks=some, targets=targets)
        assert caught(replace(plan, steps=(launch,))) == "cover"


@pytest.mark.usefixtures("no_full_masks")
@pytest.mark.parametrize(("length", "window"), [(64, 16), (4096, 1024)])
def test_the_order_of_rows_and_keys_under_a_window_is_proven(length: int, window: int) -> None:
    """A window cuts what stands at the ends; images are looked at by rows, and long ones whole."""
    x = torch.empty(1, length, HEADS, 4, device="meta", requires_grad=True)
    mask = masks.Causal() & (masks.SlidingWindow(window) | masks.Prefix(2))
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    ways = (way.launches for way in (plan.solution, *plan.alternatives))
    slides = (way for way in ways if len(way) == 1 and way[0].call.sparse_mode == 4)
    plan = replace(plan, steps=next(slides))
    plan.verify()
    blocks = plan.steps[0].blocks
    at = next(k for k, one in enumerate(blocks) if len(one.keys) > 1)
    rows, keys = blocks[at].rows, blocks[at].keys
    for wrong in (
        {"keys": keys[::-1]},
        {"keys": (*keys[:-1], keys[-1][::-1])},
        {"rows": tuple(one[::-1] for one in rows[::-1])},
        {"rows": blocks[0].rows},
    ):
        assert caught(with_block(plan, at, **wrong)) in ("cover", "misplaced"), wrong
