"""Plans inside graphs: one operator for every backend, and nothing that outlives its graph."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands, make_plan
from attnkit.backends.graph import Terms, _attend, hold
from attnkit.backends.tiled import TiledPlan
from attnkit.errors import CompositionError
from attnkit.handles import _VALUES, number_of
from attnkit.planner import lower

WINDOW = masks.Causal() & masks.SlidingWindow(9)


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def words(roles: str, backend: str = "auto", grads: int = 0) -> str:
    return Terms(
        roles, "BNSD", grads=(True,) * grads + (False,) * (3 - grads), backend=backend
    ).text()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_the_operator_keeps_its_contract(backend: str) -> None:
    x, mask = torch.randn(1, 2, 20, 8), masks.SlidingWindow(3)
    operands = [x.clone().requires_grad_(), x, x]
    torch.library.opcheck(
        _attend,
        (operands, None, [mask._handle], words("m", backend, 1), True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_dropout_in_a_graph() -> None:
    x = torch.randn(1, 2, 48, 16).requires_grad_()
    for backend in ("tiled", "reference", "emulated"):
        call = compiled(
            lambda x, name=backend: ak.attention(x, x, x, layout="BNSD", dropout=0.5, backend=name)
        )
        torch.manual_seed(0)
        one, two = call(x), call(x)
        torch.manual_seed(0)
        assert torch.equal(one, call(x))
        assert not torch.equal(one, two)
        (grad,) = torch.autograd.grad(one.sum(), x)
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("move", ["double", "half", "assign", "deepcopy"])
def test_a_bias_whose_tensors_are_replaced(move: str) -> None:
    """A module is moved or loaded before its first call, and that is in the graph."""
    for bias in (pse.Dense(torch.randn(6, 6)), pse.ALiBi(2, learnable=True), pse.T5Relative(2)):
        layer = ak.Attention(2, 8, pse=bias + pse.KeyBias(torch.randn(6)))
        dtype = {"double": torch.float64, "half": torch.float16}.get(move, torch.float32)
        layer = layer.to(dtype)
        if move == "assign":
            loaded = {name: torch.randn_like(p) for name, p in layer.state_dict().items()}
            layer.load_state_dict(loaded, assign=True)
        if move == "deepcopy":
            layer = copy.deepcopy(layer)
        y = torch.randn(1, 6, 2, 8, dtype=dtype)
        found = compiled(layer)(y, y, y)
        torch.testing.assert_close(found, layer(y, y, y))


def test_gradients_through_statistics_in_a_graph() -> None:
    x, sink = torch.randn(1, 12, 2, 8, dtype=torch.float64).requires_grad_(), torch.zeros(2)
    for backend, bias in (
        ("tiled", pse.T5Relative(2)),
        ("emulated", pse.ALiBi(2)),
        ("reference", None),
    ):

        def call(x: Tensor, name: str = backend, bias: Any = bias) -> Tensor:
            found = ak.attention(
                x, x, x, mask=WINDOW, pse=bias, sink=sink, backend=name, return_stats=True
            )
            assert isinstance(found, ak.AttentionOutput)
            return found.output.sin().sum() + found.stats.lse.square().sum() + found.stats.max.sum()

        both = (call(x), compiled(call)(x))
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(total, x)[0] for total in both))


def test_statistics_that_nobody_differentiates_cost_nothing_in_a_graph() -> None:
    """Their gradient arrives as zeros, and torch's kernel still makes the others in one call."""
    x = torch.randn(1, 2, 20, 8, requires_grad=True)
    plan = ak.plan(x, x, x, layout="BNSD", mask=masks.Causal(), backend="tiled")
    assert isinstance(plan, TiledPlan)
    value = torch.tensor([number_of(hold(plan, None))])
    output, lse, _ = _attend([x, x, x], None, [value], words("p"), True)
    found = torch.autograd.grad((output, lse), x, (torch.ones_like(output), torch.zeros_like(lse)))
    assert "by_blocks" not in vars(plan.job)
    output, lse, _ = _attend([x, x, x], None, [value], words("p"), True)
    meant = torch.autograd.grad((output, lse), x, (torch.ones_like(output), lse * 1e-30))
    assert "by_blocks" in vars(plan.job)
    torch.testing.assert_close(found, meant)


@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
def test_no_keys_and_no_rows_in_a_graph(backend: str) -> None:
    for q_len, kv_len in ((4, 0), (0, 4), (0, 0)):
        q, k = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (q_len, kv_len))

        def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found = ak.attention(q, k, k, layout="BNSD", backend=backend, return_stats=True)
            return found.output, found.stats.lse, found.stats.max

        found = compiled(call)(q, k)
        for mine, right in zip(found, call(q, k), strict=True):
            assert torch.equal(mine, right)
        slopes = torch.autograd.grad(found[:2], (q, k), [torch.ones_like(t) for t in found[:2]])
        assert not any(slope.any() for slope in slopes)


