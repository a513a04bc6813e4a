"""The examples of CONTRIBUTING.md are complete: each is executed, and then used."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attnkit import masks, pse
from attnkit.attention import Attention
from attnkit.backends import BACKENDS
from attnkit.config import AttentionConfig
from attnkit.errors import BackendRefused
from attnkit.layouts import LAYOUTS, SeqLens, Sizes
from attnkit.registry import Registry

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    match[1]: match[0]
    for match in re.findall(r"```python\n(# attnkit/(\w+)/\w+\.py\n.*?)```", TEXT, flags=re.DOTALL)
}
REGISTRIES: dict[str, Registry[Any]] = {
    "masks": masks.MASKS,
    "pse": pse.PSE,
    "layouts": LAYOUTS,
    "backends": BACKENDS,
}

Contribute = Callable[[str], ModuleType]


@pytest.fixture
def contribute(tmp_path: Path) -> Iterator[Contribute]:
    """Import the example for a folder as a module of its own; forget it afterwards."""
    before = {folder: set(registry) for folder, registry in REGISTRIES.items()}

    def load(folder: str) -> ModuleType:
        name = f"contributed_{folder}"
        file = tmp_path / f"{name}.py"
        file.write_text(EXAMPLES[folder], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        assert len(set(REGISTRIES[folder]) - before[folder]) == 1
        return module

    yield load
    for folder, registry in REGISTRIES.items():
        for entry in set(registry) - before[folder]:
            registry.remove(entry)
        sys.modules.pop(f"contributed_{folder}", None)


def qkv(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, *shape)
    return query, key, value


def test_there_is_one_example_for_each_registry() -> None:
    assert EXAMPLES.keys() == REGISTRIES.keys()
    assert TEXT.count("```python") == len(REGISTRIES)


@pytest.mark.parametrize("folder", REGISTRIES)
def test_the_doctests_of_the_examples(folder: str, contribute: Contribute) -> None:
    result = doctest.testmod(contribute(folder), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted >= (1 if folder in ("masks", "pse") else 0)


def test_the_mask_works_everywhere(contribute: Contribute) -> None:
    ahead = contribute("masks").Ahead
    mask = masks.parse("Causal() | Ahead(2)")
    assert mask == masks.Causal() | ahead(2)
    assert mask.region(5, 7) == masks.Band(None, 2).region(5, 7)
    assert (mask & ~masks.Causal()).region(5, 5) == (ahead(2) - masks.Band(0, 0)).region(5, 5)
    config = AttentionConfig.model_validate(
        {
            "num_heads": 2,
            "head_dim": 8,
            "mask": {"kind": "or", "parts": [{"kind": "causal"}, {"kind": "ahead", "size": 2}]},
        }
    )
    assert config.mask == mask
    assert AttentionConfig.model_validate(config.to_yaml()) == config
    assert "Ahead" in AttentionConfig.model_json_schema()["$defs"]
    q, k, v = qkv(1, 6, 2, 8)
    named = Attention(2, 8, mask=masks.Band(None, 2))
    assert torch.equal(config.build()(q, k, v), named(q, k, v))


def test_the_mask_reaches_the_kernel_without_a_dense_mask(contribute: Contribute) -> None:
    contribute("masks")
    mask = masks.parse("Causal() | Ahead(2)")
    q, k, v = qkv(1, 6, 2, 8)
    emulated = Attention(2, 8, mask=mask, backend="emulated")
    named = Attention(2, 8, mask=masks.Band(None, 2), backend="emulated")
    assert emulated.plan(q, k, v).calls == named.plan(q, k, v).calls
    torch.testing.assert_close(emulated(q, k, v), Attention(2, 8, mask=mask)(q, k, v))


def test_the_bias_works_everywhere(contribute: Contribute) -> None:
    recency = contribute("pse").Recency
    bias = recency(0.5)
    assert pse.parse(str(bias + pse.ALiBi(2))) == bias + pse.ALiBi(2)
    config = AttentionConfig.model_validate(
        "{num_heads: 2, head_dim: 8, pse: {kind: recency, weight: 0.5}}"
    )
    assert config.pse == bias
    assert AttentionConfig.model_validate_json(config.model_dump_json()) == config
    q, k, v = qkv(1, 6, 2, 8)
    dense = pse.Dense(bias.materialize(6, 6))
    expected = Attention(2, 8, pse=dense)(q, k, v)
    torch.testing.assert_close(config.build()(q, k, v), expected)
    emulated = Attention(2, 8, pse=bias, backend="emulated")
    torch.testing.assert_close(emulated(q, k, v), expected)


def test_the_layout_works_everywhere(contribute: Contribute) -> None:
    contribute("layouts")
    config = AttentionConfig.model_validate("{num_heads: 2, head_dim: 8, layout: SBND}")
    assert AttentionConfig.model_validate(config.to_yaml()) == config
    assert "SBND" in AttentionConfig.model_json_schema()["properties"]["layout"]["enum"]
    q, k, v = qkv(3, 6, 2, 8)
    swapped = [tensor.transpose(0, 1) for tensor in (q, k, v)]
    output = config.build()(*swapped).transpose(0, 1)
    torch.testing.assert_close(output, Attention(2, 8)(q, k, v))


def test_the_backend_works_everywhere(contribute: Contribute) -> None:
    contribute("backends")
    config = AttentionConfig.model_validate(
        "{num_heads: 4, num_kv_heads: 2, head_dim: 8, mask: Causal(), backend: eager}"
    )
    assert "eager" in AttentionConfig.model_json_schema()["properties"]["backend"]["enum"]
    how = {"sink": True, "softcap": 2.0, "score_fn": lambda score, *cell: 2 * score}
    layer = Attention(4, 8, layout="TND", backend="eager", **how)
    with pytest.raises(BackendRefused, match="softcap") as caught:
        layer(*qkv(6, 4, 8), seqlens=SeqLens([2, 4]))
    assert {one.code for one in caught.value.refusals} == {*how, "packed"}
    assert config.build().plan(*qkv(1, 6, 4, 8)[:1], *qkv(1, 6, 2, 8)[1:]).backend == "eager"


@pytest.mark.parametrize("layout", ["BNSD", "BSH", "BSND", "SBH"])
@pytest.mark.parametrize(
    ("mask", "bias"),
    [
        (masks.Causal(), None),
        (masks.Rows(2), pse.ALiBi(4)),  # rows that see no key
        (masks.Padding([6, 3]), pse.T5Relative(4) + pse.ALiBi(4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_backend_agrees_with_the_definition(
    layout: str, mask: masks.Mask, bias: pse.Pse | None, dropout: float, contribute: Contribute
) -> None:
    contribute("backends")
    form = LAYOUTS[layout]
    torch.manual_seed(0)
    tensors = [
        torch.randn(form.shape(Sizes(2, 6, heads, 8)), dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    found = []
    for name in ("eager", "reference"):
        layer = Attention(
            4, 8, num_kv_heads=2, mask=mask, pse=bias, layout=layout, dropout=dropout, backend=name
        )
        torch.manual_seed(1)
        output, stats = layer(*tensors, return_stats=True)
        loss = output.square().sum() + stats.lse.masked_fill(stats.lse.isinf(), 0.0).sum()
        found.append((output, stats.lse, stats.max, *torch.autograd.grad(loss, tensors)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
