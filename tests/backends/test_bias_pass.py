"""The gradient of a bias that the fused kernel only reads: a pass over tiles beside the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import Operands, run_plan
from attnkit.backends.bias_pass import KeptCells, PassedPlan
from attnkit.backends.tiled.of_bias import OfBias
from attnkit.errors import KernelContractError
from attnkit.planner import Plan, Request
from attnkit.planner.bias_pass import BiasPass, frozen
from attnkit.planner.calls import widened
from attnkit.planner.lower import _as_given, _with_pass
from attnkit.planner.price import price_of_pass
from attnkit.planner.search import Search
from tests.agreement import agreement, slope_error
from tests.backends.memory import Allocated

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 20, 4, 2, 4
EXACT = 1e-10


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def wide(bias: pse.Pse) -> pse.Pse:
    for tensor in bias.tensors:
        tensor.data = torch.randn(tensor.shape, dtype=torch.float64)
    return bias


def dense(*shape: int, **rest: Any) -> pse.Pse:
    return pse.Dense(parameter(*shape, LENGTH, LENGTH), **rest)


def places(*shape: int) -> Tensor:
    return torch.randint(30, (*shape, LENGTH, LENGTH))


def table(*shape: int) -> pse.Pse:
    return pse.Table(parameter(30, HEADS), places(*shape))


def t5() -> pse.Pse:
    return wide(pse.T5Relative(HEADS, 8, 12, bidirectional=True))


def alibi() -> pse.Pse:
    return wide(pse.ALiBi(HEADS, learnable=True))


BIASES: dict[str, Callable[[], pse.Pse]] = {
    "dense": dense,
    "dense per head": lambda: dense(HEADS),
    "dense per batch": lambda: dense(BATCH, 1),
    "dense per both, before the scale": lambda: dense(BATCH, HEADS, before_scale=True),
    "dense, and constant slopes": lambda: dense(HEADS) + pse.ALiBi(HEADS),
    "dense, and steps": lambda: dense(1, HEADS) + t5(),
    "two that are dense": lambda: dense(BATCH, 1) + dense(HEADS, before_scale=True),
    "table": lambda: table(),
    "table per batch": lambda: table(BATCH),
    "table of one column": lambda: pse.Table(parameter(30, 1), places()) + dense(BATCH, 1),
    "steps": t5,
    "slopes": alibi,
    "keys": lambda: pse.KeyBias(parameter(BATCH, HEADS, LENGTH)),
    "slopes and steps": lambda: alibi() + t5(),
}
BY_DISTANCE = ("steps", "slopes", "slopes and steps")
CAUSAL = masks.Causal()
MASKS: dict[str, masks.Mask] = {
    "full": masks.Full(),
    "causal": CAUSAL,
    "window and first keys": CAUSAL & (masks.SlidingWindow(4) | masks.Columns(0, 2)),
    "documents": CAUSAL & masks.Documents([7, 9, 4]),
    "padding": masks.Padding([20, 13]),
    "rows without keys": CAUSAL & masks.Rows(3, 15),
    "heads": masks.PerHead([CAUSAL, masks.SlidingWindow(6) | masks.Columns(0, 1)] * 2),
    "no region": CAUSAL & masks.Predicate(lambda b, h, i, j: (i + 2 * j) % 3 != 0),
}
LAYOUTS = ("BSND", "BNSD", "BSH", "TND")
LENGTHS = ak.SeqLens([5, 0, 8, 7], [6, 3, 8, 9])


def tensors(layout: str = "BSND", value_dim: int = DIM, sink: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def make(heads: int, dim: int, total: int) -> Tensor:
        shape = {
            "BSND": (BATCH, LENGTH, heads, dim),
            "BNSD": (BATCH, heads, LENGTH, dim),
            "BSH": (BATCH, LENGTH, heads * dim),
            "TND": (total, heads, dim),
        }[layout]
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    keys = LENGTHS.total_kv
    made = [make(HEADS, DIM, LENGTHS.total_q), make(KV_HEADS, DIM, keys)]
    made.append(make(KV_HEADS, value_dim, keys))
    return [*made, parameter(HEADS)] if sink else made


def request_of(bias: pse.Pse, leaves: list[Tensor], **rest: Any) -> Request:
    sink = leaves[3] if leaves[3:] else None
    heads: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    found = ak.plan(*leaves[:3], pse=bias, sink=sink, backend="reference", **heads, **rest)
    return found.request


def passed(request: Request) -> Plan:
    """The plan that has the gradient of all that trains by a pass, whatever it costs."""
    terms = tuple(k for k, term in enumerate(request.bias) if term.requires_grad)
    wide = widened(request)
    found = _with_pass(wide, terms, _as_given(frozen(wide, terms), Search()))
    found = replace(found, request=request, backend="emulated")
    assert found.steps, found.refusals
    found.verify()
    return found


def gradients(found: Any, leaves: list[Tensor]) -> list[Tensor]:
    """What was found, and gradients by it, through the output and through the statistics."""
    out, lse = found.output, found.stats.lse
    dy = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out)
    dlse = torch.linspace(-2, 1, lse.numel(), dtype=torch.float64).view_as(lse)
    return [out.detach(), lse, *torch.autograd.grad((out, lse), leaves, (dy, dlse))]


def check(bias: pse.Pse, leaves: list[Tensor], plan: Plan | None = None, **rest: Any) -> Plan:
    """The pass gives what the reference does, in float64."""
    request = request_of(bias, leaves, **rest)
    trained = [tensor for tensor in bias.tensors if tensor.requires_grad]
    plan, every = plan or passed(request), [*leaves, *trained]
    given = Operands(*leaves[:3], bias, leaves[3] if leaves[3:] else None)
    meant = gradients(run_plan(Plan("reference", request), given), every)
    for one, other in zip(gradients(run_plan(plan, given), every), meant, strict=True):
        torch.testing.assert_close(one, other, atol=EXACT, rtol=0)
    return plan


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", BIASES)
def test_every_gradient_is_the_references(bias: str, mask: str) -> None:
    torch.manual_seed(0)
    leaves = tensors(sink=len(bias + mask) % 2 == 0)  # with and without, by no rule
    check(BIASES[bias](), leaves, mask=MASKS[mask])


# Sequences of unlike lengths have no one matrix: those are in the next test.
IN_LAYOUTS = [(b, one) for b in BIASES for one in LAYOUTS if one != "TND" or b in BY_DISTANCE]


@pytest.mark.parametrize(("bias", "layout"), IN_LAYOUTS)
def test_every_layout(bias: str, layout: str) -> None:
    torch.manual_seed(0)
    packed: dict[str, Any] = {"seqlens": LENGTHS} if layout == "TND" else {}
    for mask in (CAUSAL, masks.Band(6, 3)):
        check(BIASES[bias](), tensors(layout), mask=mask, layout=layout, scale=0.3, **packed)


def test_a_matrix_for_each_packed_sequence() -> None:
    lens = ak.SeqLens([10, 10])
    leaves = [torch.randn(20, n, DIM, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    for shape in ((1, HEADS), (2, HEADS), (2, 1)):
        bias = pse.Dense(parameter(*shape, 10, 10))
        check(bias, leaves, mask=CAUSAL, layout="TND", seqlens=lens)


@pytest.mark.parametrize("value_dim", [2, 7])
def test_values_of_other_dimensions(value_dim: int) -> None:
    check(dense(HEADS), tensors(value_dim=value_dim), mask=CAUSAL)


def test_several_calls_have_one_pass(no_full_masks: None) -> None:
    for name, count in (("window and first keys", 2), ("heads", 3)):
        plan = check(dense(BATCH, HEADS), tensors(), mask=MASKS[name])
        assert len(plan.calls) >= count


def test_channels_and_a_pass_go_together() -> None:
    """In 16 bits no sum of two is a matrix, so one of them is channels."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 2, 16, dtype=torch.bfloat16).requires_grad_()
    table = pse.Dense(nn.Parameter(torch.randn(2, 64, 64).bfloat16()))
    bias = table + pse.T5Relative(2, 8, 12, table=nn.Parameter(torch.randn(8, 2)))
    plan = ak.plan(x, x, x, mask=CAUSAL, pse=bias, backend="emulated")
    plan.verify()
    assert plan.route is not None
    assert plan.bias_pass is not None
    assert plan.bias_pass.terms == (0,)
    agreement([x, x, x], "emulated", mask=CAUSAL, pse=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 70, n, 16, dtype=dtype) for n in (4, 2, 2)]
    bias = pse.Dense(nn.Parameter(torch.randn(4, 70, 70).to(dtype)))
    agreement(given, "emulated", mask=CAUSAL, pse=bias)


