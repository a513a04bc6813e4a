"""The rule that chooses a backend, and what all backends share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, AttentionOutput, Backend, Operands, Stats, auto_order
from attnkit.planner import Plan, Request
from attnkit.pse import Dense

X = torch.randn(1, 8, 2, 4)


def test_auto_keeps_the_reasons_of_those_it_passed_over() -> None:
    plan = ak.plan(X, X, X, mask=masks.Causal())
    assert plan.backend in auto_order()
    assert plan.backend != "ascend"
    passed = {(r.subject, r.code) for r in plan.passed_over}
    assert ("ascend", "device") in passed
    assert "passed over" in plan.explain()


def test_a_name_never_falls_back() -> None:
    for name in ("emulated", "ascend"):
        with pytest.raises(ak.BackendRefused, match=name) as refused:
            ak.attention(X, X, X, softcap=2.0, backend=name)
        assert "softcap" in {r.code for r in refused.value.refusals}
    with pytest.raises(ak.CompositionError, match="did you mean 'emulated'"):
        ak.attention(X, X, X, backend="emulatd")


def test_a_reason_that_many_calls_have_is_told_once() -> None:
    q = torch.zeros(1, 64, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    bias = pse.Dense(torch.zeros(64, 64, requires_grad=True))
    with pytest.raises(ak.BackendRefused) as refused:
        ak.attention(q, q, q, mask=masks.Causal(), pse=bias, backend="emulated")
    lines = str(refused.value).splitlines()
    assert len(lines) == len(set(lines))
    assert [refusal.code for refusal in refused.value.refusals] == ["pse-precision"]


def test_what_is_certain_is_refused_when_the_module_is_built() -> None:
    with pytest.raises(ak.BackendRefused, match="soft"):
        ak.Attention(2, 4, softcap=2.0, backend="emulated")
    with pytest.raises(ak.CompositionError, match="unknown backend"):
        ak.Attention(2, 4, backend="gpu")
    ak.Attention(2, 4, softcap=2.0)  # "auto" finds one


def test_auto_raises_with_every_reason_where_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.backends.choose.auto_order", lambda: ("ascend", "emulated"))
    with pytest.raises(ak.BackendRefused, match="no backend runs") as refused:
        ak.attention(X, X, X, softcap=1.25)
    assert {r.subject for r in refused.value.refusals} == {"ascend", "emulated"}


class Zeros(Backend):
    """The smallest backend."""

    name = "zeros"

    def refusals(self, request: Request) -> list[ak.Refusal]:
        return [] if not request.bias else [ak.Refusal("bias", "adds nothing", self.name)]

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        rows = operands.query[..., 0].transpose(1, 2)
        return AttentionOutput(operands.query * 0, Stats(rows, rows))


def test_a_backend_is_one_class_and_one_registration() -> None:
    ak.backends.register(Zeros())
    try:
        assert (ak.attention(X, X, X, backend="zeros") == 0).all()
        with pytest.raises(ak.BackendRefused, match="adds nothing"):
            ak.attention(X, X, X, pse=pse.ALiBi(2), backend="zeros")
        with pytest.raises(ak.CompositionError, match="registered already"):
            ak.backends.register(Zeros())
        assert repr(BACKENDS["zeros"]) == "Zeros()"
    finally:
        BACKENDS.remove("zeros")


class Eager(Zeros):
    """A backend that "auto" asks first."""

    name = "eager"
    auto = 5


def test_auto_asks_the_backends_of_others_in_their_place() -> None:
    before = ak.plan(X, X, X, scale=0.25)
    ak.backends.register(Eager())
    try:
        assert auto_order() == ("eager", "ascend", "cuda", "tiled", "reference")
        assert ak.plan(X, X, X, scale=0.25).backend == "eager"
        refused = ak.plan(X, X, X, scale=0.25, pse=pse.ALiBi(2))
        assert refused.backend == before.backend
        assert refused.passed_over[0].subject == "eager"
    finally:
        BACKENDS.remove("eager")
    assert ak.plan(X, X, X, scale=0.25).backend == before.backend


class Hasty(type(BACKENDS["emulated"])):  # type: ignore[misc]
    """A backend of fused calls whose plans lack one."""

    name = "hasty"

    def plan(self, request: Request) -> Plan:
        return replace(super().plan(request), steps=())


def test_a_plan_whose_proof_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ak.backends.register(Hasty())
    monkeypatch.setattr("attnkit.backends.choose.auto_order", lambda: ("hasty", "reference"))
    try:
        plan = ak.plan(X, X, X, scale=0.123)
        assert plan.backend == "reference"
        assert [(r.subject, r.code) for r in plan.passed_over] == [("hasty", "no-calls")]
        with pytest.raises(ak.KernelContractError, match="does not compute"):
            ak.plan(X, X, X, scale=0.123, backend="hasty")
    finally:
        BACKENDS.remove("hasty")


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_autocast_does_not_reach_inside(backend: str) -> None:
    plain = ak.attention(X, X, X, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert (X[0, :, 0] @ X[0, :, 0].T).dtype == torch.bfloat16
        inside = ak.attention(X, X, X, backend=backend)
    assert torch.equal(inside, plain)


def test_inference_first_and_training_later_share_what_is_kept() -> None:
    rest = {"mask": masks.Causal(), "pse": pse.ALiBi(2), "backend": "emulated"}
    with torch.inference_mode():
        ak.attention(X, X, X, **rest)
    q = X.clone().requires_grad_()
    ak.attention(q, X, X, **rest).sum().backward()
    assert q.grad is not None
    assert q.grad.any()


@pytest.mark.parametrize("backend", ["reference", "emulated"])
class TestDropout:
    def out(self, backend: str, seed: int | None = None, **rest: object) -> AttentionOutput:
        if seed is not None:
            torch.manual_seed(seed)
        return ak.attention(X, X, X, dropout=0.5, backend=backend, return_stats=True, **rest)

    def test_it_comes_from_torchs_generator(self, backend: str) -> None:
        first, again, other = (self.out(backend, seed) for seed in (3, 3, 4))
        assert torch.equal(first.output, again.output)
        assert not torch.equal(first.output, other.output)
        assert not torch.equal(self.out(backend).output, self.out(backend).output)

    def test_statistics_exclude_it(self, backend: str) -> None:
        plain = ak.attention(X, X, X, backend=backend, return_stats=True)
        torch.testing.assert_close(self.out(backend).stats.lse, plain.stats.lse)

    def test_survivors_are_scaled_so_that_the_mean_stays(self, backend: str) -> None:
        torch.manual_seed(0)
        ones = torch.ones(4, 64, 4, 4)
        q = torch.randn(4, 64, 4, 4)
        out = ak.attention(q, q, ones, dropout=0.25, backend=backend)
        # the mean of 4*64*4 rows of 64 weights each: its deviation is below 0.01
        assert abs(float(out.mean()) - 1) < 0.05
        assert out.std() > 0.01

    def test_backward_uses_the_decisions_of_its_forward(self, backend: str) -> None:
        q, k, v = (torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in "qkv")
        mask = masks.Causal() & (masks.SlidingWindow(2) | masks.Columns(0, 1))

        def attend(*tensors: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(0)
            return ak.attention(*tensors, mask=mask, dropout=0.5, backend=backend)

        assert torch.autograd.gradcheck(attend, (q, k, v))


def test_a_table_is_not_pinned_by_plans() -> None:
    import gc
    import weakref

    table = torch.zeros(2, 8, 8)
    gone = weakref.ref(table)
    ak.attention(X, X, X, pse=Dense(table))
    del table
    gc.collect()
    assert gone() is None
