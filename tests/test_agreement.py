"""The harness that all comparisons rest on: it sees what is wrong, and passes what is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from tests.agreement import Results, agree, agreement, definition, distance, near, results

GENERATOR = torch.Generator().manual_seed(0)
WIDE = [torch.randn(2, 9, n, 4, generator=GENERATOR).double() for n in (4, 2, 2)]
SINK = torch.linspace(-1, 1, 4, dtype=torch.float64)
MASK = masks.Causal() & ~masks.Rows(3, 4)  # a row without keys: what is infinite is compared, too
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bias() -> ak.pse.Pse:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).double()
    return ak.pse.Dense(table.requires_grad_())


def small(tensor: Tensor) -> Tensor:
    """One per cent in one place: the fault that is hardest to see."""
    other = tensor.clone()
    place = other.isfinite().flatten() & (other != 0).flatten()
    index = int(torch.where(place, other.flatten().abs(), 0).argmax())
    other.flatten()[index] *= 1.01
    return other


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one per cent in one place": small,
    "another sign": torch.neg,
    "not a number": lambda t: torch.where(t == t.flatten()[0], torch.nan, t),
    "infinite": lambda t: torch.where(t == t.flatten()[0], torch.inf, t),
    "a finite number for none": lambda t: t.nan_to_num(neginf=-1e30) + t.isfinite().all(),
    "another shape": lambda t: t[None],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_results_pass(dtype: torch.dtype) -> None:
    given = [t.to(dtype) for t in WIDE]
    agreement(given, "reference", "tiled", mask=MASK, pse=bias())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["out", "lse", "max", "sum", "dq", "dk", "dv", "dsink", "dbias 0"])
def test_a_fault_anywhere_is_seen(name: str, fault: str) -> None:
    how = {"mask": masks.Causal(), "pse": bias(), "sink": SINK}
    exact, rounded = definition(WIDE, **how)
    found = results("tiled", WIDE, **how)
    assert found.keys() == exact.keys()
    agree(found, exact, rounded)
    with pytest.raises(AssertionError):
        agree(found | {name: FAULTS[fault](found[name])}, exact, rounded)


def test_what_is_infinite_must_be() -> None:
    exact, rounded = definition(WIDE, mask=MASK)
    found = results("tiled", WIDE, mask=MASK)
    agree(found, exact, rounded)
    assert (found["lse"] == -torch.inf).any()
    for wrong in (torch.nan, torch.inf, -1e30, 0.0):
        lse = found["lse"].masked_fill(found["lse"] == -torch.inf, wrong)
        with pytest.raises(AssertionError, match="lse"):
            agree(found | {"lse": lse}, exact, rounded)


def test_other_compositions_do_not_agree() -> None:
    def run(**how: object) -> Results:
        return results("tiled", WIDE, **how)

    measures = definition(WIDE, mask=MASK, scale=0.5)
    agree(run(mask=MASK, scale=0.5), *measures)
    for wrong in ({"scale": 0.501}, {"softcap": 30.0}, {"mask": masks.SlidingWindow(8)}):
        with pytest.raises(AssertionError, match="off by"):
            agree(run(**({"mask": MASK, "scale": 0.5} | wrong)), *measures)


def test_a_definition_that_is_wrong_is_no_measure() -> None:
    exact = {"out": torch.ones(3, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="no measure"):
        agree(exact, exact, {"out": torch.full((3,), torch.inf)})
    with pytest.raises(AssertionError, match="no measure"):
        agree(exact, exact, {"out": torch.full((3,), 1.01)})
    with pytest.raises(AssertionError):
        agree({}, exact, exact)


def test_stated_bounds_and_distances() -> None:
    one, other = {"out": torch.tensor([1.0, 2.0])}, {"out": torch.tensor([1.0, 2.1])}
    near(one, other, 0, 0.2)
    with pytest.raises(AssertionError, match="out"):
        near(one, other, 0, 0.01)
    infinite = torch.tensor([-torch.inf, 1.0])
    assert distance(infinite, infinite) == 0
    assert distance(infinite, torch.tensor([torch.nan, 1.0])) == torch.inf
    assert distance(infinite, torch.tensor([0.0, 1.0])) == torch.inf
