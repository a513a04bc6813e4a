"""Steps of a few rows: every form of them equals the definition, and none of them plans anew."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled import backend as tiled
from attnkit.errors import CompositionError

MASKS = (
    masks.Full(),
    masks.Causal(),
    masks.Causal(align="top_left"),
    masks.SlidingWindow(3),
    masks.Causal() & (masks.Columns(0, 2) | masks.SlidingWindow(3)),
    masks.Padding([0, 2, 9]),
    ~masks.Prefix([3, 0, 5]) & masks.Causal(),
    masks.Rows(0, 1),
    ~masks.Full(),
    masks.Dilated(2),
    masks.PerHead([masks.Causal(), masks.Full(), masks.Causal(), masks.Full()]),
)
EXTRAS = (
    {},
    {"softcap": 3.0},
    {"sink": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    {"pse": pse.ALiBi(4)},
    {"pse": pse.ALiBi(4) + pse.T5Relative(4, num_buckets=4, max_distance=8)},
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def placed(tensor: Tensor, layout: str) -> Tensor:
    """A tensor ``b s n d`` in a layout, in memory of its own."""
    form = ak.layouts.get(layout)
    return form.from_bnsd(tensor.transpose(1, 2)).contiguous()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_form_of_a_step_equals_the_definition(mask: masks.Mask, dtype: torch.dtype) -> None:
    """Layouts decide how keys lie, groups how many rows a product has, batches what is shared."""
    generator = torch.Generator().manual_seed(1)
    whole = dtype == torch.float64
    forms = product(
        ("BSND", "BNSD", "SBH") if whole else ("BSND", "BNSD"),
        (1, 3),
        (1, 2, 4) if whole else (1, 4),
        EXTRAS if whole else EXTRAS[:2],
    )
    for layout, rows, key_heads, extra in forms:
        sizes = (rows, 4, 8), (9, key_heads, 8), (9, key_heads, 8)
        q, k, v = (
            placed(torch.randn(3, *size, generator=generator).to(dtype), layout) for size in sizes
        )
        say = {"mask": mask, "layout": layout, "num_heads": 4, "num_kv_heads": key_heads, **extra}
        found = ak.attention(q, k, v, backend="tiled", return_stats=True, **say)
        wide = (t.double() for t in (q, k, v))
        right = ak.attention(*wide, backend="reference", return_stats=True, **say)
        pairs = (
            (found.output, right.output),
            (found.stats.lse, right.stats.lse),
            (found.stats.max, right.stats.max),
        )
        for one, other in pairs:
            told = f"{layout} {rows} {key_heads} {extra}"
            torch.testing.assert_close(
                one.double(), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], msg=told
            )


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_torch_computes_at_once_equal_the_definition(
    heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Long and wide enough that torch's kernel takes several of its own tiles."""
    q = torch.randn(2, 1, heads[0], 64).to(dtype)
    k, v = (torch.randn(2, 700, heads[1], 64).to(dtype) for _ in range(2))
    found = ak.attention(q, k, v, mask=masks.Causal(), return_stats=True)
    right = ak.attention(*(t.double() for t in (q, k, v)), backend="reference", return_stats=True)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.output.double(), right.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.stats.lse, right.stats.lse.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 5, 25])
def test_a_tree_of_drafts_equals_the_definition(rows: int) -> None:
    """Many rows see many stretches: each draft its ancestors, behind all of the text."""
    parents = [(k - 1) // 2 for k in range(rows)]
    tree = torch.eye(rows, dtype=torch.bool)
    for k in range(1, rows):
        tree[k] |= tree[parents[k]]
    mask = masks.Dense.keep(torch.cat([torch.ones(rows, 40, dtype=torch.bool), tree], 1))
    q = torch.randn(2, rows, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 40 + rows, 2, 8, dtype=torch.float64) for _ in range(2))
    found = ak.attention(q, k, v, mask=mask, backend="tiled", return_stats=True)
    right = ak.attention(q, k, v, mask=mask, backend="reference", return_stats=True)
    torch.testing.assert_close(found.output, right.output)
    torch.testing.assert_close(found.stats.lse, right.stats.lse)


