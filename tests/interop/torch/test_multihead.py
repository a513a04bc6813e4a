"""`nn.MultiheadAttention` and ours: all of its arguments, in float64."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.interop.torch import MultiheadAttention

FLAGS = ("batch_first", "kdim", "vdim", "bias", "add_bias_kv", "add_zero_attn")
CALLS = list(
    itertools.product(
        (False, True),  # one text without a batch axis
        (None, "bool", "float"),  # key_padding_mask
        (None, "bool", "float", "float3"),  # attn_mask; and bool of three axes, where one is added
    )
)


def pair(**built: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    theirs = nn.MultiheadAttention(8, 2, dtype=torch.float64, **built)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor, std=0.5)
    ours = MultiheadAttention(8, 2, dtype=torch.float64, **built)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def builds() -> Iterator[dict[str, Any]]:
    for flags in itertools.product((False, True), repeat=len(FLAGS)):
        built: dict[str, Any] = dict(zip(FLAGS, flags, strict=True))
        built["kdim"] = 6 if built["kdim"] else None
        built["vdim"] = 10 if built["vdim"] else None
        yield built


def inputs(built: dict[str, Any], alone: bool) -> list[Tensor]:
    widths = 8, built.get("kdim") or 8, built.get("vdim") or 8
    tensors = [
        torch.randn(*(() if alone else (2,)), length, width, dtype=torch.float64)
        for length, width in zip((3, 4, 4), widths, strict=True)
    ]
    turn = not (alone or built.get("batch_first"))
    return [t.transpose(0, 1) if turn else t for t in tensors]


def masks(kind: str | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return a mask that leaves the first key to every row: rows without any are NaN in torch."""
    if kind is None:
        return None
    dropped = torch.rand(shape) > 0.6
    dropped[..., 0] = False
    if kind.startswith("bool"):
        return dropped
    return torch.randn(shape, dtype=torch.float64).masked_fill(dropped, -torch.inf)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_every_combination_equals_torchs() -> None:
    torch.manual_seed(0)
    compared, made = 0, functools.cache(masks)  # each mask is read once
    for k, built in enumerate(builds()):
        theirs, ours = pair(**built)
        for call, (alone, padding, cells) in enumerate(CALLS):
            given = inputs(built, alone)
            count = 2 if alone else 4
            named: dict[str, Any] = {
                "key_padding_mask": made(padding, (4,) if alone else (2, 4)),
                "attn_mask": made(cells, (count, 3, 4) if cells == "float3" else (3, 4)),
            }
            need = (k + call) % 2 == 0  # of each build half of the calls, of each call half
            right = theirs(*given, need_weights=need, **named)
            found = ours(*given, need_weights=need, **named)
            torch.testing.assert_close(found[0], right[0])
            assert (found[1] is None) == (right[1] is None) == (not need)
            if need:
                torch.testing.assert_close(found[1], right[1])
                assert found[1].shape == right[1].shape
            compared += 1
    assert compared == 64 * 24


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("built", [{}, {"kdim": 6}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_gradients(built: dict[str, Any], need: bool) -> None:
    theirs, ours = pair(**built)
    given = [one.requires_grad_() for one in inputs(built, False)]
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for layer in (theirs, ours):
        output, weights = layer(*given, attn_mask=bias, need_weights=need)
        total = output.square().sum() + (0 if weights is None else weights.cos().sum())
        grads.append(torch.autograd.grad(total, [*given, bias, *layer.parameters()]))
    for right, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, right)


def test_weights_of_each_head_and_bool_masks_of_three_axes() -> None:
    theirs, ours = pair(batch_first=True)
    given, dropped = inputs({"batch_first": True}, False), masks("bool", (4, 3, 4))
    for average in (False, True):
        right = theirs(*given, attn_mask=dropped, average_attn_weights=average)
        found = ours(*given, attn_mask=dropped, average_attn_weights=average)
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("built", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_the_causal_hint(built: dict[str, Any]) -> None:
    theirs, ours = pair(batch_first=True, **built)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = masks("bool", (2, 5))
    for named in ({}, {"key_padding_mask": padding.double().masked_fill(padding, -torch.inf)}):
        # With weights torch reads the mask. Without, its own key is beyond the corner and lost.
        right = theirs(x, x, x, attn_mask=causal, need_weights=True, **named)[0]
        for need in (False, True):
            found = ours(x, x, x, attn_mask=causal, is_causal=True, need_weights=need, **named)
            torch.testing.assert_close(found[0], right)
    with pytest.raises(CompositionError, match="it is a hint about attn_mask"):
        ours(x, x, x, is_causal=True)


def test_dropout_is_the_same_in_weights_and_output() -> None:
    _, ours = pair(dropout=0.5, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 64, 8, dtype=torch.float64)
    torch.manual_seed(0)
    output, weights = ours(x, x, x, average_attn_weights=False)
    assert weights.shape == (2, 2, 64, 65)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    value = ours._projected(x, x, x)[2].unflatten(-1, (2, 4))
    value = torch.cat([value, ours.bias_v.view(1, 1, 2, 4).expand(2, 1, 2, 4)], 1)
    joined = torch.einsum("bnst,btnd->bsnd", weights, value).flatten(-2)
    torch.testing.assert_close(ours.out_proj(joined), output)
    with torch.no_grad():
        mean = sum(ours(x, x, x, need_weights=False)[0] for _ in range(400)) / 400
        error = mean - ours.eval()(x, x, x)[0]
    assert error.abs().mean() < 0.15  # no part is lost or counted twice


def test_rows_without_keys_are_zero_and_torchs_are_not_numbers() -> None:
    theirs, ours = pair(batch_first=True, bias=False)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    dropped = torch.zeros(3, 3).bool()
    dropped[1] = True
    assert theirs(x, x, x, attn_mask=dropped)[0][0, 1].isnan().all()
    for need in (False, True):
        output, weights = ours(x, x, x, attn_mask=dropped, need_weights=need)
        assert not output[0, 1].any()
        assert weights is None or not weights[0, 1].any()


def test_signatures_are_torchs() -> None:
    for name in ("__init__", "forward"):
        theirs, ours = (
            [
                (p.name, p.kind, p.default)
                for p in inspect.signature(getattr(c, name)).parameters.values()
            ]
            for c in (nn.MultiheadAttention, MultiheadAttention)
        )
        assert theirs == ours


def test_state_copies_and_pickles() -> None:
    for built in ({}, {"kdim": 6}):
        theirs, ours = pair(**built)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        given = inputs(built, False)
        right = ours(*given)[0]
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(again(*given)[0], right)
        torch.manual_seed(3)
        theirs._reset_parameters()
        torch.manual_seed(3)
        ours._reset_parameters()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_low_precision(dtype: torch.dtype) -> None:
    theirs, ours = pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(2, 5, 8)
    right = theirs(x.double(), x.double(), x.double())[0]
    found = ours.to(dtype)(*3 * [x.to(dtype)], need_weights=False)[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), right, atol=0.1, rtol=0.1)
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        for need in (False, True):
            found = ours(x, x, x, need_weights=need)[0]
            torch.testing.assert_close(found.double(), right, atol=0.1, rtol=0.1)


def test_a_graph_without_masks_is_whole() -> None:
    _, ours = pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    found, right = (one(x, x, x, need_weights=False)[0] for one in (compiled, ours))
    torch.testing.assert_close(found, right)


def test_what_is_refused() -> None:
    _, ours = pair()
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (CompositionTypeError, "nested", (torch.nested.nested_tensor([x[0]]), x, x), {}),
        (CompositionError, "8, 8 and 8 features", (x, x[..., :4], x), {}),
        (CompositionError, "8, 8 and 8 features", (x, x[0], x[0]), {}),
        (CompositionError, "one batch size", (x, x[:, :1], x[:, :1]), {}),
        (CompositionError, "a key has one value", (x, x, x[:2]), {}),
        (
            CompositionError,
            r"give \[3, 3\] or \[4, 3, 3\]",
            (x, x, x),
            {"attn_mask": torch.ones(3, 2).bool()},
        ),
        (
            CompositionError,
            r"give \[2, 3\]",
            (x, x, x),
            {"key_padding_mask": torch.ones(3, 2).bool()},
        ),
        (CompositionTypeError, "True = dropped", (x, x, x), {"attn_mask": torch.ones(3, 3).int()}),
        (CompositionTypeError, "need_weights=1", (x, x, x), {"need_weights": 1}),
    ]
    for kind, told, args, named in cases:
        with pytest.raises(kind, match=told):
            ours(*args, **named)