# -- dropout -----------------------------------------------------------------------------------


# Padding and cells are made for a batch of two, and calls that merge take regions only.
DROPPING = [
    (mask, layout, merging)
    for mask in ("full", "window and first keys", "heads", "padding", "no region")
    for layout in ("BNSD", "BSH", "TND")
    for merging in (False, True)
    if not (layout == "TND" and mask in ("padding", "no region"))
    and not (merging and mask == "no region")
]


@pytest.mark.parametrize(("mask", "layout", "merging"), DROPPING)
def test_what_dropout_kept_enters(
    mask: str, layout: str, merging: bool, request: pytest.FixtureRequest
) -> None:
    """Against differences of the loss, with the same numbers drawn."""
    if merging:
        request.getfixturevalue("no_full_masks")
    torch.manual_seed(1)
    packed: dict[str, Any] = {"seqlens": LENGTHS} if layout == "TND" else {}
    bias = t5() if layout == "TND" else dense(BATCH, HEADS)
    leaves = tensors(layout)
    asked = request_of(bias, leaves, mask=MASKS[mask], layout=layout, **packed)
    plan = passed(replace(asked, dropout=0.4))
    assert off(plan, bias, leaves) < 1e-6


def off(plan: Plan, bias: pse.Pse, leaves: list[Tensor]) -> float:
    def loss() -> Tensor:
        torch.manual_seed(5)
        return run_plan(plan, Operands(*leaves, bias)).output.sin().sum()

    (table,) = bias.tensors
    return slope_error(loss, table)


