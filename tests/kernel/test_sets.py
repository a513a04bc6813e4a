"""The set that the emulator computes, seen from outside, against the closed form of each mode.

Queries are zero, so weights are uniform over the cells that take part; values are one-hot,
so output element j of row i is non-zero exactly when cell (i, j) takes part.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit.errors import KernelContractError
from attnkit.geometry import Region, Slice
from attnkit.kernel import AttenMask, emulate
from tests.kernel.plain import (
    DENSE,
    call_for,
    cells,
    cumulative,
    from_layout,
    mask_for,
    packed,
    region_cells,
    to_layout,
)

SIZES = list(product(range(1, 7), repeat=2))


def dense_set(layout: str, batch: int, sq: int, skv: int, tensor=None, **arguments) -> torch.Tensor:
    """Return [batch, sq, skv], True where a dense call computes."""
    query = torch.zeros(batch, 1, sq, skv)
    key = torch.zeros(batch, 1, skv, skv)
    value = torch.eye(skv).expand(batch, 1, skv, skv)
    q, k, v = (to_layout(t, layout) for t in (query, key, value))
    call = call_for(q, k, v, 1, layout, **arguments)
    out, _, _ = emulate(call, q, k, v, atten_mask=tensor)
    return from_layout(out, layout, 1)[:, 0] > 0


def packed_sets(sizes, tensor=None, **arguments) -> list[torch.Tensor]:
    """Return one [sq, skv] per sequence, True where a TND call computes."""
    width = max(skv for _, skv in sizes)
    q = torch.zeros(sum(sq for sq, _ in sizes), 1, width)
    v = packed([torch.eye(skv, width)[None, None] for _, skv in sizes])
    k = torch.zeros_like(v)
    q_lens, kv_lens = ([s[n] for s in sizes] for n in (0, 1))
    arguments |= {
        "actual_seq_qlen": cumulative(q_lens),
        "actual_seq_kvlen": cumulative(kv_lens),
    }
    out, _, _ = emulate(call_for(q, k, v, 1, "TND", **arguments), q, k, v, atten_mask=tensor)
    rows = out[:, 0].split(q_lens)
    return [r[:, :skv] > 0 for r, skv in zip(rows, kv_lens, strict=True)]


def test_without_a_mask_everything_is_computed_whatever_the_mode_says():
    for mode, (sq, skv) in product(range(5), SIZES):
        got = dense_set("BNSD", 1, sq, skv, sparse_mode=mode, pre_tokens=1, next_tokens=0)
        assert got.all(), (mode, sq, skv)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("mode", [2, 3])
def test_causal_modes(mode: int, layout: str):
    for sq, skv in SIZES:
        arguments = {"sparse_mode": mode, "atten_mask": mask_for(mode), "pre_tokens": -3}
        got = dense_set(layout, 2, sq, skv, **arguments)
        want = cells(mode, sq, skv, 0, 0)
        assert torch.equal(got, want.expand_as(got)), (sq, skv)


def window_is_legal(sq: int, skv: int, pre: int, nxt: int) -> bool:
    """The tiling's check of a dense window that is anchored top-left."""
    if pre < 0 and nxt < 0:
        return False
    if pre < 0 and (nxt < -pre or -pre >= skv):
        return False
    return not (nxt < 0 and (-nxt > pre or -nxt >= sq))


@pytest.mark.parametrize("layout", DENSE)
def test_band_in_every_dense_layout(layout: str):
    for sq, skv in SIZES:
        for pre, nxt in product(range(-6, 8), repeat=2):
            if not window_is_legal(sq, skv, pre + sq - skv, nxt + skv - sq):
                continue
            got = dense_set(
                layout,
                1,
                sq,
                skv,
                sparse_mode=4,
                atten_mask=AttenMask.causal(),
                pre_tokens=pre,
                next_tokens=nxt,
            )
            assert torch.equal(got[0], cells(4, sq, skv, pre, nxt)), (sq, skv, pre, nxt)


def dense_prefixes(sq: int, skv: int) -> range:
    return range(0 if sq > skv else skv - sq, skv + 1)


