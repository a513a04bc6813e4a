"""Attention written by hand, in every order in which people write it, against the module itself."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch.byhand import fuse
from attnkit.interop.torch.byhand.records import Deferred

B, N, S, T, D = 2, 3, 5, 7, 4
LEAST = torch.finfo(torch.float64).min

Step = Callable[[Any], Any]


def banned() -> Tensor:
    """Cells that take no part, per batch element; no row loses all."""
    cells = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(1)) < 0.4
    cells[..., 0] = False
    return cells


BANNED = banned()
ADDED = torch.zeros(B, 1, S, T, dtype=torch.float64).masked_fill(BANNED, LEAST)
BIAS = torch.randn(N, S, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PER_KEY = torch.randn(B, N, 1, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda q, k: q @ k.transpose(-1, -2),
    "matmul": lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)),
    "method": lambda q, k: q.matmul(k.mT),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, N, S, T),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum dots": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
    "einsum bqhd": lambda q, k: torch.einsum(
        "bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)
    ),
    "einsum swapped": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q),
    "keys first": lambda q, k: (k @ q.mT).transpose(-1, -2),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.empty(B * N, S, T, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0
    ).view(B, N, S, T),
    "unsqueezed": lambda q, k: (q[:, :, None] @ k[:, :, None].mT).squeeze(2),
}

SCALES: dict[str, Step] = {
    "*": lambda s: s * 0.4,
    "/": lambda s: s / math.sqrt(D),
    "/=": lambda s: s.__itruediv__(2.0),
    "0-d": lambda s: s / torch.tensor(1.7, dtype=s.dtype),
    "mul": lambda s: torch.mul(0.3, s),
    "per head": lambda s: s * torch.arange(1.0, N + 1, dtype=s.dtype).view(N, 1, 1),
    "-(-)": lambda s: -(s * -0.5),
}

TERMS: dict[str, Step] = {
    "none": lambda s: s,
    "add": lambda s: s + ADDED.to(s.dtype),
    "radd": lambda s: ADDED.to(s.dtype) + s,
    "iadd": lambda s: s.add_(ADDED.to(s.dtype)),
    "fill": lambda s: s.masked_fill(BANNED, torch.finfo(s.dtype).min),
    "fill_": lambda s: s.masked_fill_(BANNED, -torch.inf),
    "where": lambda s: torch.where(~BANNED, s, torch.tensor(LEAST, dtype=s.dtype)),
    "where method": lambda s: s.where(~BANNED, -1e9),
    "where not": lambda s: torch.where(BANNED, -1e9, s),
    "bias": lambda s: s + BIAS.to(s.dtype),
    "minus": lambda s: s - PER_KEY.to(s.dtype),
    "per key": lambda s: s + PER_KEY.to(s.dtype),
    "both": lambda s: (s + BIAS.to(s.dtype)) + ADDED.to(s.dtype),
    "flat": lambda s: (s.view(B * N, S, T) + PER_KEY.view(B * N, 1, T).to(s.dtype)).view(
        B, N, S, T
    ),
    "one row": lambda s: s + ADDED[:, :, :1].to(s.dtype),
    "a number": lambda s: s + 3.0,
    "clamped": lambda s: torch.max(s + ADDED.to(s.dtype), torch.tensor(LEAST, dtype=s.dtype)),
}

SOFTMAXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F": lambda s, v: F.softmax(s, dim=-1),
    "method": lambda s, v: s.softmax(-1),
    "module": lambda s, v: nn.Softmax(dim=-1)(s),
    "float": lambda s, v: F.softmax(s.float(), dim=-1).to(v.dtype),
    "dtype": lambda s, v: F.softmax(s, dim=-1, dtype=torch.float64).type_as(v),
    "dim 3": lambda s, v: torch.softmax(s, 3),
    "nan": lambda s, v: torch.nan_to_num(torch.softmax(s, -1)),
}

VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda w, v: w @ v,
    "bmm": lambda w, v: torch.bmm(w.view(B * N, S, T), v.flatten(0, 1)).view(B, N, S, -1),
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
    "einsum out": lambda w, v: torch.einsum("bhqk,bkhd->bqhd", w, v.transpose(1, 2)).transpose(
        1, 2
    ),
    "values first": lambda w, v: (v.mT @ w.mT).mT,
    "head mask": lambda w, v: (
        (w * torch.tensor([1.0, 0.0, 2.0], dtype=w.dtype).view(1, N, 1, 1)) @ v
    ),
    "dropout 0": lambda w, v: F.dropout(w, 0.5, False) @ v,
    "contiguous": lambda w, v: w.contiguous().clone() @ v,
}


class Written(nn.Module):
    """Attention as the product of these ways to write it."""

    def __init__(self, *ways: Callable[..., Any]) -> None:
        super().__init__()
        self.ways = ways

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        product, *steps, softmax, values = self.ways
        scores = product(query, key)
        for step in steps:
            scores = step(scores)
        return values(softmax(scores, value), value)


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    sizes = ((B, N, S, D), (B, N, T, D), (B, N, T, D + 1))
    return [torch.randn(*s, dtype=dtype, generator=made).requires_grad_() for s in sizes]


def both(module: nn.Module, *given: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield output and gradients, as written and fused."""
    for fused in (False, True):
        report = fuse(module, [type(module)]) if fused else None
        output = module(*given)
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        yield output, torch.autograd.grad(output, given, cotangent)
        if report is not None:
            assert (report.calls, report.left) == (1, {})
            report.undo()