def test_a_cell_of_dropout_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nothing was dropped."""
    bias, leaves = dense(BATCH, HEADS), tensors()
    plan = passed(replace(request_of(bias, leaves, mask=CAUSAL), dropout=0.4))
    assert off(plan, bias, leaves) < 1e-6
    tile = KeptCells.tile
    monkeypatch.setattr(KeptCells, "tile", lambda self, *given: tile(self, *given).fill_(1.0))
    assert off(plan, bias, leaves) > 0.01


# -- what is around it -------------------------------------------------------------------------


def test_a_slope_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the gradient that arrives through the output itself is forgotten."""
    monkeypatch.setattr(OfBias, "_delta", lambda self, step, grad: torch.zeros_like(grad[..., :1]))
    with pytest.raises(AssertionError, match="not close"):
        check(dense(HEADS), tensors(), mask=CAUSAL)


def test_what_the_calls_keep_is_not_written_to() -> None:
    bias, leaves = dense(HEADS), tensors()
    plain = ak.attention(*leaves, pse=bias, mask=CAUSAL, backend="emulated")
    meant = torch.autograd.grad(plain.sum(), [*leaves, *bias.tensors])
    out = ak.attention(*leaves, pse=bias, mask=CAUSAL, backend="emulated")
    out *= 1.0  # in place, as a residual is added
    for one, other in zip(
        torch.autograd.grad(out.sum(), [*leaves, *bias.tensors]), meant, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["tiled", "emulated"])
def test_one_tensor_in_two_addends(backend: str) -> None:
    weight, leaves = parameter(HEADS, LENGTH, LENGTH), tensors()
    bias = pse.Dense(weight) + pse.Dense(weight, before_scale=True)
    made = (ak.attention(*leaves, pse=bias, backend=name) for name in (backend, "reference"))
    one, other = (torch.autograd.grad(out.sin().sum(), [weight])[0] for out in made)
    torch.testing.assert_close(one, other, atol=EXACT, rtol=0)


def test_a_bias_alone_may_train() -> None:
    bias, leaves = dense(HEADS), [t.detach() for t in tensors()]
    found = ak.attention(*leaves, pse=bias, mask=CAUSAL, backend="emulated")
    meant = ak.attention(*leaves, pse=bias, mask=CAUSAL, backend="reference")
    one, other = (torch.autograd.grad(t.sin().sum(), bias.tensors)[0] for t in (found, meant))
    torch.testing.assert_close(one, other, atol=EXACT, rtol=0)


