"""The block-sparse op: its contract, which cells it computes, and its emulator in float64."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit.geometry import Region
from attnkit.kernel import RULES, AttenMask, BlockSparseCall, KernelCall, TensorSpec
from attnkit.kernel.block_sparse import BLOCK_SPARSE_RULES, OP, full_blocks, grid_of
from attnkit.kernel.block_sparse_op import BACKWARD, EMULATED, lacks_block_sparse
from attnkit.kernel.legality import LAYERS, SOURCES
from tests.npu.releases.recorded import RecordedOps

HALF = torch.float16
SPEC = TensorSpec((1, 256, 2, 128), HALF)
BARE = KernelCall(SPEC, SPEC, SPEC, 2, "BSND", scale=0.1)
CALL = BlockSparseCall.of(BARE, (Region.full(2, 2),))
PACKED = TensorSpec((256, 2, 128), HALF)
TND = BlockSparseCall.of(
    KernelCall(PACKED, PACKED, PACKED, 2, "TND", actual_seq_qlen=(256,), actual_seq_kvlen=(256,)),
    (Region.full(2, 2),),
)


def shaped(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype = HALF, length: int = 256
) -> BlockSparseCall:
    query, key = (TensorSpec((1, length, n, dim), dtype) for n in (heads, kv_heads))
    return replace(CALL, query=query, key=key, value=key, head_num=heads)


TRAINING: dict[str, Any] = {"training": True}
BROKEN: dict[str, tuple[BlockSparseCall, dict[str, Any]]] = {
    "block-sparse-product": (CALL, {"product": "950"}),
    "block-sparse-dtype": (shaped(2, 2, 128, torch.float32), {}),
    "block-sparse-head-dim": (shaped(2, 2, 64), TRAINING),
    "block-sparse-heads": (shaped(2, 1, 128, length=200), {}),
    "block-sparse-layout": (TND, TRAINING),
    "block-shape": (replace(CALL, block_shape=(128, 64), tables=(Region.full(2, 4),)), {}),
    "block-table": (replace(CALL, tables=(Region.full(2, 3),)), {}),
    "block-row-empty": (replace(CALL, tables=(Region.full(1, 2),)), {}),
    "block-sparse-plain": (replace(CALL, atten_mask=AttenMask.causal()), {}),
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_rule_and_a_call_that_breaks_it_alone(code: str) -> None:
    call, where = BROKEN[code]
    assert [one.code for one in call.violations(**where)] == [code]


def test_what_is_legal() -> None:
    assert set(BROKEN) == {code for code, _ in BLOCK_SPARSE_RULES.items()}
    for call in (CALL, TND, shaped(4, 1, 64), shaped(2, 2, 64)):
        assert call.violations() == ()
    assert CALL.violations(training=True) == shaped(4, 1, 128).violations(training=True) == ()
    assert shaped(2, 2, 128, torch.float64).violations(product="emulator", training=True) == ()
    assert replace(CALL, keep_prob=0.5).violations()[0].found.startswith("keep_prob")
    assert len(replace(CALL, tables=()).violations()) == 1
    for code, rule in BLOCK_SPARSE_RULES.items():
        assert code not in {one.code for one in RULES}
        assert rule.layer in LAYERS
        assert rule.source in SOURCES


def test_what_the_op_is_told() -> None:
    assert TND.arguments()["actual_seq_lengths"] == [256]
    assert CALL.arguments()["actual_seq_lengths"] is None
    assert CALL.arguments()["q_input_layout"] == "BNSD"
    assert str(CALL).startswith("npu_block_sparse_attention(query=float16[1, 256, 2, 128]")
    two = replace(TND, actual_seq_qlen=(128, 256), actual_seq_kvlen=(200, 256))
    assert two.arguments()["actual_seq_lengths_kv"] == [200, 56]  # not cumulative


# -- which cells -------------------------------------------------------------------------------


def cells(region: Region, q_len: int, kv_len: int) -> Tensor:
    return torch.tensor([[(i, j) in region for j in range(kv_len)] for i in range(q_len)])


def test_full_blocks_and_their_cells_by_brute_force() -> None:
    """Against cells, for random regions; a last block may be shorter."""
    made = torch.Generator().manual_seed(0)
    found = 0
    for (x, y), density in product([(1, 1), (2, 3), (3, 2), (4, 4)], [0.5, 0.8, 0.95] * 8):
        q_len, kv_len = torch.randint(1, 10, (2,), generator=made).tolist()
        allowed = torch.rand(q_len, kv_len, generator=made) < density
        if density == 0.8:  # bands, whose ends move with the rows
            low, high = torch.randint(-2, 8, (2,), generator=made).tolist()
            allowed = torch.ones(q_len, kv_len).tril(high).triu(-low) > 0
        region = Region.from_rows([runs(row) for row in allowed.tolist()])
        table = full_blocks(region, (q_len, kv_len), (x, y))
        rows, keys = grid_of((q_len, kv_len), (x, y))
        blocks = [
            [bool(allowed[i * x : (i + 1) * x, j * y : (j + 1) * y].all()) for j in range(keys)]
            for i in range(rows)
        ]
        assert cells(table, rows, keys).tolist() == blocks
        spec = [TensorSpec((1, n, 1, 8), HALF) for n in (q_len, kv_len)]
        call = BlockSparseCall.of(
            KernelCall(spec[0], spec[1], spec[1], 1, "BSND"), (table,), (x, y)
        )
        bits = torch.tensor(blocks).repeat_interleave(x, 0).repeat_interleave(y, 1)
        assert torch.equal(cells(call.regions()[0], q_len, kv_len), bits[:q_len, :kv_len])
        found += table.area
    assert found > 200


def runs(row: list[bool]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for j, seen in enumerate(row):
        if seen and out and out[-1][1] == j:
            out[-1] = (out[-1][0], j + 1)
        elif seen:
            out.append((j, j + 1))
    return out


# -- the emulator ------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, -3) for t in (k, v))
    scores = (0.3 * q @ k.mT).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


def given(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [
        torch.randn(batch, n, s, 4, generator=made, dtype=torch.float64).requires_grad_()
        for n, s in sizes
    ]


TABLE = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 0, 0]]], dtype=torch.int8)[:, None]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_emulated_op_in_a_dense_layout(kv_heads: int) -> None:
    leaves = given(2, 2, kv_heads, 7, 8)
    table = TABLE.expand(2, 2, 2, 3).contiguous()
    allowed = table.bool().repeat_interleave(4, 2).repeat_interleave(3, 3)[:, :, :7, :8]
    exact, total = dense(*leaves, allowed)
    with torch.no_grad():
        out, lse = getattr(EMULATED, OP)(*leaves, table, [4, 3], scale_value=0.3)
    torch.testing.assert_close(out, exact, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse, total, rtol=1e-14, atol=1e-14)
    dy = torch.randn_like(out)
    meant = torch.autograd.grad(exact, leaves, dy)
    with torch.no_grad():
        found = getattr(EMULATED, BACKWARD)(
            dy, *leaves, out, lse, table, [4, 3], None, None, "BNSD", "BNSD", kv_heads, 0.3
        )
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_the_emulated_op_on_packed_sequences() -> None:
    """Two sequences of other lengths, whose lengths are not cumulative."""
    sizes, table = ((7, 8), (3, 5)), TABLE.expand(2, 2, 2, 3).contiguous()
    parts = [given(1, 2, 1, *some) for some in sizes]
    packed = [
        torch.cat([one[0].transpose(0, 1) for one in side]) for side in zip(*parts, strict=True)
    ]
    lengths = [[some[side] for some in sizes] for side in (0, 1)]
    with torch.no_grad():
        out, lse = getattr(EMULATED, OP)(
            *packed, table, [4, 3], scale_value=0.3,
            actual_seq_lengths=lengths[0], actual_seq_lengths_kv=lengths[1],
        )  # fmt: skip
    assert lse.shape == (10, 2, 1)
    start = 0
    for b, (q_len, kv_len) in enumerate(sizes):
        allowed = table[b].bool().repeat_interleave(4, 1).repeat_interleave(3, 2)
        exact, total = dense(*(t[0] for t in parts[b]), allowed[:, :q_len, :kv_len])
        own = slice(start, start + q_len)
        torch.testing.assert_close(out[own].transpose(0, 1), exact, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(lse[own].transpose(0, 1), total, rtol=1e-14, atol=1e-14)
        start += q_len


def test_a_row_without_a_block_is_no_number() -> None:
    table = torch.zeros(1, 2, 2, 3, dtype=torch.int8)
    table[:, :, 0] = 1
    with torch.no_grad():
        out, lse = getattr(EMULATED, OP)(*given(1, 2, 2, 7, 8), table, [4, 3], scale_value=0.3)
    assert out[:, :, :4].isfinite().all()
    assert out[:, :, 4:].isnan().all()
    assert lse[:, :, 4:].isnan().all()


# -- what is installed -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [OP, BACKWARD])
def test_the_emulated_ops_are_spelled_like_the_genuine_ones(name: str) -> None:
    schema = getattr(RecordedOps("26.1.0"), name).schema
    ours = inspect.signature(getattr(EMULATED, name)).parameters
    assert list(ours) == [one.name for one in schema.arguments]
    for one in schema.arguments:
        theirs = one.default_value if one.has_default_value() else inspect.Parameter.empty
        assert ours[one.name].default == theirs
        assert (ours[one.name].kind == inspect.Parameter.KEYWORD_ONLY) == one.kwarg_only
    told = {*CALL.arguments(backward=name == BACKWARD)}
    assert told <= set(ours)


def test_releases_without_it_say_so() -> None:
    assert lacks_block_sparse(RecordedOps("26.1.0"), training=True) is None
    assert "has no npu_block_sparse_attention" in str(
        lacks_block_sparse(RecordedOps("7.3.0"), training=False)
    )
    older = RecordedOps("26.1.0")
    delattr(older, BACKWARD)
    assert lacks_block_sparse(older, training=False) is None
    assert BACKWARD in str(lacks_block_sparse(older, training=True))