@pytest.mark.parametrize("layout", DENSE)
def test_compressed_prefix_in_every_dense_layout(layout: str):
    for sq, skv in SIZES:
        lengths = tuple(dense_prefixes(sq, skv))
        got = dense_set(
            layout, len(lengths), sq, skv, sparse_mode=6, atten_mask=mask_for(6), prefix=lengths
        )
        for b, length in enumerate(lengths):
            assert torch.equal(got[b], cells(6, sq, skv, 0, 0, length)), (sq, skv, length)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("mode", [0, 1, 5])
def test_the_mask_tensor_decides(mode: int, layout: str):
    generator = torch.Generator().manual_seed(mode)
    for sq, skv in SIZES:
        allowed = torch.rand(2, 1, sq, skv, generator=generator) < 0.6
        shape = tuple(allowed.shape)
        got = dense_set(
            layout,
            2,
            sq,
            skv,
            ~allowed,
            sparse_mode=mode,
            atten_mask=AttenMask.full(shape),
            inner_precise=2,
            prefix=(skv, skv) if mode == 5 else None,
            pre_tokens=0,
            next_tokens=0,
        )
        assert torch.equal(got, allowed[:, 0]), (sq, skv)


@pytest.mark.parametrize("layout", DENSE)
def test_windows_drawn_into_the_mask_of_mode_0(layout: str):
    for sq, skv in SIZES:
        for pre, nxt in product(range(-5, 8), repeat=2):
            if not window_is_legal(sq, skv, pre, nxt):
                continue
            window = Region.of(Slice(0, sq, 0, skv, lo=-pre, hi=nxt))
            got = dense_set(
                layout,
                1,
                sq,
                skv,
                atten_mask=AttenMask.full((sq, skv), [window]),
                pre_tokens=pre,
                next_tokens=nxt,
                inner_precise=2,
            )
            assert torch.equal(got[0], cells(0, sq, skv, pre, nxt)), (sq, skv, pre, nxt)


# -- packed ------------------------------------------------------------------------------


def check_packed(mode: int, sizes, cut: int | None = None, **arguments) -> None:
    pre, nxt = arguments.get("pre_tokens", 0), arguments.get("next_tokens", 0)
    lengths = arguments.get("prefix") or (0,) * len(sizes)
    got = packed_sets(sizes, sparse_mode=mode, atten_mask=mask_for(mode), **arguments)
    for b, (sq, skv) in enumerate(sizes):
        want = cells(mode, sq, skv, pre, nxt, lengths[b], b == cut)
        assert torch.equal(got[b], want), (mode, b, sq, skv, arguments)


def test_packed_causal_modes_over_all_sizes_at_once():
    check_packed(2, SIZES)
    check_packed(3, [(sq, skv) for sq, skv in SIZES if sq <= skv])


def test_packed_band_over_all_legal_windows():
    for pre, nxt in product(range(8), range(-7, 8)):
        sizes = [(sq, skv) for sq, skv in SIZES if sq - nxt <= skv]
        if sizes and pre + nxt >= 0:
            check_packed(4, sizes, pre_tokens=pre, next_tokens=nxt)


def test_packed_prefix_over_all_legal_lengths():
    rows = [(sq, skv, n) for sq, skv in SIZES for n in dense_prefixes(sq, skv)]
    check_packed(6, [(sq, skv) for sq, skv, _ in rows], prefix=tuple(n for *_, n in rows))


@pytest.mark.parametrize("before", [(), ((0, 0),), ((0, 3), (2, 4))])
@pytest.mark.parametrize("after", [(), ((0, 0),), ((3, 3), (0, 0))])
def test_the_cut_sequence_of_modes_7_and_8(before, after):
    """Mode 7 cuts the last sequence with queries, mode 8 the first, past empty ones."""
    for (sq, skv), nxt in product(SIZES, range(-6, 7)):
        sizes = [*before, (sq, skv), *after]
        with_queries = [b for b, (q, _) in enumerate(sizes) if q]
        for mode, cut in ((7, with_queries[-1]), (8, with_queries[0])):
            q_cut, kv_cut = sizes[cut]
            uncut_fit = all(q <= kv for b, (q, kv) in enumerate(sizes) if b != cut)
            legal = q_cut - nxt <= kv_cut and (mode == 8 or (nxt <= 0 and uncut_fit))
            if legal:
                check_packed(mode, sizes, cut, pre_tokens=9, next_tokens=nxt)