def agree(module: nn.Module, *given: Tensor, tolerance: float = 1e-10) -> None:
    (output, grads), (found, found_grads) = both(module, *given)
    assert (found.shape, found.dtype) == (output.shape, output.dtype)
    torch.testing.assert_close(found, output, atol=tolerance, rtol=tolerance)
    for a, b in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def spellings() -> Iterator[tuple[str, ...]]:
    """Every way once, the others as usual; and a sample of all combinations."""
    usual = ("@", "*", "add", "F", "@")
    tables = (PRODUCTS, SCALES, TERMS, SOFTMAXES, VALUES)
    for at, table in enumerate(tables):
        yield from ((*usual[:at], one, *usual[at + 1 :]) for one in table)
    chosen = random.Random(0)
    for _ in range(120):
        yield tuple(chosen.choice(list(table)) for table in tables)


def test_spellings_are_one_call_with_the_same_numbers() -> None:
    given = tensors()
    for words in spellings():
        product, scale, term, softmax, values = words
        steps = [SCALES[scale], TERMS[term]]
        module = Written(PRODUCTS[product], *steps, SOFTMAXES[softmax], VALUES[values])
        # Written in float32 what is float64 has float32's error.
        agree(module, *given, tolerance=2e-6 if softmax == "float" else 1e-10)


# -- what is added and trained ---------------------------------------------------------------


class Relative(nn.Module):
    """A bias that trains, between a scale before and one after, and a soft-cap if asked for."""

    def __init__(self, cap: float | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(BIAS.clone())
        self.per_head = nn.Parameter(torch.tensor([[[0.5]], [[1.0]], [[1.5]]]).double())
        self.cap = cap

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query / 2) @ key.mT
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        else:
            scores = (scores + self.table) * self.per_head
        return (scores * 0.7 + self.table).softmax(-1) @ value


@pytest.mark.parametrize("cap", [None, 0.8])
def test_what_is_added_and_multiplied_trains(cap: float | None) -> None:
    module = Relative(cap)
    given = (*tensors(), *module.parameters()) if cap is None else (*tensors(), module.table)
    found = []
    for fused in (False, True):
        if fused:
            fuse(module, [Relative])
        output = module(*given[:3])
        found.append((output, torch.autograd.grad(output.square().sum(), given)))
    (output, grads), (fast, fast_grads) = found
    torch.testing.assert_close(fast, output)
    for a, b in zip(fast_grads, grads, strict=True):
        torch.testing.assert_close(a, b)


