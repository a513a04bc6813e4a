"""A subclass of a mask or of a bias behaves as its parent, and one that overrides, as itself."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.flex.scores import score_function
from attnkit.planner import Composition, read_request


class Lower(masks.Causal):
    """A causal mask by another name."""


class Both(masks.And):
    """An intersection by another name."""


class Near(masks.SlidingWindow):
    """A window by another name."""


class Packed(masks.Documents):
    """Documents by another name."""


class Slope(pse.ALiBi):
    """The same slopes."""


@dataclass(frozen=True, init=False, repr=False)
class Bent(pse.ALiBi):
    """Slopes of another curve."""

    def curve(self, distance):
        return distance * distance


class Shifted(pse.ALiBi):
    """The same slopes, and more in some rows."""

    def _values(self, at, dtype, device):
        rows = torch.arange(*at.rows, dtype=dtype)[:, None]
        return super()._values(at, dtype, device) + rows % 3


MASKS = [
    (Lower("top_left"), masks.Causal("top_left")),
    (Near(3), masks.SlidingWindow(3)),
    (Packed([2, 4], inside=Lower()), masks.Documents([2, 4], inside=masks.Causal())),
    (Both((Lower(), Near(2))), masks.Causal() & masks.SlidingWindow(2)),
    (Lower() & Packed([3, 3]), masks.Causal() & masks.Documents([3, 3])),
    (~Near(2), ~masks.SlidingWindow(2)),
]


@pytest.mark.parametrize(("child", "parent"), MASKS, ids=repr)
def test_a_mask_of_a_subclass(child, parent):
    assert child.region(6, 6) == parent.region(6, 6)
    assert child.materialize(6, 6).equal(parent.materialize(6, 6))
    assert [f.code for f in child.lint(6, 6)] == [f.code for f in parent.lint(6, 6)]
    assert child.simplify(6, 6).region(6, 6) == parent.region(6, 6)
    assert copy.deepcopy(child) == pickle.loads(pickle.dumps(child)) == child
    assert child != parent
    x = torch.randn(1, 6, 2, 8)
    ours, theirs = (ak.attention(x, x, x, mask=mask) for mask in (child, parent))
    assert ours.equal(theirs)


def test_joins_of_a_subclass_are_flat():
    a, b, c = masks.Causal(), masks.SlidingWindow(2), masks.Prefix(1)
    assert (Both((a, b)) & c).parts == (a, b, c)
    assert Both((a & b, c)).parts == (a, b, c)
    assert str(Both((a, b)) | c) == "(Causal() & SlidingWindow(2)) | Prefix(1)"


@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
@pytest.mark.parametrize("kind", [Slope, Bent, Shifted])
def test_a_bias_of_a_subclass(kind, backend):
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    bias = kind([0.5, 0.25])
    right = pse.Dense(bias.materialize(6, 6, dtype=torch.float64)[0])
    ours = ak.attention(x, x, x, pse=bias, backend=backend)
    torch.testing.assert_close(ours, ak.attention(x, x, x, pse=right, backend="reference"))


def test_flex_takes_slopes_for_what_they_compute():
    x = torch.randn(1, 6, 2, 8)
    for kind, shape in (
        (pse.ALiBi, ("sloped", False)),
        (Slope, ("sloped", False)),
        (Bent, "looked up"),
    ):
        bias = kind([0.5, 0.25])
        request = read_request(Composition(masks.Full(), bias, "BSND", None, 0.0, None), x, x, x)
        score_mod, shapes = score_function(request, bias, torch.device("cpu"))
        assert shapes[0] == shape
        i, j = torch.tensor(1), torch.tensor(4)
        got = score_mod(torch.tensor(0.0), torch.tensor(0), torch.tensor(1), i, j)
        torch.testing.assert_close(got, bias.materialize(6, 6)[0, 1, 1, 4])


def test_a_subclass_has_the_structure_of_the_cells_it_computes():
    slopes = (0.5, 0.25)
    for kind, structure in (
        (pse.ALiBi, pse.Linear("top_left", slopes)),
        (pse.SqrtALiBi, pse.Root("top_left", slopes)),
        (Slope, pse.Linear("top_left", slopes)),
        (Bent, pse.Toeplitz("top_left")),
        (Shifted, None),
    ):
        assert kind(slopes, align="top_left").structure == structure
