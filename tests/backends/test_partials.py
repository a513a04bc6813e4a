"""Shares of an attention, merged and added up, are one process; they drop the same cells."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.base import BACKENDS as RUNNERS
from attnkit.backends.base import Kept, Operands
from attnkit.backends.choose import make_plan
from attnkit.backends.dropout import Chances
from attnkit.backends.tiled import TiledPlan, backend, job, retraced, walk
from attnkit.backends.tiled import bias as bias_of_tiles
from attnkit.backends.tiled.bias import bind
from attnkit.backends.tiled.terms import Excerpted, Stored, Term
from attnkit.errors import BackendRefused
from attnkit.layouts import LAYOUTS, Sizes
from attnkit.parallel.local import local_request
from attnkit.planner import Composition, Request, read_request
from attnkit.planner.request import Share
from attnkit.pse.base import rebound
from attnkit.ranges import total
from tests.agreement import Results
from tests.backends.shares import Whole, dealt, in_shares, whole_of
from tests.masks.test_taken import samples

BACKENDS = ("tiled", "reference")


def noise(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(*sizes, dtype=torch.float64, generator=generator).to(dtype)


def tensors(
    q_len: int,
    kv_len: int,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = heads
    return (
        noise(batch, q_len, q, 8, dtype=dtype),
        noise(batch, kv_len, kv, 8, dtype=dtype, seed=1),
        noise(batch, kv_len, kv, 8, dtype=dtype, seed=2),
    )


def check(whole: Whole, backend: str, rng: random.Random, heads: tuple[range, ...] = ()) -> None:
    rows, keys = dealt(rng, whole.request.q_len, 2), dealt(rng, whole.request.kv_len, 3)
    expected, found = whole.by(backend), in_shares(whole, backend, rows, keys, heads)
    expected.pop("dsink", None)  # is made where shares are merged
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert torch.allclose(one, expected[name], rtol=1e-12, atol=1e-12), (name, rows, keys)


def every_mask(backend: str, sizes: tuple[tuple[int, int], ...], step: int) -> None:
    rng = random.Random(step)
    for q_len, kv_len in sizes:
        for mask in samples(q_len, kv_len)[::step]:
            each = tensors(q_len, kv_len, (mask.heads or 2, 1), mask.batches or 2)
            check(whole_of(each, Composition(mask)), backend, rng)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_the_sum_of_their_shares(backend: str) -> None:
    every_mask(backend, ((5, 8),), 9)


@pytest.mark.sweep
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mask_is_the_sum_of_its_shares(backend: str) -> None:
    every_mask(backend, ((4, 4), (6, 6), (5, 8), (8, 3)), 1)


LONG: dict[str, dict[str, Any]] = {
    "full": {"mask": masks.Full()},
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.SlidingWindow(20), "softcap": 3.0},
    "documents": {"mask": masks.Documents([40, 5, 55, 20]) & masks.Causal()},
    "dilated": {"mask": masks.Causal() & masks.Dilated(3)},
    "empty rows": {"mask": masks.Causal() - masks.Rows(30, 50) - masks.Columns(90, 120)},
    "scale": {"mask": masks.PrefixLM(17), "scale": 4.0},
    "soft-cap": {"mask": masks.Full(), "softcap": 0.5},
}
"""Long enough that torch's own kernel has a part in some tiles."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LONG)
def test_longer_masks_and_terms(name: str, backend: str) -> None:
    rng = random.Random(name)
    how = dict(LONG[name])
    sink = noise(4) if name in ("causal", "empty rows") else None
    whole = whole_of(tensors(120, 120), Composition(**how), sink=sink)
    check(whole, backend, rng)
    check(whole, backend, rng, (range(2), range(2, 3), range(3, 4)))


