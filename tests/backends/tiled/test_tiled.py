"""The tiled backend beside its numbers: precision, statistics, views, plans, refusals, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse
from attnkit.backends.tiled import cells, tiles
from attnkit.backends.tiled.job import schedule
from attnkit.backends.tiled.schedule import RowBlock, Schedule, Whole
from attnkit.backends.tiled.whole import pattern_mask
from attnkit.planner import Composition, Request, read_request


def operands(
    rows: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(1, heads, rows, dim, generator=generator).to(dtype) for _ in range(3)]


def request(
    mask: masks.Mask, rows: int, dtype: torch.dtype = torch.float32, heads: int = 2
) -> Request:
    x = torch.empty(1, heads, rows, 16, dtype=dtype, device="meta")
    return read_request(Composition(mask, layout="BNSD"), x, x, x)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def exact_and_sdpa(tensors: list[Tensor], mask: masks.Mask) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients in float64, and those of torch's own operator in the tensors' dtype."""
    cells = mask.materialize(*[tensors[0].shape[2]] * 2)
    out = []
    for dtype in (torch.float64, tensors[0].dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        result = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=cells)
        out.append([result, *torch.autograd.grad(result, leaves, slopes(result))])
    return out[0], out[1]


def slopes(output: Tensor) -> Tensor:
    """A gradient that arrives at an output, the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(torch.bfloat16).to(output.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    "mask",
    [masks.SlidingWindow(100), masks.Causal() | masks.Prefix(200), masks.Documents([64] * 10)],
    ids=["window", "prefix", "documents"],
)
def test_no_less_precise_than_torch(dtype: torch.dtype, spread: float, mask: masks.Mask) -> None:
    q, k, v = operands(640, dim=32)
    tensors = [(q * spread**0.5).to(dtype), (k * spread**0.5).to(dtype), v.to(dtype)]
    exact, torchs = exact_and_sdpa(tensors, mask)
    leaves = [t.requires_grad_() for t in tensors]
    out = ak.attention(*leaves, mask=mask, layout="BNSD", backend="tiled")
    assert isinstance(out, Tensor)
    found = [out, *torch.autograd.grad(out, leaves, slopes(out))]
    for name, mine, theirs, right in zip(
        ("out", "dq", "dk", "dv"), found, torchs, exact, strict=True
    ):
        # In float32 errors are those of sums, which differ by their order; in 16 bits those of
        # rounding, which do not.
        slack = 1.75 if dtype == torch.float32 else 1.02
        assert error(mine, right) <= slack * error(theirs, right), name


@pytest.mark.parametrize("rows", [200, 1100], ids=["blocks", "two calls"])
@pytest.mark.parametrize("before", [0, 40])
def test_wide_pieces_are_merged(rows: int, before: int) -> None:
    """Large prefixes take two calls of torch's kernel, whose outputs are added."""
    tensors = operands(rows)
    mask = masks.Causal() | masks.Prefix(before) if before else masks.Causal()
    exact, _ = exact_and_sdpa(tensors, mask)
    leaves = [t.requires_grad_() for t in tensors]
    out = ak.attention(*leaves, mask=mask, layout="BNSD", backend="tiled")
    assert isinstance(out, Tensor)
    found = [out, *torch.autograd.grad(out, leaves, slopes(out))]
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_many_chunks() -> None:
    """Rows meet more keys than one score tile is wide."""
    q, k, v = operands(5000, heads=1)
    mask = masks.Full() - masks.Columns(2500, 2700)
    cells = mask.materialize(20, 5000)
    found = ak.attention(
        q[:, :, :20], k, v, mask=mask, softcap=50.0, layout="BNSD", backend="tiled"
    )
    expected = ak.attention(
        q[:, :, :20],
        k,
        v,
        mask=masks.Dense.keep(cells),
        softcap=50.0,
        layout="BNSD",
        backend="reference",
    )
    torch.testing.assert_close(found, expected)