def windows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Swin: windows of an image in the batch, a bias per head, a mask per window, with a view."""
    scores = query @ key.mT + BIAS[:, :, :S]
    banned = torch.zeros(2, S, S, dtype=scores.dtype)
    banned[1, :, 3:] = -100.0
    scores = scores.view(2, 2, N, S, S) + banned.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, N, S, S).softmax(-1) @ value


def decomposed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SAM: rows and keys are the places of a grid, and biases know one axis of it."""
    scores = query @ key.mT
    places = query.reshape(4 * N, 2, 3, D)
    high = torch.einsum("bhwc,hkc->bhwk", places, torch.ones(2, 2, D).double())
    scores = scores.view(4 * N, 2, 3, 2, 3) + high[:, :, :, :, None]
    scores = scores.view(4, N, 6, 6)
    return scores.softmax(-1) @ value


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two query heads to each of the keys': by broadcasting."""
    scores = query.view(4, N, 2, S, D) @ key[:, :, None].mT
    out = scores.softmax(-1) @ value[:, :, None]
    return out.view(4, 2 * N, S, D)


def three_axes(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head, channels first, values before the weights."""
    scores = torch.bmm(query.permute(0, 2, 1), key) * D**-0.5
    return torch.bmm(value, scores.softmax(dim=2).permute(0, 2, 1))


def many_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys without heads, in an einsum."""
    weights = torch.einsum("bhqd,bkd->bhqk", query, key).softmax(-1)
    return torch.einsum("bhqk,bkd->bqhd", weights, value)


def last_is_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """XLNet: positions first."""
    weights = torch.einsum("ibnd,jbnd->ijbn", query, key).softmax(1)
    return torch.einsum("ijbn,jbnd->ibnd", weights, value)


def stabilised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """CogView: the largest score of each row is taken off before a scale."""
    scores = (query @ key.mT) / 4
    scores = scores - scores.max()
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return ((scores - scores.amax(dim=-1).unsqueeze(-1)) * 4).softmax(-1) @ value


def emptied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Weights are set to 0 where scores were masked, and in rows."""
    scores = (query @ key.mT).masked_fill(BANNED, -torch.inf)
    weights = scores.softmax(-1).masked_fill(BANNED.clone(), 0.0)
    return weights.masked_fill(torch.arange(S).view(S, 1) == 2, 0.0) @ value


def expanded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """XLM: a mask is expanded as the scores, and they are filled in place."""
    scores = query @ key.mT
    scores.masked_fill_(BANNED[:, :, :1].expand_as(scores), LEAST)
    filled = scores.float() if scores.dtype == torch.float32 else scores.contiguous()
    filled.masked_fill_(BANNED, LEAST)  # of one dtype, these are the scores themselves
    return scores.softmax(-1).type_as(scores) @ value


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's own attention, with a mask that is a product."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=query @ key.mT)


def listed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Operands of einsum in a list; what comes out is written to."""
    weights = torch.einsum("bhqd,bhkd->bhqk", [query, key]).softmax(-1)
    out = torch.einsum("bhqk,bhkd->bhqd", [weights, value])
    out += 1.0
    return out


ODD: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "windows": (windows, (4, N, S, D), (4, N, S, D)),
    "decomposed": (decomposed, (4, N, 6, D), (4, N, 6, D)),
    "grouped": (grouped, (4, 2 * N, S, D), (4, N, T, D)),
    "three axes": (three_axes, (4, D, S), (4, D, T)),
    "many queries": (many_queries, (4, N, S, D), (4, T, D)),
    "positions first": (last_is_queries, (S, B, N, D), (T, B, N, D)),
    "stabilised": (stabilised, (B, N, S, D), (B, N, T, D)),
    "emptied": (emptied, (B, N, S, D), (B, N, T, D)),
    "expanded": (expanded, (B, N, S, D), (B, N, T, D)),
    "torchs": (torchs, (B, N, S, D), (B, N, T, D)),
    "listed": (listed, (B, N, S, D), (B, N, T, D)),
    "one query": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (B, N, 1, D), (B, N, T, D)),
    "a bias on one key": (
        lambda q, k, v: (q @ k.mT + BIAS[:, :1, :1]).softmax(-1) @ v,
        (B, N, S, D),
        (B, N, 1, D),
    ),
    "one key": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (B, N, S, D), (B, N, 1, D)),
    "one of all": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (1, 1, 1, D), (1, 1, 1, D)),
}