def test_packed_full_masks_use_the_top_left_corner():
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 5), (0, 1), (6, 3), (4, 6)]
    allowed = torch.rand(6, 6, generator=generator) < 0.6
    for mode in (0, 1):
        got = packed_sets(
            sizes,
            ~allowed,
            sparse_mode=mode,
            atten_mask=AttenMask.full((6, 6)),
            inner_precise=2,
        )
        for (sq, skv), seen in zip(sizes, got, strict=True):
            assert torch.equal(seen, allowed[:sq, :skv])


def test_packed_masks_of_the_total_lengths_are_read_at_their_own_place():
    allowed = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    got = packed_sets([(2, 4), (3, 3)], ~allowed, atten_mask=AttenMask.full((5, 7)))
    assert torch.equal(got[0], allowed[:2, :4])
    assert torch.equal(got[1], allowed[2:, 4:])


# -- the same sets as regions ------------------------------------------------------------


def test_regions_say_what_the_emulator_computes():
    """`KernelCall.regions` against the closed form, for every mode and all small sizes."""
    for sq, skv in product(range(7), repeat=2):
        q, k = torch.zeros(1, 1, sq, 2), torch.zeros(1, 1, skv, 2)
        for mode, pre, nxt in product((2, 3, 4), (0, 1, 4), (-1, 0, 2)):
            arguments = {"sparse_mode": mode, "pre_tokens": pre, "next_tokens": nxt}
            call = call_for(q, k, k, 1, "BNSD", atten_mask=mask_for(mode), **arguments)
            (region,) = call.regions()
            assert torch.equal(region_cells(region, sq, skv), cells(mode, sq, skv, pre, nxt))
        for length in range(skv + 1):
            arguments = {"sparse_mode": 6, "prefix": (length,), "atten_mask": mask_for(6)}
            (region,) = call_for(q, k, k, 1, "BNSD", **arguments).regions()
            assert torch.equal(region_cells(region, sq, skv), cells(6, sq, skv, 0, 0, length))


def test_regions_of_cut_sequences():
    q, k = torch.zeros(9, 1, 2), torch.zeros(12, 1, 2)
    lengths = {"actual_seq_qlen": (0, 4, 9, 9), "actual_seq_kvlen": (0, 5, 12, 12)}
    for mode, cut, nxt in ((7, 2, -1), (8, 1, 1)):
        arguments = {"sparse_mode": mode, "next_tokens": nxt, "pre_tokens": 9, **lengths}
        call = call_for(q, k, k, 1, "TND", atten_mask=mask_for(mode), **arguments)
        assert call.band_index == cut
        for b, (region, (sq, skv)) in enumerate(zip(call.regions(), call.sequences, strict=True)):
            want = cells(mode, sq, skv, 9, nxt, cut=b == cut)
            assert torch.equal(region_cells(region, sq, skv), want)


def test_regions_of_masks_that_differ_between_batches_and_heads():
    parts = [Region.of(Slice(0, 3, 0, 4, hi=n)) for n in range(4)]
    q, k = torch.zeros(2, 2, 3, 2), torch.zeros(2, 2, 4, 2)
    per_head = AttenMask.full((2, 2, 3, 4), parts)
    call = call_for(q, k, k, 2, "BNSD", atten_mask=per_head)
    assert call.regions(head=1) == (parts[1], parts[3])
    with pytest.raises(KernelContractError, match="differs between heads"):
        call.regions()
    alike = AttenMask.full((2, 2, 3, 4), [parts[0], parts[0], parts[1], parts[1]])
    call = call_for(q, k, k, 2, "BNSD", atten_mask=alike)
    assert call.regions() == (parts[0], parts[1])
    with pytest.raises(KernelContractError, match="unknown"):
        call_for(q, k, k, 2, "BNSD", atten_mask=AttenMask.full((2, 2, 3, 4))).regions()


# -- planted faults ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [2, 3, 4, 6])
def test_a_wrong_compressed_mask_computes_a_wrong_set(mode: int):
    good = mask_for(mode).build()
    right = cells(mode, 5, 5, 2, 1, 3)
    arguments = {
        "sparse_mode": mode,
        "atten_mask": mask_for(mode),
        "pre_tokens": 2,
        "next_tokens": 1,
        "prefix": (3,) if mode == 6 else None,
    }
    assert torch.equal(dense_set("BSH", 1, 5, 5, good, **arguments)[0], right)
    wrong = {
        "inverted": ~good,
        "one diagonal off": good.roll(1, -1),
        "transposed": torch.cat([good[:2048].T.clone(), good[2048:]]),
        "empty": torch.zeros_like(good),
    }
    for name, tensor in wrong.items():
        got = dense_set("BSH", 1, 5, 5, tensor, **arguments)[0]
        assert not torch.equal(got, right), name


