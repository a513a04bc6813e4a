"""The compiled kernel beside the definition: masks, heads, layouts, dtypes, gradients, refusals."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, register
from attnkit.backends.compiled import CompiledPlan, library
from attnkit.backends.compiled import backend as compiled
from attnkit.errors import BackendRefused
from attnkit.planner import Composition
from tests.agreement import agree, agreement, definition, results, slopes
from tests.backends.shares import dealt, in_shares, whole_of

if compiled.LIBRARY.missing():
    pytest.skip(str(compiled.LIBRARY.missing()), allow_module_level=True)

MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(7),
    "wide window": masks.SlidingWindow(40),
    "sinks and window": masks.Causal() & (masks.SlidingWindow(9) | masks.Columns(0, 3)),
    "band": masks.Band(3, 5),
    "no row in the middle": masks.Causal() - masks.Rows(20, 60),
    "nothing": ~masks.Full(),
    "many runs": masks.Causal() - masks.Columns(3, 5) - masks.Columns(20, 40) - masks.Rows(9, 11),
    "blocks": masks.BlockCausal(16),
}


def tensors(
    lengths: tuple[int, int] = (75, 75),
    heads: tuple[int, int] = (2, 2),
    widths: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key and value, ``[b s n d]``."""
    generator = torch.Generator().manual_seed(sum(lengths))
    (rows, keys), (many, few), (width, value) = lengths, heads, widths
    shapes = ((batch, rows, many, width), (batch, keys, few, width), (batch, keys, few, value))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    agreement(tensors(), "compiled", mask=MASKS[name])
    agreement(tensors((40, 90)), "compiled", mask=MASKS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_shares_are_one_process(name: str, dtype: torch.dtype) -> None:
    """On wide copies of 16 bits: what is merged and added up is rounded once, at the end."""
    rng, composition = random.Random(name), Composition(MASKS[name])
    query, key, value = tensors(heads=(4, 2), batch=2, dtype=dtype)
    sink = torch.linspace(-1, 1, 4) if name == "no row in the middle" else None
    whole = whole_of((query, key, value), composition, sink=sink)
    wide = (query.double(), key.double(), value.double())
    exact = whole_of(wide, composition, sink=sink).by("reference")
    one = whole.by("compiled")
    found = in_shares(whole, "compiled", dealt(rng, 75, 2), dealt(rng, 75, 3))
    for what, share in found.items():
        finite = exact[what].isfinite()
        assert torch.equal(share.isfinite(), finite)
        off, own = ((t.double() - exact[what])[finite].norm() for t in (share, one[what].float()))
        assert off <= 1.1 * own + 1e-5, (what, off, own)


def test_what_a_machine_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(compiled.LIBRARY.missing())
    monkeypatch.setenv("PATH", "")
    assert "ninja" in str(compiled.LIBRARY.missing())


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129, 300])
def test_lengths_around_tiles_and_chunks(length: int) -> None:
    for mask in (masks.Causal(), masks.SlidingWindow(130), masks.Full()):
        agreement(tensors((length, length), (1, 1)), "compiled", mask=mask)


def test_no_rows_or_keys() -> None:
    agreement(tensors((0, 5)), "compiled", mask=masks.Full())
    agreement(tensors((5, 0)), "compiled", mask=masks.Full())
    agreement(tensors(batch=0), "compiled", mask=masks.Full())


