"""Planted faults: what a wrong backend would do must make the comparison fail.

A fault changes what attnkit sends, after the plan was proven right, and the real host code
accepts it. Were the comparison blind to one of these, its passing would mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnkit import masks
from attnkit.backends import Ascend
from attnkit.kernel import KernelCall
from tests.npu.compare import check
from tests.npu.compositions import Case, by_name

Tensors = dict[str, torch.Tensor | None]
Fault = Callable[[KernelCall, Tensors], tuple[KernelCall, Tensors]]


def scale_is_off(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    return replace(call, scale=1.01 * call.scale), tensors


def mask_is_inverted(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    mask = tensors["atten_mask"]
    assert mask is not None
    return call, {**tensors, "atten_mask": mask.logical_not()}


def window_is_longer(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    return replace(call, pre_tokens=call.pre_tokens + 1), tensors


def window_is_shorter(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    return replace(call, pre_tokens=call.pre_tokens - 1), tensors


def causal_is_top_left(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    return replace(call, sparse_mode=2), tensors


def mask_is_left_out(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    return replace(call, atten_mask=None, sparse_mode=0), {**tensors, "atten_mask": None}


def bias_is_before_the_scale(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    assert call.pse_type == 0
    return replace(call, pse_type=1), tensors


def empty_rows_are_left_to_chance(call: KernelCall, tensors: Tensors) -> tuple[KernelCall, Tensors]:
    assert call.inner_precise == 2
    return replace(call, inner_precise=0), tensors


def _holed(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i + j) % 3 != 1) & (i % 5 != 2)


HOLED = Case("rows without a key in a mask of cells", masks.Predicate(_holed))

PLANTED = (
    (HOLED.name, empty_rows_are_left_to_chance),
    ("full", scale_is_off),
    ("causal", scale_is_off),
    ("packed causal", scale_is_off),
    ("causal", mask_is_inverted),
    ("dilated", mask_is_inverted),
    ("causal", mask_is_left_out),
    ("sliding window", window_is_longer),
    ("sliding window", window_is_shorter),
    ("packed window", window_is_longer),
    ("causal, a chunk of queries", causal_is_top_left),
    ("bias matrix", bias_is_before_the_scale),
)


@pytest.mark.parametrize(
    ("name", "fault"), PLANTED, ids=[f"{fault.__name__} in {name}" for name, fault in PLANTED]
)
def test_is_seen(name: str, fault: Fault, monkeypatch: pytest.MonkeyPatch):
    case = HOLED if name == HOLED.name else by_name(name)
    forward, backward, planted = Ascend.forward, Ascend.backward, []
    check(case)

    def faulty(self: Ascend, call: KernelCall, tensors: Tensors) -> Any:
        planted.append(fault.__name__)
        return forward(self, *fault(call, tensors))

    def faulty_grad(self: Ascend, call: KernelCall, tensors: Tensors, *rest: Any) -> Any:
        return backward(self, *fault(call, tensors), *rest)

    monkeypatch.setattr(Ascend, "forward", faulty)
    monkeypatch.setattr(Ascend, "backward", faulty_grad)
    # Wrong numbers, or arguments that the kernel's contract forbids.
    with pytest.raises((AssertionError, RuntimeError), match=r"is off by|contract"):
        check(case)
    assert planted


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_is_seen_in_calls_that_are_merged(part: str, monkeypatch: pytest.MonkeyPatch):
    case, run, planted = by_name("wide window and first keys"), getattr(Ascend, part), []
    check(case)

    def faulty(self: Ascend, call: KernelCall, *rest: Any) -> Any:
        if not planted:
            call = replace(call, scale=1.01 * call.scale)
        planted.append(part)
        return run(self, call, *rest)

    monkeypatch.setattr(Ascend, part, faulty)
    with pytest.raises(AssertionError, match="is off by"):
        check(case)
    assert planted
