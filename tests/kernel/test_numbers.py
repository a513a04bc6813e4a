"""Output, statistics and gradients against the plain whole-matrix formula in float64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnkit.geometry import Region, Slice
from attnkit.kernel import (
    AttenMask,
    TensorSpec,
    dropout_bytes,
    dropout_mask,
    emulate,
    emulate_grad,
    log_sum_exp,
    merge_partials,
    pack_stats,
    unpack_stats,
)
from attnkit.kernel.scores import score_tile
from tests.kernel.plain import (
    DENSE,
    FLT_MAX,
    call_for,
    cells,
    cumulative,
    from_layout,
    mask_for,
    packed,
    plain,
    to_layout,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def operands(batch, heads, kv_heads, sq, skv, dim=6, value_dim=4, seed=0):
    return (
        randn(batch, heads, sq, dim, seed=seed),
        randn(batch, kv_heads, skv, dim, seed=seed + 1),
        randn(batch, kv_heads, skv, value_dim, seed=seed + 2),
    )


def bits(shape, keep_prob: float, seed: int) -> torch.Tensor:
    """The decisions that a seed means, unpacked from the packed mask bit by bit."""
    count = int(torch.tensor(shape).prod())
    raw = dropout_mask(count, keep_prob, seed=seed).tolist()
    flat = [raw[n // 8] >> (n % 8) & 1 for n in range(count)]
    return torch.tensor(flat, dtype=torch.float64).view(shape)


def bias_for(pse_type: int, heads: int, sq: int, skv: int, starts=(0, 0)):
    """(what the op is given, the matrix that it means)."""
    if pse_type < 2:
        matrix = randn(1, heads, sq, skv, seed=9)
        return matrix, matrix
    slopes = torch.rand(heads, generator=torch.Generator().manual_seed(9))
    distance = (torch.arange(skv) + starts[1] - torch.arange(sq)[:, None] - starts[0]).abs()
    distance = distance.double().sqrt() if pse_type == 3 else distance.double()
    return slopes, -slopes.double()[None, :, None, None] * distance


def gradients(outputs, weights, inputs):
    total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


def check_dense(layout, mode, pse_type, keep_prob=1.0, sink=False, sq=5, skv=7, pre=3, nxt=1):
    batch, heads, kv_heads, scale, seed = 2, 4, 2, 0.4, 5
    tensors = [t.requires_grad_() for t in operands(batch, heads, kv_heads, sq, skv)]
    prefix = tuple(range(max(skv - sq, 0) + 1, max(skv - sq, 0) + 1 + batch))
    allowed = torch.stack([cells(mode, sq, skv, pre, nxt, n) for n in prefix])[:, None]
    pse, bias = (None, None) if pse_type is None else bias_for(pse_type, heads, sq, skv)
    mask, mask_tensor = mask_for(mode), None
    if mode in (0, 1, 5):
        mask_tensor = ~allowed
        mask = AttenMask.full(tuple(allowed.shape))
    sinks = randn(heads, seed=4).float() if sink else None
    given_sink = sinks.clone().requires_grad_() if sinks is not None else None
    q, k, v = (to_layout(t, layout) for t in tensors)
    arguments = {"pse_type": 1 if pse_type is None else pse_type, "keep_prob": keep_prob}
    arguments |= {"pre_tokens": pre, "next_tokens": nxt, "prefix": prefix, "seed": seed}
    call = call_for(
        q,
        k,
        v,
        heads,
        layout,
        scale=scale,
        sparse_mode=mode,
        atten_mask=mask,
        pse=None if pse is None else TensorSpec.of(pse),
        sink=None if sinks is None else TensorSpec.of(sinks),
        **arguments,
    )
    out, peak, total = emulate(call, q, k, v, pse=pse, atten_mask=mask_tensor, sink=given_sink)
    keep = bits((batch, heads, sq, skv), keep_prob, seed) if keep_prob < 1 else None
    plain_sink = None if sinks is None else sinks.double().requires_grad_()
    want, want_peak, want_total = plain(
        *tensors,
        allowed,
        scale=scale,
        bias=bias,
        bias_first=pse_type == 1,
        keep=keep,
        keep_prob=keep_prob,
        sink=plain_sink,
        zero_rows=call.empty_row_output == "zero",
    )
    got = from_layout(out, layout, heads)
    torch.testing.assert_close(got, want, **CLOSE)
    assert peak.shape == total.shape == (batch, heads, sq, 8)
    assert out.shape == call.output.shape
    assert peak.dtype == call.stats.dtype
    empty = want_peak == -FLT_MAX
    torch.testing.assert_close(peak[..., 3], want_peak, **CLOSE)
    torch.testing.assert_close(total[..., 5][~empty], want_total[~empty], **CLOSE)
    weight = randn(*want.shape, seed=8)
    found = gradients([got], [weight], [*tensors, *([given_sink] if sink else [])])
    wanted = gradients([want], [weight], [*tensors, *([plain_sink] if sink else [])])
    for g, w in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(g, w, **CLOSE)
    if sink:
        torch.testing.assert_close(found[3].double(), wanted[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_prob", [1.0, 0.7])
@pytest.mark.parametrize("layout", DENSE)
def test_dense_modes_and_biases(layout: str, keep_prob: float):
    for mode, pse_type in product((0, 1, 2, 3, 4, 5, 6), (None, 0, 1, 2, 3)):
        check_dense(layout, mode, pse_type, keep_prob)


def test_more_queries_than_keys_and_sinks():
    """Rows without a key, where the tiling turns its handling of them on."""
    for mode in (2, 3, 4, 6):
        check_dense("BNSD", mode, None, sq=7, skv=5, pre=9, nxt=0)
        check_dense("BSH", mode, 0, 0.6, sink=True, sq=7, skv=5, pre=9, nxt=0)


def packed_bias(pse_type: int, heads: int, sq: int):
    """(what the op is given, what one sequence of sq tokens reads of it)."""
    if pse_type > 1:
        return bias_for(pse_type, heads, sq, sq)
    values = randn(heads, 2048, seed=9)
    stored = torch.arange(1024)[:, None] - torch.arange(5) + 5 - 1024
    distance = torch.arange(sq)[:, None] - torch.arange(sq)
    return values[:, stored][None].contiguous(), values[:, distance][None]


def check_packed(mode, pse_type, keep_prob=1.0, softmax_layout="", trailing=0):
    sizes = [(3, 4), (0, 2), (5, 5), (1, 6), (2, 2)][: 5 if mode != 8 else 4]
    if pse_type is not None:
        sizes = [(n, n) for n in (3, 5, 1)]
    heads, kv_heads, scale, seed, pre, nxt = 4, 2, 0.3, 6, 6, 0 if mode in (7, 8) else 1
    parts = [
        [t.requires_grad_() for t in operands(1, heads, kv_heads, sq, skv, seed=10 * n)]
        for n, (sq, skv) in enumerate(sizes)
    ]
    q, k, v = (packed(list(column)) for column in zip(*parts, strict=True))
    full_cells = cells(0, 5, 6, pre, nxt)
    mask = mask_for(mode) if mode > 1 else AttenMask.full((5, max(s[1] for s in sizes)))
    mask_tensor = None if mode > 1 else ~full_cells[:, : mask.shape[1]]
    with_queries = [b for b, (sq, _) in enumerate(sizes) if sq]
    cut = {7: with_queries[-1], 8: with_queries[0]}.get(mode)
    prefix = tuple(skv - sq + 1 if skv > sq else skv for sq, skv in sizes)
    pse = None if pse_type is None else packed_bias(pse_type, heads, 5)[0]
    call = call_for(
        q,
        k,
        v,
        heads,
        "TND",
        scale=scale,
        sparse_mode=mode,
        atten_mask=mask,
        prefix=prefix if mode == 6 else None,
        pse=None if pse is None else TensorSpec.of(pse),
        pse_type=1 if pse_type is None else pse_type,
        keep_prob=keep_prob,
        seed=seed,
        pre_tokens=pre,
        next_tokens=nxt,
        softmax_layout=softmax_layout,
        actual_seq_qlen=(*cumulative([s[0] for s in sizes]), *[0] * trailing),
        actual_seq_kvlen=(*cumulative([s[1] for s in sizes]), *[0] * trailing),
    )
    out, peak, total = emulate(call, q, k, v, pse=pse, atten_mask=mask_tensor)
    count = heads * sum(sq * skv for sq, skv in sizes)
    decisions = bits((count,), keep_prob, seed) if keep_prob < 1 else None
    wants, stats, used = [], [], 0
    for b, (sq, skv) in enumerate(sizes):
        keep = None
        if decisions is not None:
            keep = decisions[used : used + heads * sq * skv].view(1, heads, sq, skv)
        used += heads * sq * skv
        allowed = cells(mode, sq, skv, pre, nxt, prefix[b], b == cut)
        if mode < 2:
            allowed = full_cells[:sq, :skv]
        want, *stat = plain(
            *parts[b],
            allowed,
            scale=scale,
            bias=None if pse_type is None else packed_bias(pse_type, heads, sq)[1],
            bias_first=pse_type == 1,
            keep=keep,
            keep_prob=keep_prob,
        )
        wants.append(want)
        stats.append(stat)
    torch.testing.assert_close(out, packed(wants), **CLOSE)
    for n, got in enumerate((peak, total)):
        blocks = [s[n][0].T if softmax_layout else s[n][0] for s in stats]
        flat = torch.cat([b.flatten() for b in blocks])
        torch.testing.assert_close(got.reshape(-1, 8)[:, 2], flat, **CLOSE)
        assert got.shape == (len(q), heads, 8)
        assert torch.equal(pack_stats(call, unpack_stats(call, got)), got)
    weight = randn(*out.shape, seed=8)
    inputs = [t for part in parts for t in part]
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((packed(wants) * weight).sum(), inputs, allow_unused=True)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, **CLOSE)


@pytest.mark.parametrize("keep_prob", [1.0, 0.7])
@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 6, 7, 8])
def test_packed_modes(mode: int, keep_prob: float):
    check_packed(mode, None, keep_prob, trailing=2)
    check_packed(mode, None, keep_prob, softmax_layout="TND")
    for pse_type in () if mode == 7 else (2, 3):
        check_packed(mode, pse_type, keep_prob)
    for pse_type in (0, 1) if mode in (2, 3) else ():
        check_packed(mode, pse_type, keep_prob)


# -- rows without a key ------------------------------------------------------------------


def test_a_masked_row_is_the_mean_of_v_unless_asked_otherwise():
    q, k, v = operands(1, 2, 1, 3, 4)
    rows = Region.of(Slice(0, 1, 0, 2), Slice(2, 3, 1, 4))
    mask = AttenMask.full((3, 4), [rows])
    call = call_for(q, k, v, 2, "BNSD", atten_mask=mask)
    assert call.empty_row_output == "mean"
    assert call.averaged_rows() == (((1, 2),),)
    out, peak, total = emulate(call, q, k, v)
    torch.testing.assert_close(out[0, 0, 1], v[0, 0].mean(0), **CLOSE)
    assert peak[0, 0, 1, 0] == -FLT_MAX
    assert total[0, 0, 1, 0] == 4
    call = call_for(q, k, v, 2, "BNSD", atten_mask=mask, inner_precise=2)
    assert call.empty_row_output == "zero"
    assert call.averaged_rows() == ((),)
    tensors = [t.clone().requires_grad_() for t in (q, k, v)]
    out, peak, total = emulate(call, *tensors)
    assert (out[0, :, 1] == 0).all()
    assert peak[0, 0, 1, 0] == -FLT_MAX
    assert total[0, 0, 1, 0] == FLT_MAX
    assert log_sum_exp(peak, total)[0, 0, 1, 0] == float("-inf")
    grads = torch.autograd.grad(out[:, :, 1].sum(), tensors)
    assert all(g.abs().max() < 1e-30 for g in grads)


def test_when_the_tiling_handles_empty_rows_by_itself():
    def invalid_line(sq, skv, mode, pre=100, nxt=0, **more):
        q, k, v = operands(1, 1, 1, sq, skv)
        mask = mask_for(mode) if mode > 1 and mode != 5 else AttenMask.full((sq, skv))
        call = call_for(
            q, k, v, 1, "BNSD", sparse_mode=mode, pre_tokens=pre, next_tokens=nxt,
            atten_mask=mask, **more,
        )  # fmt: skip
        return call.invalid_line

    assert invalid_line(5, 3, 3)
    assert not invalid_line(3, 5, 3)
    assert invalid_line(4, 4, 4, pre=-1, nxt=3)
    assert invalid_line(5, 3, 4, nxt=1)
    assert not invalid_line(5, 3, 4, nxt=2)
    assert invalid_line(9, 4, 0, pre=3, nxt=1)
    assert invalid_line(4, 4, 0, pre=3, nxt=-1)
    assert not invalid_line(9, 4, 0, pre=9)
    assert not invalid_line(9, 4, 0, pre=5, nxt=1)
    assert not invalid_line(9, 4, 2)
    assert not invalid_line(9, 4, 1, pre=0)
    assert invalid_line(9, 4, 6, prefix=(0,))
    assert not invalid_line(9, 4, 6, prefix=(1,))


def test_a_packed_sequence_without_keys_gives_zero_and_zero_stats():
    q, k, v = (t.float() for t in (randn(4, 2, 3), randn(3, 2, 3), randn(3, 2, 3)))
    call = call_for(q, k, v, 2, "TND", actual_seq_qlen=(1, 4), actual_seq_kvlen=(0, 3))
    out, peak, total = emulate(call, q, k, v)
    assert (out[0] == 0).all()
    assert (peak[0] == 0).all()
    assert (total[0] == 0).all()
    assert log_sum_exp(peak, total)[0, 0, 0] == float("-inf")


def test_rows_beyond_the_last_sequence():
    """Zero after trailing zeros; else memory that nobody wrote, shown as NaN."""
    q = randn(5, 1, 2)
    for lengths, unwritten in (((2, 3), True), ((2, 3, 0), False)):
        call = call_for(q, q, q, 1, "TND", actual_seq_qlen=lengths, actual_seq_kvlen=lengths)
        out, *_ = emulate(call, q, q, q)
        assert out[3:].isnan().all() if unwritten else (out[3:] == 0).all()


def test_a_bias_gradient_is_never_written():
    q, k, v = operands(1, 2, 2, 3, 3)
    pse = randn(1, 2, 3, 3).requires_grad_()
    call = call_for(q, k, v, 2, "BNSD", pse=TensorSpec.of(pse))
    out, *_ = emulate(call, q, k, v, pse=pse)
    out.sum().backward()
    assert pse.grad is not None
    assert pse.grad.isnan().all()


# -- biases ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_bias_shapes(batch: int):
    sq, skv, heads = 3, 5, 2
    q, k, v = operands(2, heads, 1, sq, skv)
    for shape in ((batch, heads, sq, skv), (batch, heads, 1, skv)):
        pse = randn(*shape, seed=3)
        for pse_type in (0, 1):
            call = call_for(
                q, k, v, heads, "BNSD", pse=TensorSpec.of(pse), pse_type=pse_type, scale=0.5
            )
            out, *_ = emulate(call, q, k, v, pse=pse)
            want, *_ = plain(q, k, v, scale=0.5, bias=pse, bias_first=pse_type == 1)
            torch.testing.assert_close(out, want, **CLOSE)


def test_start_indices_work_only_together_and_slopes_may_differ_between_batches():
    q, k, v = operands(2, 2, 2, 4, 4)
    slopes = torch.rand(2, 2, generator=torch.Generator().manual_seed(2))
    distance = torch.arange(4)[None] - torch.arange(4)[:, None]
    for q_start, kv_start, shift in (((3,), (1,), -2), ((3,), None, 0), (None, (1,), 0)):
        call = call_for(
            q, k, v, 2, "BNSD", pse=TensorSpec.of(slopes), pse_type=2,
            q_start_idx=q_start, kv_start_idx=kv_start,
        )  # fmt: skip
        out, *_ = emulate(call, q, k, v, pse=slopes)
        bias = -slopes.double()[..., None, None] * (distance + shift).abs()
        torch.testing.assert_close(out, plain(q, k, v, bias=bias)[0], **CLOSE)


def test_mode_8_shifts_only_the_first_sequence():
    sizes, heads = [(3, 3), (4, 4)], 2
    parts = [operands(1, heads, heads, *size, seed=n) for n, size in enumerate(sizes)]
    q, k, v = (packed(list(column)) for column in zip(*parts, strict=True))
    slopes = torch.rand(heads, generator=torch.Generator().manual_seed(2))
    call = call_for(
        q, k, v, heads, "TND", pse=TensorSpec.of(slopes), pse_type=2, sparse_mode=8,
        atten_mask=AttenMask.causal(), pre_tokens=9, next_tokens=0, q_start_idx=(2,),
        kv_start_idx=(5,), actual_seq_qlen=(3, 7), actual_seq_kvlen=(3, 7),
    )  # fmt: skip
    out, *_ = emulate(call, q, k, v, pse=slopes)
    wants = []
    for part, (sq, skv), starts in zip(parts, sizes, ((2, 5), (0, 0)), strict=True):
        distance = (torch.arange(skv) + starts[1] - torch.arange(sq)[:, None] - starts[0]).abs()
        bias = -slopes.double()[None, :, None, None] * distance
        wants.append(plain(*part, cells(2, sq, skv, 0, 0), bias=bias)[0])
    torch.testing.assert_close(out, packed(wants), **CLOSE)


@pytest.mark.parametrize("lengths", [None, (1500,), (1100, 300, 1500, 1024), (700, 3, 120)])
def test_the_compressed_bias_stands_for_one_that_depends_on_the_distance(lengths):
    """The last 1024 rows of a Toeplitz bias, over a causal call; packed lengths may differ."""
    heads, sizes = 2, lengths or (1500,)
    longest = max(sizes)
    parts = [operands(1, heads, 1, size, size, seed=10 * n) for n, size in enumerate(sizes)]
    values = randn(heads, 2 * longest, seed=3)
    distance = torch.arange(longest)[:, None] - torch.arange(longest)
    bias = values[:, distance + longest][None]
    pse = bias[:, :, -1024:]
    # Rows above those of a longest sequence that is short are never read.
    pse = torch.cat([torch.full((1, heads, 1024 - pse.shape[2], longest), torch.nan), pse], 2)
    arguments = {"actual_seq_qlen": cumulative(sizes), "actual_seq_kvlen": cumulative(sizes)}
    tensors = [packed(list(column)) for column in zip(*parts, strict=True)]
    if lengths is None:
        arguments, tensors = {}, parts[0]
    call = call_for(
        *tensors, heads, "TND" if lengths else "BNSD", pse=TensorSpec.of(pse), pse_type=0,
        sparse_mode=3, atten_mask=AttenMask.causal(), **arguments,
    )  # fmt: skip
    assert not call.violations(product="emulator", training=True)
    out, *_ = emulate(call, *tensors, pse=pse)
    wants = [
        plain(*part, distance[:n, :n] >= 0, bias=bias[:, :, :n, :n])[0]
        for part, n in zip(parts, sizes, strict=True)
    ]
    torch.testing.assert_close(out, packed(wants) if lengths else wants[0], **CLOSE)


def test_packed_sinks_and_their_gradients():
    sizes = [(3, 4), (2, 2)]
    parts = [operands(1, 4, 2, *size, seed=n) for n, size in enumerate(sizes)]
    sink = randn(4, seed=4).requires_grad_()
    lengths = {"actual_seq_qlen": (3, 5), "actual_seq_kvlen": (4, 6)}
    tensors = [packed(list(column)) for column in zip(*parts, strict=True)]
    call = call_for(*tensors, 4, "TND", sink=TensorSpec.of(sink), **lengths)
    assert not call.violations(product="emulator")
    out, peak, total = emulate(call, *tensors, sink=sink)
    other = sink.detach().clone().requires_grad_()
    wants = [plain(*part, sink=other) for part in parts]
    torch.testing.assert_close(out, packed([w[0] for w in wants]), **CLOSE)
    stats = (unpack_stats(call, peak), unpack_stats(call, total))
    for n, stat in enumerate(stats, 1):
        torch.testing.assert_close(stat, torch.cat([w[n][0].T for w in wants]), **CLOSE)
    weight = randn(*out.shape, seed=8)
    (found,) = torch.autograd.grad((out * weight).sum(), sink)
    (wanted,) = torch.autograd.grad((packed([w[0] for w in wants]) * weight).sum(), other)
    torch.testing.assert_close(found, wanted, **CLOSE)


# -- dropout -----------------------------------------------------------------------------


def test_packed_decisions_given_from_outside_are_the_regenerated_ones():
    q, k, v = operands(2, 4, 2, 5, 7)
    generated = call_for(q, k, v, 4, "BNSD", keep_prob=0.6, seed=11, offset=3)
    mask = dropout_mask(generated.numels, 0.6, seed=11, offset=3)
    assert len(mask) == dropout_bytes(2 * 4 * 5 * 7)
    given_ = call_for(q, k, v, 4, "BNSD", keep_prob=0.6, dropout_mask=TensorSpec.of(mask))
    results = (
        emulate(generated, q, k, v),
        emulate(given_, q, k, v, dropout_mask=mask),
        emulate(given_, q, k, v, dropout_mask=mask ^ 1),
    )
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    without = emulate(call_for(q, k, v, 4, "BNSD"), q, k, v)
    assert torch.equal(results[0][2], without[2]), "the sum is taken before dropout"


def test_decisions_are_fair_and_depend_on_everything():
    one = dropout_mask(80_000, 0.3, seed=1)
    rate = sum(bin(byte).count("1") for byte in one.tolist()) / 80_000
    assert abs(rate - 0.3) < 0.01
    for other in ({"seed": 2}, {"seed": 1, "offset": 1}):
        two = dropout_mask(80_000, 0.3, **other)
        agree = 1 - sum(bin(b).count("1") for b in (one ^ two).tolist()) / 80_000
        assert abs(agree - (0.3**2 + 0.7**2)) < 0.02
    assert (dropout_mask(64, 1.0, seed=1)[:8] == 255).all()
    assert (dropout_mask(64, 0.0, seed=1) == 0).all()


# -- merging -----------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40)
def test_any_split_of_the_keys_merges_to_the_whole(data: st.DataObject):
    """Forward by max and sum; backward as the sum of grads with the merged statistics."""
    sq, skv, heads = data.draw(st.integers(1, 6)), data.draw(st.integers(4, 10)), 2
    cuts = sorted(data.draw(st.sets(st.integers(1, skv - 1), min_size=1, max_size=3)))
    edges = [0, *cuts, skv]
    tensors = [t.requires_grad_() for t in operands(1, heads, 1, sq, skv)]
    hi = data.draw(st.integers(-sq, skv))
    whole = Region.of(Slice(0, sq, 0, skv, hi=hi))
    mask = AttenMask.full((sq, skv), [whole])
    arguments = {"scale": 0.7, "inner_precise": 2}
    out, peak, total = emulate(
        call_for(*tensors, heads, "BNSD", atten_mask=mask, **arguments), *tensors
    )
    weight = randn(*out.shape, seed=8)
    wanted = torch.autograd.grad((out * weight).sum(), tensors)
    q, k, v = (t.detach() for t in tensors)
    calls, results = [], []
    for j0, j1 in pairwise(edges):
        part = AttenMask.full((sq, j1 - j0), [whole.cut((0, sq), (j0, j1))])
        slices = (q, k[:, :, j0:j1], v[:, :, j0:j1])
        calls.append((call_for(*slices, heads, "BNSD", atten_mask=part, **arguments), slices))
        results.append(emulate(calls[-1][0], *slices))
    outs, peaks, totals = (list(column) for column in zip(*results, strict=True))
    merged = merge_partials(outs, [p[..., 0] for p in peaks], [t[..., 0] for t in totals])
    torch.testing.assert_close(merged[0], out, **CLOSE)
    torch.testing.assert_close(merged[1], peak[..., 0], **CLOSE)
    torch.testing.assert_close(merged[2], total[..., 0], **CLOSE)
    stats = {
        name: pack_stats(calls[0][0], rows)
        for name, rows in zip(("softmax_max", "softmax_sum"), merged[1:], strict=True)
    }
    grads = [
        emulate_grad(call, *slices, weight, attention_in=merged[0], **stats)
        for call, slices in calls
    ]
    found = (
        sum(g.query for g in grads),
        torch.cat([g.key for g in grads], 2),
        torch.cat([g.value for g in grads], 2),
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


# -- low precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_within_its_rounding(dtype: torch.dtype):
    """Inputs are exact in the dtype, so errors come from rounding P and results only."""
    q, k, v = (t.to(dtype) for t in operands(2, 4, 2, 40, 50))
    call = call_for(q, k, v, 4, "BNSD", scale=0.4, sparse_mode=3, atten_mask=AttenMask.causal())
    out, peak, total = emulate(call, q, k, v)
    assert out.dtype == dtype
    assert peak.dtype == total.dtype == torch.float32
    allowed = cells(3, 40, 50, 0, 0)
    want, want_peak, _ = plain(*(t.double() for t in (q, k, v)), allowed, scale=0.4)
    unit = torch.finfo(dtype).eps
    bound = 2 * unit * v.double().abs().max() + 1e-5
    assert (out.double() - want).abs().max() <= bound
    torch.testing.assert_close(peak[..., 0].double(), want_peak, rtol=1e-5, atol=1e-5)


def test_many_tiles_and_heads_are_cut_without_a_trace():
    """Sizes that need several row tiles, column tiles and head groups."""
    q, k, v = (t.requires_grad_() for t in operands(2, 6, 3, 300, 1200, dim=3, value_dim=2))
    call = call_for(q, k, v, 6, "BNSD", sparse_mode=3, atten_mask=AttenMask.causal(), scale=0.5)
    out, *_ = emulate(call, q, k, v)
    allowed = torch.arange(1200) <= torch.arange(300)[:, None] + 900
    want, *_ = plain(q, k, v, allowed, scale=0.5)
    torch.testing.assert_close(out, want, **CLOSE)
    weight = randn(*out.shape, seed=1)
    found, wanted = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, want))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_as_good_as_plain_low_precision(dtype: torch.dtype):
    """The bound is the error that the whole-matrix formula makes when run in the dtype."""
    exact = [t.to(dtype).double().requires_grad_() for t in operands(2, 4, 2, 40, 50)]
    rough = [t.detach().to(dtype).requires_grad_() for t in exact]
    tested = [t.detach().to(dtype).requires_grad_() for t in exact]
    allowed = cells(3, 40, 50, 0, 0)
    weight = randn(2, 4, 40, 4, seed=3).to(dtype)
    call = call_for(*tested, 4, "BNSD", scale=0.4, sparse_mode=3, atten_mask=AttenMask.causal())
    truth = plain(*exact, allowed, scale=0.4)[0]
    low = plain(*(t.float() for t in rough), allowed, scale=0.4)[0].to(dtype)
    got = emulate(call, *tested)[0]
    wanted = torch.autograd.grad((truth * weight).sum(), exact)
    found = torch.autograd.grad((got.double() * weight).sum(), tested)
    scale = torch.finfo(dtype).eps
    assert (got.double() - truth).abs().max() <= 3 * (low.double() - truth).abs().max() + scale
    for grad, want in zip(found, wanted, strict=True):
        # Weights and score gradients are rounded once each before they are summed over keys.
        assert (grad.double() - want).abs().max() <= 4 * scale * want.abs().max()


# -- memory and work ---------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Records the largest tensor that anything made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_nothing_of_the_size_of_the_score_matrix_is_made():
    """Forward and backward of 3000 tokens: tiles, inputs and outputs, never [B, N, Sq, Skv]."""
    q, k, v = (t.float().requires_grad_() for t in operands(1, 4, 4, 3000, 3000, 8, 8))
    for mode, keep_prob in ((3, 1.0), (4, 0.9)):
        call = call_for(
            q, k, v, 4, "BNSD", sparse_mode=mode, atten_mask=AttenMask.causal(),
            pre_tokens=500, next_tokens=0, keep_prob=keep_prob,
        )  # fmt: skip
        with Sizes() as sizes:
            emulate(call, q, k, v)[0].sum().backward()
        # The mask is 4 MiB; a tile of scores is 1 MiB, of dropout counters 2 MiB; the whole
        # score matrix of one head would be 36 MiB.
        assert sizes.largest <= 2**22


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ({"sparse_mode": 2}, 0.5),
        ({"sparse_mode": 3}, 0.5),
        ({"sparse_mode": 4, "pre_tokens": 100, "next_tokens": 0}, 0.05),
        ({"sparse_mode": 6, "prefix": (1024,)}, 0.53),
    ],
)
def test_tiles_that_the_mode_excludes_are_not_computed(monkeypatch, arguments, share):
    computed = 0

    def counting(given, group, cells, query, key):
        nonlocal computed
        computed += cells.height * cells.width
        return score_tile(given, group, cells, query, key)

    monkeypatch.setattr("attnkit.kernel.emulator.score_tile", counting)
    q, k, v = (t.float() for t in operands(1, 1, 1, 4096, 4096, 4, 4))
    call = call_for(q, k, v, 1, "BNSD", atten_mask=mask_for(arguments["sparse_mode"]), **arguments)
    emulate(call, q, k, v)
    assert share < computed / 4096**2 * 1.02
    assert computed / 4096**2 < share + 0.04


def test_a_mask_that_contradicts_its_window_matters_only_where_tiles_are_skipped():
    """Mode 0: the mask decides for up to 1024 keys; beyond, tiles outside the window are lost."""
    for size, agrees in ((1000, True), (2000, False)):
        q, k, v = operands(1, 1, 1, size, size, 4, 4)
        mask = AttenMask.full((size, size), [Region.full(size, size)])
        narrow = {"pre_tokens": 100, "next_tokens": 100}
        call = call_for(q, k, v, 1, "BNSD", atten_mask=mask, **narrow)
        assert "mask-outside-window" in [v.code for v in call.violations(product="emulator")]
        out, *_ = emulate(call, q, k, v)
        want, *_ = plain(q, k, v)
        assert torch.allclose(out, want, rtol=1e-10, atol=1e-10) == agrees


def test_the_ends_of_mode_0s_window_are_rounded_up_before_tiles_are_skipped():
    """A mask up to 120 keys ahead survives a declared window of 100, for 128 are visited."""
    q, k, v = operands(1, 1, 1, 2000, 2000, 4, 4)
    region = Region.of(Slice(0, 2000, 0, 2000, lo=-120, hi=120))
    mask = AttenMask.full((2000, 2000), [region])
    call = call_for(q, k, v, 1, "BNSD", atten_mask=mask, pre_tokens=100, next_tokens=100)
    distance = torch.arange(2000) - torch.arange(2000)[:, None]
    want, *_ = plain(q, k, v, distance.abs() <= 120)
    torch.testing.assert_close(emulate(call, q, k, v)[0], want, **CLOSE)


def test_weights_are_rounded_to_the_input_dtype_before_the_second_product():
    """Two keys of weight 1 and 0.3, the second valued 1: bfloat16(0.3) / 1.3, then rounded."""
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).bfloat16()
    pse = torch.tensor([0.0, -1.2031]).view(1, 1, 1, 2).bfloat16()
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).bfloat16()
    k = torch.zeros(1, 1, 2, 2).bfloat16()
    call = call_for(q, k, v, 1, "BNSD", pse=TensorSpec.of(pse), pse_type=0)
    weight = pse[0, 0, 0, 1].float().exp()
    rounded = (weight.bfloat16().float() / (1 + weight)).bfloat16()
    unrounded = (weight / (1 + weight)).bfloat16()
    assert rounded != unrounded, "the example must tell the two apart"
    assert emulate(call, q, k, v, pse=pse)[0].item() == rounded.item()


def test_parts_without_keys_take_no_part_in_a_merge():
    """Both ways the op marks them: sum 0 (packed, no keys), and max -FLT_MAX, sum FLT_MAX."""
    out, peak, total = torch.tensor([[3.0]]), torch.tensor([-1000.0]), torch.tensor([2.0])
    for mark in ((0.0, 0.0), (-FLT_MAX, FLT_MAX)):
        empty = [torch.zeros(1, 1), *(torch.tensor([m]) for m in mark)]
        merged = merge_partials([empty[0], out], [empty[1], peak], [empty[2], total])
        assert [t.item() for t in merged] == [3.0, -1000.0, 2.0]
        merged = merge_partials([empty[0]] * 2, [empty[1]] * 2, [empty[2]] * 2)
        assert merged[0].item() == 0.0
        assert log_sum_exp(*merged[1:]).item() == float("-inf")