def test_strange_strides() -> None:
    """Tensors whose last axis is not dense, expanded tensors, and packed projections."""
    q, k, v = operands(300)
    expected = ak.attention(q, k, v, mask=masks.Causal(), layout="BNSD", backend="reference")
    for mask in (masks.Causal(), masks.Causal() - masks.Columns(400, 401)):
        odd = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
        found = ak.attention(*odd, mask=mask, layout="BNSD", backend="tiled")
        torch.testing.assert_close(found, expected)
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2)
    parts = packed.unbind(2)
    found = ak.attention(*parts, mask=masks.Causal(), backend="tiled")
    torch.testing.assert_close(found.transpose(1, 2), expected)
    wide = [t.expand(3, -1, -1, -1) for t in (q, k, v)]
    found = ak.attention(*wide, mask=masks.SlidingWindow(20), layout="BNSD", backend="tiled")
    right = ak.attention(q, k, v, mask=masks.SlidingWindow(20), layout="BNSD", backend="reference")
    torch.testing.assert_close(found, right.expand(3, -1, -1, -1))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_rows_or_no_keys(lengths: tuple[int, int]) -> None:
    q, k = torch.ones(2, lengths[0], 2, 4), torch.ones(2, lengths[1], 2, 4)
    found = ak.attention(q, k, k, mask=masks.Causal(), backend="tiled", return_stats=True)
    assert not isinstance(found, Tensor)
    assert found.output.shape == q.shape
    assert not found.output.any()
    assert (found.stats.lse == -torch.inf).all()


def painted(found: Schedule, rows: int) -> Tensor:
    """The cells that a schedule of one lane computes, with how often."""
    cells = torch.zeros(rows, rows, dtype=torch.int)
    (lane,) = found.lanes
    for item in lane.items:
        for k in range(item.times):
            top = item.row + k * item.step
            if isinstance(item, Whole):
                left = item.key + k * item.step
                inside = torch.ones(item.rows, item.keys)
                if item.pattern is not None:
                    inside = (
                        pattern_mask(item.pattern, torch.float32, torch.device("cpu"), 0.0) == 0
                    ).float()
                inside = inside.tril() if item.causal else inside
                cells[top : top + item.rows, left : left + item.keys] += inside.int()
                cells[top : top + item.rows, left - item.before : left] += 1
                continue
            for chunk in item.chunks:
                inside = torch.ones(item.rows, chunk.width)
                for column, pattern in chunk.patches:
                    part = pattern_mask(pattern, torch.float32, torch.device("cpu"), 0.0) == 0
                    inside[:, column : column + pattern.width] = part.float()
                column = 0
                for start, stop, step in chunk.runs:
                    width = stop - start
                    part = inside[:, column : column + width].int()
                    at = start + k * step
                    cells[top : top + item.rows, at : at + width] += part
                    column += width
    return cells


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        masks.SlidingWindow(256),
        masks.SlidingWindow(1000),
        masks.Causal() | masks.Prefix(512),
        masks.Causal() & (masks.SlidingWindow(300) | masks.Columns(0, 4)),
        masks.Documents([5, 100, 700, 33, 12, 50, 1150]) & masks.Causal(),
        masks.Documents([128] * 10 + [770]),
        masks.BlockCausal(96),
        ~masks.SlidingWindow(500),
    ],
    ids=str,
)
def test_a_schedule_computes_every_cell_once(mask: masks.Mask, dtype: torch.dtype) -> None:
    for wholes in (True, False):
        found = painted(schedule(request(mask, 2050, dtype), wholes), 2050)
        assert torch.equal(found, mask.materialize(2050, 2050)[0, 0].int())


def test_what_is_planned() -> None:
    window = schedule(request(masks.SlidingWindow(256), 16384))
    (lane,) = window.lanes
    (longer,) = schedule(request(masks.SlidingWindow(256), 32768)).lanes
    assert len(lane.items) == len(longer.items)  # blocks that look alike are one
    assert window.computed <= 1.6 * 2 * masks.SlidingWindow(256).region(16384, 16384).area
    (whole,) = schedule(request(masks.Causal(), 4096)).lanes[0].items
    assert isinstance(whole, Whole)
    documents = masks.Documents([2048] * 4) & masks.Causal()
    (whole,) = schedule(request(documents, 8192)).lanes[0].items
    assert isinstance(whole, Whole)
    assert whole.times == 4
    blocks = schedule(request(masks.Causal(), 4096), wholes=False).lanes[0].items
    assert {type(item) for item in blocks} == {RowBlock}


