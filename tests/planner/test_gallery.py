"""The gallery's masks: few calls, no full mask, proven, and equal to the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnkit as ak
from docs.make import variants as gallery

DOCS = Path(__file__).parents[2] / "docs"


AT_MOST = {
    "Causal": 1,
    "Sliding window": 1,
    "Sink and window": 2,
    "Prefix LM": 1,
    "Packed documents, causal": 1,
    "Packed documents, windowed": 1,
    "Packed documents, prefix LM": 1,
    "Chunked": 1,
    "Block causal": 1,
    "Longformer": 2,
    "Block diffusion": 1,
    "Shared prefix": 1,
    "Bidirectional spans": 1,
    "Dilated window": 1,
    "Keys with holes": 1,
    "Numbers that return": 1,
    "Neighborhood": 2,
    "Neighborhood of a video": 1,
    "Sliding tiles": 1,
    "Shifted windows": 1,
    "Sparse blocks, causal": 1,
    "BigBird": 1,
    "Sparse Transformer, fixed": 1,
    "Tree of drafts": 2,
}


def test_the_table_is_about_every_mask() -> None:
    assert AT_MOST.keys() == gallery.GALLERY.keys()


@pytest.mark.usefixtures("no_full_masks")
@pytest.mark.parametrize("name", AT_MOST)
def test_few_calls_and_no_full_mask(name: str) -> None:
    plan = gallery.plan_of(gallery.GALLERY[name])
    plan.verify()
    assert 1 <= len(plan.calls) <= AT_MOST[name]
    for call in plan.calls:
        assert call.atten_mask is None or call.atten_mask.kind != "full"


@pytest.mark.sweep
@pytest.mark.parametrize("name", AT_MOST)
def test_equal_to_the_reference_at_full_length(name: str) -> None:
    torch.manual_seed(0)
    length, mask = gallery.LENGTH, gallery.GALLERY[name]
    sizes = [gallery.queries(mask), length, length]
    tensors = [torch.randn(1, size, 1, 4, dtype=torch.float64) for size in sizes]
    dy = torch.randn(1, sizes[0], 1, 4, dtype=torch.float64)
    found = []
    for backend in ("reference", "emulated"):
        given = [t.clone().requires_grad_() for t in tensors]
        out, stats = ak.attention(*given, mask=mask, backend=backend, return_stats=True)
        found.append([out, stats.lse, *torch.autograd.grad(out, given, dy)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_page_is_current() -> None:
    page = (DOCS / "variants.md").read_text(encoding="utf-8")
    assert page == gallery.page(), "run: python docs/make/variants.py"


def test_the_page_fits_a_terminal() -> None:
    for name, mask in gallery.GALLERY.items():
        assert all(len(line) <= 80 for line in gallery.plan_of(mask).explain().splitlines()), name