@pytest.mark.parametrize("mode", [2, 3, 4, 6])
@pytest.mark.parametrize(("sq", "skv"), [(300, 300), (2100, 1100), (270, 2600)])
def test_sets_across_tiles(mode: int, sq: int, skv: int):
    """Many tiles, longer than the compressed mask; the set as sums of one-hot blocks."""
    pre, nxt, length = 700, 60, max(skv - sq, 0) + 150
    arguments = {
        "sparse_mode": mode,
        "atten_mask": mask_for(mode),
        "pre_tokens": pre,
        "next_tokens": nxt,
        "prefix": (length,),
    }
    q, k = torch.zeros(1, 1, sq, 1), torch.zeros(1, 1, skv, 1)
    # Each row's keys are counted, and their positions summed, which pins one run per row.
    position = torch.arange(skv, dtype=torch.float64)
    v = torch.stack([position, position**2], -1)[None, None]
    q, k = q.double(), k.double()
    call = call_for(q, k, v, 1, "BNSD", **arguments)
    out, _, total = emulate(call, q, k, v)
    i, j = torch.arange(sq)[:, None], torch.arange(skv)
    shift = skv - sq
    allowed = {
        2: j <= i,
        3: j <= i + shift,
        4: (j <= i + shift + nxt) & (j >= i + shift - pre),
        6: (j <= i + shift) | (j < length),
    }[mode].double()
    count = allowed.sum(1)
    some = count > 0
    assert torch.equal(total[0, 0, some, 0], count[some])
    for column in (0, 1):
        want = (allowed * v[0, 0, :, column]).sum(1) / count.clamp(min=1)
        torch.testing.assert_close(out[0, 0, :, column], want, rtol=1e-12, atol=1e-9)


@given(data=st.data())
@settings(max_examples=60)
def test_larger_sets_agree_with_their_regions_and_formulas(data: st.DataObject):
    """Random packed batches, empty sequences included, up to 40 tokens each."""
    mode = data.draw(st.sampled_from([2, 3, 4, 6, 7, 8]))
    size = st.tuples(st.integers(0, 40), st.integers(1, 40))
    sizes = data.draw(st.lists(size, min_size=1, max_size=4).filter(lambda s: any(q for q, _ in s)))
    if mode != 2:
        sizes = [(min(s), max(s)) for s in sizes]
    with_queries = [b for b, (sq, _) in enumerate(sizes) if sq]
    cut = {7: with_queries[-1], 8: with_queries[0]}.get(mode)
    slack = min(skv - sq for sq, skv in sizes) if mode == 4 else 0
    slack = sizes[cut][1] - sizes[cut][0] if cut is not None else slack
    nxt = data.draw(st.integers(-slack, 0 if mode == 7 else 30))
    pre = data.draw(st.integers(max(0, -nxt), 50)) if mode == 4 else 99
    prefix = (
        tuple(data.draw(st.integers(skv - sq, skv)) for sq, skv in sizes) if mode == 6 else None
    )
    check_packed(mode, sizes, cut, pre_tokens=pre, next_tokens=nxt, prefix=prefix)
    q, k = (torch.zeros(sum(s[n] for s in sizes), 1, 2) for n in (0, 1))
    call = call_for(
        q,
        k,
        k,
        1,
        "TND",
        sparse_mode=mode,
        atten_mask=mask_for(mode),
        pre_tokens=pre,
        next_tokens=nxt,
        prefix=prefix,
        actual_seq_qlen=cumulative([s[0] for s in sizes]),
        actual_seq_kvlen=cumulative([s[1] for s in sizes]),
    )
    assert not call.violations()
    for b, (region, (sq, skv)) in enumerate(zip(call.regions(), sizes, strict=True)):
        want = cells(mode, sq, skv, pre, nxt, prefix[b] if prefix else 0, b == cut)
        assert region.area == int(want.sum())
        assert torch.equal(region_cells(region, sq, skv), want)
