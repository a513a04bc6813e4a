"""pse.Dense: keeps the tensor it is given, and refuses what cannot be a bias."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse import Dense


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "heads", "batch"),
    [
        ((4, 5), None, None),
        ((3, 4, 5), 3, None),
        ((1, 4, 5), 1, None),
        ((1, 1, 4, 5), None, None),
        ((1, 3, 4, 5), 3, None),
        ((2, 1, 4, 5), None, 2),
        ((2, 3, 4, 5), 3, 2),
    ],
)
def test_shapes_and_what_they_say(shape, heads, batch):
    tensor = noise(*shape)
    bias = Dense(tensor)
    assert (bias.heads, bias.batch) == (heads, batch)
    assert (bias.before_scale, bias.requires_grad, bias.toeplitz) == (False, False, False)
    bias.check(4, 5, batch=batch or 7, heads=heads or 7)
    full = bias.materialize(4, 5, batch=batch or 7, heads=heads or 7)
    assert full.shape == (1,) * (4 - len(shape)) + shape
    assert full.data_ptr() == tensor.data_ptr()
    one = bias.materialize(4, 5, batch_index=(batch or 1) - 1)
    assert torch.equal(one, full[-1:])


def test_the_tensor_is_kept_and_gradients_reach_it():
    weight = torch.nn.Parameter(noise(3, 4, 5))
    bias = Dense(weight)
    assert bias.tensor is weight
    assert bias.tensors == (weight,)
    assert bias.requires_grad
    bias.materialize(4, 5, dtype=torch.float64).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_materialize_casts_only_when_asked():
    tensor = noise(4, 5, dtype=torch.bfloat16)
    assert Dense(tensor).materialize(4, 5, dtype=torch.bfloat16).data_ptr() == tensor.data_ptr()
    assert torch.equal(Dense(tensor).materialize(4, 5)[0, 0], tensor.float())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Dense([[0.0]]), ["give a torch tensor", "list"]),
        (lambda: Dense(noise(4, 5), before_scale=1), ["before_scale", "1"]),
        (
            lambda: Dense(torch.zeros(4, 5, dtype=torch.int64)),
            ["[4, 5] of torch.int64", "floating", "cast"],
        ),
        (lambda: Dense(torch.ones(4, 5, dtype=torch.bool)), ["masks.Dense.keep"]),
        (lambda: Dense(noise(5)), ["float32[5]", "[q_len, kv_len]"]),
        (lambda: Dense(noise(1, 1, 1, 4, 5)), ["[q_len, kv_len]"]),
        (lambda: Dense(torch.tensor([[0.0, -torch.inf]])), ["infinite", "mask"]),
        (lambda: Dense(torch.tensor([[0.0, torch.inf]])), ["infinite", "mask"]),
        (lambda: Dense(torch.tensor([[0.0, torch.nan]])), ["NaN", "mask"]),
        (lambda: Dense(noise(4, 5)).check(4, 6), ["4 x 5", "4 x 6", "slice"]),
        (lambda: Dense(noise(4, 5)).materialize(5, 4), ["4 x 5", "5 x 4"]),
        (lambda: Dense(noise(3, 4, 5)).check(4, 5, heads=6), ["3 heads", "query has 6"]),
        (lambda: Dense(noise(2, 1, 4, 5)).check(4, 5, batch=3), ["batch of 2", "is 3"]),
        (lambda: Dense(noise(4, 5)).materialize(4, 5, device="meta"), ["cpu", "meta", "move"]),
        (lambda: Dense(noise(4, 5)).materialize(4, 5, dtype=torch.int8), ["torch.int8"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_type_errors_are_type_errors():
    with pytest.raises(CompositionTypeError):
        Dense(torch.ones(4, 5, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_but_finite_values_and_every_float_dtype_are_accepted(dtype):
    info = torch.finfo(dtype)
    Dense(torch.tensor([[info.min, info.max]], dtype=dtype))


def test_values_are_not_read_where_they_cannot_or_need_not_be():
    Dense(torch.empty(4, 5, device="meta"))
    Dense(torch.empty(0, 5))
    Dense(torch.tensor([[torch.nan]]), validate=False)


def test_equality_is_by_content_and_agrees_with_hash_and_key():
    tensor = noise(3, 4, 5)
    bias, twin = Dense(tensor), Dense(tensor.clone())
    assert bias == twin == copy.deepcopy(bias) == pickle.loads(pickle.dumps(bias))
    assert hash(bias) == hash(twin)
    assert bias.key() == twin.key()
    planted = tensor.clone()
    planted[2, 3, 4] += 1e-3
    for other in (
        Dense(planted),
        Dense(tensor, before_scale=True),
        Dense(tensor.double()),
        Dense(tensor[None]),
        Dense(torch.nn.Parameter(tensor)),
    ):
        assert bias != other
    assert bias != "bias"
    meta = torch.empty(3, 4, 5, device="meta")
    assert Dense(meta) == Dense(meta)
    assert Dense(meta) != Dense(torch.empty_like(meta)) != bias


def test_the_key_holds_what_a_plan_depends_on_and_no_values():
    assert Dense(noise(4, 5)).key() == Dense(torch.zeros(4, 5)).key()
    keys = {
        Dense(noise(4, 5)).key(),
        Dense(noise(5, 4)).key(),
        Dense(noise(4, 5).double()).key(),
        Dense(noise(4, 5), before_scale=True).key(),
        Dense(torch.nn.Parameter(noise(4, 5))).key(),
    }
    assert len(keys) == 5


def test_repr_says_shape_dtype_side_and_gradient():
    assert repr(Dense(noise(4, 5))) == "Dense(float32[4, 5])"
    weight = torch.nn.Parameter(noise(4, 5, dtype=torch.bfloat16))
    assert repr(Dense(weight, True)) == "Dense(bfloat16[4, 5], before_scale=True, requires_grad)"
