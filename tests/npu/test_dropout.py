"""Dropout with the vendor's seeds: drawn by its generator, regenerated in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import layouts
from attnkit.backends import Ascend
from attnkit.kernel import KernelCall, dropout_mask
from attnkit.kernel.dropout import read_bits
from tests.agreement import distance
from tests.npu.compositions import Case, by_name
from tests.npu.device import DEVICE, Call

DROPOUT = 0.3
CASES = [
    by_name(name)
    for name in ("full", "causal", "grouped heads", "BSH", "SBH", "BNSD", "ALiBi", "sink")
]
PACKED = [by_name(name) for name in ("packed", "packed causal", "packed causal, empty sequences")]
MERGED = by_name("wide window and first keys")


def attend(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output on the NPU, and the gradients of query, key and value."""
    given = {name: tensor.float().npu() for name, tensor in case.tensors().items()}
    grad, sink = given.pop("grad"), given.pop("sink", None)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    arguments = case.arguments("npu", torch.float32)
    output = ak.attention(*leaves, **arguments, sink=sink, dropout=DROPOUT, backend="ascend")
    output.backward(grad)
    return output.detach().cpu(), [leaf.grad.cpu() for leaf in leaves if leaf.grad is not None]


def drawn(calls: list[Call]) -> list[Call]:
    """Return the calls that generated dropout decisions."""
    return [call for call in calls if call["op"].startswith("aclnnDropoutGenMaskV2")]


def check_bits(case: Case, calls: int = 1) -> None:
    """Every forward call draws bits of its own, and its grad call draws the same again."""
    with DEVICE.recording() as recorded:
        attend(case)
    draws = [(c["seed"], c["offset"], c["shape"], c["drop_prob"]) for c in drawn(recorded)]
    forward, backward = draws[: len(draws) // 2], draws[len(draws) // 2 :]
    assert len({(seed, offset) for seed, offset, *_ in forward}) == len(forward) == calls
    assert sorted(forward) == sorted(backward), "the grad calls draw other bits"
    assert all(abs(prob - DROPOUT) < 1e-6 for *_, prob in draws)


@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("case", [*CASES, *PACKED, MERGED], ids=str)
def test_the_backward_regenerates_the_bits_of_the_forward(case: Case):
    check_bits(case, calls=len(case.plan("emulated").calls))


@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("part", ["seed", "offset"])
def test_a_number_that_a_merged_backward_loses_is_seen(part: str, monkeypatch: pytest.MonkeyPatch):
    """Planted: the grad calls are given 0 in its place."""
    run, planted = Ascend.backward, []

    def faulty(self: Ascend, call: KernelCall, tensors: Any, dy: torch.Tensor, merged: Any) -> Any:
        seed, offset, numels = merged.random
        planted.append(part)
        random = (0, offset, numels) if part == "seed" else (seed, 0, numels)
        return run(self, call, tensors, dy, replace(merged, random=random))

    monkeypatch.setattr(Ascend, "backward", faulty)
    with pytest.raises(AssertionError, match="draw other bits"):
        check_bits(MERGED, calls=2)
    assert planted


def test_every_call_draws_anew_and_a_seed_repeats_it():
    case = by_name("causal")
    torch.npu.manual_seed(5)
    first, again = attend(case)[0], attend(case)[0]
    assert distance(first, again) > 0.1
    torch.npu.manual_seed(5)
    assert torch.equal(attend(case)[0], first)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_the_drawn_bits(case: Case):
    """Attention written out in float64, with the decisions that the device generated."""
    with DEVICE.recording() as calls:
        output, gradients = attend(case)
    keep = _decisions(case, drawn(calls)[0])
    layout = layouts.get(case.layout)
    counts = (case.heads, case.kv_heads, case.kv_heads)
    given = case.tensors()
    grad, sink = given.pop("grad"), given.pop("sink", None)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    q, k, v = (layout.to_bnsd(t, n) for t, n in zip(leaves, counts, strict=True))
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    scores = case.dim**-0.5 * q @ k.mT
    bias = case.arguments("cpu", torch.float64)["pse"]
    if bias is not None:
        scores = scores + bias.materialize(case.q_len, case.kv_len, dtype=torch.float64)
    allowed = case.mask.materialize(case.q_len, case.kv_len)
    scores = scores.masked_fill(~allowed, -torch.inf)
    total = scores.exp().sum(-1, keepdim=True)
    if sink is not None:
        total = total + sink.exp()[:, None, None]
    wanted = layout.from_bnsd((scores.exp() / total * keep / (1 - DROPOUT)) @ v)
    wanted.backward(grad)
    # float32 against float64: a few hundred roundings of numbers near one.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output.double(), wanted.detach(), **close)
    for found, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(found.double(), leaf.grad, **close)


def test_the_gradient_of_a_bias_knows_what_was_dropped():
    """Its pass draws the bits of the forward once more: the formula's, with these bits."""
    case = by_name("bias matrix that trains")
    given = {name: tensor.float().npu() for name, tensor in case.tensors().items()}
    grad = given.pop("grad")
    arguments = case.arguments("npu", torch.float32)
    with DEVICE.recording() as calls:
        output = ak.attention(*given.values(), **arguments, dropout=DROPOUT, backend="ascend")
        (found,) = torch.autograd.grad(output, arguments["pse"].tensors, grad)
    draws = drawn(calls)
    assert len({(c["seed"], c["offset"]) for c in draws}) == 1
    assert len(draws) >= 2
    keep = _decisions(case, draws[0])
    exact = case.tensors()
    q, k, v = (exact[name].transpose(1, 2) for name in ("query", "key", "value"))
    bias = case.arguments("cpu", torch.float64)["pse"].tensors[0].detach().requires_grad_()
    scores = (case.dim**-0.5 * q @ k.mT + bias).masked_fill(
        ~case.mask.materialize(case.q_len, case.kv_len), -torch.inf
    )
    wanted = (scores.softmax(-1) * keep / (1 - DROPOUT)) @ v
    (meant,) = torch.autograd.grad(wanted.transpose(1, 2), [bias], exact["grad"])
    torch.testing.assert_close(found.cpu().double(), meant, rtol=1e-5, atol=1e-5)


def _decisions(case: Case, call: Call) -> torch.Tensor:
    """Return which cells survived, [b n i j]."""
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    count = torch.Size(shape).numel()
    assert torch.Size(call["shape"]).numel() == count
    keep_prob = 1.0 - call["drop_prob"]
    packed = dropout_mask(count, keep_prob, seed=call["seed"], offset=call["offset"])
    keep = read_bits(packed, torch.arange(count)).view(shape)
    assert abs(keep.double().mean().item() - (1 - DROPOUT)) < 0.05
    return keep.double()


def test_eval_mode_draws_nothing():
    layer = ak.Attention(4, 16, dropout=DROPOUT, backend="ascend").eval()
    x = torch.randn(2, 8, 4, 16).npu()
    with DEVICE.recording() as calls:
        layer(x, x, x)
    assert not drawn(calls)