@pytest.mark.parametrize("rows", [150, 900], ids=["torch's calls", "blocks"])
def test_inference_then_training(rows: int) -> None:
    """What is kept from a call under inference mode serves training."""
    tensors = operands(rows)
    tiles._IDLE.clear()
    with torch.inference_mode():
        ak.attention(*tensors, mask=masks.SlidingWindow(33), layout="BNSD", backend="tiled")
    leaves = [t.requires_grad_() for t in tensors]
    out = ak.attention(*leaves, mask=masks.SlidingWindow(33), layout="BNSD", backend="tiled")
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def buffers() -> set[int]:
    """Where the memory lies that idle workspaces keep."""
    return {flat.data_ptr() for work in tiles._IDLE for flat in work._flat.values()}


def test_the_next_call_works_in_the_same_memory() -> None:
    tiles._IDLE.clear()
    layer = ak.Attention(2, 16, mask=masks.SlidingWindow(33), layout="BNSD", backend="tiled")
    layer(*operands(900))
    kept = buffers()
    assert kept
    layer(*operands(800))
    assert buffers() == kept


def test_threads_work_in_memory_of_their_own() -> None:
    layer = ak.Attention(2, 16, mask=masks.SlidingWindow(300), layout="BNSD", backend="tiled")
    given = [operands(900 + k) for k in range(4)]
    meant = [layer(*tensors) for tensors in given]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for found, expected in zip(threads.map(lambda x: layer(*x), given), meant, strict=True):
                torch.testing.assert_close(found, expected)


def test_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles._IDLE.clear()
    monkeypatch.setattr(tiles, "KEPT", 1000)
    ak.attention(*operands(900), mask=masks.SlidingWindow(33), layout="BNSD", backend="tiled")
    assert not tiles._IDLE


@pytest.mark.parametrize(
    ("mask", "height"),
    [
        (masks.SlidingWindow(256), 64),
        (masks.Causal() & (masks.SlidingWindow(256) | masks.Columns(0, 4)), 64),
        (masks.SlidingWindow(1024), 128),
        (masks.Causal() & (masks.SlidingWindow(1024) | masks.Columns(0, 4)), 128),
        (masks.Band(2048, 2048), 256),
    ],
    ids=repr,
)
def test_wide_runs_have_high_blocks(mask: masks.Mask, height: int) -> None:
    (lane,) = schedule(request(mask, 8192)).lanes
    blocks = [item for item in lane.items if isinstance(item, RowBlock)]
    assert max(blocks, key=lambda block: block.cells * block.times).rows == height


def test_stairs_of_keys_share_blocks() -> None:
    """Block-causal attention in steps of 64 is not cut at every step."""
    stairs = masks.BlockCausal(64)
    (lane,) = schedule(request(stairs, 4096)).lanes
    assert max(item.rows for item in lane.items) > 64
    documents = masks.Documents([64] * 64)
    (lane,) = schedule(request(documents, 4096)).lanes
    assert [(item.rows, item.times) for item in lane.items] == [(64, 64)]


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "TND"])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.Full()], ids=repr)
def test_equal_documents_are_one_call(layout: str, mask: masks.Mask) -> None:
    """They come back in the memory that torch's kernel wrote, with grouped heads too."""
    generator = torch.Generator().manual_seed(0)

    def leaf(heads: int) -> Tensor:
        x = torch.randn(1, heads, 192, 16, generator=generator, dtype=torch.float64)
        x = x if layout == "BNSD" else x.transpose(1, 2).contiguous()
        return (x[0] if layout == "TND" else x).requires_grad_()

    leaves = [leaf(4), leaf(2), leaf(2)]
    seqlens = ak.SeqLens([48] * 4) if layout == "TND" else None
    composed = mask if seqlens else mask & masks.Documents([48] * 4)
    found = []
    for backend in ("reference", "tiled"):
        output = ak.attention(
            *leaves, mask=composed, layout=layout, seqlens=seqlens, backend=backend
        )
        found.append([output, *torch.autograd.grad(output, leaves, slopes(output))])
    plan = ak.plan(*leaves, mask=composed, layout=layout, seqlens=seqlens, backend="tiled")
    job = plan.job  # type: ignore[attr-defined]
    assert job.sole is not None
    assert job.sole.times == 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_trained_bias_of_a_module() -> None:
    table = torch.nn.Parameter(torch.zeros(2, 40, 40))
    layer = ak.Attention(
        2, 16, mask=masks.Causal(), pse=pse.Dense(table), layout="BNSD", backend="tiled"
    )
    tensors = operands(40, dtype=torch.float32)
    layer(*tensors).square().sum().backward()
    assert table.grad is not None
    assert table.grad.tril().any()
    assert not table.grad.triu(1).any()


