"""`fusion_attention` as an op: signature, outputs, errors, dropout, gradients, launch."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attnkit.errors import KernelContractError, KernelContractTypeError, Refusal
from attnkit.kernel import (
    AttenMask,
    KernelCall,
    TensorSpec,
    dropout_mask,
    fusion_attention,
    fusion_attention_grad,
)
from attnkit.kernel.arguments import as_python
from attnkit.kernel.launch import choose_version, launch, launch_grad
from tests.kernel.plain import plain, to_layout

PUBLISHED = {
    "query": ...,
    "key": ...,
    "value": ...,
    "head_num": ...,
    "input_layout": ...,
    "pse": None,
    "padding_mask": None,
    "atten_mask": None,
    "scale": 1.0,
    "keep_prob": 1.0,
    "pre_tokens": 2147483647,
    "next_tokens": 2147483647,
    "inner_precise": 0,
    "prefix": None,
    "actual_seq_qlen": None,
    "actual_seq_kvlen": None,
    "sparse_mode": 0,
    "gen_mask_parallel": True,
    "sync": False,
    "pse_type": 1,
    "q_start_idx": None,
    "kv_start_idx": None,
}


def tensors(dtype=torch.float64, batch=2, heads=4, kv_heads=2, sq=5, skv=7):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, sq, 6), (batch, kv_heads, skv, 6), (batch, kv_heads, skv, 4)]
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(fusion_attention).parameters
    found = {n: ... if p.default is p.empty else p.default for n, p in parameters.items()}
    assert list(found)[: len(PUBLISHED)] == list(PUBLISHED)
    assert {n: found[n] for n in PUBLISHED} == PUBLISHED
    kinds = [p.kind for p in parameters.values()]
    assert kinds[:5] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 5
    assert set(kinds[5:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_every_argument_is_documented():
    for function in (fusion_attention, fusion_attention_grad):
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            shared = function is fusion_attention_grad and name in (
                *inspect.signature(fusion_attention).parameters,
                *("offset", "numels"),
            )
            assert shared or f"{name}: " in text, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_seven_outputs(dtype: torch.dtype):
    q, k, v = tensors(dtype)
    result = fusion_attention(q, k, v, 4, "BNSD")
    assert len(result) == 7
    out, peak, total, softmax_out, seed, offset, numels = result
    assert out.shape == (2, 4, 5, 4)
    assert out.dtype == dtype
    assert peak.shape == total.shape == (2, 4, 5, 8)
    assert peak.dtype == total.dtype == torch.float32
    assert softmax_out.shape == (0,)
    assert (seed, offset, numels) == (0, 0, 2 * 4 * 5 * 7)
    assert torch.equal(peak, peak[..., :1].expand_as(peak))


def test_numels_of_packed_lists_counts_trailing_zeros():
    t = torch.zeros(3, 2, 4)
    lists = {"actual_seq_qlen": [1, 3], "actual_seq_kvlen": [1, 3]}
    assert fusion_attention(t, t, t, 2, "TND", **lists).numels == 2 * (1 + 4)
    lists = {"actual_seq_qlen": [1, 3, 0], "actual_seq_kvlen": [1, 3, 0]}
    assert fusion_attention(t, t, t, 2, "TND", **lists).numels == 2 * (1 + 4 + 9)


# -- mistakes ----------------------------------------------------------------------------


def test_the_old_spelling_names_the_new_one():
    q, k, v = tensors()
    with pytest.raises(TypeError, match="pre_tokens=5"):
        fusion_attention(q, k, v, 4, "BNSD", pre_tockens=5)
    with pytest.raises(KernelContractTypeError, match="next_tokens=0"):
        fusion_attention(q, k, v, 4, "BNSD", next_tockens=0)


def test_all_broken_rules_come_at_once_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(
        "attnkit.kernel.emulator._forward", lambda *_: pytest.fail("something was computed")
    )
    q, k, v = tensors()
    with pytest.raises(KernelContractError) as caught:
        fusion_attention(q, k, v, 4, "BNSD", sparse_mode=3, keep_prob=1.5, inner_precise=9)
    assert set(caught.value.codes) == {"mode-without-mask", "keep-prob-range", "inner-precise"}


def test_types_are_type_errors():
    q, k, v = tensors()
    for bad in ({"scale": "1"}, {"pre_tokens": 0.5}, {"prefix": torch.tensor([1, 2])}):
        with pytest.raises(TypeError):
            fusion_attention(q, k, v, 4, "BNSD", **bad)
    with pytest.raises(TypeError, match="is a list"):
        fusion_attention(q.tolist(), k, v, 4, "BNSD")
    with pytest.raises(TypeError, match="key"):
        fusion_attention(q, None, v, 4, "BNSD")
    with pytest.raises(TypeError, match="additive"):
        fusion_attention(q, k, v, 4, "BNSD", atten_mask=torch.zeros(5, 7))
    with pytest.raises(KernelContractError, match="different devices"):
        fusion_attention(q, k.to("meta"), v, 4, "BNSD")


class Four:
    """Not an int, but it has an index."""

    def __index__(self) -> int:
        return 4


VALUES = {
    "int": 4, "True": True, "float": 4.0, "None": None, "text": "4", "bytes": b"4",
    "big": 2**63, "small": -(2**63) - 1, "largest": 2**63 - 1, "huge": 10**400, "complex": 4j,
    "index": Four(), "int32": np.int32(4), "uint64": np.uint64(4), "big uint64": np.uint64(2**63),
    "float16": np.float16(4), "float32": np.float32(4.5), "float64": np.float64(4.5),
    "bool_": np.bool_(True), "0-d array": np.array(4), "array of one": np.array([4]),
    "array": np.array([1, 2]), "2-d array": np.array([[1, 2]]), "float array": np.array([1.5]),
    "0-d tensor": torch.tensor(4), "0-d float tensor": torch.tensor(4.5),
    "tensor": torch.tensor([1, 2]), "list": [1, 2], "tuple": (1, 2), "empty": [],
    "range": range(3), "Size": torch.Size([1, 2]), "set": {1, 2}, "dict": {}, "floats": [1.0],
    "bools": [True], "mixed": [1, None], "texts": ["1"], "numpy ints": [np.int64(1)],
    "too big": [2**63], "generator": "generator",
}  # fmt: skip

# One argument of each kind, and what the binding takes of it beyond what is taken here: by
# changing the value, or from what has no order or can be read only once.
KINDS = {
    "head_num": ("int", {"bool_", "float16", "float32", "0-d float tensor"}),
    "scale": ("float", set()),
    "input_layout": ("str", {"bytes"}),
    "prefix": ("int[]?", {"set", "generator"}),
    "sync": ("bool", set(VALUES) - {"True", "bool_", "bools"}),
}


@pytest.fixture(scope="module")
def binding():
    """torch's own reader of arguments, which is the real op's; returns what it reads."""
    library = torch.library.Library("attnkit_binding", "DEF")
    found = []
    for name, (kind, _) in KINDS.items():
        library.define(f"{name}(Tensor x, {kind} value) -> ()")
        library.impl(name, lambda x, value: found.append(value), "CPU")

    def read(name: str, value: object) -> object:
        getattr(torch.ops.attnkit_binding, name)(torch.zeros(1), value)
        return found.pop()

    yield read
    library._destroy()


@pytest.mark.parametrize("name", KINDS)
def test_types_are_those_of_the_binding(name: str, binding):
    def sample(label: str) -> object:
        return (i for i in (1, 2)) if label == "generator" else VALUES[label]

    for label in VALUES:
        mine = as_python(name, sample(label))
        broken = replace(call(), **{name: mine}).violations()
        taken = "argument-type" not in {violation.code for violation in broken}
        try:
            read = binding(name, sample(label))
        except RuntimeError:
            assert not taken, f"{name}={label}: the binding refuses it"
            continue
        stricter = label in KINDS[name][1]
        assert taken != stricter, f"{name}={label}"
        if taken:
            assert mine == (tuple(read) if isinstance(read, list) else read), label
            assert mine is None or type(mine) in (int, float, bool, str, tuple), label


X = torch.zeros(1, 4, 8, 16)
PACKED = torch.zeros(8, 4, 16)
LISTS = {"actual_seq_qlen": [4, 8], "actual_seq_kvlen": [4, 8]}
NESTED = torch.nested.nested_tensor([torch.zeros(4, 16)] * 2)
MASK = torch.zeros(8, 8, dtype=torch.uint8)
WRONG = [
    *[("argument-type", {"input_layout": value}) for value in (None, 3, ["BSH"])],
    *[("argument-type", {"actual_seq_qlen": value}) for value in (5, torch.tensor([4, 8]), "48")],
    *[("argument-type", {"sync": value}) for value in (None, "no", 2, [], torch.zeros(2))],
    *[("argument-type", {"gen_mask_parallel": value}) for value in ("", {}, 0.5)],
    *[
        ("argument-type", {name: value})
        for name in ("pre_tokens", "next_tokens", "seed", "offset", "head_num", "sparse_mode")
        for value in (2**63, -(2**63) - 1, None, 0.5, np.float32(1))
    ],
    ("argument-type", {"scale": 10**400}),
    ("argument-type", {"scale": None}),
    ("argument-type", {"prefix": [2**70] * 10**6}),
    ("argument-type", {"atten_mask": MASK.tolist()}),
    ("argument-type", {"pse": 3}),
    *[
        ("argument-type", {name: value})
        for name in ("query", "key", "value", "pse", "atten_mask", "sink", "dropout_mask")
        for value in (X.to_sparse(), NESTED, np.zeros(3))
    ],
    ("argument-type", {"query": X.to_mkldnn()}),
    ("argument-type", {"key": None}),
    *[("scale-finite", {"scale": value}) for value in (torch.nan, torch.inf, np.float32("-inf"))],
    *[("mask-values", {"atten_mask": MASK + value}) for value in (2, 255)],
    ("mask-values", {"atten_mask": AttenMask.causal().build().byte() * 2, "sparse_mode": 2}),
    ("batch-limit", dict.fromkeys(("query", "key", "value"), X[:0])),
    ("head-dim-limit", dict.fromkeys(("query", "key", "value"), X[..., :0])),
    ("dtype", {name: X.bool() for name in ("query", "key", "value")}),
    ("window-dense", {"atten_mask": MASK, "pre_tokens": -(2**63)}),
    ("prefix-unused", {"prefix": [3]}),
]


@pytest.mark.parametrize("where", ["forward", "gradient"])
def test_wrong_arguments_are_told_in_one_short_sentence(where: str):
    good = {"query": X, "key": X, "value": X, "head_num": 4, "input_layout": "BNSD"}
    out = fusion_attention(**good)
    if where == "gradient":
        names = ("softmax_max", "softmax_sum")
        good |= {name: getattr(out, name) for name in names}
        good |= {"attention_in": out.attention_out, "dy": X}
    run = fusion_attention if where == "forward" else fusion_attention_grad
    for code, wrong in WRONG:
        if where == "gradient" and "dropout_mask" in wrong:
            continue
        with pytest.raises(KernelContractError) as caught:
            run(**{**good, **wrong})
        assert caught.value.codes[0] == code, wrong
        assert isinstance(caught.value, TypeError) == (code in ("argument-type", "dtype"))
        assert len(str(caught.value)) < 1500


def test_numbers_at_the_ends_of_64_bits_are_numbers():
    """The farthest window, and the farthest start, are those that a matrix can show."""
    causal = AttenMask.causal().build()
    ends = (-(2**63), 2**63 - 1)
    q, k, v = tensors(sq=5, skv=5)
    full = fusion_attention(q, k, v, 4, "BNSD").attention_out
    for pre, nxt in ((ends[1], ends[1]), (ends[1], ends[0]), (ends[0], ends[1])):
        window = {"pre_tokens": pre, "next_tokens": nxt}
        # Modes 1 and 2 do not read it, mode 4 refuses what leaves nothing.
        none = torch.zeros(5, 5, dtype=torch.bool)
        out = fusion_attention(q, k, v, 4, "BNSD", atten_mask=none, sparse_mode=1, **window)
        assert torch.equal(out.attention_out, full)
        fusion_attention(q, k, v, 4, "BNSD", atten_mask=causal, sparse_mode=2, **window)
        if min(pre, nxt) > 0:
            out = fusion_attention(q, k, v, 4, "BNSD", atten_mask=causal, sparse_mode=4, **window)
            assert torch.equal(out.attention_out, full)
        else:
            with pytest.raises(KernelContractError, match="window-dense"):
                fusion_attention(q, k, v, 4, "BNSD", atten_mask=causal, sparse_mode=4, **window)
    starts = {"q_start_idx": [ends[0]], "kv_start_idx": [ends[1]]}
    slopes = torch.full((4,), 2.0**-60)
    out = fusion_attention(q, k, v, 4, "BNSD", pse=slopes, pse_type=2, **starts)
    assert out.attention_out.isfinite().all()


def test_numpys_numbers_and_arrays_are_taken():
    lists = {name: np.array(value) for name, value in LISTS.items()}
    window = {"pre_tokens": np.int32(2), "next_tokens": np.int64(0)}
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1).tril(4) | torch.ones(4, 4).tril(-3).bool()
    given = {"atten_mask": mask, "scale": np.float32(0.5), "keep_prob": np.float64(1), **window}
    t = torch.randn(8, 4, 16)
    one = fusion_attention(t, t, t, np.int64(4), "TND", sync=np.bool_(False), **lists, **given)
    two = fusion_attention(
        t, t, t, 4, "TND", atten_mask=mask, scale=0.5, pre_tokens=2, next_tokens=0, **LISTS
    )
    assert torch.equal(one.attention_out, two.attention_out)


def test_the_gradient_takes_what_its_forward_returned():
    q, k, v = (t.detach() for t in tensors(torch.float32))
    out = fusion_attention(q, k, v, 4, "BNSD", keep_prob=0.6)
    good = {
        "dy": out.attention_out, "softmax_max": out.softmax_max, "softmax_sum": out.softmax_sum,
        "attention_in": out.attention_out, "keep_prob": 0.6, "seed": out.seed,
        "offset": out.offset, "numels": out.numels,
    }  # fmt: skip
    fusion_attention_grad(q, k, v, head_num=4, input_layout="BNSD", **good)
    wrong = [
        *[("argument-type", {name: value}) for name in good for value in (None, [1.0])],
        *[("argument-type", {name: 2**63}) for name in ("seed", "offset", "numels")],
        *[("argument-type", {"softmax_in": value}) for value in (3, out.attention_out.to_sparse())],
        ("stats-dtype", {"softmax_max": out.softmax_max.half()}),
        ("stats-dtype", {"softmax_sum": out.softmax_sum.double()}),
        ("stats-shape", {"softmax_sum": out.softmax_sum[..., :1]}),
        ("grad-shape", {"dy": out.attention_out[:1]}),
        ("grad-shape", {"attention_in": out.attention_out[..., :1]}),
        ("grad-dtype", {"dy": out.attention_out.half()}),
        ("device", {"dy": out.attention_out.to("meta")}),
        ("grad-numels", {"numels": out.numels + 1}),
    ]
    for code, changed in wrong:
        with pytest.raises(KernelContractError) as caught:
            fusion_attention_grad(q, k, v, head_num=4, input_layout="BNSD", **{**good, **changed})
        assert caught.value.codes == (code,), changed


def test_silent_mistakes_are_errors_unless_they_are_wanted():
    q, k, v = tensors(sq=5, skv=5)
    good = AttenMask.causal().build()
    some = torch.ones(5, 5, dtype=torch.bool).triu(1)
    late = some.clone()
    late[2] = True
    bias = torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    silent = {
        "mode-without-mask": {"sparse_mode": 2},
        "mask-content": {"sparse_mode": 2, "atten_mask": ~good},
        "mask-outside-window": {"atten_mask": some, "pre_tokens": 2, "next_tokens": 0},
        "rows-averaged": {"atten_mask": late},
        "pse-learnable": {"pse": bias.clone().requires_grad_()},
        "seed-overwritten": {"keep_prob": 0.5, "seed": 3},
        "start-pair": {"pse": torch.ones(4), "pse_type": 2, "q_start_idx": [2]},
    }
    for code, arguments in silent.items():
        with pytest.raises(KernelContractError) as caught:
            fusion_attention(q, k, v, 4, "BNSD", **arguments)
        assert caught.value.codes == (code,)
        out = fusion_attention(q, k, v, 4, "BNSD", allow_silent=True, **arguments)
        assert out.attention_out.isfinite().all()
    with pytest.raises(KernelContractError, match="keep-prob-range"):
        fusion_attention(q, k, v, 4, "BNSD", keep_prob=2.0, allow_silent=True)


def test_packed_silent_mistakes():
    t = torch.randn(7, 2, 4)
    lists = {"actual_seq_qlen": [3, 7], "actual_seq_kvlen": [3, 7]}
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    for code, given in (
        ("rows-masked-packed", mask),
        ("mask-total-lengths", torch.zeros(7, 7, dtype=torch.bool)),
        ("mask-4d-packed", torch.zeros(1, 1, 4, 4, dtype=torch.bool)),
    ):
        with pytest.raises(KernelContractError) as caught:
            fusion_attention(t, t, t, 2, "TND", atten_mask=given, **lists)
        assert caught.value.codes == (code,)


def test_mask_content_is_looked_at_again_when_it_changes():
    q, k, v = tensors(sq=4, skv=4)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)
    mask[0] = False
    with pytest.raises(KernelContractError, match="mask-outside-window"):
        fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)


def test_the_content_of_a_mask_is_read_once_per_version(monkeypatch: pytest.MonkeyPatch):
    from attnkit.kernel import mask_facts

    read, times = mask_facts._read, []
    monkeypatch.setattr(mask_facts, "_read", lambda *given: times.append(1) or read(*given))
    q, k, v = tensors(sq=4, skv=4)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for _ in range(3):
        fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)
    assert len(times) == 1
    mask[0, 0] = False
    fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)
    fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask.clone(), next_tokens=0)
    assert len(times) == 3


def test_a_mask_made_in_inference_mode_is_looked_at_too():
    """Such a tensor does not count its versions."""
    q, k, v = (t.detach() for t in tensors(sq=4, skv=4))
    with torch.inference_mode():
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)
        mask[0] = False
        with pytest.raises(KernelContractError, match="mask-outside-window"):
            fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, next_tokens=0)


def test_long_masks_are_looked_at_everywhere():
    """Only the last of 1500 rows contradicts the window, or is masked."""
    q, k, v = (t.float().detach() for t in tensors(batch=1, sq=1500, skv=1500))
    window = {"pre_tokens": 1400, "next_tokens": 3}
    distance = torch.arange(1500) - torch.arange(1500)[:, None]
    mask = (distance > 3) | (distance < -1400)
    fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, **window)
    wide, none = mask.clone(), mask.clone()
    wide[1499, 98] = False
    none[1499] = True
    for wrong, code in ((wide, "mask-outside-window"), (none, "rows-averaged")):
        with pytest.raises(KernelContractError) as caught:
            fusion_attention(q, k, v, 4, "BNSD", atten_mask=wrong, **window)
        assert caught.value.codes == (code,)


# -- dropout -----------------------------------------------------------------------------


def test_dropout_follows_torchs_generator_and_returns_what_the_backward_needs():
    q, k, v = tensors()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(fusion_attention(q, k, v, 4, "BNSD", keep_prob=0.6))
    assert torch.equal(results[0].attention_out, results[1].attention_out)
    assert results[0].seed == results[1].seed != results[2].seed
    again = fusion_attention(q, k, v, 4, "BNSD", keep_prob=0.6)
    assert again.seed != results[2].seed, "each call draws anew"
    first = results[0]
    bits = dropout_mask(first.numels, 0.6, seed=first.seed, offset=first.offset).tolist()
    keep = torch.tensor([bits[n // 8] >> (n % 8) & 1 for n in range(first.numels)])
    keep = keep.view(2, 4, 5, 7).double()
    want, *_ = plain(q, k, v, keep=keep, keep_prob=0.6)
    torch.testing.assert_close(first.attention_out, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    found = torch.autograd.grad((first.attention_out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))
    grads = fusion_attention_grad(
        *(t.detach() for t in (q, k, v)), weight, 4, "BNSD",
        softmax_max=first.softmax_max, softmax_sum=first.softmax_sum,
        attention_in=first.attention_out.detach(), keep_prob=0.6,
        seed=first.seed, offset=first.offset, numels=first.numels,
    )  # fmt: skip
    for got, separate, expected in zip(found, grads, wanted, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(got, separate)


def test_the_gradient_needs_the_forwards_numels():
    q, k, v = (t.detach() for t in tensors())
    out = fusion_attention(q, k, v, 4, "BNSD", keep_prob=0.6)
    arguments = {
        "softmax_max": out.softmax_max,
        "softmax_sum": out.softmax_sum,
        "attention_in": out.attention_out,
        "keep_prob": 0.6,
        "seed": out.seed,
    }
    with pytest.raises(KernelContractError, match="280 dropout decisions"):
        fusion_attention_grad(q, k, v, out.attention_out, 4, "BNSD", **arguments)


def test_rules_of_the_grad_op_apply_to_trained_calls_only():
    t = torch.randn(4, 2, 4)
    arguments = {
        "atten_mask": AttenMask.causal().build(),
        "sparse_mode": 4,
        "pre_tokens": 0,
        "next_tokens": 0,
        "actual_seq_qlen": [4],
        "actual_seq_kvlen": [4],
    }
    fusion_attention(t, t, t, 2, "TND", **arguments)
    t.requires_grad_()
    with pytest.raises(KernelContractError, match="window-backward"):
        fusion_attention(t, t, t, 2, "TND", **arguments)
    with torch.no_grad():
        fusion_attention(t, t, t, 2, "TND", **arguments)


def test_ring_attention_over_two_halves_equals_the_whole():
    """Causal attention over two key blocks: merged statistics, and the grads of both calls."""
    q, k, v = tensors(sq=6, skv=6)
    mask = AttenMask.causal().build()
    common = {"scale": 0.4}
    whole = fusion_attention(q, k, v, 4, "BNSD", atten_mask=mask, sparse_mode=3, **common)
    weight = torch.randn_like(whole.attention_out)
    wanted = torch.autograd.grad((whole.attention_out * weight).sum(), (q, k, v))
    stats = {
        "softmax_max": whole.softmax_max,
        "softmax_sum": whole.softmax_sum,
        "attention_in": whole.attention_out.detach(),
    }

    def rows(stat: torch.Tensor) -> torch.Tensor:
        return stat[:, :, 3:].contiguous()

    q, k, v = (t.detach() for t in (q, k, v))
    late = {name: rows(t) for name, t in stats.items()}
    first = fusion_attention_grad(
        q[:, :, 3:], k[:, :, :3], v[:, :, :3], rows(weight), 4, "BNSD", **late, **common
    )
    early = {name: t[:, :, :3].contiguous() for name, t in stats.items()}
    diagonal = [
        fusion_attention_grad(
            q[:, :, r], k[:, :, r], v[:, :, r], weight[:, :, r].contiguous(), 4, "BNSD",
            atten_mask=mask, sparse_mode=3, **part, **common,
        )
        for r, part in ((slice(0, 3), early), (slice(3, 6), late))
    ]  # fmt: skip
    grad_q = torch.cat([diagonal[0].query, diagonal[1].query + first.query], 2)
    grad_k = torch.cat([diagonal[0].key + first.key, diagonal[1].key], 2)
    grad_v = torch.cat([diagonal[0].value + first.value, diagonal[1].value], 2)
    for got, want in zip((grad_q, grad_k, grad_v), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_all_dense_layouts_agree():
    q, k, v = tensors()
    want = fusion_attention(q, k, v, 4, "BNSD").attention_out
    for layout in ("BSH", "SBH", "BSND"):
        inputs = [to_layout(t, layout) for t in (q, k, v)]
        got = fusion_attention(*inputs, 4, layout).attention_out
        torch.testing.assert_close(got, to_layout(want, layout), rtol=1e-12, atol=1e-12)


# -- versions and the real op ------------------------------------------------------------

SPEC = TensorSpec((2, 4, 8, 16), torch.float16)


def call(**arguments) -> KernelCall:
    return KernelCall(SPEC, SPEC, SPEC, 4, "BNSD", **arguments)


def test_arguments_are_spelled_as_each_version_spells_them():
    windowed = call(
        atten_mask=AttenMask.causal(), sparse_mode=4, pre_tokens=3, next_tokens=0, scale=0.25
    )
    common = {
        "query": SPEC,
        "key": SPEC,
        "value": SPEC,
        "head_num": 4,
        "input_layout": "BNSD",
        "atten_mask": AttenMask.causal(),
        "sparse_mode": 4,
        "scale": 0.25,
    }
    for version in ("v1", "v3"):
        got = windowed.arguments_for(version)
        assert got == {**common, "pre_tockens": 3, "next_tockens": 0}
    for version in ("v2", "mindspeed"):
        assert windowed.arguments_for(version) == {**common, "pre_tokens": 3, "next_tokens": 0}


def test_a_version_that_cannot_say_it_says_why():
    slopes = call(pse=TensorSpec((4,), torch.float32), pse_type=2)
    for version in ("v1", "v3"):
        refusal = slopes.arguments_for(version)
        assert isinstance(refusal, Refusal)
        assert refusal.subject == version
        assert "pse_type=2" in refusal.reason
    assert choose_version(slopes) == "v2"
    assert choose_version(call()) == "v1"


class Recorder:
    """Stands in for an op: has a schema, and records how it was called."""

    def __init__(self, names: str, result: object) -> None:
        arguments = [SimpleNamespace(name=n) for n in names.split()]
        self.default = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
        self.result = result

    def __call__(self, **arguments: object) -> object:
        self.arguments = arguments
        return self.result


def test_the_installed_schema_decides_the_spelling():
    tensors_ = {n: torch.zeros(2, 4, 8, 16) for n in ("query", "key", "value")}
    tensors_["atten_mask"] = AttenMask.causal().build()
    windowed = call(
        atten_mask=AttenMask.causal(), sparse_mode=4, pre_tokens=3, next_tokens=0, prefix=(1, 2)
    )
    names = "query key value head_num input_layout atten_mask sparse_mode prefix"
    for spelling in ("tokens", "tockens"):
        op = Recorder(f"{names} pre_{spelling} next_{spelling}", tuple(range(7)))
        assert launch(windowed, tensors_, ops=SimpleNamespace(npu_fusion_attention=op)) == (
            *range(7),
        )
        assert op.arguments[f"pre_{spelling}"] == 3
        assert op.arguments["prefix"] == [1, 2]
        assert op.arguments["atten_mask"] is tensors_["atten_mask"]
    op = Recorder(names, ())
    with pytest.raises(KernelContractError, match="has no argument pre_tokens, next_tokens"):
        launch(windowed, tensors_, ops=SimpleNamespace(npu_fusion_attention=op))


def test_the_grad_op_is_called_with_its_own_names():
    tensors_ = {n: torch.zeros(2, 4, 8, 16) for n in ("query", "key", "value")}
    op = Recorder("query key value dy head_num input_layout scale_value seed", (1, 2, 3, 4, 5))
    grads = launch_grad(
        call(scale=0.5),
        tensors_,
        {"dy": tensors_["query"], "seed": 7},
        ops=SimpleNamespace(npu_fusion_attention_grad=op),
    )
    assert tuple(grads) == (1, 2, 3, 4, None)
    assert op.arguments["scale_value"] == 0.5
    assert op.arguments["seed"] == 7
    op.result = (1, 2, 3, 4)
    drawn = call(keep_prob=0.9, dropout_mask=TensorSpec((256,), torch.uint8), seed=3)
    op.default._schema.arguments.append(SimpleNamespace(name="keep_prob"))
    launch_grad(drawn, tensors_, {"seed": 7}, ops=SimpleNamespace(npu_fusion_attention_grad=op))
    assert op.arguments["seed"] == 7
    assert "dropout_mask" not in op.arguments
    grads = launch_grad(
        call(), tensors_, {"dy": 0}, ops=SimpleNamespace(npu_fusion_attention_grad=op)
    )
    assert grads.sink is None
    op.result = (1, 2, 3, 4, 5)
    op.default._schema.arguments.append(SimpleNamespace(name="sink"))
    sinking = call(sink=TensorSpec((4,), torch.float32))
    tensors_["sink"] = torch.zeros(4)
    grads = launch_grad(sinking, tensors_, {}, ops=SimpleNamespace(npu_fusion_attention_grad=op))
    assert grads.sink == 5


# -- the record --------------------------------------------------------------------------


def test_calls_are_values():
    import pickle

    one, two = call(scale=0.5), call(scale=0.5)
    assert one == two
    assert hash(one) == hash(two)
    assert one != call()
    assert one.sequences == ((8, 8),) * 2
    assert pickle.loads(pickle.dumps(one)) == one
    known = vars(__import__("attnkit.kernel", fromlist=["x"])) | {"torch": torch}
    assert eval(repr(one), known) == one
    assert str(one) == (
        "npu_fusion_attention(query=float16[2, 4, 8, 16], key=float16[2, 4, 8, 16], "
        "value=float16[2, 4, 8, 16], head_num=4, input_layout='BNSD', scale=0.5)"
    )


def test_sizes_in_every_layout():
    shapes = {
        "BSH": ((2, 5, 32), (2, 7, 16), (2, 7, 12)),
        "SBH": ((5, 2, 32), (7, 2, 16), (7, 2, 12)),
        "BSND": ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)),
        "BNSD": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    }
    for layout, three in shapes.items():
        specs = (TensorSpec(s, torch.float32) for s in three)
        made = KernelCall(*specs, head_num=4, input_layout=layout)
        assert (made.batch, made.q_len, made.kv_len) == (2, 5, 7)
        assert (made.num_heads, made.num_kv_heads, made.head_dim, made.value_dim) == (4, 2, 8, 6)
        last = 24 if layout in ("BSH", "SBH") else 6
        assert made.output.shape == (*three[0][:-1], last)
        assert made.stats.shape == (2, 4, 5, 8)
        assert not made.violations()


def test_masks_describe_tensors():
    built = AttenMask.causal().build()
    assert built is AttenMask.causal().build()
    assert torch.equal(built, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    prefix = AttenMask.prefix().build()
    assert torch.equal(prefix[:2048], built)
    assert not prefix[2048:, :1024].any()
    assert prefix[2048:, 1024:].all()
    assert AttenMask.of(built, read=True) == AttenMask.causal()
    assert AttenMask.of(prefix, read=True) == AttenMask.prefix()
    assert AttenMask.of(built).is_opaque
    assert AttenMask.of(~built, read=True).is_opaque
    with pytest.raises(KernelContractError, match="unknown"):
        AttenMask.full((3, 3)).build()
    with pytest.raises(KernelContractError, match="2 regions"):
        AttenMask.full((3, 3), [AttenMask.causal().allowed()] * 2)
