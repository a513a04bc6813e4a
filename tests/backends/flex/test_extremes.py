"""FlexAttention's functions at the ends of numbers: equal to the definition there too."""

from __future__ import annotations

import math

import pytest
import torch

from attnkit import masks, pse
from tests.agreement import near, results
from tests.backends.definition import meant, tensors
from tests.backends.flex.eager import EagerFlex

F64 = torch.float64


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-320, 3.0])
@pytest.mark.parametrize("softcap", [None, 1.3, 1e-300, 1e300])
def test_any_scale_and_soft_cap(scale: float, softcap: float | None) -> None:
    how = {"mask": masks.Causal(), "scale": scale, "softcap": softcap, "pse": pse.SqrtALiBi(4)}
    given = tensors()
    near(results(EagerFlex.name, given, **how), results("reference", given, **how), 2e-5, 2e-6)


@pytest.mark.parametrize("before", [False, True])
def test_a_soft_cap_bends_the_products_and_not_the_bias(before: bool) -> None:
    given, cells = tensors(), masks.Causal().materialize(20, 20, 2, 4)
    table = 3 * torch.randn(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    factor = 0.7 if before else 1.0
    right = meant(given, cells, bias=factor * table, softcap=1.3, scale=0.7)
    right["dbias 0"] = factor * right["dbias 0"]
    bias = pse.Dense(table.requires_grad_(), before_scale=before)
    how = {"mask": masks.Causal(), "pse": bias, "softcap": 1.3, "scale": 0.7}
    made = results(EagerFlex.name, given, **how)
    near(made, right, 2e-5, 2e-6)


@pytest.mark.parametrize("kind", ["one", "two", "never"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_the_lowest_number_are_means(kind: str, softcap: float | None) -> None:
    given, mask = tensors(), masks.SlidingWindow(7)
    table = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))
    table[[0, 3, 17]] = torch.finfo(torch.float32).min
    bias: pse.Pse = pse.Dense(table)
    if kind == "two":
        bias = bias + pse.KeyBias(table[0].clone())
    if kind == "never":
        bias = pse.Dense(table.masked_fill(table < -1e30, -torch.inf), validate=False)
    how = {"mask": mask, "pse": bias, "softcap": softcap}
    made = results(EagerFlex.name, given, **how)
    # The kernel cuts at an eighth of float32, the reference of float64: as far as weights go.
    # In the row of the sum both are flat.
    cut = results("reference", tuple(t.float() for t in given), **how)
    near(made, cut, 1e-4, 2e-5, ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal() & masks.Padding([40, 90]),
        masks.Full() - masks.Columns(50, 53),
        masks.Dilated(4) & masks.Columns(0, 100) & ~masks.Columns(4, 5),
        masks.PerHead([masks.Columns(0, 20), masks.Columns(10, 30)] * 2),
    ],
    ids=["padding", "hole", "dilated", "per head"],
)
def test_keys_that_nobody_sees_may_hold_anything(mask: masks.Mask) -> None:
    q, k, v = tensors(lengths=(140, 140))
    cells = mask.materialize(140, 140, 2, 4)
    unseen = ~cells.unflatten(1, (2, 2)).any(2).any(2).transpose(1, 2)[..., None]
    clean = results(EagerFlex.name, (q, k, v), mask=mask)
    for wild in (math.nan, math.inf, 3e38):
        dirty = (q, k.masked_fill(unseen, wild), v.masked_fill(unseen, -wild))
        near(results(EagerFlex.name, dirty, mask=mask), clean, 1e-6, 1e-9)
