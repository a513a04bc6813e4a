"""The variants of docs/variants.md: their code runs, is what the papers say, and is few calls."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from docs.make import variants
from docs.make.variants import VARIANTS, Made
from tests.planner.definitions import DEFINED, Definition

DOCS = Path(__file__).parents[2] / "docs"
BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture
def float64() -> Iterator[None]:
    """Make what code makes of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layers(made: Made, name: str) -> Iterator[tuple[ak.Attention, Definition]]:
    """Yield the layers of a variant in float64, their parameters drawn, and their definitions."""
    generator = torch.Generator().manual_seed(1)
    for layer, definition in zip(made.layers, DEFINED[name], strict=True):
        layer.double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        yield layer, definition


def asking(function: Callable[..., Any], made: Made, layer: ak.Attention) -> Callable[..., Any]:
    """Return a function of a definition with what it asks for by name, as plain numbers."""
    q_len, kv_len = made.size
    known = {**made.names, "q_len": q_len, "kv_len": kv_len}
    if layer.pse is not None and layer.pse.tensors:
        known["table"] = layer.pse.tensors[0]
    names = [name for name in inspect.signature(function).parameters if name in known]
    named = {name: plain(known[name]) for name in names if name not in ("i", "j", "h")}
    takes_head = "h" in inspect.signature(function).parameters

    def ask(*given: Any, h: int) -> Any:
        return function(*given, **named, **({"h": h} if takes_head else {}))

    return ask


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def cells(definition: Definition, made: Made, layer: ak.Attention) -> Tensor:
    """Return which cells a definition allows, ``[heads, queries, keys]``."""
    allowed, (q_len, kv_len) = asking(definition.allowed, made, layer), made.size
    alike = "h" not in inspect.signature(definition.allowed).parameters
    heads = 1 if alike else layer.num_heads
    found = [
        [[allowed(i, j, h=h) for j in range(kv_len)] for i in range(q_len)] for h in range(heads)
    ]
    return torch.tensor(found).expand(layer.num_heads, -1, -1)


def weights(
    definition: Definition, made: Made, layer: ak.Attention, query: Tensor, key: Tensor
) -> Tensor:
    """Return what softmax makes of the scores that a definition names, ``[heads, q, k]``."""
    seen = cells(definition, made, layer)
    group = layer.num_heads // layer.num_kv_heads
    scale = layer.composition.scale or layer.head_dim**-0.5
    found = torch.zeros(seen.shape, dtype=torch.float64)
    score = definition.score and asking(definition.score, made, layer)
    for h in range(layer.num_heads):
        scores = scale * query[0, :, h] @ key[0, :, h // group].T
        sink = 0.0 if layer.sink is None else math.exp(layer.sink[h].item())
        for i, row in enumerate(scores.tolist()):
            keys = [j for j, one in enumerate(seen[h, i]) if one]
            powers = [math.exp(score(row[j], i, j, h=h) if score else row[j]) for j in keys]
            found[h, i, keys] = torch.tensor(powers, dtype=torch.float64) / (sum(powers) + sink)
    return found


def test_there_are_many_and_each_has_a_definition() -> None:
    assert len(BY_NAME) == len(VARIANTS) >= 40
    assert DEFINED.keys() == BY_NAME.keys()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", BY_NAME)
def test_the_code_is_what_the_paper_says(name: str) -> None:
    """Cell by cell: what is allowed, and the weight that it gets."""
    made = BY_NAME[name].made(BY_NAME[name].small)
    for layer, definition in layers(made, name):
        mask, heads = made.mask_of(layer), layer.num_heads
        found = mask.materialize(*made.size, heads=heads)[0]
        assert torch.equal(found.expand(heads, -1, -1), cells(definition, made, layer))
        query, key, _ = drawn(made, layer)
        kv_heads, count = layer.num_kv_heads, made.size[1]
        value = torch.eye(count, dtype=torch.float64)[None, :, None].repeat(1, 1, kv_heads, 1)
        layer.backend = "reference"
        out = layer(query, key, value, **made.call)[0].transpose(0, 1)
        expected = weights(definition, made, layer, query, key)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def drawn(made: Made, layer: ak.Attention) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = made.tensors(layer, dtype=torch.float64)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in given]