def test_a_bias_that_a_model_computes() -> None:
    """Not a leaf; in a checkpoint, and without one."""
    leaves, weight = tensors(), parameter(LENGTH, HEADS)

    def attend(weight: Tensor, *leaves: Tensor) -> Tensor:
        bias = torch.einsum("in,jn->nij", weight, weight)
        given = pse.Dense(bias, validate=False)
        return ak.attention(*leaves, pse=given, mask=CAUSAL, backend="emulated")

    def slopes(made: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(made.sin().sum(), [weight, *leaves])

    meant = slopes(attend(weight, *leaves))
    again = slopes(checkpoint(attend, weight, *leaves, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(again, meant, strict=True))


def test_a_compiled_layer() -> None:
    layer = ak.Attention(HEADS, DIM, num_kv_heads=2, pse=dense(HEADS), backend="emulated")
    leaves = tensors()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    every = [*leaves, *layer.parameters()]
    found, meant = (torch.autograd.grad(f(*leaves).sin().sum(), every) for f in (compiled, layer))
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, atol=EXACT, rtol=0)


def test_second_derivatives_are_an_error() -> None:
    bias, leaves = dense(HEADS), tensors()
    out = ak.attention(*leaves, pse=bias, mask=CAUSAL, backend="emulated")
    (slope,) = torch.autograd.grad(out.sin().sum(), bias.tensors, create_graph=True)
    with pytest.raises(KernelContractError, match="second derivatives"):
        slope.sum().backward()


def test_the_tiles_are_laid_out_once() -> None:
    layer = ak.Attention(HEADS, DIM, pse=dense(HEADS), mask=CAUSAL, backend="emulated")
    x = torch.randn(1, LENGTH, HEADS, DIM, dtype=torch.float64)
    plan = layer.plan(x, x, x)
    assert isinstance(plan, PassedPlan)
    job = plan.job
    layer(x, x, x).sum().backward()
    assert layer.plan(x, x, x) is plan
    assert plan.job is job


# -- the plan ----------------------------------------------------------------------------------


def codes(plan: Plan) -> str:
    with pytest.raises(KernelContractError) as caught:
        plan.verify()
    return caught.value.codes[0]


def test_the_proof_knows_the_pass() -> None:
    bias, leaves = dense(HEADS) + pse.ALiBi(HEADS) + dense(), tensors()
    plan = passed(request_of(bias, leaves, mask=CAUSAL))
    found = plan.bias_pass
    assert found is not None
    assert found.terms == (0, 2)
    for terms in ((), (0,), (2, 0), (0, 1, 2), (0, 2, 3)):
        assert codes(replace(plan, bias_pass=replace(found, terms=terms))) == "pse-gradient"
    assert codes(replace(plan, bias_pass=None)) == "pse-gradient"
    cheaper = replace(found, price=replace(found.price, flops=1))
    assert codes(replace(plan, bias_pass=cheaper)) == "other-pass"
    constant = frozen(plan.request, (0, 2))
    assert codes(replace(plan, request=constant)) == "pse-gradient"
    replace(plan, request=constant, bias_pass=None).verify()


def test_the_pass_is_on_the_plan() -> None:
    bias = dense(HEADS)
    plan = ak.plan(*tensors(), pse=bias, mask=CAUSAL, backend="emulated")
    assert plan.bias_pass == BiasPass.of(plan.request, (0,))
    alone = replace(plan, bias_pass=None)
    assert plan.price is not None
    assert alone.price is not None
    assert plan.price.nanoseconds == alone.price.nanoseconds + plan.bias_pass.price.nanoseconds
    told = " ".join(plan.explain().split())
    assert f"the kernel reads {bias!r} and writes no gradient of it" in told
    data = plan.to_dict()["plan"]["bias_pass"]
    assert data == {"terms": [0], "price": plan.bias_pass.price.to_dict()}


def test_a_pass_costs_the_tiles_of_its_mask() -> None:
    x = torch.empty(1, 4096, 4, 64, device="meta", dtype=torch.bfloat16)

    def cells(mask: masks.Mask) -> float:
        return price_of_pass(ak.plan(x, x, x, mask=mask, backend="emulated").request).tile_cells

    whole = cells(masks.Full())
    assert whole == 4 * 4096**2
    assert 0.5 < cells(CAUSAL) / whole < 0.52
    assert cells(masks.SlidingWindow(256)) / whole < 0.1
    assert cells(masks.PerHead([masks.Full(), CAUSAL, CAUSAL, CAUSAL])) < 0.64 * whole


def test_no_matrix_is_made_for_the_gradient() -> None:
    """Slopes reach the kernel as slopes, and their gradient takes a few tiles."""
    length, heads = 3072, 4
    bias = pse.ALiBi(heads, learnable=True)
    x = torch.randn(1, length, heads, 8).requires_grad_()
    request = ak.plan(x, x, x, mask=CAUSAL, pse=bias, backend="reference").request
    plan, given = passed(request), Operands(x, x, x, bias)
    run_plan(plan, given).output.sum().backward()
    with Allocated() as seen:
        run_plan(plan, given).output.sum().backward()
    assert seen.numbers < heads * length**2 // 8
