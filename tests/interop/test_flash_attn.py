"""flash-attn's functions against the formulas of its documentation, every argument by itself."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.errors import CompositionError
from attnkit.interop import flash_attn as fa
from attnkit.interop.host import on_host
from tests.interop.formulas import near, softmax_attention

HEADS, DIM = 4, 6
ENDS = (-1, 0, 1, 3)
SLOPES = {
    "none": None,
    "per head": torch.tensor([0.5, 0.25, 1.0, 0.0]),
    "per batch": torch.tensor([[0.5, 0.25, 1.0, 0.0], [0.1, 0.0, 0.3, 0.7]]),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def kept(s: int, t: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """The keys of a query as the docstring says them: one by one."""
    cells = torch.zeros(s, t, dtype=torch.bool)
    for i, j in product(range(s), range(t)):
        low = 0 if window[0] == -1 else i + t - s - window[0]
        high = t if window[1] == -1 else i + t - s + window[1]
        cells[i, j] = low <= j <= (min(high, i + t - s) if causal else high)
    return cells


def documented(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """The formula of the documentation on ``b s n d``; slopes are [1 or b, n]."""
    s, t = q.shape[1], k.shape[1]
    bias = None
    if slopes is not None:
        i, j = torch.arange(s)[:, None], torch.arange(t)
        distance = (i + t - s - j).abs().double()
        bias = -slopes.double().view(-1, q.shape[2], 1, 1) * distance
    out, lse = softmax_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        kept(s, t, causal, window),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        bias=bias,
    )
    return out.transpose(1, 2), lse


@pytest.mark.parametrize(("s", "t"), [(4, 4), (2, 5), (5, 2), (1, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_mask_with_every_soft_cap_and_every_slope(s: int, t: int, causal: bool) -> None:
    q, k, v = drawn(2, s, HEADS, DIM), drawn(2, t, 2, DIM), drawn(2, t, 2, DIM, seed=1)
    for window, softcap, name in product(product(ENDS, ENDS), (0.0, 1.5), SLOPES):
        slopes = SLOPES[name]
        out, lse, nothing = fa.flash_attn_func(
            q, k, v, 0.0, None, causal, window, softcap, slopes, False, True
        )
        meant, meant_lse = documented(q, k, v, causal, window, softcap, slopes)
        near(out, meant)
        near(lse, meant_lse)
        assert nothing.numel() == 0


@pytest.mark.parametrize("name", SLOPES)
def test_gradients(name: str) -> None:
    leaves = [drawn(2, n, h, DIM).requires_grad_() for n, h in ((3, HEADS), (5, 2), (5, 2))]
    how = (True, (2, -1), 2.0, SLOPES[name])
    found = fa.flash_attn_func(*leaves, 0.0, 0.3, *how)
    meant, _ = documented(*leaves, *how, scale=0.3)
    upstream = drawn(*meant.shape)
    pairs = zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, meant)), strict=True)
    for ours, theirs in pairs:
        near(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (drawn(1, n, h, 16).to(dtype) for n, h in ((9, HEADS), (13, 2), (13, 2)))
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    meant, meant_lse = documented(q.double(), k.double(), v.double(), True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    near(out, meant, 8 * torch.finfo(dtype).eps)
    near(lse, meant_lse, 1e-5)


def test_packed_tensors_are_the_same_call() -> None:
    qkv = drawn(2, 5, 3, HEADS, DIM)
    whole = fa.flash_attn_func(*qkv.unbind(2), causal=True, window_size=(2, 0))
    how = {"causal": True, "window_size": (2, 0)}
    near(fa.flash_attn_qkvpacked_func(qkv, **how), whole)
    near(fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **how), whole)
    flat, ends = qkv.flatten(0, 1), [0, 5, 10]
    near(fa.flash_attn_varlen_qkvpacked_func(flat, ends, 5, **how), whole.flatten(0, 1))
    found = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], ends, ends, 5, 5, **how)
    near(found, whole.flatten(0, 1))


LENGTHS = [((3, 1, 0, 2), (3, 4, 2, 1)), ((2, 2), (5, 5))]


@pytest.mark.parametrize(("ours", "theirs"), LENGTHS)
@pytest.mark.parametrize("paged", [False, True])
def test_sequences_by_cumulative_lengths(ours, theirs, paged) -> None:
    q, k, v = (drawn(sum(n), h, DIM) for n, h in ((ours, HEADS), (theirs, 2), (theirs, 2)))
    cu_q, cu_k = (torch.tensor((0, *n)).cumsum(0).int() for n in (ours, theirs))
    table, pages = None, (k, v)
    if paged:
        pages, table = in_pages((k, v), theirs)
    each = SLOPES["per head"] * torch.arange(1, len(ours) + 1)[:, None]
    for causal, window, slopes in product(
        (False, True), ((-1, -1), (1, 1)), (None, SLOPES["per head"], each)
    ):
        out, lse, _ = fa.flash_attn_varlen_func(
            *(q, *pages, cu_q, cu_k, max(ours), max(theirs)),
            causal=causal,
            window_size=window,
            alibi_slopes=slopes,
            return_attn_probs=True,
            block_table=table,
        )
        texts = zip(q.split(ours), k.split(theirs), v.split(theirs), strict=True)
        for b, (a, x, y) in enumerate(texts):
            own = slopes if slopes is None or slopes.ndim == 1 else slopes[b : b + 1]
            meant, meant_lse = documented(a[None], x[None], y[None], causal, window, 0.0, own)
            rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
            near(out[rows], meant[0])
            near(lse[:, rows], meant_lse[0])


def in_pages(tensors, lengths, page=2):
    """Packed tokens in pages of a few, in a random order; unused entries of the table are 0."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    table, taken = torch.zeros(len(lengths), max(counts), dtype=torch.int32), iter(order)
    for b, count in enumerate(counts):
        for n in range(count):
            table[b, n] = next(taken)
    found = []
    for tensor in tensors:
        pages = torch.full((len(order), page, *tensor.shape[1:]), 77.0, dtype=tensor.dtype)
        for row, text in zip(table, tensor.split(lengths), strict=True):
            for n, token in enumerate(text):
                pages[row[n // page], n % page] = token
        found.append(pages)
    return found, table


# -- the cache ---------------------------------------------------------------------------------


def turned(x: Tensor, where: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary positions pair by pair, as the docstring says which dimensions make one."""
    x, r = x.clone(), cos.shape[1]
    for c in range(r):
        a, b = (2 * c, 2 * c + 1) if interleaved else (c, c + r)
        u, w = x[..., a].clone(), x[..., b].clone()
        co, si = cos[where, c][..., None], sin[where, c][..., None]
        x[..., a], x[..., b] = u * co - w * si, u * si + w * co
    return x


def cache_of_the_documentation(q, held, new, where, options, rotary):
    """What it returns and leaves behind: (out, lse, caches), text by text."""
    lengths, first, rows = where
    caches = [cache.clone() for cache in held]
    outs, lses, count = [], [], 0 if new is None else new[0].shape[1]
    causal, window, softcap, slopes = options
    for b, length in enumerate(lengths):
        a = q[b]
        if new is not None:
            x, y = new[0][b], new[1][b]
            if rotary is not None:
                steps = torch.arange(a.shape[0]) * int(causal or window != (-1, -1))
                a = turned(a, length + steps, *rotary)
                x = turned(x, length + torch.arange(count), *rotary)
            caches[0][rows[b], length : length + count] = x
            caches[1][rows[b], length : length + count] = y
        keys = [c[rows[b], first[b] : length + count] for c in caches]
        own = slopes if slopes is None or slopes.ndim == 1 else slopes[b : b + 1]
        out, lse = documented(a[None], *(x[None] for x in keys), causal, window, softcap, own)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), caches


OPTIONS = list(product((False, True), ((-1, -1), (2, 0)), (0.0, 1.5), SLOPES.values()))


@pytest.mark.parametrize("lengths", [(4, 4), (3, 5)])
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("first", [None, (1, 2), (1, 1)])
@pytest.mark.parametrize("rows", [None, (2, 0)])
def test_the_cache(lengths, new, first, rows) -> None:
    q = drawn(2, 2, HEADS, 8)
    fresh = [drawn(2, new, 2, 8, seed=n) for n in (2, 3)] if new else None
    held = [drawn(3, 9, 2, 8, seed=n) for n in (4, 5)]
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3])).double()
    where = lengths, first or (0, 0), rows or (0, 1)
    turns = [None, (angles.cos(), angles.sin(), True), (angles.cos(), angles.sin(), False)]
    tried = [(one, turns[0]) for one in OPTIONS]
    tried += product(OPTIONS[::5], turns[1:]) if new else []
    for options, rotary in tried:
        meant, meant_lse, after = cache_of_the_documentation(q, held, fresh, where, options, rotary)
        caches = [cache.clone() for cache in held]
        causal, window, softcap, slopes = options
        cos, sin, interleaved = rotary or (None, None, True)
        out, lse = fa.flash_attn_with_kvcache(
            *(q, *caches, *(fresh or (None, None)), cos, sin),
            cache_seqlens=torch.tensor(lengths).int() if lengths != (4, 4) else 4,
            cache_batch_idx=None if rows is None else torch.tensor(rows).int(),
            cache_leftpad=None if first is None else torch.tensor(first).int(),
            causal=causal,
            window_size=window,
            softcap=softcap,
            rotary_interleaved=interleaved,
            alibi_slopes=slopes,
            num_splits=3,
            return_softmax_lse=True,
        )
        near(out, meant)
        near(lse, meant_lse)
        for cache, one in zip(caches, after, strict=True):
            near(cache, one)


def test_a_cache_in_pages() -> None:
    lengths, page = (3, 5), 2
    tokens = [drawn(8, 2, 8, seed=n) for n in (0, 1)]
    (keys, values), table = in_pages(tokens, lengths, page)
    table = torch.cat((table, torch.tensor([[6], [7]], dtype=torch.int32)), 1)
    table[0, 2] = 8
    keys, values = (torch.cat((x, x[:3] * 0 + 77.0)) for x in (keys, values))
    q, new = drawn(2, 1, HEADS, 8), [drawn(2, 1, 2, 8, seed=n) for n in (2, 3)]
    out = fa.flash_attn_with_kvcache(
        q, keys, values, *new, cache_seqlens=torch.tensor(lengths), block_table=table, causal=True
    )
    for b, length in enumerate(lengths):
        own = [
            torch.cat((x.split(lengths)[b], y[b]))[None] for x, y in zip(tokens, new, strict=True)
        ]
        near(out[b : b + 1], documented(q[b : b + 1], *own, True)[0])
        near(keys[table[b, length // page], length % page], new[0][b, 0])


def test_the_whole_cache_without_lengths() -> None:
    q, cache = drawn(2, 3, HEADS, DIM), drawn(2, 7, 2, DIM)
    near(fa.flash_attn_with_kvcache(q, cache, cache), documented(q, cache, cache)[0])


# -- what is refused, and what is told ------------------------------------------------------------

X = torch.zeros(1, 3, 2, 8)
WRONG = {
    "a window of one number": ({"window_size": 4}, "(left, right)"),
    "no window": ({"window_size": (None, None)}, "window_size"),
    "another negative number": ({"window_size": (-2, 0)}, "must be >= -1"),
    "causal as an int": ({"causal": 1}, "True or False"),
    "probabilities of dropout": ({"dropout_p": 0.1, "return_attn_probs": True}, "dropped"),
    "a negative soft-cap": ({"softcap": -1.0}, "softcap"),
    "all dropped": ({"dropout_p": 1.0}, "below 1"),
    "slopes of another number": ({"alibi_slopes": torch.ones(3)}, "nheads"),
    "slopes that train": ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "learnable"),
    "slopes as ints": ({"alibi_slopes": torch.ones(2).int()}, "float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    how, told = WRONG[name]
    with pytest.raises(CompositionError, match=told.replace("(", r"\(").replace(")", r"\)")):
        fa.flash_attn_func(X, X, X, **how)


CACHE = {
    "no place for new keys": ({"k": X, "v": X}, "cache_seqlens"),
    "no values": ({"k": X, "cache_seqlens": 0}, "both"),
    "no room": ({"k": X, "v": X, "cache_seqlens": 1}, "room"),
    "tables without keys": ({"rotary_cos": X[0, :, 0], "rotary_sin": X[0, :, 0]}, "new keys"),
    "one table": ({"rotary_cos": X[0, :, 0]}, "both"),
    "padding behind the end": ({"cache_seqlens": 1, "cache_leftpad": [2]}, "begins"),
    "two lengths": ({"cache_seqlens": [1, 1]}, "batch of 1"),
}


@pytest.mark.parametrize("name", CACHE)
def test_what_is_refused_of_a_cache(name: str) -> None:
    how, told = CACHE[name]
    with pytest.raises(CompositionError, match=told):
        fa.flash_attn_with_kvcache(X, X.clone(), X.clone(), **how)
    with pytest.raises(CompositionError, match="no_grad"):
        fa.flash_attn_with_kvcache(X.clone().requires_grad_(), X, X)


def test_lengths_that_are_not_those_of_the_tensors() -> None:
    x = X[0]
    with pytest.raises(CompositionError, match="sum to 2"):
        fa.flash_attn_varlen_func(x, x, x, [0, 2], [0, 3], 3, 3)
    with pytest.raises(CompositionError, match="max_seqlen_q=2"):
        fa.flash_attn_varlen_func(x, x, x, [0, 3], [0, 3], 2, 3)


def test_names_order_and_defaults_are_the_library_s() -> None:
    common = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    common += "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    cu = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    recorded = {
        "flash_attn_func": f"q, k, v, {common}",
        "flash_attn_kvpacked_func": f"q, kv, {common}",
        "flash_attn_qkvpacked_func": f"qkv, {common}",
        "flash_attn_varlen_func": f"q, k, v, {cu}, {common}, block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {cu}, {common}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {common}",
        "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
        "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
        "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    }
    assert sorted(recorded) == fa.__all__
    for name, text in recorded.items():
        bare = inspect.signature(getattr(fa, name))
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
        found = bare.replace(parameters=plain, return_annotation=inspect.Signature.empty)
        assert str(found) == f"({text})"


def test_dropout_acts_and_repeats() -> None:
    q = drawn(2, 16, HEADS, DIM)
    torch.manual_seed(1)
    one = fa.flash_attn_func(q, q, q, 0.5)
    torch.manual_seed(1)
    near(fa.flash_attn_func(q, q, q, 0.5), one)
    assert not torch.allclose(one, fa.flash_attn_func(q, q, q))


def test_a_tensor_on_a_device_is_read_once_for_each_version(monkeypatch) -> None:
    given = torch.tensor([0, 3, 8])
    kind = type("Elsewhere", (torch.Tensor,), {})
    reads: list[int] = []

    class Watched(kind):
        @property
        def device(self):
            return torch.device("cuda")

        def tolist(self):
            reads.append(1)
            return super().tolist()

        def detach(self):
            return self

    there = given.as_subclass(Watched)
    for _ in range(3):
        assert on_host("cu_seqlens_q", there) == [0, 3, 8]
    assert len(reads) == 1
    there[1] = 4
    assert on_host("cu_seqlens_q", there) == [0, 4, 8]
    assert len(reads) == 2


def test_a_graph_of_it_is_whole() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def step(q, k):
        return fa.flash_attn_func(q, k, k, causal=True, window_size=(2, -1), softcap=2.0)

    q, k = drawn(1, 4, 2, 8), drawn(1, 6, 2, 8)
    near(step(q, k), documented(q, k, k, True, (2, -1), 2.0)[0])


@pytest.mark.parametrize("slopes", [None, SLOPES["per head"]])
def test_it_is_planned_for_the_fused_kernel(slopes: Tensor | None) -> None:
    # One call each, of a mode that needs no mask of all cells; soft-cap alone is not the kernel's.
    x = torch.empty(1, 2048, 4, 64, device="meta", dtype=torch.bfloat16)
    term = None if slopes is None else ak.pse.ALiBi(slopes=slopes.tolist())
    for causal, window, (mode, pre) in (
        (True, (-1, -1), (3, 2147483647)),
        (False, (128, 0), (4, 128)),
        (True, (128, 64), (4, 128)),
    ):
        how = fa.FlashOptions.of(0.0, None, causal, window, 0.0, slopes, False)
        (call,) = ak.plan(x, x, x, mask=how.mask, pse=term, backend="emulated").calls
        assert call.sparse_mode == mode or (mode == 3 and call.sparse_mode == 2)
        assert call.pre_tokens == pre or mode == 3
        assert call.pse_type == (1 if slopes is None else 2)
