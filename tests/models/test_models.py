"""Seventeen small models in plain attnkit, each beside its twin in plain torch."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import agree

MODELS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("plain", "test_models", "__init__")
)
OURS = {"ak", "masks", "pse"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def named(name: str) -> ModuleType:
    return importlib.import_module(f"tests.models.{name}")


READY = [name for name in MODELS if hasattr(named(name), "Ready")]
STEPWISE = [name for name in MODELS if hasattr(named(name), "stepwise")]


def cast(given: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """The inputs, and those that are numbers as leaves of a dtype."""
    return [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in given]


def pair(module: ModuleType, kind: str = "Model") -> tuple[nn.Module, nn.Module]:
    """A model and its twin with the same weights, none of them what it begins with."""
    model, twin = getattr(module, kind)(), module.Twin()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 8)
    twin.load_state_dict(model.state_dict())
    return model.eval(), twin.eval()


def results(model: nn.Module, call: Callable[..., Tensor], given: list[Any]) -> dict[str, Tensor]:
    """The output, and the gradients of all weights and inputs."""
    output = call(*given)
    slopes = torch.arange(output.numel(), dtype=torch.float64).mul(0.7).sin()
    leaves = dict(model.named_parameters())
    leaves |= {f"input {i}": x for i, x in enumerate(given) if x.requires_grad}
    grads = torch.autograd.grad(output, list(leaves.values()), slopes.view_as(output).to(output))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def meant(twin: nn.Module, given: tuple[Any, ...]) -> list[dict[str, Tensor]]:
    """What the twin returns in float64 and in float32."""
    wide = results(twin.double(), twin, cast(given, torch.float64))
    return [wide, results(twin.float(), twin, cast(given, torch.float32))]


def test_there_are_seventeen() -> None:
    assert len(MODELS) == 17
    assert set(STEPWISE) == {"gpt2", "gpt_oss", "mla", "qwen3", "t5", "tree_decoding", "whisper"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_twin(name: str, dtype: torch.dtype) -> None:
    module = named(name)
    model, twin = pair(module)
    model.to(dtype)
    for given in module.inputs():
        agree(results(model, model, cast(given, dtype)), *meant(twin, given))


@pytest.mark.parametrize("name", MODELS)
def test_it_says_its_attention_in_three_lines(name: str) -> None:
    tree = ast.parse(inspect.getsource(named(name).Model))
    lines: set[int] = set()
    for node in ast.walk(tree):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and names & OURS:
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    assert 1 <= len(lines) <= 3, lines


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_with_masks_made_in_forward(name: str) -> None:
    module = named(name)
    model, twin = pair(module)
    given = module.inputs()[0]
    compiled = torch.compile(model.double(), backend="eager")
    agree(results(model, compiled, cast(given, torch.float64)), *meant(twin, given))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", READY)
def test_it_is_one_graph_with_masks_made_before(name: str) -> None:
    module = named(name)
    model, twin = pair(module, "Ready")
    given = module.inputs()[0]
    compiled = torch.compile(model.double(), backend="aot_eager", fullgraph=True)
    agree(results(model, compiled, cast(given, torch.float64)), *meant(twin, given))


@pytest.mark.parametrize("name", STEPWISE)
def test_step_by_step_is_all_at_once(name: str) -> None:
    module = named(name)
    model, twin = pair(module)
    for given in module.inputs():
        wide, low = ({"output": each["output"]} for each in meant(twin, given))
        with torch.no_grad():
            found = module.stepwise(model.double(), *cast(given, torch.float64))
        agree({"output": found}, wide, low)