def test_keys_that_no_row_sees_are_not_read() -> None:
    """They may hold anything: in front, between, behind, in one text of a batch."""
    q, k, v = torch.randn(2, 1, 2, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    mask = masks.Padding([12, 7]) & (masks.Columns(1, 3) | masks.Columns(5, 12))
    right = ak.attention(q, k, v, mask=mask, backend="reference")
    for row, unseen in ((0, (0, 3, 4)), (1, (0, 3, 4, 7, 8, 11))):
        k[row, list(unseen)], v[row, list(unseen)] = torch.nan, torch.inf
    torch.testing.assert_close(ak.attention(q, k, v, mask=mask, backend="tiled"), right)


def test_a_step_is_planned_once_whatever_its_length_and_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of keys, the mask and the bias of a step are data of one plan."""
    planned: list[int] = []
    plan = tiled.Tiled.plan
    monkeypatch.setattr(tiled.Tiled, "plan", lambda *all: planned.append(1) or plan(*all))
    layer = ak.Attention(4, 8, mask=masks.Causal())
    keys = torch.randn(1, 64, 4, 8)
    query = torch.randn(1, 1, 4, 8)
    with torch.no_grad():
        for length in range(1, 65):
            given = query, keys[:, :length], keys[:, :length]
            found = layer(*given)
            assert layer.plan(*given).request.kv_len == length
            torch.testing.assert_close(found, ak.attention(*given, backend="reference"))
            bias = pse.Dense(torch.full((1, length), 0.5))
            layer(*given, mask=masks.SlidingWindow(length), pse=bias)
    assert sum(planned) == 2  # without a bias, and with one that carries a tensor


def test_a_step_that_does_not_fit_is_refused_as_by_a_plan() -> None:
    """Lengths of mask, bias, keys and values are checked at each step."""
    layer = ak.Attention(4, 8, mask=masks.Causal())
    query, keys = torch.zeros(1, 1, 4, 8), torch.zeros(1, 9, 4, 8)
    with torch.no_grad():
        layer(query, keys, keys)
        with pytest.raises(CompositionError, match="each key needs a value"):
            layer(query, keys[:, :5], keys[:, :6])
        with pytest.raises(CompositionError, match="Padding"):
            layer(query, keys[:, :5], keys[:, :5], mask=masks.Padding([2, 3]))
        with pytest.raises(CompositionError, match="4"):
            layer(query, keys[:, :5], keys[:, :5], mask=masks.Dense.keep(torch.ones(1, 4).bool()))
        with pytest.raises(CompositionError, match="Dense"):
            layer(query, keys[:, :5], keys[:, :5], pse=pse.Dense(torch.ones(1, 4)))


def test_gradients_take_the_way_that_has_them() -> None:
    """A step whose tensors train is not a step of a few rows."""
    layer = ak.Attention(4, 8, mask=masks.Causal())
    query, keys = torch.randn(1, 1, 4, 8), torch.randn(1, 9, 4, 8)
    with torch.no_grad():
        layer(query, keys, keys)
    query.requires_grad_()
    right = ak.attention(query, keys, keys, backend="reference")
    (expected,) = torch.autograd.grad(right.sum(), query)
    (found,) = torch.autograd.grad(layer(query, keys, keys).sum(), query)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [6, 40])  # few, and more than these
def test_no_axis_has_to_lie_in_any_order(rows: int) -> None:
    """Attention over channels (of DaViT) reads each tensor across its memory."""
    x = torch.randn(2, 3, 16, rows).transpose(2, 3)
    apart = torch.randn(2, 3, rows, 16)
    for query, key, value in product((x, apart), repeat=3):
        found = ak.attention(query, key, value, layout="BNSD", backend="tiled")
        wanted = ak.attention(query, key, value, layout="BNSD", backend="reference")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
