"""Numbers at the ends: scales, soft-caps, biases and shapes, and what masked keys hold."""

from __future__ import annotations

import math

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from tests.agreement import near, results
from tests.backends.definition import meant, tensors

BACKENDS = ["reference", "tiled"]
F32, F64 = torch.float32, torch.float64
FLOATS = [F64, F32, torch.bfloat16, torch.float16]
STATISTICS = ("lse", "max", "sum")


def finite(made: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    return all(bool(t.isfinite().all()) for name, t in made.items() if name not in but)


# -- scales ------------------------------------------------------------------------------------

# Torch's kernel, or blocks: one causal square, a rectangle, small patterns, two merged calls.
SHAPES = {
    "causal": (masks.Causal(), 40),
    "causal, long": (masks.Causal(), 1100),
    "behind a prefix": (masks.Causal() | masks.Prefix(30), 1100),
    "all": (masks.Full(), 40),
    "documents": (masks.Documents([13, 20, 7]) & masks.Causal(), 40),
    "window": (masks.SlidingWindow(70), 300),
    "chunks": (masks.Chunked(50), 300),
}


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-320, -1e-320, 1e-30, 20.0])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_any_scale(name: str, scale: float, dtype: torch.dtype) -> None:
    mask, rows = SHAPES[name]
    given = tensors(batch=1, lengths=(rows, rows), heads=(1, 1), dtype=dtype)
    exact = results("reference", tuple(t.double() for t in given), mask=mask, scale=scale)
    # Scores of scale 20 are some hundreds: they are known to 2**-24 of that, and so are weights.
    bound = 1e-9 if dtype == F64 else 2e-5 * max(1.0, scale**2)
    near(results("tiled", given, mask=mask, scale=scale), exact, 1e-5, bound)


@pytest.mark.parametrize("scale", [1e30, -1e30])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_huge_scale_picks_the_largest_score(scale: float, dtype: torch.dtype) -> None:
    q, k, v = tensors(lengths=(30, 30), dtype=dtype)
    mask = masks.Causal()
    cells = mask.materialize(30, 30, 2, 4)
    group = k.repeat_interleave(2, 2)
    scores = torch.einsum("bind,bjnd->bnij", q, group) * math.copysign(1.0, scale)
    best = scores.masked_fill(~cells, -torch.inf).argmax(-1).transpose(1, 2)
    right = v.repeat_interleave(2, 2).gather(1, best[..., None].expand_as(q))
    for backend in BACKENDS:
        made = results(backend, (q, k, v), mask=mask, scale=scale)
        torch.testing.assert_close(made["out"], right)
        assert finite(made, but=STATISTICS)


