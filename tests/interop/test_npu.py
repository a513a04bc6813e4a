"""Calls of the fused kernel, read and planned, against the formulas of its documentation."""

from __future__ import annotations

import inspect
import warnings
from itertools import product

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError, KernelContractError, KernelContractTypeError
from attnkit.interop import mindspeed, npu
from tests.interop.formulas import near, softmax_attention
from tests.interop.test_flash_attn import drawn

CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
PREFIX = torch.cat((CAUSAL, torch.cat((torch.zeros(1024, 1024), torch.ones(1024, 1024)), 1).bool()))
LAYOUTS = {
    "BSH": "b n s d -> b s (n d)",
    "SBH": "b n s d -> s b (n d)",
    "BSND": "b n s d -> b s n d",
    "BNSD": "b n s d -> b n s d",
}
UNBOUNDED = 2147483647
HEADS = 4


def laid(x: Tensor, layout: str) -> Tensor:
    if layout in ("BSH", "SBH"):
        x = x.transpose(1, 2).flatten(2)
        return x if layout == "BSH" else x.transpose(0, 1)
    return x if layout == "BNSD" else x.transpose(1, 2)


def kept(mode, q_len, kv_len, pre, ahead, prefix=0, cut=False, mask=None) -> Tensor:
    """The keys of each query, from the table of sparse modes; True takes part."""
    i, j, shift = torch.arange(q_len)[:, None], torch.arange(kv_len), kv_len - q_len
    if mask is None:
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    return {
        0: lambda: ~mask,
        1: lambda: ~mask,
        2: lambda: j <= i,
        3: lambda: j <= i + shift,
        4: lambda: (j >= i + shift - pre) & (j <= i + shift + ahead),
        5: lambda: ~mask,
        6: lambda: (j <= i + shift) | (j < prefix),
        7: lambda: (j <= i + shift + ahead) if cut else (j <= i + shift),
        8: lambda: (j <= i + shift + ahead) if cut else (j <= i),
    }[mode]()


def bias_of(kind, pse, q_len, kv_len, start=0):
    """What `pse_type` adds: a tensor, or slopes times a distance from the top-left corner."""
    if pse is None or kind in (0, 1):
        return pse
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    distance = (j - i - start).abs().double()
    distance = distance.sqrt() if kind == 3 else distance
    return -pse.double().view(-1, HEADS, 1, 1) * distance


SIZES = [(4, 4), (3, 5), (5, 3)]
WINDOWS = [(UNBOUNDED, UNBOUNDED), (2, 0), (0, 1), (3, -1), (-1, 2)]


def masks_of(mode, q_len, kv_len):
    """Mask tensors of a mode: none, the compressed one, or ones with an entry per cell."""
    yield None
    if mode in (2, 3, 4):
        yield CAUSAL
    elif mode == 6:
        yield PREFIX
    else:
        drops = drawn(2, HEADS, q_len, kv_len) > 0.4
        drops[..., 0] = False
        yield drops[0, 0]
        yield drops[:, :1].to(torch.uint8)
        yield drops


def refused(args, named) -> set[str]:
    """The rules that a call breaks."""
    try:
        npu.read_call(*args, **named)
    except KernelContractError as error:
        return set(error.codes)
    return set()


