"""A mask family from outside: one class and one registration, and everything else works."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks import MASKS, Enclosure, Mask, parse
from tests.masks.oracle import SIZES, Case, first_difference


@dataclass(frozen=True)
class Sink(Mask):
    """The first `keys` keys, for all queries but the first."""

    keys: int

    def _region(self, q_len, kv_len, batch, head):
        return Region.of(Slice(1, q_len, 0, min(self.keys, kv_len)))


@pytest.fixture
def sink():
    masks.register("sink")(Sink)
    yield Sink
    MASKS.remove("sink")


@pytest.mark.parametrize("size", SIZES[::5])
def test_a_family_of_others_takes_part_in_everything(sink, size):
    mask = masks.SlidingWindow(2) | sink(1)
    case = Case(
        mask,
        lambda c: c.p("bottom_right") - 2 < c.j <= c.p("bottom_right") or (c.i > 0 and c.j < 1),
    )
    assert first_difference(case, *size) is None
    assert first_difference(Case(~mask, lambda c: not case.formula(c)), *size) is None


def test_a_family_of_others_has_text(sink):
    mask = masks.Causal() & ~sink(3)
    assert str(mask) == "Causal() & ~Sink(3)"
    assert parse(str(mask)) == mask
    assert hash(parse(str(mask))) == hash(mask)
    assert sink.kind == "sink"
    assert sink(2).show(2, 3) == "...\n##."


def test_it_is_unknown_once_it_is_removed():
    with pytest.raises(CompositionError, match="unknown mask Sink"):
        parse("Sink(3)")
    assert "sink" not in MASKS


@dataclass(frozen=True, repr=False, eq=False)
class Checkers(Mask):
    """A family that is no region: every second cell."""

    def enclosure(self, q_len, kv_len, batch=0, head=0):
        return Enclosure(Region.empty(), Region.full(q_len, kv_len))

    def _cells(self, at, device):
        i, j = torch.arange(*at.rows, device=device), torch.arange(*at.keys, device=device)
        return (i[:, None] + j) % 2 == 0


def test_a_family_without_regions():
    case = Case(
        Checkers() & masks.Causal("top_left"), lambda c: (c.i + c.j) % 2 == 0 and c.j <= c.i
    )
    assert first_difference(case, 5, 4) is None


def test_a_name_is_given_once(sink):
    with pytest.raises(CompositionError, match="registered already"):
        masks.register("sink")(Checkers)
    with pytest.raises(CompositionError, match="Sink is registered already, as 'sink'"):
        masks.register("other")(Sink)
    assert Sink.kind == "sink"


def test_what_is_no_family_is_refused():
    @dataclass
    class Mutable(Mask):
        size: int

    class Plain(Mask):
        pass

    for entry in (3, int, Plain, masks.Causal()):
        with pytest.raises(CompositionTypeError, match="frozen dataclass"):
            MASKS.add("nothing", entry)
    with pytest.raises(CompositionTypeError, match="no hash"):
        MASKS.add("mutable", Mutable)
    assert "nothing" not in MASKS
    assert "mutable" not in MASKS


def test_a_family_that_says_too_little_or_too_much_is_told():
    @dataclass(frozen=True)
    class Silent(Mask):
        pass

    @dataclass(frozen=True)
    class Vague(Mask):
        enclosure = Checkers.enclosure

    @dataclass(frozen=True)
    class Wide(Mask):
        def _region(self, q_len, kv_len, batch, head):
            return Region.of(Slice(0, q_len, 0, 10**9))

    with pytest.raises(CompositionTypeError, match="Silent implements no `_region`"):
        Silent().region(2, 2)
    with pytest.raises(CompositionTypeError, match=r"Vague .* no `_cells`"):
        Vague().materialize(2, 2)
    with pytest.raises(
        CompositionError, match=r"Wide\._region returned cells outside of the 2 x 2"
    ):
        Wide().region(2, 2)
