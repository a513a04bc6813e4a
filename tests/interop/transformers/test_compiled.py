"""Under torch.compile attention runs between graphs: the same numbers, and gradients."""

from __future__ import annotations

import pytest
import torch

from attnkit.interop.transformers import enable, report
from tests.interop.transformers.models import CASES, pair


@pytest.mark.sweep
def test_a_compiled_model() -> None:
    eager, model, inputs = pair("llama")
    enable(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    wanted, found = eager(**inputs)[0], compiled(**inputs)[0]
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], wanted[kept], rtol=0, atol=1e-5)
    assert report(model).calls == CASES["llama"].calls
    for one in (wanted, found):
        one[kept].square().sum().backward()
    for own, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_one_whole_graph_is_refused_with_the_reason() -> None:
    _, model, inputs = pair("llama")
    enable(model)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