def biases(length: int) -> dict[str, pse.Pse]:
    cells, table = noise(4, length, length).requires_grad_(), noise(8, 4).requires_grad_()
    slopes = rebound(pse.ALiBi(4, learnable=True), [noise(4).abs().requires_grad_()])
    return {
        "alibi": pse.ALiBi(4),
        "roots": pse.SqrtALiBi(4),
        "trained slopes": slopes,
        "t5": pse.T5Relative(4, 8, 20, table=table),
        "keys": pse.KeyBias(noise(4, length).requires_grad_()),
        "cells": pse.Dense(cells),
        "before the scale": pse.Dense(cells, before_scale=True)
        + pse.T5Relative(4, 8, 20, table=table),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", biases(1))
def test_biases_and_what_they_train(name: str, backend: str) -> None:
    rng, bias = random.Random(name), biases(90)[name]
    for mask in (masks.Causal(), masks.SlidingWindow(11)):
        for cap in (None, 2.0):
            whole = whole_of(tensors(90, 90), Composition(mask, bias, softcap=cap))
            check(whole, backend, rng)
    check(whole, backend, rng, (range(2), range(2, 3), range(3, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["alibi", "trained slopes", "t5"])
def test_biases_of_packed_batches(name: str, backend: str) -> None:
    rng, bias = random.Random(name), biases(1)[name]
    each = noise(70, 4, 8), noise(70, 2, 8, seed=1), noise(70, 2, 8, seed=2)
    lengths = {"seqlens": ak.SeqLens([30, 0, 25, 1, 14])}
    for dropout in (0.0, 0.3):
        how = Composition(masks.Causal(), bias, layout="TND", dropout=dropout)
        check(whole_of(each, how, seed=5, **lengths), backend, rng)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["alibi", "roots", "trained slopes", "t5"])
def test_distances_of_several_runs_are_read_piece_by_piece(
    name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No matrix of a share's cells is made of a bias that counts distances."""
    monkeypatch.setattr(job, "MADE_CELLS", 0)
    bias = biases(1)[name]
    made: list[Term] = []

    def noted(request: Request, *rest: Any) -> tuple[Term, ...]:
        made.extend(found := bind(request, *rest))
        return found

    monkeypatch.setattr(backend, "bind", noted)
    rng, how = random.Random(name), {"layout": "TND"} if packed else {}
    each = tensors(300, 300)
    if packed:
        each = (each[0][0], each[1][0], each[2][0])
    lengths = {"seqlens": ak.SeqLens([180, 120])} if packed else {}
    whole = whole_of(each, Composition(masks.Causal(), bias, **how), **lengths)
    rows = [(range(40), range(200, 300)), (range(40, 200),)]
    expected, found = whole.by("tiled"), in_shares(whole, "tiled", rows, rows)
    for what, one in found.items():
        assert torch.allclose(one, expected[what], rtol=1e-12, atol=1e-12), what
    kinds = [type(term) for term in made[1:]]  # the first is that of one process
    assert Excerpted in kinds
    assert Stored not in kinds
    monkeypatch.setattr(bias_of_tiles, "ROWS_OF_PIECE", 0)
    monkeypatch.setattr(bias_of_tiles, "KEYS_OF_PIECE", 0)
    check(whole, "tiled", rng)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_functions_are_told_the_positions_of_the_whole(backend: str) -> None:
    rng = random.Random(4)

    def bent(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score * (1 + b) - 0.1 * h + torch.where(i - j > 3, 0.5, 0.01 * j)

    check(whole_of(tensors(40, 40), Composition(masks.Causal(), score_fn=bent)), backend, rng)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD", "TND"])
def test_layouts_and_packed_batches(layout: str, backend: str) -> None:
    rng = random.Random(layout)
    form, mask = LAYOUTS[layout], masks.SlidingWindow(5)
    sizes = [Sizes(1 if form.packed else 2, 31, heads, 8) for heads in (4, 2, 2)]
    each = [noise(*form.shape(one), seed=k) for k, one in enumerate(sizes)]
    how: dict[str, Any] = {} if form.packed else {"num_heads": 4, "num_kv_heads": 2}
    if form.packed:
        how["seqlens"] = ak.SeqLens([9, 0, 14, 1, 7])
    for dropout in (0.0, 0.3):
        composition = Composition(mask, layout=layout, dropout=dropout)
        whole = whole_of((each[0], each[1], each[2]), composition, seed=7, **how)
        check(whole, backend, rng)
        check(whole, backend, rng, (range(2), range(2, 3), range(3, 4)))


# -- dropout ---------------------------------------------------------------------------------


def by_local_position(request: Request) -> Request:
    share = request.share
    assert share is not None
    here = {"rows": (range(request.q_len),), "keys": (range(request.kv_len),)}
    return replace(request, share=replace(share, **here))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal() & masks.Dilated(2)], ids=str)
def test_shares_drop_what_one_process_drops(mask: masks.Mask, backend: str) -> None:
    """Values that are an identity matrix show the cells themselves."""
    rng, length = random.Random(3), 41
    query, key, _ = tensors(length, length)
    value = torch.eye(length, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    whole = whole_of((query, key, value.clone()), Composition(mask, dropout=0.4), seed=11)
    expected = whole.by(backend)
    other = whole.by(BACKENDS[BACKENDS.index(backend) - 1])
    assert torch.equal(expected["output"] != 0, other["output"] != 0)
    for heads in ((), (range(1), range(1, 2), range(2, 4))):
        rows, keys = dealt(rng, length, 3), dealt(rng, length, 4)
        found = in_shares(whole, backend, rows, keys, heads)
        assert torch.equal(found["output"] != 0, expected["output"] != 0)
        for name, one in found.items():
            assert torch.allclose(one, expected[name], rtol=1e-12, atol=1e-12), name
    wrong = in_shares(whole, backend, rows, keys, changed=by_local_position)
    assert ((wrong["output"] != 0) != (expected["output"] != 0)).double().mean() > 0.1


def test_positions_in_any_order_and_of_any_runs() -> None:
    """What `Chances` says of a share's cells is what it says of the same cells of the whole."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    whole = whole_of(tensors(30, 50), Composition(masks.Full(), dropout=0.5)).request
    for _ in range(30):
        seed = torch.randint(2**63 - 1, (1,), generator=generator)
        every = Chances(whole, seed, torch.device("cpu")).survivors(slice(None), 0, 50)
        rows, keys = ((*one[::2], *(r[::-1] for r in one[1::2])) for one in
                      (dealt(rng, size, 2)[0] for size in (30, 50)))  # fmt: skip
        some = Share(30, 50, rows, keys, 4, 1)
        sizes = {"q_len": total(rows), "kv_len": total(keys)}
        own = replace(whole, share=some, num_heads=2, num_kv_heads=1, **sizes)
        chances = Chances(own, seed, torch.device("cpu"))
        there = every[:, 1:3][:, :, [i for r in rows for i in r]][..., [j for r in keys for j in r]]
        for first in range(0, sizes["kv_len"], 7):
            count = min(9, sizes["kv_len"] - first)
            found = chances.survivors(slice(None), first, count)
            assert torch.equal(found, there[..., first : first + count])


# -- 16 bits -------------------------------------------------------------------------------


def far_off(found: Results, exact: Results) -> dict[str, float]:
    errors = {name: (found[name].double() - exact[name]) for name in found if name != "lse"}
    return {name: float(error.square().mean().sqrt()) for name, error in errors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype, backend: str) -> None:
    """Outputs and gradients, rounded at the end, are as near as those of one process."""
    rng, each = random.Random(9), tensors(96, 96, dtype=dtype)
    whole = whole_of(each, Composition(masks.Full()))
    exact = whole_of(tuple(t.double() for t in each), Composition(masks.Full())).by("reference")
    one = far_off({k: t.to(dtype) for k, t in whole.by(backend).items()}, exact)
    rows, keys = dealt(rng, 96, 2), dealt(rng, 96, 6)
    wide, rounded = (
        far_off({name: t.to(dtype) for name, t in found.items()}, exact)
        for found in (in_shares(whole, backend, rows, keys, rounded=r) for r in (False, True))
    )
    assert all(wide[name] <= 1.1 * one[name] for name in wide), (wide, one)
    assert rounded["output"] > 1.2 * wide["output"]


# -- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "keys"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_rows_or_no_keys(rows: int, keys: int, dropout: float, backend: str) -> None:
    whole = whole_of(tensors(8, 8), Composition(masks.Causal(), dropout=dropout)).request
    request = local_request(
        whole, None, (range(2, 2 + rows),) * (rows > 0), (range(keys),) * (keys > 0)
    )
    plan, seed = make_plan(request, backend), torch.tensor([3])
    each = Operands(*tensors(rows, keys))
    part = RUNNERS[backend].partial(plan, each, seed)
    assert part.output.shape == each.query.shape
    assert part.output.eq(0).all()
    assert part.lse.shape == (2, 4, rows)
    assert part.lse.eq(-torch.inf).all()
    kept = Kept(seed, part.output, part.lse + 1, torch.ones_like(part.output), None)
    wanted = (True, True, True, False)
    for grad in RUNNERS[backend].partial_gradients(plan, each, kept, wanted)[:3]:
        assert grad is None or grad.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_empty_everywhere_have_no_gradient(backend: str) -> None:
    """Whatever arrives for their statistics, which are -inf."""
    whole = whole_of(tensors(12, 12), Composition(masks.Rows(3, 7) & masks.Dilated(2)))
    grad_lse = torch.full_like(whole.grad_lse, torch.nan)
    grad_lse[:, :, 3:7] = 1.0
    found = in_shares(
        replace(whole, grad_lse=grad_lse), backend, [(range(12),)], [(range(5),), (range(5, 12),)]
    )
    assert all(found[name].isfinite().all() for name in ("dq", "dk", "dv"))
    assert found["dq"][:, :3].eq(0).all()


def test_few_rows_read_their_keys_as_they_are() -> None:
    """Decoding over a cache in shares: 16 bits are not rounded, and no copy is of all keys."""
    q, k, v = tensors(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = read_request(Composition(masks.Causal()), q, k, v)
        parts = []
        for keys in (range(20), range(20, 64)):
            request = local_request(whole, None, (range(1),), (keys,))
            plan = make_plan(request, "tiled")
            assert isinstance(plan, TiledPlan)
            assert plan.few is not None
            assert not plan.of_any_length  # its keys are some positions of the whole
            own = slice(keys.start, keys.stop)
            parts.append(RUNNERS["tiled"].partial(plan, Operands(q, k[:, own], v[:, own]), None))
    exact = ak.attention(q.double(), k.double(), v.double(), mask=masks.Causal())
    found = ak.merge(parts)
    assert found.output.dtype == torch.float32
    torch.testing.assert_close(found.output.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "window", "empty rows"])
def test_the_steps_of_a_device_are_those_of_shares_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of rows, which are made again there, are not those of a share's keys alone."""
    monkeypatch.setattr(walk, "_is_tame", lambda tensor, wide: False)
    monkeypatch.setattr(retraced, "_swallows", lambda lse: True)
    rng, whole = random.Random(name), whole_of(tensors(120, 120), Composition(**LONG[name]))
    rows, keys = dealt(rng, 120, 2), dealt(rng, 120, 3)
    expected = whole.by("reference")
    found = in_shares(whole, "tiled", rows, keys, changed=lambda r: replace(r, device="cuda"))
    for what, one in found.items():
        assert torch.allclose(one, expected[what], rtol=1e-12, atol=1e-12), what


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_beside_which_sums_are_lost_leave_no_weight_above_one(backend: str) -> None:
    """In float32, lse of 1e6 says no more than which key is the largest."""
    query, key, value = tensors(16, 16, dtype=torch.float32)
    whole = whole_of((query, key, value), Composition(masks.Full(), scale=1e6))
    found = in_shares(whole, backend, [(range(16),)], [(range(7),), (range(7, 16),)])
    assert all(one.isfinite().all() for one in found.values())
    assert (found["dv"].abs().sum() <= whole.grad.abs().sum() * 1.01).all()


# -- who answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flex", "cuda"])
def test_backends_of_whole_rows_refuse(backend: str) -> None:
    whole = whole_of(tensors(8, 8, dtype=torch.float32), Composition(masks.Causal())).request
    request = local_request(whole, None, (range(4),), (range(8),))
    with pytest.raises(BackendRefused) as caught:
        make_plan(request, backend)
    assert "share" in {one.code for one in caught.value.refusals}
    assert make_plan(request).backend == "tiled"


def test_what_comes_with_the_call_or_trains_elsewhere_has_no_shares() -> None:
    table = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    bent = Composition(masks.Causal(), score_fn=lambda score, b, h, i, j: score + table[i])
    whole = whole_of(tensors(8, 8), bent).request
    request = replace(whole, share=Share(8, 8, (range(8),), (range(8),), 4))
    with pytest.raises(BackendRefused) as caught:
        make_plan(request)
    codes = {(one.subject, one.code) for one in caught.value.refusals}
    assert {("tiled", "score-gradient"), ("reference", "score-gradient")} <= codes
