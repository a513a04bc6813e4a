"""Handles: what they stand for, how long, and where they do not go."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError
from attnkit.handles import _VALUES, handle_of, told

VALUES: dict[str, Callable[[], Any]] = {
    "mask": lambda: masks.Causal() & masks.Padding([3, 5]),
    "bias": lambda: pse.T5Relative(2) + pse.KeyBias(torch.arange(4.0)),
    "lengths": lambda: ak.SeqLens([3, 5], [4, 4]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_handle_stands_for_its_value_and_dies_with_it(name: str) -> None:
    value = VALUES[name]()
    number, seen = int(value._handle), weakref.ref(value)
    assert told(value._handle) == value
    assert told(value._handle.clone()) is told(value._handle)
    del value
    assert seen() is None  # at once: nothing goes round in circles
    assert number not in _VALUES


@pytest.mark.parametrize("name", VALUES)
def test_a_tensor_that_shares_the_memory_keeps_what_was_asked_for(name: str) -> None:
    """So a backward pass finds the mask of a step that is over."""
    value = VALUES[name]()
    kept, told_now = value._handle.detach(), told(value._handle)
    meant = copy.copy(value)
    del value
    gc.collect()
    assert told(kept) is told_now
    assert told(kept) == meant
    copied = kept.clone()
    del kept, told_now
    with pytest.raises(CompositionError, match="is gone"):
        told(copied)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_a_copy_has_a_handle_of_its_own(name: str, twin: Callable[[Any], Any]) -> None:
    value = VALUES[name]()
    other = twin(value)
    assert int(other._handle) != int(value._handle)
    assert told(other._handle) == other == value
    assert b"_handle" not in pickle.dumps(value)


@pytest.mark.parametrize("name", VALUES)
def test_handles_are_plain_tensors_wherever_values_are_made(name: str) -> None:
    with torch.inference_mode():
        one = VALUES[name]()
    assert not one._handle.is_inference()
    with torch.device("meta"):
        assert VALUES["mask"]()._handle.device.type == "cpu"
    with FakeTensorMode():
        assert type(masks.Causal()._handle) is torch.Tensor


def test_a_handle_that_keeps_its_value() -> None:
    handle = handle_of(masks.SlidingWindow(3))
    gc.collect()
    assert told(handle) == masks.SlidingWindow(3)


def test_thousands_of_values_leave_nothing() -> None:
    x = torch.randn(1, 8, 2, 8, requires_grad=True)
    call = torch.compile(
        lambda x, mask: ak.attention(x, x, x, mask=mask), fullgraph=True, backend="aot_eager"
    )
    before = 0
    for step in range(200):
        call(x, masks.Band(step, step % 5)).sum().backward()
        before = before or (step == 99 and len(_VALUES.held))
    assert len(_VALUES.held) <= before + 2
