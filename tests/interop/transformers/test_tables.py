"""T5's tables of biases go to attention as tables: no matrix of numbers, and gradients arrive."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from attnkit import pse
from attnkit.interop.transformers import enable, report
from tests.interop.transformers.models import pair


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_one_fused_call_in_training(name: str) -> None:
    _, model, inputs = pair(name)
    enable(model)
    model(**inputs)[0].sum().backward()
    found = report(model, backend="emulated")
    assert not any(layer.refused for layer in found.layers)
    assert {len(plan.steps) for layer in found.layers for plan in layer.plans} == {1}
    texts = {t.text for layer in found.layers for p in layer.plans for t in p.request.bias}
    assert texts == {"T5Relative(4)", "T5Relative(4, bidirectional=False)"}
    assert not any(layer.dense or layer.notes for layer in found.layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_hand_the_table_on(reentrant: bool) -> None:
    eager, model, inputs = pair("t5")
    enable(model)
    grads = []
    for one in (eager, model):
        one.train()
        for module in one.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one(**inputs)[0].square().sum().backward()
        table = one.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        grads.append(table.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_a_table_with_buckets_of_another_kind_stays_a_tensor() -> None:
    eager, model, inputs = pair("t5")

    def buckets(relative_position: torch.Tensor, **_: object) -> torch.Tensor:
        return relative_position.abs().clamp(max=31)

    for one in (eager, model):
        for module in one.modules():
            if hasattr(module, "relative_attention_bias"):
                module._relative_position_bucket = buckets
    enable(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], eager(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert any(
        "a bias that the model made" in note for x in report(model).layers for note in x.notes
    )


def test_a_table_that_is_replaced_is_seen() -> None:
    eager, model, inputs = pair("t5")
    enable(model)
    with torch.no_grad():
        model(**inputs)
        for one in (eager, model):
            table = one.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
            torch.manual_seed(3)
            table.weight = torch.nn.Parameter(torch.randn(32, 4))
        torch.testing.assert_close(model(**inputs)[0], eager(**inputs)[0], rtol=1e-5, atol=1e-5)
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(**inputs)[0], eager(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_what_is_computed_with_a_bias_gets_its_numbers_and_gradients() -> None:
    from attnkit.interop.transformers.bias_tensor import BiasTensor

    bias = pse.T5Relative(2, table=torch.randn(32, 2, requires_grad=True))
    made = BiasTensor(bias, (1, 2, 5, 7), torch.float32, torch.device("cpu"))
    assert made.shape == (1, 2, 5, 7)
    assert made.detach().pse is bias
    other = torch.zeros(1, 2, 5, 7)
    torch.testing.assert_close(made + other, bias.materialize(5, 7))
    (made * 2.0).sum().backward()
    assert float(bias.table.grad.sum()) == 2 * 2 * 5 * 7