class Odd(nn.Module):
    """One of the forms above."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ODD[self.name][0](query, key, value)


@pytest.mark.parametrize("name", ODD)
def test_other_arrangements_of_axes(name: str) -> None:
    made = torch.Generator().manual_seed(4)
    _, queries, keys = ODD[name]
    given = [
        torch.randn(*shape, dtype=torch.float64, generator=made).requires_grad_()
        for shape in (queries, keys, keys)
    ]
    agree(Odd(name), *given)


# -- what is no attention, or looked at --------------------------------------------------------

LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "sigmoid": (lambda q, k, v: torch.sigmoid(q @ k.mT) @ v, "sigmoid"),
    "other softmax": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "over the keys"),
    "top": (lambda q, k, v: (q @ k.mT).topk(3, -1).values.sum(-1), "topk"),
    "gather": (lambda q, k, v: (q @ k.mT)[..., :2].softmax(-1) @ v[..., :2, :], "__getitem__"),
    "tanh of bias": (
        lambda q, k, v: torch.tanh(q @ k.mT + BIAS).softmax(-1) @ v,
        "tanh of more than scaled",
    ),
    "fill with a little": (
        lambda q, k, v: (q @ k.mT).masked_fill(BANNED, -3.0).softmax(-1) @ v,
        "does not exclude",
    ),
    "weights added": (lambda q, k, v: ((q @ k.mT).softmax(-1) + 0.1) @ v, "added to the weights"),
    "renormalised": (
        lambda q, k, v: (lambda w: w / w.sum(-1, keepdim=True))((q @ k.mT).softmax(-1)) @ v,
        "sum",
    ),
    "cell by cell": (lambda q, k, v: ((q @ k.mT) * BIAS).softmax(-1) @ v, "cell by cell"),
    "softmax of half": (
        lambda q, k, v: (q @ k.mT).view(B, N, S * T, 1).softmax(-2).view(B, N, S, T) @ v,
        "not over the keys",
    ),
    "the largest": (
        lambda q, k, v: (lambda s: s / s.amax(-1, keepdim=True))(q @ k.mT).softmax(-1) @ v,
        "follows from scores",
    ),
    "detached": (lambda q, k, v: (q @ k.mT).detach().softmax(-1) @ v, "detached"),
    "unmasked weights": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(BANNED, 0.0) @ v,
        "not masked",
    ),
}


class Left(nn.Module):
    """One of the forms above."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return LEFT[self.name][0](query, key, value)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_attention_is_computed_as_written_and_told(name: str) -> None:
    given, module = tensors(), Left(name)
    output = module(*given)
    grads = torch.autograd.grad(output.sum(), given, allow_unused=True)
    report = fuse(module, [Left])
    found = module(*given)
    assert torch.equal(found, output)
    for a, b in zip(torch.autograd.grad(found.sum(), given, allow_unused=True), grads, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert report.calls == 0
    assert LEFT[name][1] in str(report)


class Returned(nn.Module):
    """Attention that returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.dropout((query @ key.mT).softmax(-1))
        return weights @ value, weights


def test_weights_that_are_returned_are_computed_when_somebody_looks() -> None:
    module, given = Returned().eval(), tensors()
    _, weights = module(*given)
    report = fuse(module, [Returned])
    output, found = module(*given)
    assert isinstance(found, Deferred)
    assert found.record.real is None
    assert (found.shape, found.dtype, found.ndim) == (weights.shape, weights.dtype, 4)
    torch.testing.assert_close(found + 0, weights)
    for a, b in zip(
        torch.autograd.grad((found * BIAS).sum() + output.sum(), given),
        torch.autograd.grad((weights * BIAS).sum() + (weights @ given[2]).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert report.calls == 1


def test_weights_of_tensors_that_were_written_to_since_are_an_error() -> None:
    module, given = Returned().eval(), [t.detach() for t in tensors()]
    fuse(module, [Returned])
    _, weights = module(*given)
    given[0].zero_()
    with pytest.raises(CompositionError, match="was written to in the meantime"):
        weights.sum()


class Writes(nn.Module):
    """Writes in place where somebody else still looks."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query * 1
        scores = query @ key.mT
        if self.what == "operand":
            query.mul_(0)
        elif self.what == "base":
            view = scores.view(B * N, S, T)
            scores += BIAS
            scores = view.view(B, N, S, T)
        elif self.what == "view":
            view = scores.transpose(-1, -2)
            view *= 2.0
        elif self.what == "item":
            scores[..., 0] = 1.0
        elif self.what == "rebound":
            scores = scores.view(B * N, S, T)
            scores *= 2.0
            scores = scores.view(B, N, S, T)
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("what", ["operand", "base", "view", "item", "rebound"])
def test_writes_in_place_are_seen_by_whom_they_should(what: str) -> None:
    module, given = Writes(what), [t.detach() for t in tensors()]
    output = module(*given)
    report = fuse(module, [Writes])
    torch.testing.assert_close(module(*given), output)
    assert report.calls == (what == "rebound")


# -- training, copies, the way back ------------------------------------------------------------


def test_dropout_is_that_of_training_and_of_torchs_generator() -> None:
    module, given = Returned(), tensors()
    fuse(module, [Returned])
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(*given)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(0)
    many = torch.stack([module(*given)[0] for _ in range(400)]).mean(0)
    torch.testing.assert_close(many, module.eval()(*given)[0], atol=0.35, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    module, given = Returned().eval(), tensors()
    wanted = torch.autograd.grad(module(*given)[0].square().sum(), given)
    fuse(module, [Returned])
    output, _ = checkpoint(module, *given, use_reentrant=reentrant)
    for one in given:
        one.grad = None
    output.square().sum().backward()
    for one, want in zip(given, wanted, strict=True):
        torch.testing.assert_close(one.grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_as_written(dtype: torch.dtype) -> None:
    module = Written(PRODUCTS["@"], SCALES["*"], TERMS["both"], SOFTMAXES["F"], VALUES["@"])
    exact = module(*tensors())
    given = [t.detach().to(dtype) for t in tensors()]
    written = module(*given)
    fuse(module, [Written])
    found = module(*given)
    assert found.dtype == dtype
    error = (found.double() - exact).abs().median()
    assert error <= 2 * (written.double() - exact).abs().median()


def test_autocast_is_what_it_is_as_written() -> None:
    module, given = Returned().eval(), [t.detach().float() for t in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        written, _ = module(*given)
        report = fuse(module, [Returned])
        found, weights = module(*given)
        assert (found.dtype, weights.dtype) == (written.dtype, (weights + 0).dtype)
    assert report.calls == 1
    torch.testing.assert_close(found, written, atol=0.05, rtol=0.05)


def test_copies_and_pickles_are_fused_on_their_own() -> None:
    layer, given = nn.Sequential(Returned()).eval(), [t.detach() for t in tensors()]
    report = fuse(layer, [Returned])
    layer[0](*given)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other[0](*given)
        assert other[0].forward.module is other[0]
        assert other[0].forward.spot.fused == 1
    assert report.calls == 1
    assert list(layer.state_dict()) == []


class SelfAttention(Returned):
    """A class whose name says what it is."""


def test_modules_are_found_by_name_or_class_and_go_back() -> None:
    model = nn.ModuleDict({"a": SelfAttention(), "b": nn.Linear(2, 2), "c": Returned()}).eval()
    given = tensors()
    with fuse(model) as report:
        assert list(report.spots) == ["a"]
        model["a"](*given)
        assert report.calls == 1
        assert list(fuse(model).spots) == ["a"]  # again: nothing changes
        assert "a  SelfAttention: 1 calls" in str(report)
    assert "forward" not in vars(model["a"])
    assert list(fuse(model, ["Returned"]).spots) == ["a", "c"]
    with pytest.raises(CompositionError, match="Linear has no module whose class name"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(CompositionTypeError, match="model='bert'"):
        fuse("bert")  # type: ignore[arg-type]


def test_errors_of_torch_are_torchs() -> None:
    module, (query, key, value) = Returned().eval(), tensors()
    fuse(module, [Returned])
    with pytest.raises(RuntimeError, match=r"must match|incompatible|Expected size"):
        module(query, key[..., :2], value)


def test_no_matrix_of_scores_is_made() -> None:
    length, module = 4096, Returned().eval()
    given = [torch.randn(1, 1, length, 8) for _ in range(3)]
    fuse(module, [Returned])
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for one in found if isinstance(found, tuple | list) else (found,):
                if isinstance(one, Tensor) and not isinstance(one, Deferred):
                    largest = max(largest, one.numel() if not one.is_meta else 0)
            return found

    with torch.no_grad(), Sizes():
        module(*given)
    assert 0 < largest < length * length / 4
