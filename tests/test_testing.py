"""The checks for plug-ins pass what is right, and name what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, AttentionOutput, Backend, Operands, Stats
from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.planner import Plan, Request
from attnkit.pse.base import Rectangle
from attnkit.pse.structure import Toeplitz
from attnkit.testing import check_backend, check_bias, check_mask

FAMILIES = [
    masks.Causal(align="top_left"),
    masks.Dilated(2) & masks.SlidingWindow(4),
    masks.Padding((3, 5)),
    masks.Dense.keep(torch.tensor([[True, False], [True, True]])),
    masks.PerHead([masks.Causal(), masks.Full()]),
]


@pytest.mark.parametrize("mask", FAMILIES, ids=repr)
def test_families_pass(mask: masks.Mask) -> None:
    assert check_mask(mask) > 0


@pytest.mark.parametrize(
    "bias", [pse.ALiBi(3), pse.T5Relative(2), pse.Dense(torch.arange(6.0).view(2, 3))], ids=repr
)
def test_biases_pass(bias: pse.Pse) -> None:
    assert check_bias(bias) > 0


@dataclass(frozen=True, repr=False, eq=False)
class Next(masks.Mask):
    """The key after the query; `wrong` says how it is."""

    wrong: str = ""

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        ahead = 2 if self.wrong == "cells" else 1
        at = 0 if self.wrong == "anchor" else kv_len - q_len
        return Region.of(Slice(0, q_len, 0, kv_len, lo=at + ahead, hi=at + ahead))

    @property
    def anchored(self) -> bool:
        return self.wrong != "claim"

    def __hash__(self) -> int:
        return id(self) if self.wrong == "hash" else super().__hash__()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("cells", r"cell \(0, 0\) is masked, and its definition says allowed"),
        ("anchor", "its definition says"),
        ("claim", "says that it is not anchored"),
        ("hash", "after a pickle"),
    ],
)
def test_a_mask_that_is_wrong_is_told(wrong: str, told: str) -> None:
    masks.MASKS.add("next", Next)
    try:
        mask = Next(wrong)
        assert check_mask(Next(), lambda i, j, q, kv: j == i + kv - q + 1) > 0
        with pytest.raises(ak.CompositionError, match=told):
            check_mask(mask, lambda i, j, q, kv: j == i + kv - q + 1)
    finally:
        masks.MASKS.remove("next")


@dataclass(frozen=True)
class Steep(pse.Pse):
    """A bias by distance, or one that only says so."""

    honest: bool = True

    @property
    def structure(self) -> Toeplitz:
        return Toeplitz("bottom_right")

    def _values(self, at: Rectangle, dtype: torch.dtype, device: Any) -> torch.Tensor:
        query = torch.arange(*at.rows) + (at.kv_len - at.q_len)
        key = torch.arange(*at.keys)
        found = (query[:, None] - key).to(dtype)
        return found if self.honest else found * (key + 1)


def test_a_bias_that_is_wrong_is_told() -> None:
    pse.PSE.add("steep", Steep)
    try:
        assert check_bias(Steep(), lambda n, i, j, q, kv: i + kv - q - j) > 0
        with pytest.raises(ak.CompositionError, match="neighbours on a diagonal"):
            check_bias(Steep(honest=False))
        with pytest.raises(ak.CompositionError, match="and its definition differ at"):
            check_bias(Steep(), lambda n, i, j, q, kv: i - j)
    finally:
        pse.PSE.remove("steep")


class Off(Backend):
    """The reference, with one result changed."""

    name = "off"

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def refusals(self, request: Request) -> list[Refusal]:
        refuses = self.wrong == "all" or request.sink
        return [Refusal("never", "it is not here", self.name)] if refuses else []

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        output, stats = BACKENDS["reference"].run(replace(plan, backend="reference"), operands)
        if self.wrong == "the output":
            output = output * (1 + 1e-9)
        if self.wrong == "the gradient of the key":
            twice = replace(operands, key=operands.key.detach())
            output = BACKENDS["reference"].run(replace(plan, backend="reference"), twice).output
            output = output + 0 * operands.key.sum()
        lse = stats.lse + (1e-9 if self.wrong == "the log-sum-exp" else 0)
        return AttentionOutput(output, Stats(lse, stats.max))


@pytest.mark.parametrize("wrong", ["the output", "the log-sum-exp", "the gradient of the key"])
def test_a_backend_that_is_wrong_is_told(wrong: str) -> None:
    BACKENDS.add("off", Off(wrong))
    try:
        with pytest.raises(
            ak.CompositionError, match=f"'off' differs from the definition in {wrong}"
        ):
            check_backend("off")
    finally:
        BACKENDS.remove("off")


def test_what_a_backend_refuses_is_returned() -> None:
    for wrong, told in (("", None), ("all", "refuses all of full, causal")):
        BACKENDS.add("off", Off(wrong))
        try:
            if told is None:
                found = check_backend("off")
                assert {what: codes for what, codes in found.items() if codes} == {
                    "a sink": ("never",)
                }
            else:
                with pytest.raises(ak.CompositionError, match=told):
                    check_backend("off")
        finally:
            BACKENDS.remove("off")