# -- values and lifetimes ----------------------------------------------------------------------


def test_plans_are_values() -> None:
    x = torch.randn(1, 2, 20, 8)
    plan = ak.plan(x, x, x, layout="BNSD", mask=WINDOW, backend="tiled")
    assert isinstance(plan, TiledPlan)
    hold(plan, None)
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert hash(twin) == hash(plan)
        found, meant = (BACKENDS["tiled"].run(p, Operands(x, x, x)).output for p in (twin, plan))
        assert torch.equal(found, meant)


ELSEWHERE = """
import pickle, sys
import torch
import attnkit as ak
from attnkit import masks
from attnkit.backends import Operands, run_plan

x = torch.randn(1, 16, 2, 8, generator=torch.Generator().manual_seed(0))
widths = [masks.SlidingWindow(width) for width in (2, 3, 4)]  # whose numbers are others' there
plan, mask, bias, lengths = pickle.load(open(sys.argv[1], "rb"))
call = lambda x: ak.attention(x, x, x, mask=mask, pse=bias)
packed = lambda x: ak.attention(x, x, x, layout="TND", seqlens=lengths)
made = [run_plan(plan, Operands(x, x, x)).output]
for form, given in ((call, x), (packed, x[0])):
    made.append(torch.compile(form, backend="eager", fullgraph=True)(given))
torch.save(made, sys.argv[2])
"""


def test_values_mean_the_same_in_another_process(tmp_path: Path) -> None:
    x = torch.randn(1, 16, 2, 8, generator=torch.Generator().manual_seed(0))
    mask, bias, lengths = (
        masks.SlidingWindow(5),
        pse.KeyBias(torch.arange(16.0)),
        ak.SeqLens([4, 12]),
    )
    plan = ak.plan(x, x, x, mask=mask, backend="tiled")
    hold(plan, None)
    compiled(lambda x, mask, bias: ak.attention(x, x, x, mask=mask, pse=bias))(x, mask, bias)
    given, made = tmp_path / "plan", tmp_path / "output"
    given.write_bytes(pickle.dumps((plan, mask, bias, lengths)))
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(given), str(made)], check=True)
    meant = [
        ak.attention(x, x, x, mask=mask),
        ak.attention(x, x, x, mask=mask, pse=bias),
        ak.attention(x[0], x[0], x[0], layout="TND", seqlens=lengths),
    ]
    assert all(map(torch.equal, torch.load(made), meant))


def test_what_a_graph_was_given_dies_with_its_owner_and_the_backward() -> None:
    x = torch.randn(2, 16, 2, 8, requires_grad=True)
    layer = ak.Attention(2, 8, mask=masks.SlidingWindow(6))
    call = compiled(lambda mask, x: layer(x, x, x, mask=mask))
    loss = call(masks.Padding([16, 9]), x).square().sum()  # nobody else has this mask
    mask = masks.Padding([16, 3])
    seen, number = weakref.ref(mask), int(mask._handle)
    second = call(mask, x).square().sum()
    del mask
    assert seen() is None
    assert number in _VALUES  # the backward needs it
    meant = torch.autograd.grad(layer(x, x, x, mask=masks.Padding([16, 3])).square().sum(), x)
    assert torch.autograd.grad(loss, x)[0].any()
    for cache in (make_plan, lower):  # each keeps a few, whoever made them
        cache.cache_clear()
    torch.testing.assert_close(torch.autograd.grad(second, x), meant)
    del loss, second
    assert number not in _VALUES


def test_a_handle_that_stands_for_nothing() -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(CompositionError, match="is gone"):
        _attend([x, x, x], None, [torch.tensor([10**9])], words("m"), False)


def test_wrong_types_in_a_graph_are_told() -> None:
    layer, x = ak.Attention(2, 8, pse=pse.ALiBi(2)), torch.randn(1, 4, 2, 8)
    for call in (layer, ak.Attention(2, 8)):
        for wrong in (torch.zeros(4, 4), 3, [pse.ALiBi(2)]):
            with pytest.raises(ak.CompositionError, match=r"pse=.*pse\.Dense|a bias of|p1"):
                call(x, x, x, pse=wrong)
            with pytest.raises(ak.CompositionError, match=r"pse=.*pse\.Dense|a bias of|p1"):
                call.explain(x, x, x, pse=wrong)
    parameter = nn.Parameter(torch.zeros(2, 4, 4))
    assert ak.Attention(2, 8)(x, x, x, pse=pse.Dense(parameter)).requires_grad
