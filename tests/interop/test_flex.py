"""`flex_attention` by torch's signature, against torch's own on the CPU, in float64."""

from __future__ import annotations

import inspect
import warnings
from itertools import product

import pytest
import torch
import torch.nn.attention.flex_attention as theirs

from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop import flex
from attnkit.interop.flex import flex_attention, lift_score_mod

B, H, N, D = 2, 4, 24, 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
TABLE = torch.linspace(-1, 1, H * (2 * N - 1), dtype=torch.float64).view(H, -1).sin()
KEYS = torch.linspace(-1, 1, B * N, dtype=torch.float64).view(B, N).cos()
CELLS = torch.linspace(-3, 3, H * N * N, dtype=torch.float64).view(H, N, N).sin()
BUCKETS = torch.linspace(-2, 2, 16 * H, dtype=torch.float64).view(16, H).cos()
STARTS = torch.tensor([0, 5])


def t5(score, b, h, i, j):
    ahead, far = ((j - i) > 0).long() * 8, (j - i).abs()
    large = 4 + (torch.log(far.clamp(min=1).float() / 4) / 2.0794415 * 4).long()
    return score + BUCKETS[ahead + torch.where(far < 4, far, large.clamp(max=7)), h]


SCORES = {
    "ALiBi": (lambda s, b, h, i, j: s - (i - j).abs() * SLOPES[h], "ALiBi"),
    "ALiBi of one side": (
        lambda s, b, h, i, j: s + (j - i) * torch.exp2(-((h + 1) * 8.0 / H)),
        "a number per distance",
    ),
    "soft-cap": (lambda s, b, h, i, j: 2 * torch.tanh(s / 2), "soft-cap 2"),
    "soft-cap, then ALiBi": (
        lambda s, b, h, i, j: 2 * torch.tanh(s / 2) - (i - j).abs() * SLOPES[h],
        "soft-cap 2, ALiBi",
    ),
    "distance": (lambda s, b, h, i, j: s + (i - j), "a number per distance"),
    "relative table": (
        lambda s, b, h, i, j: s + TABLE[h, j - i + N - 1],
        "a number per distance",
    ),
    "T5": (t5, "a number per distance"),
    "keys": (lambda s, b, h, i, j: s + KEYS[b, j], "a number per key"),
    "queries": (lambda s, b, h, i, j: s - KEYS[b, i], "a number per cell"),
    "heads": (lambda s, b, h, i, j: s + SLOPES[h], "a number per key"),
    "a matrix": (lambda s, b, h, i, j: s + CELLS[h, i, j], "a number per cell"),
    "a factor": (lambda s, b, h, i, j: s * 1.5 / 2, "scores times 0.75"),
    "a mask": (
        lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")),
        "cells taken out: Causal()",
    ),
    "nothing": (lambda s, b, h, i, j: s, "no change"),
}
CALLED = {
    "a square": lambda s, b, h, i, j: s * s.abs(),
    "a factor per query": lambda s, b, h, i, j: s * (i + 2.0).log(),
    "ALiBi, then soft-cap": lambda s, b, h, i, j: torch.tanh(s + (j - i) * SLOPES[h]),
    "a mask per batch element": (
        lambda s, b, h, i, j: torch.where(j >= STARTS[b], s, -float("inf"))
    ),
}


def causal(b, h, i, j):
    return i >= j


def padded(b, h, i, j):
    return (i >= j) & (j >= STARTS[b])


def blocks(fn, batch=None, q_len=N, kv_len=N):
    return theirs.create_block_mask(fn, batch, None, q_len, kv_len, device="cpu", BLOCK_SIZE=8)


def drawn(q_len=N, kv_heads=H, kv_batch=B):
    torch.manual_seed(0)
    query = torch.randn(B, H, q_len, D, dtype=torch.float64)
    return query, *(torch.randn(kv_batch, kv_heads, N, D, dtype=torch.float64) for _ in "kv")