# -- soft-caps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "before the scale", "alibi", "sum"])
def test_a_soft_cap_bends_the_products_and_not_the_bias(backend: str, name: str) -> None:
    """score = c * tanh(scale * q.k / c) + bias, as in flash-attention and ONNX's Attention."""
    given = tensors()
    cells = masks.Causal().materialize(20, 20, 2, 4)
    table = 3 * torch.randn(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    fixed = pse.ALiBi(4)
    slanted = fixed.materialize(20, 20, dtype=F64)
    scale, how = 0.7, {"softcap": 1.3, "scale": 0.7}
    if name == "alibi":
        right = meant(given, cells, bias=slanted.expand(2, 4, 20, 20), **how)
        del right["dbias 0"]  # these slopes are fixed
        made = results(backend, given, mask=masks.Causal(), pse=fixed, **how)
    elif name == "before the scale":
        right = meant(given, cells, bias=scale * table, **how)
        right["dbias 0"] = scale * right["dbias 0"]
        before = pse.Dense(table.requires_grad_(), before_scale=True)
        made = results(backend, given, mask=masks.Causal(), pse=before, **how)
    else:
        more = slanted if name == "sum" else torch.zeros_like(slanted)
        right = meant(given, cells, bias=table + more, **how)
        dense = pse.Dense(table.requires_grad_())
        bias = fixed + dense if name == "sum" else dense
        made = results(backend, given, mask=masks.Causal(), pse=bias, **how)
    near(made, right, 1e-9, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("bias", [None, pse.ALiBi(4)], ids=["bare", "alibi"])
def test_soft_caps_beyond_the_numbers(
    backend: str, dtype: torch.dtype, bias: pse.Pse | None
) -> None:
    """One that is far above all scores does nothing, one that is almost 0 leaves 0 of them."""
    given, mask = tensors(dtype=dtype), masks.Causal()
    bound = 1e-9 if dtype == F64 else 3e-5
    plain = results(backend, given, mask=mask, pse=bias)
    flat = results(backend, given, mask=mask, pse=bias, scale=0.0)
    for softcap, right in ((1e300, plain), (1e-300, flat), (5e-324, flat)):
        made = results(backend, given, mask=mask, pse=bias, softcap=softcap)
        near(made, right, bound, bound, ("out", "lse"))
        assert finite(made)
    near(results(backend, given, mask=mask, pse=bias, softcap=1e300), plain, bound, bound)
    hot = results(backend, given, mask=mask, pse=bias, softcap=1e-300, scale=1e30)
    assert finite(hot)


# -- biases ------------------------------------------------------------------------------------


def lowest(dtype: torch.dtype, rows: tuple[int, ...] = (0, 3, 17)) -> torch.Tensor:
    """A bias of small numbers, some rows of which are the lowest number of a dtype."""
    table = torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    table[list(rows)] = torch.finfo(dtype).min
    table[8, :5] = torch.finfo(dtype).min
    return table


@pytest.mark.parametrize("backend", [*BACKENDS, "emulated"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=["full", "causal"])
def test_rows_of_the_lowest_number_are_means(
    backend: str, dtype: torch.dtype, mask: masks.Mask
) -> None:
    """What transformers writes as a mask: such a row weighs what it sees alike."""
    q, k, v = tensors(dtype=dtype)
    table = lowest(dtype)
    out = ak.attention(q, k, v, mask=mask, pse=pse.Dense(table), backend=backend)
    cells = mask.materialize(20, 20)[0, 0].double()
    values = v.double().repeat_interleave(2, 2)
    # In float16 that number is -65,504, which scores do not vanish beside.
    if dtype != torch.float16:
        for row in (0, 3, 17):
            mean = torch.einsum("j,bjnd->bnd", cells[row] / cells[row].sum(), values)
            torch.testing.assert_close(out[:, row].double(), mean, rtol=1e-2, atol=1e-2)
    full = mask.materialize(20, 20, 2, 4)
    right = meant((q, k, v), full, bias=table.double().clamp(min=-1e30).expand(2, 4, 20, 20))["out"]
    if dtype == torch.float16 or mask == masks.Full():
        rows = torch.tensor([i for i in range(20) if i not in (0, 3, 17)])
        torch.testing.assert_close(out[:, rows].double(), right[:, rows], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["one", "two", "with a key bias", "never", "before the scale"])
def test_biases_beyond_the_numbers_are_cut_alike(
    dtype: torch.dtype, softcap: float | None, kind: str
) -> None:
    given, mask = tensors(dtype=dtype), masks.SlidingWindow(7)
    table = lowest(dtype)
    bias: pse.Pse
    if kind == "one":
        bias = pse.Dense(table)
    elif kind == "two":
        bias = pse.Dense(table) + pse.Dense(table.flip(0))
    elif kind == "with a key bias":
        bias = pse.Dense(table) + pse.KeyBias(table[0].clone()) + pse.ALiBi(4)
    elif kind == "never":
        bias = pse.Dense(table.masked_fill(table < -1e30, -torch.inf), validate=False)
    else:
        bias = pse.Dense(table, before_scale=True)
    how = {"mask": mask, "pse": bias, "softcap": softcap, "scale": 1.5}
    right, made = (results(backend, given, **how) for backend in BACKENDS)
    assert finite(right)
    bound = 1e-9 if dtype == F64 else 2e-5
    near(made, right, 1e-4, bound, [name for name in right if name not in STATISTICS])
    near(made, right, 1e-5, 1e-4, ["lse"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_at_masked_cells_reaches_nothing(backend: str) -> None:
    given, mask = tensors(lengths=(100, 100)), masks.SlidingWindow(9)
    cells = mask.materialize(100, 100)[0, 0]
    table = torch.randn(100, 100, dtype=F64, generator=torch.Generator().manual_seed(2))
    high = table.masked_fill(~cells, torch.finfo(F64).max)
    for softcap in (None, 2.0):
        one, other = (
            results(backend, given, mask=mask, pse=pse.Dense(t.requires_grad_()), softcap=softcap)
            for t in (table, high)
        )
        assert "dbias 0" in one
        near(one, other, 1e-9, 1e-9)


# -- what nobody sees --------------------------------------------------------------------------


def scattered() -> torch.Tensor:
    cells = torch.rand(140, 140, generator=torch.Generator().manual_seed(3)) < 0.4
    cells[:, [3, 50, 139]] = False
    return cells


UNSEEN = {
    "padding": {"mask": masks.Causal() & masks.Padding([40, 90])},
    "padding on the left": {"mask": masks.Causal() & masks.Padding([40, 90], side="left")},
    "padding and slopes": {"mask": masks.Padding([40, 90]), "pse": pse.ALiBi(4)},
    "padding and a cap": {"mask": masks.Causal() & masks.Padding([40, 90]), "softcap": 2.0},
    "dense": {"mask": masks.Dense.keep(scattered())},
    "dense and slopes": {"mask": masks.Dense.keep(scattered()), "pse": pse.ALiBi(4)},
    "function": {
        "mask": masks.Predicate(lambda b, h, i, j: (i * j) % 3 == 0) & ~masks.Columns(50, 51)
    },
    "a hole": {"mask": masks.Full() - masks.Columns(50, 53)},
    "a hole in a causal square": {"mask": masks.Causal() - masks.Columns(5, 6)},
    "dilated": {"mask": masks.Dilated(4) & masks.Columns(0, 100) & ~masks.Columns(4, 5)},
    "per head": {
        "mask": masks.PerHead(
            [
                masks.Columns(0, 20),
                masks.Columns(10, 30),
                masks.Causal() - masks.Columns(7, 9),
                masks.SlidingWindow(9) - masks.Columns(7, 8),
            ]
        )
    },
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for backend in [*BACKENDS, "emulated"]
        for name in UNSEEN
        if backend != "emulated" or "softcap" not in UNSEEN[name]  # the kernel has no such term
    ],
)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_keys_that_nobody_sees_may_hold_anything(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    how = UNSEEN[name]
    q, k, v = tensors(lengths=(140, 140), dtype=dtype)
    cells = how["mask"].materialize(140, 140, 2, 4)
    unseen = ~cells.unflatten(1, (2, 2)).any(2).any(2).transpose(1, 2)[..., None]
    assert unseen.any()
    clean = results(backend, (q, k, v), **how)
    assert finite(clean, but=STATISTICS)
    for wild in (math.nan, math.inf, -math.inf, 3e38):
        dirty = (q, k.masked_fill(unseen, wild), v.masked_fill(unseen, -wild))
        near(results(backend, dirty, **how), clean, 1e-5, 1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "emulated"])
@pytest.mark.parametrize(
    "lens", [[3, 3, 9, 5, 2, 0, 18], [40] * 3, [250, 3, 270]], ids=["tiny", "equal", "long"]
)
@pytest.mark.parametrize("mask", [masks.Full(), masks.SlidingWindow(4)], ids=["full", "window"])
def test_packed_neighbours_may_hold_anything(
    backend: str, lens: list[int], mask: masks.Mask
) -> None:
    total, dtype = sum(lens), F32
    q, k, v = (t[0] for t in tensors(batch=1, lengths=(total, total), dtype=dtype))
    how = {"mask": mask, "layout": "TND", "seqlens": ak.SeqLens(lens)}
    start = lens[0]
    wild = torch.zeros(total, 1, 1, dtype=torch.bool)
    wild[start : start + lens[1]] = True
    own = ~wild[:, 0, 0]
    clean = results(backend, (q, k, v), **how)
    for bad in (math.nan, math.inf, 3e38):
        dirty = results(backend, (q, k.masked_fill(wild, bad), v.masked_fill(wild, bad)), **how)
        near(*({k: t[own] for k, t in one.items()} for one in (dirty, clean)), 1e-5, 1e-6)


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (3, 0), (1, 1), (3, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_smallest_shapes(batch: int, lengths: tuple[int, int], dim: int) -> None:
    given = tensors(batch=batch, lengths=lengths, dim=dim, value_dim=2)
    every = {
        "full": {},
        "causal": {"mask": masks.Causal()},
        "corner": {"mask": masks.Causal("top_left"), "pse": pse.ALiBi(4)},
        "nothing": {"mask": masks.Causal() - masks.Full()},
        "opaque": {"mask": masks.Dilated(2)},
        "capped": {"mask": masks.SlidingWindow(2), "softcap": 2.0},
    }
    for name, how in every.items():
        right, made = (results(backend, given, **how) for backend in BACKENDS)
        near(made, right, 1e-9, 1e-9)
        if name == "nothing" or 0 in lengths:
            assert all((made[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
            assert (made["lse"] == -torch.inf).all()


# -- rows of one key ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.2, 100.0])
@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (masks.Chunked(601, "top_left"), (1803, 1203)),
        (masks.Full(), (601, 1)),
        (masks.Columns(7, 8), (200, 40)),
        (masks.Chunked(40, "top_left"), (200, 41)),
    ],
    ids=["last chunk", "one key", "a column", "small"],
)
def test_many_rows_of_one_key_give_it_no_slope(
    mask: masks.Mask, lengths: tuple[int, int], scale: float
) -> None:
    """Whatever its score, its weight is 1: what rounding leaves must not add up over the rows."""
    given = tensors(batch=1, lengths=lengths, heads=(2, 1), dim=16, dtype=F32)
    only = mask.materialize(*lengths)[0, 0]
    rows = only.sum(1) == 1
    key = int(only[rows][0].nonzero())
    made = results("tiled", given, mask=mask, scale=scale)
    # One rounding of p, which is 1, and of ds, which is some 2**-21: nothing of first order.
    score = scale * max(t.norm(dim=-1).max().item() for t in given[:2]) ** 2
    bound = int(rows.sum()) * scale * 4 * 2**-20 * 2**-22 * max(1.0, score)
    assert made["dk"][:, key].abs().max() <= bound
    assert made["dq"][:, rows].abs().max() <= bound
