"""`ak.merge`: answers over disjoint keys, joined to the answer over all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.backends.base import Partial
from attnkit.backends.partials import Merging
from attnkit.layouts import LAYOUTS, Sizes
from tests.agreement import slopes

WIDE = torch.float64


def noise(*sizes: int, dtype: torch.dtype = WIDE) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, dtype=WIDE, generator=generator).to(dtype)


def operands(dtype: torch.dtype = WIDE, keys: int = 30) -> list[Tensor]:
    sizes = ((20, 4), (keys, 2), (keys, 2))
    return [noise(2, s, n, 8, dtype=dtype).requires_grad_() for s, n in sizes]


def split(ends: list[int], tensors: list[Tensor], **how: Any) -> list[ak.AttentionOutput]:
    """What rows answer over ranges of keys, under a mask that leaves some without any."""
    query, key, value = tensors
    mask = masks.Causal() - masks.Rows(3, 6) - masks.Columns(0, 4)
    rows, parts = (0, query.shape[1]), []
    for keys in pairwise(ends):
        own = mask.cut(rows, keys, q_len=query.shape[1], kv_len=key.shape[1])
        some = key[:, slice(*keys)], value[:, slice(*keys)]
        found = ak.attention(query, *some, mask=own, return_stats=True, **how)
        assert isinstance(found, ak.AttentionOutput)
        parts.append(found)
    return parts


def asked(merged: ak.AttentionOutput, leaves: list[Tensor]) -> list[Tensor]:
    """Output, statistics, and gradients of the leaves by the output and the log-sum-exp."""
    empty = merged.stats.lse == -torch.inf
    lse = merged.stats.lse.masked_fill(empty, 0.0)
    loss = (merged.output * slopes(merged.output)).sum() + lse.sin().sum()
    grads = torch.autograd.grad(loss, leaves)
    return [merged.output, merged.stats.lse, merged.stats.max, merged.stats.sum, *grads]


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
def test_parts_are_the_whole_and_so_are_their_gradients(backend: str, with_sink: bool) -> None:
    tensors = operands()
    sink = noise(4).requires_grad_() if with_sink else None
    leaves = tensors if sink is None else [*tensors, sink]
    mask = masks.Causal() - masks.Rows(3, 6) - masks.Columns(0, 4)
    whole = ak.attention(*tensors, mask=mask, sink=sink, backend=backend, return_stats=True)
    assert isinstance(whole, ak.AttentionOutput)
    expected = asked(whole, leaves)
    for ends in ([0, 30], [0, 11, 30], [0, 0, 3, 17, 29, 30]):
        parts = split(ends, tensors, backend=backend)
        for one, other in zip(asked(ak.merge(parts, sink=sink), leaves), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        if len(parts) > 2:  # in whatever order
            some = ak.merge([ak.merge(parts[3:]), ak.merge(parts[2::-1])], sink=sink)
            torch.testing.assert_close(some.output, expected[0], rtol=1e-12, atol=1e-12)


def test_derivatives_of_every_order() -> None:
    outputs = [noise(2, 3, 2, 2) + k for k in range(3)]
    lses = [noise(2, 2, 3) - k for k in range(3)]
    leaves = [t.requires_grad_() for t in (*outputs, *lses, noise(2))]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        found = ak.merge(list(zip(given[:3], given[3:6], strict=True)), sink=given[6])
        return found.output, found.stats.lse

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH", "TND"])
def test_layouts(layout: str) -> None:
    form = LAYOUTS[layout]
    views, lses = noise(2, 1, 4, 5, 8), noise(2, 1, 4, 5)
    total = lses.logsumexp(0)
    output = (views * (lses - total).exp()[..., None]).sum(0)
    parts = [
        (form.restore(view), lse[0].mT if form.packed else lse)
        for view, lse in zip(views, lses, strict=True)
    ]
    found = ak.merge(parts, layout=layout)
    assert found.output.shape == form.shape(Sizes(1, 5, 4, 8))
    torch.testing.assert_close(form.view(found.output, 4), output, rtol=1e-14, atol=1e-14)
    lse = found.stats.lse.mT[None] if form.packed else found.stats.lse
    torch.testing.assert_close(lse, total, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("with_sink", [False, True])
def test_empty_rows_count_for_nothing(with_sink: bool) -> None:
    """Row 0 is empty in one part, where its output is NaN; row 1 in both."""
    outputs, lses = noise(2, 1, 2, 2, 4), noise(2, 1, 2, 2)
    outputs[1, :, 0], lses[1, :, :, 0] = torch.nan, -torch.inf
    outputs[:, :, 1], lses[:, :, :, 1] = torch.nan, -torch.inf
    leaves = [t.clone().requires_grad_() for t in (*outputs, *lses)]
    sink = noise(2).requires_grad_() if with_sink else None
    found = ak.merge(list(zip(leaves[:2], leaves[2:], strict=True)), sink=sink)
    assert found.output[:, 1].eq(0).all()
    if sink is None:
        assert torch.equal(found.output[:, 0], outputs[0, :, 0])
        assert torch.equal(found.stats.lse[..., 0], lses[0, ..., 0])
        assert found.stats.lse[..., 1].eq(-torch.inf).all()
    else:
        assert torch.equal(found.stats.lse[0, :, 1], sink)
    ends = found.output.sum() + found.stats.lse.masked_fill(lses.amax(0) == -torch.inf, 0.0).sum()
    grads = torch.autograd.grad(ends, leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert all(grad[:, 1].eq(0).all() for grad in grads[:2])
    assert grads[1].eq(0).all()
    assert grads[3][..., 0].eq(0).all()
    if sink is None:
        assert all(grad[..., 1].eq(0).all() for grad in grads[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_merged_wide(dtype: torch.dtype) -> None:
    outputs, lses = noise(8, 1, 16, 2, 8, dtype=dtype), noise(8, 1, 2, 16, dtype=torch.float32)
    found = ak.merge(list(zip(outputs, lses, strict=True)))
    exact = ak.merge(list(zip(outputs.double(), lses.double(), strict=True)))
    assert (found.output.dtype, found.stats.lse.dtype) == (dtype, torch.float32)
    assert torch.equal(found.output, exact.output.to(dtype)) or torch.allclose(
        found.output.double(), exact.output, rtol=torch.finfo(dtype).eps / 1.9, atol=1e-7
    )
    wide = ak.merge(list(zip(outputs.float(), lses, strict=True)))
    assert wide.output.dtype == torch.float32
    torch.testing.assert_close(wide.output.double(), exact.output, rtol=1e-6, atol=1e-6)


def test_the_largest_score_is_known_where_all_parts_have_it() -> None:
    parts = split([0, 10, 30], operands())
    assert ak.merge(parts).stats.max.shape == (2, 4, 20)
    pairs = [(part.output, part.stats.lse) for part in parts]
    with pytest.raises(ak.CompositionError, match="largest scores"):
        _ = ak.merge([parts[0], pairs[1]]).stats.max


# -- while parts come in ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BSND", "SBH", "TND"])
def test_rows_that_come_in_are_those_merged_at_once(layout: str) -> None:
    """Each part is of some rows; the order of the parts decides, and no other."""
    form, rng = LAYOUTS[layout], random.Random(layout)
    shape, rows = form.shape(Sizes(1, 9, 4, 8)), (9, 4) if form.packed else (1, 4, 9)
    merging, sink = Merging.of(layout, shape, rows, torch.zeros(1, dtype=WIDE)), noise(4)
    parts = []
    for k in range(5):
        a, b, c, d = sorted(rng.sample(range(10), 4))
        places = tuple(one for one in (range(a, b), range(c, d)) if one)
        seen = torch.tensor([row for one in places for row in one])
        views, lse = noise(1, 4, len(seen), 8) + k, noise(1, 4, len(seen)) - k
        part = Partial(form.restore(views), lse[0].mT if form.packed else lse)
        merging.add(part, places)
        whole, own = torch.zeros(1, 4, 9, 8, dtype=WIDE), torch.full((1, 4, 9), -torch.inf)
        whole[:, :, seen], own = views, own.double().index_copy_(2, seen, lse)
        parts.append((form.restore(whole), own[0].mT if form.packed else own))
    for logits in (None, sink):
        expected, found = ak.merge(parts, layout=layout, sink=logits), merging.answer(logits)
        torch.testing.assert_close(found.output, expected.output, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(found.lse, expected.stats.lse, rtol=1e-14, atol=1e-14)


def test_one_part_is_the_answer_to_the_bit() -> None:
    output, lse = noise(1, 5, 2, 4, dtype=torch.float32), noise(1, 2, 5, dtype=torch.float32)
    merging = Merging("BSND", torch.zeros_like(output), torch.full_like(lse, -torch.inf))
    merging.add(Partial(output, lse))
    found, at_once = merging.answer(), ak.merge([(output, lse)])
    assert torch.equal(found.output, output)
    assert torch.equal(found.lse, lse)
    assert torch.equal(at_once.output, output)
    assert torch.equal(at_once.stats.lse, lse)


# -- what is no part -------------------------------------------------------------------------

OUTPUT, LSE = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ak.merge([]), ["no part"]),
        (lambda: ak.merge((OUTPUT, LSE)), ["part 0", "(output, lse)"]),  # type: ignore[arg-type]
        (lambda: ak.merge(OUTPUT), ["list of parts"]),  # type: ignore[arg-type]
        (lambda: ak.merge([OUTPUT]), ["part 0", "tensor"]),  # type: ignore[list-item]
        (lambda: ak.merge([(OUTPUT, 1.0)]), ["log-sum-exp of part 0"]),  # type: ignore[list-item]
        (lambda: ak.merge([(OUTPUT.int(), LSE)]), ["output of part 0", "int32"]),
        (lambda: ak.merge([(OUTPUT, LSE.half())]), ["float16", "float32"]),
        (lambda: ak.merge([(OUTPUT, LSE), (OUTPUT[:, :3], LSE)]), ["[1, 3, 2, 8]", "same rows"]),
        (lambda: ak.merge([(OUTPUT, LSE), (OUTPUT.half(), LSE)]), ["float16", "one dtype"]),
        (lambda: ak.merge([(OUTPUT, LSE.mT)]), ["[1, 4, 2]", "[1, 2, 4]"]),
        (lambda: ak.merge([(OUTPUT, LSE)], layout="TND"), ["TND"]),
        (lambda: ak.merge([(OUTPUT, LSE)], layout="XYZ"), ["XYZ"]),
        (lambda: ak.merge([(OUTPUT, LSE)], sink=torch.zeros(4)), ["sink", "[2]"]),
        (lambda: ak.merge([(OUTPUT, LSE)], sink=1.0), ["the sink"]),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_part_is_said(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ak.CompositionError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
