"""Rotary against complex multiplication in float64, and what makes it a position embedding."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from attnkit.errors import CompositionError
from attnkit.rotary import Dynamic, Interpolation, Llama3, Rotary, YaRN, positions


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_complex_numbers(rotary: Rotary, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Pairs as complex numbers, turned by multiplication; the pairs picked by index."""
    r = rotary.rotary_dim or x.shape[-1]
    c = torch.arange(r // 2)
    first, second = (c, c + r // 2) if rotary.pairing == "half" else (2 * c, 2 * c + 1)
    angle = where.double()[:, None, None] * rotary.base ** (-2 * c.double() / r)
    turned = torch.complex(x[..., first], x[..., second]) * torch.polar(
        torch.ones_like(angle), angle
    )
    out = x.clone()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


ROTARIES = [
    Rotary(),
    Rotary(pairing="interleaved"),
    Rotary(base=500000.0, rotary_dim=4),
    Rotary(rotary_dim=2, pairing="interleaved"),
]


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_rotate_is_complex_multiplication(rotary):
    where = torch.tensor([0, 1, 7, 1000, 3])
    for shape in [(2, 5, 3, 8), (5, 3, 8)]:
        x = noise(*shape)
        got = rotary.rotate(x, where)
        assert torch.allclose(got, by_complex_numbers(rotary, x, where), rtol=0, atol=1e-12)
        assert torch.equal(got[..., 0, :, :], x[..., 0, :, :])  # position 0 does not turn


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
@given(i=st.integers(0, 50), j=st.integers(0, 50), shift=st.integers(0, 50))
def test_scores_depend_on_the_distance_only(rotary, i, j, shift):
    q, k = noise(2, 1, 1, 8)
    where = torch.tensor

    def score(a: int, b: int) -> torch.Tensor:
        return (rotary.rotate(q, where([a])) * rotary.rotate(k, where([b]))).sum()

    assert torch.allclose(score(i, j), score(i + shift, j + shift), atol=1e-10)


def test_the_two_pairings_are_a_permutation_of_one_another_and_differ():
    x, where = noise(4, 2, 8), torch.arange(4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half = Rotary().rotate(x[..., order], where)
    interleaved = Rotary(pairing="interleaved").rotate(x, where)
    assert torch.allclose(half, interleaved[..., order])
    assert not torch.allclose(Rotary().rotate(x, where), interleaved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_dtype_and_rounds_like_its_inputs(dtype):
    x, where = noise(300, 2, 8).to(dtype), torch.arange(300) + 5000
    got = Rotary().rotate(x, where)
    assert got.dtype == dtype
    exact = Rotary().rotate(x.double(), where)
    # One rounding of the result, and float32 angles of up to 5300 radians.
    bound = torch.finfo(dtype).eps * exact.abs() + 5300 * 2**-23 * x.double().norm(dim=-1).max()
    assert ((got.double() - exact).abs() <= bound).all()


def test_gradients_flow_and_meta_tensors_pass():
    x = noise(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Rotary().rotate(t, torch.arange(3)), x)
    where = torch.arange(3, device="meta")
    assert Rotary().rotate(torch.empty(3, 2, 4, device="meta"), where).shape == (3, 2, 4)


# -- scalings, against the formulas of Hugging Face's modeling_rope_utils ------------------------


def plain(base: float, dim: int) -> list[float]:
    return [1.0 / base ** (2 * c / dim) for c in range(dim // 2)]


def linear(base: float, dim: int, scaling: Interpolation, _: int) -> list[float]:
    return [f / scaling.factor for f in plain(base, dim)]


def llama3(base: float, dim: int, scaling: Llama3, _: int) -> list[float]:
    known, found = scaling.original_max_position_embeddings, []
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    for f in plain(base, dim):
        wavelength = 2 * math.pi / f
        smooth = (known / wavelength - low) / (high - low)
        if wavelength > known / low:
            found.append(f / scaling.factor)
        elif wavelength < known / high:
            found.append(f)
        else:
            found.append((1 - smooth) * f / scaling.factor + smooth * f)
    return found


def yarn(base: float, dim: int, scaling: YaRN, _: int) -> list[float]:
    known = scaling.original_max_position_embeddings

    def correction(rotations: float) -> float:
        return dim * math.log(known / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(scaling.beta_fast), correction(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    found = []
    for c, f in enumerate(plain(base, dim)):
        ramp = min(max((c - low) / (high - low if high != low else 0.001), 0), 1)
        found.append(f / scaling.factor * ramp + f * (1 - ramp))
    return found


def dynamic(base: float, dim: int, scaling: Dynamic, length: int) -> list[float]:
    known, factor = scaling.original_max_position_embeddings, scaling.factor
    grown = factor * max(length, known) / known - (factor - 1)
    return plain(base * grown ** (dim / (dim - 2)), dim)


SCALINGS = [
    (linear, Interpolation(4.0), 1.0),
    (llama3, Llama3(8.0, original_max_position_embeddings=256), 1.0),
    (llama3, Llama3(32.0, 2.0, 3.0, 8192), 1.0),
    (yarn, YaRN(4.0, 32768), 0.1 * math.log(4.0) + 1),
    (yarn, YaRN(32.0, 4096, truncate=False), 0.1 * math.log(32.0) + 1),
    (yarn, YaRN(40.0, 64, beta_fast=8, attention_factor=1.0), 1.0),
    (yarn, YaRN(2.0, 2, 1.0, 1.0), 0.1 * math.log(2.0) + 1),  # a ramp of no width
    (dynamic, Dynamic(2.0, 4096), 1.0),
    (dynamic, Dynamic(3.0, 64), 1.0),
]


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("base", [10000.0, 1e6])
@pytest.mark.parametrize(
    ("formula", "scaling", "size"), SCALINGS, ids=lambda v: getattr(v, "__name__", str(v))[:40]
)
def test_scalings_are_the_formulas_of_hugging_face(formula, scaling, size, base, dim):
    x, where = noise(2, 5, 3, dim), torch.tensor([0, 3, 100, 7, 4099])
    turns = torch.tensor(formula(base, dim, scaling, 4100), dtype=torch.float64)
    angle = torch.outer(where.double(), turns)[:, None]
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.full_like(angle, size), angle)
    got = Rotary(base, scaling=scaling).rotate(x, where)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(got, expected, rtol=0, atol=1e-11)


def test_a_part_of_the_head_turns():
    x, where = noise(5, 2, 16), torch.arange(5)
    assert torch.equal(
        Rotary(rotary_dim=0.25).rotate(x, where), Rotary(rotary_dim=4).rotate(x, where)
    )


# -- positions of several axes -------------------------------------------------------------------


def by_rotate_half(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """What vision models of Hugging Face do with frequencies [..., s, d/2], in their words."""
    emb = torch.cat((freqs, freqs), dim=-1)[..., None, :]
    x1, x2 = x.chunk(2, dim=-1)
    return x * emb.cos() + torch.cat((-x2, x1), dim=-1) * emb.sin()


X, WHERE = noise(2, 6, 3, 16), torch.randint(0, 50, (3, 2, 6), generator=torch.manual_seed(0))
LADDER = torch.tensor(plain(10000.0, 16), dtype=torch.float64)


def test_m_rope_is_qwen2_vl():
    sections = (3, 3, 2)
    freqs = WHERE[..., None] * LADDER
    picked = [part[axis] for axis, part in enumerate(freqs.split(sections, dim=-1))]
    got = Rotary(sections=sections).rotate(X, WHERE)
    assert torch.allclose(got, by_rotate_half(X, torch.cat(picked, -1)), rtol=0, atol=1e-12)


def test_interleaved_m_rope_is_qwen3_vl():
    sections = (4, 2, 2)
    freqs = WHERE[..., None] * LADDER
    mixed = freqs[0].clone()
    for axis in (1, 2):
        chosen = slice(axis, sections[axis] * 3, 3)
        mixed[..., chosen] = freqs[axis][..., chosen]
    got = Rotary(sections=sections, order="interleaved").rotate(X, WHERE)
    assert torch.allclose(got, by_rotate_half(X, mixed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sections", [(4, 4), (2, 6)])
def test_axial_positions_turn_every_axis_alike(sections):
    where = WHERE[:2]
    freqs = [
        p[..., None] * torch.tensor(plain(10000.0, 2 * n), dtype=torch.float64)
        for p, n in zip(where, sections, strict=True)
    ]
    got = Rotary(sections=sections, order="axial").rotate(X, where)
    assert torch.allclose(got, by_rotate_half(X, torch.cat(freqs, -1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(sections=(3, 3, 2))], ids=str)
def test_positions_of_every_text(rotary):
    axes = () if rotary.sections is None else (3,)
    where = WHERE if axes else WHERE[0]
    got = rotary.rotate(X, where)
    each = [rotary.rotate(X[b], where[..., b, :]) for b in range(2)]
    assert torch.equal(got, torch.stack(each))
    shared = where[..., 0, :]  # [s] or [a, s]: of all texts
    assert torch.equal(
        rotary.rotate(X, shared), rotary.rotate(X, shared[..., None, :].expand_as(where))
    )
    along_all = WHERE[0, 0]
    text = Rotary().rotate(X, along_all)  # the axes of a text are one
    assert torch.allclose(rotary.rotate(X, along_all), text, rtol=0, atol=1e-12)


EVERY = [
    Rotary(scaling=Interpolation(2.0)),
    Rotary(scaling=Llama3(8.0, original_max_position_embeddings=16), rotary_dim=0.5),
    Rotary(scaling=YaRN(4.0, 16), pairing="interleaved"),
    Rotary(scaling=Dynamic(2.0, 8)),
    Rotary(sections=(3, 3, 2), scaling=YaRN(4.0, 16)),
    Rotary(sections=(4, 2, 2), order="interleaved"),
    Rotary(sections=(4, 2, 2), order="axial"),
]


@pytest.mark.parametrize("rotary", EVERY, ids=str)
def test_one_graph_serves_all_positions(rotary):
    torch.compiler.reset()
    counter = CompileCounter()
    turn = torch.compile(rotary.rotate, fullgraph=True, backend=counter)
    axes = 3 if rotary.sections else 1
    for seed in range(3):
        where = torch.randint(0, 99, (3, 2, 6), generator=torch.manual_seed(seed))[:axes]
        where = where if rotary.sections else where[0]
        assert torch.allclose(turn(X, where), rotary.rotate(X, where), rtol=0, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rotary", EVERY, ids=str)
def test_no_tokens_no_data_and_float32(rotary):
    axes = (3,) if rotary.sections else ()
    assert rotary.rotate(X[:, :0], torch.zeros(*axes, 2, 0)).shape == (2, 0, 3, 16)
    where = torch.zeros(*axes, 2, 6, device="meta")
    assert rotary.rotate(X.to("meta"), where).shape == X.shape
    where = WHERE if axes else WHERE[0]
    near = rotary.rotate(X.float(), where)
    # Angles of up to 50 radians, in float32.
    assert torch.allclose(near.double(), rotary.rotate(X, where), rtol=0, atol=50 * 2**-21)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 9))
def test_positions_count_from_the_offset_in_each_sequence(lengths, offset):
    expected = [offset + i for length in lengths for i in range(length)]
    assert positions(lengths, offset).tolist() == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Rotary(base=0), ["base=0"]),
        (lambda: Rotary(base=math.nan), ["nan"]),
        (lambda: Rotary(base="10"), ["'10'"]),
        (lambda: Rotary(base=10**400), ["base=", "1e+30"]),
        (lambda: Rotary(base=1e-320), ["base=1e-320", "1e-30"]),
        (lambda: Rotary(base=None), ["base=None"]),
        (lambda: Rotary(rotary_dim=2**70).dims(8), ["head of 8"]),
        (lambda: Rotary(rotary_dim=True), ["rotary_dim=True"]),
        (lambda: Rotary().dims(8.0), ["head_dim=8.0"]),
        (lambda: Rotary().rotate(3, torch.arange(4)), ["heads is a int"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), [0, 1, 2, 3]), ["positions is a list"]),
        (lambda: Rotary().rotate(noise(4, 2, 8).int(), torch.arange(4)), ["torch.int32"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.ones(4) > 0), ["torch.bool"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(4).to_sparse()), ["sparse"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(4, device="meta")), ["on meta"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.zeros(4, 1)), ["[4, 1]", "[s]"]),
        (lambda: Rotary(pairing=np.ones(2)), ["pairing=array"]),
        (lambda: positions("12"), ["lengths", "sequence of int"]),
        (lambda: positions([2, -1]), ["lengths[1]=-1"]),
        (lambda: positions(range(10**12)), ["lengths", "entries"]),
        (lambda: positions([2**60]), ["tokens from 0 on"]),
        (lambda: positions([2], 0.5), ["offset=0.5"]),
        (lambda: positions([2], 10**30), ["positions", "0000000"]),
        (lambda: positions([2], 0, 1.5), ["device=1.5"]),
        (lambda: positions([2], 0, "abacus"), ["device='abacus' is not there"]),
        (lambda: Rotary(rotary_dim=3), ["rotary_dim=3", "even"]),
        (lambda: Rotary(rotary_dim=1.5), ["rotary_dim=1.5", "part of the head"]),
        (lambda: Rotary(rotary_dim=0.1).dims(8), ["0 dimensions", "head of 8"]),
        (lambda: Rotary(scaling="yarn"), ["scaling='yarn'", "YaRN"]),
        (lambda: Rotary(scaling=YaRN), ["scaling=<class", "YaRN"]),
        (lambda: Rotary(0.5, scaling=Interpolation(2.0)), ["base above 1"]),
        (lambda: Interpolation(0), ["Interpolation: factor=0", "positive"]),
        (lambda: Interpolation(None), ["factor=None"]),
        (lambda: Llama3(True), ["Llama3: factor=True"]),
        (lambda: Llama3(8.0, 4.0, 4.0), ["low_freq_factor must be below"]),
        (lambda: YaRN(2.0, -1), ["original_max_position_embeddings=-1"]),
        (lambda: YaRN(2.0, 64, truncate=1.5), ["truncate=1.5", "True or False"]),
        (lambda: YaRN(math.nan, 64), ["factor=nan"]),
        (lambda: Rotary(order="blocks", sections=3), ["sections=3", "(16, 24, 24)"]),
        (lambda: Rotary(sections=(4,)), ["sections=(4,)", "two or more"]),
        (lambda: Rotary(sections=(4, 10**12)), ["sections=(4, 1000000000000)"]),
        (lambda: Rotary(sections=(4, True)), ["sections=(4, True)"]),
        (lambda: Rotary(order="axial"), ["sections=None", "order='axial'"]),
        (lambda: Rotary(sections=(2, 2), order="rows"), ["order='rows'", "axial"]),
        (lambda: Rotary(sections=(2, 6), order="interleaved"), ["cannot take turns"]),
        (lambda: Rotary(sections=(2, 2)).dims(16), ["4 pairs", "16 dimensions", "8 pairs"]),
        (lambda: Rotary(sections=(2, 2), scaling=Dynamic(2.0, 4)), ["one axis"]),
        (lambda: Rotary(sections=(2, 2)).rotate(noise(4, 1, 8), torch.ones(3, 4)), ["[2, s]"]),
        (lambda: Rotary().rotate(noise(3, 4, 2, 8), torch.ones(2, 4)), ["[2, 4]", "[3, 4]"]),
        (lambda: Rotary(rotary_dim=0), ["rotary_dim=0"]),
        (lambda: Rotary(pairing="neox"), ["'neox'", "'half'", "'interleaved'"]),
        (lambda: Rotary(rotary_dim=16).dims(8), ["16 dimensions", "head of 8"]),
        (lambda: Rotary().dims(7), ["head of 7"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(3)), ["tokens [4]", "[3]"]),
        (lambda: Rotary().rotate(noise(4, 8), torch.arange(4)), ["[..., s, n, d]"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("rotary", ROTARIES + EVERY, ids=str)
def test_it_is_a_value(rotary):
    assert pickle.loads(pickle.dumps(rotary)) == rotary == copy.deepcopy(rotary)
    assert hash(copy.deepcopy(rotary)) == hash(rotary)
    assert eval(repr(rotary)) == rotary
