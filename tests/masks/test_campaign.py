"""A fixed piece of the campaign, and that it notices what is planted."""

from __future__ import annotations

from operator import and_

import pytest

from attnkit import masks
from attnkit.geometry import Region, Slice
from attnkit.masks import algebra, cut, documents, predicate
from tests.masks.campaign import run


def test_random_expressions_are_their_formulas():
    found, made = run(600, seed=11)
    assert found == []
    assert min(made[kind] for kind in ("regions", "bounds", "text", "simplified")) >= 5


def wider_window(self, q_len, kv_len, batch, head):
    return masks.Band(self.size, 0, self.align)._region(q_len, kv_len, batch, head)


def broadcast(fn, b, h, rows, keys):
    """Return what a function gives for whole axes at once, as it once was asked."""
    return fn(b, h, rows[:, None], keys[None]).expand(len(rows), len(keys))


PLANTED = {
    "a window of one more": (masks.SlidingWindow, "_region", wider_window),
    "a sum over the axes": (predicate, "evaluate", broadcast),
    "no shift of a document": (
        documents,
        "accumulate",
        lambda lengths, initial: [0, *lengths],
    ),
    "a cut that begins at 0": (
        cut.Cut,
        "_cells",
        lambda self, q, k, *more: self.mask._cells(*self._whole(q, k), *more)[:q, :k],
    ),
    "an or that is an and": (algebra.Or, "_combine", and_),
    "a prefix of one more": (
        masks.Prefix,
        "_region",
        lambda self, q, k, b, h: Region.of(Slice(0, q, 0, min(k, 1))),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    monkeypatch.setattr(*PLANTED[fault])
    found, _ = run(300, seed=12)
    assert found