@pytest.mark.parametrize(
    "widths", [(1, 1), (8, 8), (17, 17), (64, 64), (80, 80), (192, 128)], ids=str
)
def test_head_sizes(widths: tuple[int, int]) -> None:
    agreement(tensors((50, 50), widths=widths), "compiled", mask=masks.SlidingWindow(20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["window", "sinks and window", "nothing"])
def test_sixteen_bits(dtype: torch.dtype, name: str) -> None:
    agreement(tensors(dtype=dtype), "compiled", mask=MASKS[name])


def test_heads_batches_and_sinks() -> None:
    given = tensors(heads=(6, 2), batch=3)
    agreement(given, "compiled", mask=masks.Causal() & masks.Padding([75, 40, 0]))
    heads = masks.PerHead([masks.Causal(), masks.SlidingWindow(3)] * 3)
    agreement(given, "compiled", mask=heads)
    agreement(given, "compiled", mask=heads & masks.Padding([75, 40, 3]))
    sink = torch.linspace(-200.0, 3.0, 6)
    agreement(given, "compiled", mask=masks.SlidingWindow(9) - masks.Rows(3, 5), sink=sink)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD", "BSND"])
def test_layouts(layout: str) -> None:
    given = [ak.layouts.get(layout).restore(t.transpose(1, 2)) for t in tensors(batch=2)]
    extra = {"num_heads": 2} if layout in ("BSH", "SBH") else {}
    agreement(given, "compiled", mask=masks.Causal(), layout=layout, **extra)


def test_packed() -> None:
    lens = ak.SeqLens([5, 0, 33, 40], [7, 2, 33, 40])
    query, key, value = (t[0] for t in tensors((78, 82), (4, 2)))
    for mask in (masks.Causal(), masks.PerHead([masks.Causal(), masks.SlidingWindow(4)] * 2)):
        agreement([query, key, value], "compiled", mask=mask, layout="TND", seqlens=lens)


def test_strides_of_any_kind() -> None:
    joined = torch.randn(2, 30, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    given = [joined[:, :, k] for k in range(3)]
    agreement(given, "compiled", mask=masks.Causal())
    turned = [t.mT.contiguous().mT for t in tensors((30, 30))]
    agreement(turned, "compiled", mask=masks.Causal())


def test_unseen_keys_count_for_nothing() -> None:
    """NaN in keys that no row sees, or that only another packed sequence sees."""
    query, key, value = tensors((64, 64))
    wild = [t.clone() for t in (query, key, value)]
    wild[1][:, 50:], wild[2][:, 50:] = torch.nan, torch.inf
    mask = masks.Causal() & masks.Columns(0, 50)
    right, found = (results("compiled", given, mask=mask) for given in ((query, key, value), wild))
    for name in ("out", "lse", "dq"):
        assert torch.equal(right[name], found[name]), name
    lens, packed = ak.SeqLens([20, 44], [20, 44]), [t[0] for t in (query, key, value)]
    packed[2] = packed[2].clone()
    packed[2][20:] = torch.nan
    out = ak.attention(*packed, mask=masks.Causal(), layout="TND", seqlens=lens, backend="compiled")
    assert isinstance(out, Tensor)
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()


def test_nan_is_not_hidden() -> None:
    query, key, value = tensors((40, 40))
    query[0, 7], key[0, 30] = torch.nan, torch.nan
    out = ak.attention(query, key, value, mask=masks.Causal(), backend="compiled")
    assert isinstance(out, Tensor)
    rows = out.isnan().all(-1).all(-1)[0]
    assert rows.nonzero()[:, 0].tolist() == [7, *range(30, 40)]


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_large_and_small_scores(spread: float) -> None:
    query, key, value = tensors((60, 60))
    given = [query * spread, key, value]
    exact, rounded = definition(given, mask=masks.SlidingWindow(30))
    agree(results("compiled", given, mask=masks.SlidingWindow(30)), exact, rounded)


def test_gradient_through_the_statistics() -> None:
    found = []
    for backend, dtype in (("compiled", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors((40, 40), (4, 2))]
        for both in (True, False):
            out, stats = ak.attention(
                *leaves, mask=masks.SlidingWindow(9), backend=backend, return_stats=True
            )
            ends = [out, stats.lse] if both else [stats.lse]
            found.append(
                torch.autograd.grad(ends, leaves, [slopes(t) for t in ends], allow_unused=True)
            )
    for one, right in zip(found[:2], found[2:], strict=True):
        for got, meant in zip(one, right, strict=True):
            assert got is not None
            meant = torch.zeros_like(got) if meant is None else meant.float()
            torch.testing.assert_close(got, meant, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    leaves = [t.requires_grad_() for t in tensors((20, 20))]
    out = ak.attention(*leaves, mask=masks.Causal(), backend="compiled")
    with pytest.raises(BackendRefused, match="second derivatives"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_threads_add_up_apart() -> None:
    """More threads than key heads: each has gradients of its own, and all are added up."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        agreement(tensors((200, 200), (2, 1)), "compiled", mask=masks.SlidingWindow(50))
        given, how = tensors((200, 200), (2, 1)), {"mask": masks.SlidingWindow(50)}
        one, other = (results("compiled", given, deterministic=True, **how) for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)
    finally:
        torch.set_num_threads(before)


def test_in_a_graph() -> None:
    layer = ak.Attention(2, 16, mask=masks.SlidingWindow(9), backend="compiled")
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.requires_grad_() for t in tensors((40, 40))]
        out = run(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, slopes(out))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_plans_travel() -> None:
    x = tensors()[0]
    plan = ak.plan(x, x, x, mask=masks.Causal(), backend="compiled")
    assert isinstance(plan, CompiledPlan)
    copy = pickle.loads(pickle.dumps(plan))
    assert torch.equal(copy.table.tiles, plan.table.tiles)


def test_refusals_name_every_reason() -> None:
    x = torch.zeros(1, 8, 2, 4, dtype=torch.float64)
    with pytest.raises(BackendRefused) as caught:
        ak.attention(
            x, x, x, mask=masks.Dilated(2), pse=pse.ALiBi(2), dropout=0.5, softcap=3.0, scale=1e5,
            score_fn=lambda score, *cell: score, backend="compiled",
        )  # fmt: skip
    codes = {refusal.code for refusal in caught.value.refusals}
    names = ("dtype", "mask", "bias", "dropout", "softcap", "score_fn", "scale")
    assert codes == {f"compiled-{name}" for name in names}


@pytest.fixture
def preferred() -> Iterator[None]:
    compiled.prefer()
    yield
    BACKENDS.remove("compiled")
    register(compiled.Compiled())


@pytest.mark.usefixtures("preferred")
def test_auto_takes_it_where_somebody_said_so() -> None:
    x = torch.zeros(1, 40, 2, 16)
    assert ak.plan(x, x, x, mask=masks.Causal()).backend == "compiled"
    capped = ak.plan(x, x, x, mask=masks.Causal(), softcap=3.0)
    few = ak.plan(x[:, :15], x, x, mask=masks.Causal())
    for plan, code in ((capped, "compiled-softcap"), (few, "compiled-rows")):
        assert plan.backend == "tiled"
        assert code in {refusal.code for refusal in plan.passed_over}


@pytest.mark.usefixtures("preferred")
def test_auto_goes_on_where_it_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "kernel.cpp"
    broken.write_text("this is no kernel")
    monkeypatch.setattr(library, "SOURCE", broken)
    monkeypatch.setattr(compiled, "LIBRARY", library.Library())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    x = torch.zeros(1, 40, 2, 16)
    plan = ak.plan(x, x, x, mask=masks.SlidingWindow(31))
    assert plan.backend == "tiled"
    (reason,) = [refusal for refusal in plan.passed_over if refusal.code == "compiled-build"]
    assert "could not be built" in reason.reason
    with pytest.raises(BackendRefused, match="could not be built"):
        ak.plan(x, x, x, mask=masks.SlidingWindow(30), backend="compiled")


def test_without_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 9, 2, 4)
    monkeypatch.setattr(type(compiled.LIBRARY), "missing", lambda self: "no compiler")
    with pytest.raises(BackendRefused, match="cannot be built: no compiler"):
        ak.attention(x, x, x, mask=masks.SlidingWindow(8), scale=0.123, backend="compiled")