@pytest.fixture(autouse=True)
def torch_compiles_nothing(monkeypatch):
    """torch's eager path traces each function else, for seconds."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def expected(*args, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and that return_lse is old
        return theirs.flex_attention(*args, **named)


def close(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mask", [None, causal, padded])
@pytest.mark.parametrize("name", [*SCORES, *CALLED])
def test_every_score_mod_gives_what_torch_gives(name, mask):
    mod = CALLED.get(name) or SCORES[name][0]
    given = None if mask is None else blocks(mask, B)
    aux = theirs.AuxRequest(lse=True)
    out, more = flex_attention(*drawn(), mod, given, return_aux=aux)
    want, lse = expected(*drawn(), mod, given, return_aux=aux)
    close(out, want)
    close(more.lse, lse.lse)
    assert more.max_scores is None


@pytest.mark.parametrize("name", SCORES)
def test_common_score_mods_are_recognised(name):
    mod, said = SCORES[name]
    found = lift_score_mod(mod, N, N, batch=B, heads=H)
    assert str(found).endswith(f": {said}")
    assert found.score_fn is None


@pytest.mark.parametrize("name", CALLED)
def test_others_are_called_and_say_so(name):
    found = lift_score_mod(CALLED[name], N, N, batch=B, heads=H)
    assert found.score_fn is CALLED[name]
    assert "called for each score" in str(found)


def test_the_arguments_are_torch_s():
    mine, other = (inspect.signature(fn) for fn in (flex_attention, theirs.flex_attention))
    assert [(p.name, p.kind, p.default) for p in mine.parameters.values()] == [
        (p.name, p.kind, p.default) for p in other.parameters.values()
    ]


def test_every_combination_of_the_other_arguments():
    for scale, kv_heads, q_len, lse in product((None, 0.3), (H, 2, 1), (N, 7), (False, True)):
        for given in (None, blocks(causal, None, q_len)):
            more = {"scale": scale, "enable_gqa": kv_heads != H, "return_lse": lse}
            mine = flex_attention(*drawn(q_len, kv_heads), None, given, **more)
            other = expected(*drawn(q_len, kv_heads), None, given, **more)
            for one, want in zip(*((x if lse else (x,)) for x in (mine, other)), strict=True):
                close(one, want)


def test_keys_of_one_batch_element_are_for_all():
    given = blocks(causal, B)
    close(
        flex_attention(*drawn(kv_batch=1), None, given), expected(*drawn(kv_batch=1), None, given)
    )


def test_rows_without_keys_are_0_and_the_greatest_score_is_told():
    given = blocks(lambda b, h, i, j: j + 3 < i)
    aux = theirs.AuxRequest(lse=True, max_scores=True)
    out, more = flex_attention(*drawn(), None, given, return_aux=aux)
    query, key, _ = drawn()
    allowed = masks.from_flex(given).mask.materialize(N, N)
    scores = (query @ key.mT * D**-0.5).masked_fill(~allowed, -torch.inf)
    assert not out[:, :, :4].any()
    close(more.max_scores, scores.amax(-1))
    close(more.lse, scores.logsumexp(-1))


@pytest.mark.parametrize("form", ["table", "slopes", "called"])
def test_gradients_reach_what_a_score_mod_looks_at(form):
    table = TABLE.clone().requires_grad_()
    slopes = SLOPES.clone().requires_grad_()
    mods = {
        "table": lambda s, b, h, i, j: s + table[h, j - i + N - 1],
        "slopes": lambda s, b, h, i, j: s - (i - j).abs() * slopes[h],
        "called": lambda s, b, h, i, j: s * s.abs() + (i - j) * slopes[h],
    }
    i, j = torch.arange(N)[:, None], torch.arange(N)
    query, key, value = (one.requires_grad_() for one in drawn())
    scores = query @ key.mT * D**-0.5
    if form == "table":
        scores = scores + table[:, j - i + N - 1]
    elif form == "slopes":
        scores = scores - (i - j).abs() * slopes[:, None, None]
    else:
        scores = scores * scores.abs() + (i - j) * slopes[:, None, None]
    want = scores.masked_fill(i < j, -torch.inf).softmax(-1) @ value
    trained = [query, key, value, table if form == "table" else slopes]
    wanted = torch.autograd.grad(want.sin().sum(), trained)
    for _ in range(2):  # the second time it is known already
        out = flex_attention(query, key, value, mods[form], blocks(causal))
        close(out, want)
        for mine, other in zip(torch.autograd.grad(out.sin().sum(), trained), wanted, strict=True):
            close(mine, other)


def test_what_is_read_once_is_read_again_when_its_tensors_change(monkeypatch):
    starts, slopes = torch.tensor([0, 5]), SLOPES.clone()
    read = []
    monkeypatch.setattr(
        flex, "from_flex", lambda *a, **k: read.append(1) or masks.from_flex(*a, **k)
    )

    def late(b, h, i, j):
        return (i >= j) & (j >= starts[b])

    def biased(s, b, h, i, j):
        return s - (i - j).abs() * slopes[h]

    given = theirs.BlockMask.from_kv_blocks(
        *(torch.tensor(x)[None, None] for x in ([1], [[0]])), BLOCK_SIZE=N, mask_mod=late
    )
    for _ in range(2):
        close(flex_attention(*drawn(), biased, given), expected(*drawn(), biased, given))
    assert len(read) == 1
    starts += 2
    slopes *= 2
    close(flex_attention(*drawn(), biased, given), expected(*drawn(), biased, given))
    assert len(read) == 2


def test_a_call_stands_between_compiled_graphs():
    given = blocks(causal)

    def layer(query, key, value):
        return flex_attention(2 * query, key, value, SCORES["ALiBi"][0], given) + 1

    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        close(compiled(*drawn()), layer(*drawn()))


def test_arguments_that_contradict_each_other_are_refused():
    q, k, v = drawn()
    with pytest.raises(CompositionError, match="enable_gqa=True"):
        flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(CompositionError, match="a batch of 2 queries and of 1 keys"):
        flex_attention(q, k[:1], v[:1])
    with pytest.raises(CompositionError, match="24 x 24 and q_len=7"):
        flex_attention(q[:, :, :7], k, v, None, blocks(causal))
    with pytest.raises(CompositionError, match="SPEED"):
        flex_attention(q, k, v, kernel_options={"SPEED": 1})
    with pytest.raises(CompositionError, match="return_aux"):
        flex_attention(q, k, v, return_lse=True, return_aux=theirs.AuxRequest(lse=True))
    with pytest.raises(CompositionTypeError, match="AuxRequest"):
        flex_attention(q, k, v, return_aux=True)
    with pytest.raises(CompositionTypeError, match="BlockMask"):
        flex_attention(q, k, v, None, torch.ones(N, N).bool())
    with pytest.raises(CompositionError, match=r"\[b, n, s, d\]"):
        flex_attention(q[0], k, v)
    flex_attention(q, k, v, kernel_options={"BLOCK_M": 64, "num_warps": 4})


def test_a_bias_by_distance():
    numbers = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 5.0]])
    bias = pse.DistanceBias(numbers, -2, "top_left")
    want = torch.stack([one[torch.arange(2) - torch.arange(3)[:, None] + 2] for one in numbers])
    assert bias.materialize(3, 2)[0].equal(want)
    assert bias.toeplitz
    assert bias == pse.DistanceBias(numbers.clone(), -2, "top_left")
    with pytest.raises(CompositionError, match="asked for -3 to 0"):
        bias.materialize(4, 1)