@pytest.mark.usefixtures("no_full_masks")
@pytest.mark.parametrize("name", BY_NAME)
def test_few_calls_and_no_full_mask(name: str) -> None:
    made = BY_NAME[name].made()
    for layer, definition in zip(made.layers, DEFINED[name], strict=True):
        plan = made.plan(layer)
        plan.verify()
        assert bool(plan.calls) == bool(definition.calls)
        assert len(plan.calls) <= definition.calls
        for call in plan.calls:
            full = call.atten_mask is not None and call.atten_mask.kind == "full"
            assert full <= definition.full


def equal_to_the_reference(made: Made, layer: ak.Attention, fused: str) -> None:
    """Compare output, statistics and gradients of all that trains."""
    given = [t.requires_grad_() for t in drawn(made, layer)]
    trained = [t for t in layer.parameters() if t.requires_grad]
    found = []
    for backend in ("reference", fused):
        layer.backend = backend
        out, stats = layer(*given, **made.call, return_stats=True)
        loss = (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum()
        found.append([out, stats.lse, *torch.autograd.grad(loss, [*given, *trained])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.usefixtures("no_full_masks", "float64")
@pytest.mark.parametrize("name", BY_NAME)
def test_fused_calls_equal_the_reference(name: str) -> None:
    made = BY_NAME[name].made(BY_NAME[name].small)
    for layer, definition in layers(made, name):
        equal_to_the_reference(made, layer, "emulated" if definition.calls else "tiled")


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].ranks])
def test_fused_calls_equal_the_reference_at_full_length(name: str) -> None:
    made = BY_NAME[name].made()
    layer = ak.Attention(1, 4, mask=made.mask)
    equal_to_the_reference(made, layer, "emulated")


# -- the page ------------------------------------------------------------------------------------


def test_the_page_is_current() -> None:
    page = (DOCS / "variants.md").read_text(encoding="utf-8")
    assert page == variants.page(), "run: python docs/make/variants.py"


def test_the_page_fits_a_terminal() -> None:
    page = (DOCS / "variants.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)```", page, re.S)
    assert len(shown) >= len(VARIANTS)
    assert all(len(line) <= 80 for block in shown for line in block.splitlines())
    code = [line for variant in VARIANTS for line in variant.shown.splitlines()]
    assert all(len(line) <= 100 for line in code)


def test_links_to_variants_lead_to_one() -> None:
    """And the page of libraries with a kernel for one mask, and this page, know each other."""
    page = (DOCS / "variants.md").read_text(encoding="utf-8")
    headings = {variants.slug(one) for one in re.findall(r"^#+ (.*)$", page, re.M)}
    assert {variant.slug for variant in VARIANTS} < headings
    linked = set(re.findall(r"href=\"#([^\"]*)\"|\]\(#([^)]*)\)", page))
    assert {a or b for a, b in linked} <= headings
    for other in DOCS.rglob("*.md"):
        found = re.findall(r"variants\.md#([\w-]*)", other.read_text(encoding="utf-8"))
        assert set(found) <= headings, other
        if other.stem == "sparse-attention":
            assert len(found) >= 10
    assert "coming-from/sparse-attention.md" in page


def test_every_picture_is_current() -> None:
    folder = DOCS / "images" / "variants"
    assert {file.stem for file in folder.iterdir()} == {one.slug for one in VARIANTS}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 600_000
    for variant in VARIANTS:
        shown = (folder / f"{variant.slug}.svg").read_text(encoding="utf-8")
        assert shown == variants.picture(variant), f"{variant.name}: python docs/make/variants.py"


def test_sizes_that_no_line_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="no line of the code sets depth"):
        BY_NAME["Sliding window"].made({"window": 3, "depth": 2})