@pytest.mark.filterwarnings("ignore:npu_fusion_attention")
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
@pytest.mark.parametrize("mode", range(7))
def test_every_mode_with_every_window(mode: int, q_len: int, kv_len: int) -> None:
    q, k, v = drawn(2, HEADS, q_len, 8), drawn(2, 2, kv_len, 8), drawn(2, 2, kv_len, 8, seed=1)
    prefix = [max(0, kv_len - q_len), kv_len] if mode in (5, 6) else None
    taken = 0
    for (pre, ahead), mask in product(WINDOWS, masks_of(mode, q_len, kv_len)):
        given = {"atten_mask": mask, "sparse_mode": mode, "scale": 0.3, "prefix": prefix}
        how = (q, k, v, HEADS, "BNSD"), {**given, "pre_tokens": pre, "next_tokens": ahead}
        if refused(*how):
            # A window that the op rejects, or the tile-wise garbage of a mask outside of it.
            assert refused(*how) <= {"window-dense", "mask-outside-window", "mode-5-mask"}
            continue
        found = npu.npu_fusion_attention_v2(*how[0], **how[1])
        taken += 1
        cells = [
            kept(mode, q_len, kv_len, pre, ahead, n, mask=None if mask is None else mask.bool())
            for n in prefix or (0, 0)
        ]
        cells = cells[0] if mode != 6 else torch.stack(cells)[:, None]
        meant, lse = softmax_attention(q, k, v, cells, scale=0.3)
        near(found.attention_out, meant)
        stats = found.softmax_max[..., 0] + found.softmax_sum[..., 0].log()
        near(stats.masked_fill(lse == -torch.inf, -torch.inf), lse)
    assert taken >= 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    q, k, v = drawn(2, HEADS, 3, 8), drawn(2, 2, 5, 8), drawn(2, 2, 5, 8, seed=1)
    meant, lse = softmax_attention(q, k, v, kept(3, 3, 5, 0, 0, mask=CAUSAL), scale=0.3)
    given = (*(laid(x, layout) for x in (q, k, v)), HEADS, layout)
    found = npu.npu_fusion_attention(*given, None, None, CAUSAL, 0.3, sparse_mode=3)
    near(found[0], laid(meant, layout))
    assert found[1].shape == found[2].shape == (2, HEADS, 3, 8)
    near((found[1] + found[2].log())[..., 0], lse)


def biases(q_len, kv_len):
    yield from product((0, 1), [drawn(n, HEADS, q_len, kv_len) for n in (1, 2)])
    yield from product((0, 1), [drawn(n, HEADS, 1, kv_len) for n in (1, 2)])
    if q_len == kv_len:
        slopes = drawn(2, HEADS, seed=7).abs()
        yield from product((2, 3), [slopes[0], slopes, slopes[:1].expand(2, HEADS)])


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_every_bias(q_len: int, kv_len: int) -> None:
    q, k, v = drawn(2, HEADS, q_len, 8), drawn(2, 2, kv_len, 8), drawn(2, 2, kv_len, 8, seed=1)
    cells = kept(2, q_len, kv_len, 0, 0, mask=CAUSAL)
    for (kind, pse), starts in product(biases(q_len, kv_len), (None, (3, 0), (0, 2))):
        if starts and kind in (0, 1):
            continue
        named = {} if starts is None else {"q_start_idx": [starts[0]], "kv_start_idx": [starts[1]]}
        found = mindspeed.npu_fusion_attention(
            *(q, k, v, HEADS, "BNSD"),
            pse=pse,
            pse_type=kind,
            scale=0.3,
            atten_mask=CAUSAL,
            sparse_mode=2,
            **named,
        )
        start = starts[0] - starts[1] if starts else 0
        bias = bias_of(kind, pse, q_len, kv_len, start)
        meant, _ = softmax_attention(q, k, v, cells, scale=0.3, bias=bias, before_scale=kind == 1)
        near(found[0], meant)


def test_the_bias_of_a_call_trains() -> None:
    # The op leaves its gradient unwritten.
    q, pse = drawn(1, HEADS, 4, 8), drawn(1, HEADS, 4, 4).requires_grad_()
    found = npu.npu_fusion_attention(q, q, q, HEADS, "BNSD", pse, None, None, 0.3)[0]
    everything = torch.ones(4, 4).bool()
    meant, _ = softmax_attention(q, q, q, everything, scale=0.3, bias=pse, before_scale=True)
    near(*(torch.autograd.grad(x.square().sum(), pse)[0] for x in (found, meant)))


PACKED = [((3, 2, 0, 4), (3, 5, 2, 6)), ((2, 2), (2, 4))]