HALVES = {
    "one call of torch's": masks.Causal(),
    "torch's calls, merged": masks.Prefix(100) | masks.Causal(),
    "documents": masks.Documents([200, 300, 500, 24]) & masks.Causal(),
    "few keys": masks.SlidingWindow(130),
    "two runs of keys": masks.Causal() & (masks.SlidingWindow(130) | masks.Columns(0, 4)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_16_bits_are_as_exact_as_torchs_own_kernel(name: str, dtype: torch.dtype) -> None:
    """Against float64, up to logits of 50: no more than torch's error on the same inputs."""
    mask, length = HALVES[name], 1024
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, length, 64)
    given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    given[0] = given[0] * 8
    scores = given[0].double() @ given[1].double().transpose(-2, -1) / 8
    assert scores.abs().max() > 35
    slope = torch.randn(shape, generator=generator).to(dtype)
    dense = mask.materialize(length, length)

    def errors(run: Callable[..., Tensor]) -> list[float]:
        leaves = [t.clone().requires_grad_() for t in given]
        output = run(*leaves)
        found = [output, *torch.autograd.grad(output, leaves, slope)]
        return [
            (one.double() - other).square().mean().sqrt().item()
            for one, other in zip(found, meant, strict=True)
        ]

    wide = [t.double().requires_grad_() for t in given]
    output = scaled_dot_product_attention(*wide, attn_mask=dense)
    meant = [output, *torch.autograd.grad(output, wide, slope.double())]
    layer = ak.Attention(2, 64, mask=mask, layout="BNSD", backend="tiled")
    ours = errors(layer)
    theirs = errors(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.02 * other


@pytest.mark.parametrize(
    ("mask", "bias", "raised"),
    [
        (masks.Causal(), None, False),
        (masks.SlidingWindow(256), None, False),
        (masks.Prefix(512) | masks.Causal(), None, True),
        (masks.Causal(), pse.ALiBi(8), True),
    ],
    ids=repr,
)
def test_where_16_bits_are_computed_in_float32(
    mask: masks.Mask, bias: pse.Pse | None, raised: bool
) -> None:
    x = torch.empty(1, 4096, 8, 64, dtype=torch.bfloat16)
    plan = ak.plan(x, x, x, mask=mask, pse=bias, backend="tiled")
    assert (plan.job.raised is not None) == raised  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False, eq=False)
class Watched(masks.Dilated):
    """A mask that is not a region, and tells which rectangles of it are asked for."""

    def _cells(self, at: masks.Rectangle, device: torch.device | str | None) -> Tensor:
        ASKED.append(at)
        return super()._cells(at, device)


ASKED: list[masks.Rectangle] = []


@pytest.mark.parametrize(("room", "times"), [(cells.ROOM, 1), (0, 2)])
def test_cells_of_opaque_masks_are_read_by_rows_of_blocks(
    room: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No score matrix is ever held: a block's rows, inside its keys, once for all of its heads.

    They are kept, if there is room, or else read by each pass.
    """
    monkeypatch.setattr(cells, "ROOM", room)
    ASKED.clear()
    mask = Watched(2 + times) & masks.SlidingWindow(200)  # each its own plan
    leaves = [t.requires_grad_() for t in operands(1500, heads=4)]
    ak.attention(*leaves, mask=mask, layout="BNSD", backend="tiled").sum().backward()
    assert max(rows * keys for rows, keys in (at.shape for at in ASKED)) < 1500 * 1500 / 8
    assert set(Counter(ASKED).values()) == {times}