@pytest.mark.filterwarnings("ignore:npu_fusion_attention")
@pytest.mark.parametrize(("q_lens", "kv_lens"), PACKED)
@pytest.mark.parametrize("mode", [None, 0, 1, 2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("stats_in_order", [False, True])
def test_packed_sequences(mode, q_lens, kv_lens, stats_in_order) -> None:
    q, k, v = (drawn(sum(n), h, 8) for n, h in ((q_lens, HEADS), (kv_lens, 2), (kv_lens, 2)))
    pre, ahead = {4: (2, 0), 7: (UNBOUNDED, -1), 8: (UNBOUNDED, 1)}.get(mode, (UNBOUNDED,) * 2)
    mask = {None: None, 6: PREFIX}.get(mode, CAUSAL)
    if mode in (0, 1):
        mask = drawn(max(q_lens), max(kv_lens)) > 0.4
        mask[:, 0] = False
    prefix = list(kv_lens) if mode == 6 else None
    ends = [torch.tensor(n).cumsum(0) for n in (q_lens, kv_lens)]
    found = npu.npu_fusion_attention(
        *(q, k, v, HEADS, "TND", None, None, mask, 0.3, 1.0, pre, ahead, 0, prefix),
        ends[0].tolist(),
        ends[1],  # as op version 3 takes them
        mode or 0,
        softmax_layout="TND" if stats_in_order else "",
    )
    last = max(b for b, n in enumerate(q_lens) if n)
    texts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
    row, peaks = 0, found.softmax_max + found.softmax_sum.log()
    for b, own in enumerate(texts):
        size, cut = (q_lens[b], kv_lens[b]), b == (last if mode == 7 else 0)
        drops = mask if mode not in (0, 1) else mask[: size[0], : size[1]]
        cells = kept(mode, *size, pre, ahead, kv_lens[b], cut, drops)
        heads = [x.transpose(0, 1)[None] for x in own]
        meant, lse = softmax_attention(*heads, cells, scale=0.3)
        rows = slice(row, row + size[0])
        near(found[0][rows], meant[0].transpose(0, 1))
        # The op's own order is head by head inside of a sequence, whatever the shape says.
        block = peaks[rows, :, 0]
        block = block.T if stats_in_order else block.reshape(HEADS, size[0])
        near(block.masked_fill(lse[0] == -torch.inf, -torch.inf), lse[0])
        row += size[0]


def test_slopes_of_packed_sequences_and_of_a_cut_one() -> None:
    slopes = drawn(HEADS, seed=3).abs()
    for q_lens, kv_lens, mode, starts in (
        ((3, 4), (3, 4), 2, (0, 0)),
        ((3, 3), (3, 3), 3, (2, 0)),
        ((2, 3), (5, 3), 8, (3, 0)),
    ):
        q, k, v = (drawn(sum(n), HEADS, 8) for n in (q_lens, kv_lens, kv_lens))
        ends = [torch.tensor(n).cumsum(0).tolist() for n in (q_lens, kv_lens)]
        found = npu.npu_fusion_attention_v2(
            *(q, k, v, HEADS, "TND"),
            pse=slopes,
            pse_type=2,
            scale=0.3,
            atten_mask=CAUSAL,
            sparse_mode=mode,
            actual_seq_qlen=ends[0],
            actual_seq_kvlen=ends[1],
            q_start_idx=[starts[0]],
            kv_start_idx=[starts[1]],
            **({"next_tokens": 0} if mode == 8 else {}),
        )[0]
        texts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
        parts = []
        for b, own in enumerate(texts):
            size = q_lens[b], kv_lens[b]
            start = starts[0] - starts[1] if mode != 8 or b == 0 else 0
            cells = kept(mode, *size, UNBOUNDED, 0, cut=b == 0, mask=CAUSAL)
            heads = [x.transpose(0, 1)[None] for x in own]
            bias = bias_of(2, slopes, *size, start)
            parts.append(softmax_attention(*heads, cells, scale=0.3, bias=bias)[0][0])
        near(found, torch.cat(parts, 1).transpose(0, 1))


@pytest.mark.parametrize("kind", [0, 1])
def test_the_last_rows_of_a_long_alibi(kind: int) -> None:
    length = 1100
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    whole = -slopes.view(1, HEADS, 1, 1) * (i - j).abs()
    q = torch.randn(1, HEADS, length, 4, generator=torch.Generator().manual_seed(0))
    found = npu.npu_fusion_attention_v2(
        *(q, q, q, HEADS, "BNSD"),
        pse=whole[:, :, -1024:].contiguous(),
        pse_type=kind,
        scale=0.5,
        atten_mask=CAUSAL,
        sparse_mode=2,
    )
    assert isinstance(found.reading.pse, ak.pse.ALiBi)
    meant, _ = softmax_attention(
        *(q.double(),) * 3, j <= i, scale=0.5, bias=whole.double(), before_scale=kind == 1
    )
    near(found[0], meant, 1e-5)


def test_unused_rows_behind_the_last_sequence() -> None:
    q = drawn(7, HEADS, 8)
    found = npu.npu_fusion_attention(
        *(q, q, q, HEADS, "TND"), scale=0.3, actual_seq_qlen=[2, 5, 0], actual_seq_kvlen=[2, 5, 0]
    )
    assert found[0].shape == q.shape
    assert found[1].shape == (7, HEADS, 8)
    assert not found[0][5:].any()
    near(
        found[0][:2], npu.npu_fusion_attention(*(q[None, :2],) * 3, HEADS, "BSND", scale=0.3)[0][0]
    )


def test_a_sink_and_rotary_channels() -> None:
    q, k, v = drawn(5, HEADS, 8), drawn(5, HEADS, 8, seed=1), drawn(5, HEADS, 6, seed=2)
    rope, sink = drawn(5, HEADS, 4, seed=3), drawn(HEADS)
    lens = {"actual_seq_qlen": [5], "actual_seq_kvlen": [5]}
    found = npu.npu_fusion_attention_v2(
        *(q, k, v, HEADS, "TND"), query_rope=rope, key_rope=2 * rope, scale=0.3, sink=sink, **lens
    )
    heads = [
        x.transpose(0, 1)[None] for x in (torch.cat((q, rope), 2), torch.cat((k, 2 * rope), 2), v)
    ]
    meant, _ = softmax_attention(*heads, torch.ones(5, 5).bool(), scale=0.3, sink=sink)
    near(found[0], meant[0].transpose(0, 1))


def test_it_is_the_op_itself_in_what_both_define() -> None:
    # The emulator of the op, written from the kernel's source and held against recorded results.
    q, k = drawn(2, HEADS, 6, 8), drawn(2, 2, 9, 8)
    how = {"atten_mask": CAUSAL, "sparse_mode": 4, "pre_tokens": 3, "next_tokens": 1, "scale": 0.3}
    ours = npu.npu_fusion_attention_v2(q, k, k, HEADS, "BNSD", **how)
    op = ak.fusion_attention(q, k, k, HEADS, "BNSD", **how)
    for name in ("attention_out", "softmax_max", "softmax_sum", "softmax_out"):
        near(getattr(ours, name), getattr(op, name))
    # Rows without a key: mode 3 with more queries than keys, where the op makes them 0 by itself.
    how = {"atten_mask": CAUSAL, "sparse_mode": 3, "scale": 0.3}
    few = npu.npu_fusion_attention_v2(q, k[:, :, :4], k[:, :, :4], HEADS, "BNSD", **how)
    for ours_of, op_s in zip(
        few[:3],
        ak.fusion_attention(q, k[:, :, :4], k[:, :, :4], HEADS, "BNSD", **how),
        strict=False,
    ):
        near(ours_of, op_s)
    assert ours[6] == op.numels
    assert len(ours) == 7
    assert ours[1:3][0].shape == op.softmax_max.shape


# -- what it says --------------------------------------------------------------------------------

X = torch.zeros(1, 8, 2, 16)
FLIPPED = torch.ones(8, 8).tril().bool()
TOLD = {
    "a mode without a mask": ({"sparse_mode": 3}, "mode-without-mask", masks.Full()),
    "a window without a mask": ({"pre_tockens": 2}, "window-without-mask", masks.Full()),
    "a window of one key": (
        {"atten_mask": CAUSAL, "sparse_mode": 4, "pre_tockens": 0, "next_tockens": 0},
        None,
        masks.SlidingWindow(1),
    ),
    "tokens that nobody reads": (
        {"atten_mask": CAUSAL, "sparse_mode": 2, "pre_tockens": 4, "next_tockens": 0},
        "tokens-ignored",
        masks.Causal("top_left"),
    ),
    "no scale": ({"scale": 1.0}, "scale-is-one", masks.Full()),
    "the other polarity": ({"atten_mask": FLIPPED, "sparse_mode": 1}, "polarity", None),
    "a scaled bias": ({"pse": torch.zeros(1, 2, 8, 8)}, "pse-is-scaled", masks.Full()),
    "a prefix for nothing": ({"prefix": [3]}, "prefix-unused", masks.Full()),
    "rows without a key": (
        {"atten_mask": torch.ones(8, 8).bool(), "sparse_mode": 1},
        "rows-averaged",
        ~masks.Full(),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_the_integers_mean(name: str) -> None:
    how, code, mask = TOLD[name]
    reading = npu.read_call(X, X, X, 2, "BSND", **{"scale": 0.25, **how})
    codes = [found.code for found in reading.findings]
    assert (code in codes) if code else not codes
    assert mask is None or reading.mask.region(8, 8) == mask.region(8, 8)
    assert code is None or f"[{code}]" in str(reading)
    # Who calls it is warned of what is likely a mistake, and not of what may be meant.
    warned = code is not None and code not in npu._HINTS
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        npu.npu_fusion_attention(X, X, X, 2, "BSND", **{"scale": 0.25, **how})
    assert any(f"[{code}]" in str(one.message) for one in told) == warned


def test_a_window_keeps_one_key_more_than_its_number() -> None:
    x = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    how = {"atten_mask": CAUSAL.to("meta"), "sparse_mode": 4, "next_tokens": 0, "scale": 0.1}
    wide = npu.read_call(x, x, x, 8, "BSND", pre_tokens=1024, **how)
    assert wide.mask == masks.SlidingWindow(1025)
    assert [found.code for found in wide.findings] == ["window-keeps-one-more"]
    right = npu.read_call(x, x, x, 8, "BSND", pre_tokens=1023, **how)
    assert right.mask == masks.SlidingWindow(1024)
    assert not right.findings
    # What was read is planned as the call that it was.
    (call,) = right.plan(x, x, x, backend="emulated").calls
    assert (call.sparse_mode, call.pre_tokens, call.next_tokens) == (4, 1023, 0)


def test_what_mindspeed_sends_for_causal_attention() -> None:
    # sparse_mode=2, pre_tockens=65536, next_tockens=0, by position as its adaptor has it.
    reading = npu.read_call(
        *(X, X, X, 2, "BSND", None, None, CAUSAL, 0.25, 1.0, 65536, 0, 0, None, None, None, 2)
    )
    assert reading.mask == masks.Causal("top_left")
    assert not reading.findings


UNDEFINED = {
    "an inverted compressed mask": ({"atten_mask": ~CAUSAL, "sparse_mode": 3}, "mask-content"),
    "a mask that leaves the window": (
        {"atten_mask": torch.zeros(8, 8).bool(), "pre_tockens": 2},
        "mask-outside-window",
    ),
    "a mask that broadcasts": (
        {"atten_mask": torch.zeros(1, 1, 1, 8).bool(), "sparse_mode": 1},
        "mask-shape",
    ),
    "a float mask": ({"atten_mask": torch.zeros(8, 8)}, "mask-dtype"),
    "given decisions": (
        {"dropout_mask": torch.zeros(16, dtype=torch.uint8), "keep_prob": 0.5},
        "dropout-mask",
    ),
    "a padding mask": ({"padding_mask": X}, "padding-mask"),
    "a bias by distance": (
        {"pse": torch.randn(1, 2, 1024, 1100)},
        "pse-compressed",
    ),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_is_not_defined_is_refused(name: str) -> None:
    how, code = UNDEFINED[name]
    x = X if name != "a bias by distance" else torch.zeros(1, 1100, 2, 16)
    causal = {"atten_mask": CAUSAL, "sparse_mode": 3} if x is not X else {}
    with pytest.raises(KernelContractError) as error:
        npu.npu_fusion_attention(x, x, x, 2, "BSND", **{"scale": 0.25, **causal, **how})
    assert code in error.value.codes


def test_positions_of_old_releases() -> None:
    # torch_npu 5.0: ..., inner_precise, prefix, sparse_mode, gen_mask_parallel, sync.
    head = (X, X, X, 2, "BSND", None, None, CAUSAL, 0.25, 1.0, UNBOUNDED, UNBOUNDED, 0, None)
    for tail in ((3,), (3, True), (3, True, False)):
        assert npu.read_call(*head, *tail).mask == masks.Causal()
        assert npu.npu_fusion_attention(*head, *tail).reading.mask == masks.Causal()
    assert npu.read_call(*head, None, None, 3).mask == masks.Causal()
    with pytest.raises(KernelContractTypeError, match=r"5\.0"):
        npu.npu_fusion_attention(*head, 3, [8], 3)
    with pytest.raises(KernelContractTypeError, match="one argument"):
        npu.read_call(*head, pre_tokens=3)


def test_names_order_and_defaults() -> None:
    ours = inspect.signature(ak.fusion_attention).parameters
    recorded = {
        "npu_fusion_attention": "query key value head_num input_layout pse padding_mask atten_mask "
        "scale keep_prob pre_tockens next_tockens inner_precise prefix actual_seq_qlen "
        "actual_seq_kvlen sparse_mode gen_mask_parallel sync softmax_layout sink dropout_mask seed "
        "offset",
        "npu_fusion_attention_v2": "query key value head_num input_layout * pse padding_mask "
        "atten_mask query_rope key_rope scale keep_prob pre_tokens next_tokens inner_precise "
        "prefix actual_seq_qlen actual_seq_kvlen sparse_mode gen_mask_parallel sync pse_type "
        "q_start_idx kv_start_idx softmax_layout sink dropout_mask seed offset",
        "mindspeed": "query key value head_num input_layout * pse "
        "padding_mask atten_mask scale keep_prob pre_tokens next_tokens inner_precise prefix "
        "actual_seq_qlen actual_seq_kvlen sparse_mode gen_mask_parallel sync pse_type q_start_idx "
        "kv_start_idx",
    }
    for name, text in recorded.items():
        call = mindspeed.npu_fusion_attention if name == "mindspeed" else getattr(npu, name)
        found = inspect.signature(call).parameters
        positional, _, by_name = text.partition(" * ")
        assert list(found) == [*positional.split(), *by_name.split()]
        kinds = {p.kind for n, p in found.items() if n in by_name.split()}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
        for spelled, parameter in found.items():
            own = ours.get(spelled.replace("tockens", "tokens"))
            assert own is None or own.default == parameter.default


def test_dropout_acts_and_mindspeed_s_is_told() -> None:
    x = drawn(1, 32, 2, 8)
    one = npu.npu_fusion_attention(x, x, x, 2, "BSND", keep_prob=0.5, scale=0.3)[0]
    whole = npu.npu_fusion_attention(x, x, x, 2, "BSND", scale=0.3)[0]
    assert not torch.allclose(one, whole)
    with pytest.warns(UserWarning, match="mindspeed-dropout"):
        mindspeed.npu_fusion_attention(x, x, x, 2, "BSND", keep_prob=0.5, scale=0.3)


def megatron_softmax_mask(length: int, pre: int, ahead: int) -> Tensor:
    """What MindSpeed draws without flash attention; True drops."""
    ones = torch.ones(length, length).bool()
    return ones.tril(-(pre + 1)) | ones.triu(ahead + 1)


@pytest.mark.parametrize("length", [5, 8])
def test_flags_of_training_scripts(length: int) -> None:
    for pre, ahead in product((0, 2, 7, 65536), (0, 1, 9)):
        named = {"seq_length": length, "pre_tockens": pre, "next_tockens": ahead}
        plain = mindspeed.read_flags(**named).mask
        drawn_mask = ~megatron_softmax_mask(length, pre, ahead)
        assert torch.equal(plain.materialize(length, length)[0, 0], drawn_mask)
        flash = mindspeed.read_flags(use_flash_attn=True, **named)
        assert flash.mask == masks.Causal("top_left")
        assert ("not read" in str(flash)) == (pre < length - 1)
        how = {"use_flash_attn": True, "use_fusion_attn_v2": True, **named}
        if pre >= length - 1:
            assert mindspeed.read_flags(**how).mask == masks.Causal("top_left")
        else:
            with pytest.raises(CompositionError, match="as tiles fall"):
                mindspeed.read_flags(**how)
        assert mindspeed.read_flags(sparse_mode=1, **how).mask == masks.Causal("top_left")
        for mode in (2, 3, 4, 6):
            with pytest.raises(CompositionError):
                mindspeed.read_flags(sparse_mode=mode, **how)
    band = mindspeed.read_flags(
        seq_length=2048, use_flash_attn=True, use_fusion_attn_v2=True, sparse_mode=4, pre_tockens=9
    )
    assert band.mask == masks.SlidingWindow(10)
    with pytest.raises(CompositionError, match="from_torch"):
        mindspeed.read_flags(seq_length=8, attention_mask_type="general")


@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_gradients(layout: str) -> None:
    leaves = [drawn(5, n, 8, seed=n).requires_grad_() for n in (HEADS, 2, 2)]
    sink = drawn(HEADS).requires_grad_()
    how = {"atten_mask": CAUSAL, "sparse_mode": 4, "pre_tokens": 2, "next_tokens": 1}
    if layout == "TND":
        given, how = leaves, how | {"actual_seq_qlen": [5], "actual_seq_kvlen": [5]}
    else:
        given = [x[None] for x in leaves]
    found = npu.npu_fusion_attention_v2(*given, HEADS, layout, scale=0.3, sink=sink, **how)[0]
    cells = kept(4, 5, 5, 2, 1, mask=CAUSAL)
    heads = [x.transpose(0, 1)[None] for x in leaves]
    meant, _ = softmax_attention(*heads, cells, scale=0.3, sink=sink)
    pairs = [found.reshape(5, HEADS, 8), meant[0].transpose(0, 1)]
    wanted = [*leaves, sink]
    grads = zip(*(torch.autograd.grad(x.square().sum(), wanted) for x in pairs), strict=True)
    for ours, others in grads:
        near(ours, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, slopes = drawn(1, 12, HEADS, 16).to(dtype), torch.tensor([0.5, 0.25, 0.125, 1.0])
    found = npu.npu_fusion_attention_v2(
        *(q, q, q, HEADS, "BSND"),
        pse=slopes,
        pse_type=2,
        atten_mask=CAUSAL,
        sparse_mode=2,
        scale=0.25,
    )
    heads = [q.double().transpose(1, 2)] * 3
    bias = bias_of(2, slopes, 12, 12)
    meant, lse = softmax_attention(
        *heads, kept(2, 12, 12, 0, 0, mask=CAUSAL), scale=0.25, bias=bias
    )
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    near(found[0], meant.transpose(1, 2), 8 * torch.finfo(dtype).eps)
    near((found[1] + found[2].log())[..., 0], lse, 1e-4)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_it_runs_between_compiled_graphs() -> None:
    def step(x: Tensor) -> Tensor:
        return npu.npu_fusion_attention(
            2 * x, x, x, 2, "BSND", None, None, CAUSAL, 0.3, sparse_mode=2
        )[0].relu()

    x = drawn(1, 6, 2, 8)
    near(torch.compile(step, backend="eager")(x), step(x))
    torch.compiler.reset()


MODES = {
    2: {},
    3: {},
    4: {"pre_tokens": 99, "next_tokens": 0},
    6: {"prefix": [40]},
}


@pytest.mark.parametrize("mode", MODES)
def test_what_was_read_is_planned_as_no_more_than_it_was(mode: int) -> None:
    x = torch.empty(1, 2048, 8, 64, dtype=torch.bfloat16, device="meta")
    mask = PREFIX if mode == 6 else CAUSAL
    how = {"atten_mask": mask, "sparse_mode": mode, "scale": 0.125, **MODES[mode]}
    plan = npu.read_call(x, x, x, 8, "BSND", **how).plan(x, x, x, backend="emulated")
    (call,) = plan.calls
    assert call.regions() == npu.read_call(x, x, x, 8, "BSND", **how).call.regions()
    assert call.atten_mask is None or call.atten_mask.kind != "full"
    plan.verify()


def test_an_order_of_statistics_that_version_2_does_not_hear_of() -> None:
    q, lens = drawn(5, HEADS, 8), {"actual_seq_qlen": [2, 5], "actual_seq_kvlen": [2, 5]}
    how = {"scale": 0.3, "softmax_layout": "TND", **lens}
    with pytest.warns(UserWarning, match="softmax-layout-ignored"):
        found = npu.npu_fusion_attention_v2(q, q, q, HEADS, "TND", **how)
    own_order = npu.npu_fusion_attention(q, q, q, HEADS, "TND", scale=0.3, **lens)
    near(found.softmax_max, own_order.softmax_max)
