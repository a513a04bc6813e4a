"""Rows, keys and heads that are taken of every bias are those of its whole matrix."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor

from attnkit import pse
from attnkit.arguments import anchor
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse.base import EVERY, rebound
from attnkit.pse.structure import OfDistance
from attnkit.ranges import Excerpt, Ranges
from tests.pse.families import BATCH, FAMILIES, HEADS, KV, Q

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def drawn(rng: random.Random, length: int) -> Ranges:
    ends = sorted(rng.sample(range(length + 1), rng.choice([2, 2, 4])))
    found = [range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    rng.shuffle(found)
    return tuple(one[::-1] if rng.random() < 0.3 else one for one in found)


def places(ranges: Ranges) -> Tensor:
    return torch.tensor([position for one in ranges for position in one], dtype=torch.int64)


def cells(bias: pse.Pse, *lengths: int, batch: int | None = None) -> Tensor:
    return bias.materialize(*lengths, batch_index=batch, dtype=torch.float64)


def lengths_of(bias: pse.Pse) -> tuple[int, int]:
    q_len, kv_len = bias.extent
    return q_len or 2 * Q, kv_len or 2 * KV


def gradients(bias: pse.Pse, found: Tensor, of: pse.Pse) -> list[Tensor | None]:
    """Return the gradients that numbers have on the tensors of a bias, each number another."""
    wanted = [tensor for tensor in of.tensors if tensor.requires_grad]
    if not wanted:
        return []
    weights = torch.arange(1.0, found.numel() + 1, dtype=found.dtype).view(found.shape)
    return list(
        torch.autograd.grad((found * weights).sum(), wanted, allow_unused=True, retain_graph=True)
    )


def alike(found: Tensor, right: Tensor, own: pse.Pse, whole: pse.Pse) -> None:
    """Values, and gradients on the tensors of the whole."""
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    assert all(a is b for a, b in zip(own.tensors, whole.tensors, strict=True))
    for a, b in zip(gradients(own, found, own), gradients(whole, right, whole), strict=True):
        if b is None or not b.any():
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@EVERY_FAMILY
def test_what_is_taken_is_what_it_is_there(name: str) -> None:
    bias, rng = FAMILIES[name].make(), random.Random(name)
    lengths = lengths_of(bias)
    for _ in range(4):
        rows, keys = drawn(rng, lengths[0]), drawn(rng, lengths[1])
        own = bias.take(rows, keys, q_len=lengths[0], kv_len=lengths[1])
        right = cells(bias, *lengths)[:, :, places(rows)][..., places(keys)]
        sizes = right.shape[2:]
        alike(cells(own, *sizes), right, own, bias)
        assert (own.heads, own.before_scale) == (bias.heads, bias.before_scale)
        assert own.batch == bias.batch
        check_structure(own, right)
        for b in range(bias.batch or 0):
            torch.testing.assert_close(cells(own, *sizes, batch=b), right[b : b + 1])


def check_structure(own: pse.Pse, right: Tensor, batch: int | None = None) -> None:
    """What a bias says that its cells follow from, they do."""
    sizes = right.shape[2:]
    for part in own.parts:
        known, values = part.structure, cells(part, *sizes, batch=batch)
        if isinstance(known, OfDistance):
            diagonals = part.diagonals(*sizes, dtype=torch.float64)
            at = torch.arange(sizes[1]) - torch.arange(sizes[0])[:, None] + sizes[0] - 1
            torch.testing.assert_close(diagonals[:, at][None], values)
        if isinstance(known, pse.PerKey):
            tensor = part.structure_tensors[0][..., None, :].to(torch.float64)
            tensor = tensor[(None,) * (4 - tensor.ndim)]
            chosen = tensor if batch is None or len(tensor) == 1 else tensor[batch : batch + 1]
            torch.testing.assert_close(chosen.expand(-1, -1, *sizes), values)
        if isinstance(known, pse.Stepped):
            shift = sizes[1] - sizes[0] if known.align == "bottom_right" else 0
            distance = torch.arange(sizes[1]) - torch.arange(sizes[0])[:, None] - shift
            table = part.structure_tensors[0].to(torch.float64)
            for first, last, row in known.steps(-99, 99):
                here = (distance >= first) & (distance <= last)
                torch.testing.assert_close(
                    values[0, :, here], table[row][:, None].expand(-1, int(here.sum()))
                )
        if isinstance(known, pse.Linear) and known.slopes is None:
            shift = anchor(known.align, *sizes)
            distance = torch.arange(sizes[1]) - torch.arange(sizes[0])[:, None] - shift
            slopes = part.structure_tensors[0].to(torch.float64)[:, None, None]
            torch.testing.assert_close(values[0], -slopes * distance.abs())


@EVERY_FAMILY
def test_ranges_side_by_side_keep_a_bias_by_distance_one(name: str) -> None:
    bias = FAMILIES[name].make()
    lengths = lengths_of(bias)
    for rows, keys in (((1, 3), (0, 2)), ((0, 4), (0, 5)), ((2, 4), (1, 5)), ((0, 1), (3, 5))):
        own = bias.take([rows], [keys], q_len=lengths[0], kv_len=lengths[1])
        right = cells(bias, *lengths)[:, :, slice(*rows), slice(*keys)]
        alike(cells(own, *right.shape[2:]), right, own, bias)
        assert own.toeplitz == bias.toeplitz
        steps = [isinstance(part.structure, pse.Stepped | pse.PerKey) for part in bias.parts]
        kept = [isinstance(part.structure, pse.Stepped | pse.PerKey) for part in own.parts]
        assert kept == steps or name in ("cut",)
        check_structure(own, right)


@EVERY_FAMILY
def test_each_sequence_of_a_packed_batch_has_an_excerpt(name: str) -> None:
    bias, rng = FAMILIES[name].make(), random.Random(name)
    lengths = lengths_of(bias)
    for alone in (True, False):
        numbers = rng.sample(range(BATCH), 2)
        sides = [(drawn(rng, lengths[0]), drawn(rng, lengths[1])) for _ in numbers]
        sides = [sides[0]] * 2 if alone else sides
        excerpts = [Excerpt(*lengths, *side, b) for side, b in zip(sides, numbers, strict=True)]
        own = bias.take_excerpts(excerpts)
        found, right = [], []
        for k, one in enumerate(excerpts):
            whole = cells(bias, *lengths, batch=one.batch)
            right.append(whole[:, :, places(one.rows)][..., places(one.keys)])
            found.append(cells(own, *one.sizes, batch=k))
            alike(found[-1], right[-1], own, bias)
            check_structure(own, right[-1], k)
        if alone:
            torch.testing.assert_close(cells(own, *excerpts[0].sizes), torch.cat(right))
        assert own.batch in (2, None if bias.batch is None else 2)


@EVERY_FAMILY
def test_heads(name: str) -> None:
    bias = FAMILIES[name].make()
    lengths = lengths_of(bias)
    for start, stop in ((0, 1), (1, 2), (0, 2)):
        own = bias.for_heads(start, stop)
        whole = cells(bias, *lengths)
        right = whole[:, start:stop] if whole.shape[1] > 1 else whole
        alike(cells(own, *lengths), right, own, bias)
        assert own.heads in (None, stop - start)
        assert [part.structure is None for part in own.parts] == [
            part.structure is None for part in bias.parts
        ]
        check_structure(own, right)
        later = own.take([(1, 4)], [(0, 2), (4, 5)], q_len=lengths[0], kv_len=lengths[1])
        right = right[:, :, 1:4][..., [0, 1, 4]]
        alike(cells(later, 3, 3), right, later, bias)
        again = bias.take([(1, 4)], [(0, 2), (4, 5)], q_len=lengths[0], kv_len=lengths[1])
        alike(cells(again.for_heads(start, stop), 3, 3), right, again.for_heads(start, stop), bias)
    assert (bias.for_heads(0, HEADS) is bias) == (bias.heads in (None, HEADS))


@EVERY_FAMILY
def test_it_is_a_value_and_takes_other_tensors(name: str) -> None:
    bias = FAMILIES[name].make()
    lengths = lengths_of(bias)
    for own in (
        bias.take([(2, 4), (0, 1)], [(0, 3)], q_len=lengths[0], kv_len=lengths[1]),
        bias.for_heads(1, 2),
        bias.take_excerpts([Excerpt(*lengths, (range(2),), (range(3),), 1)]),
    ):
        fields, _ = set(vars(own.copy())), (own.structure, own.extent)
        assert own == copy.deepcopy(own) == pickle.loads(pickle.dumps(own))
        assert set(vars(pickle.loads(pickle.dumps(own)))) == fields  # and nothing that is cached
        assert own.key() == copy.deepcopy(own).key()
        assert hash(own) == hash(copy.deepcopy(own))
        other = [torch.zeros_like(t) for t in own.tensors]
        bound = rebound(own, other)
        assert all(a is b for a, b in zip(bound.tensors, other, strict=True))
        assert len(own.tensor_names) == len(own.tensors)


def test_what_is_taken_of_what_was_taken_is_taken_once() -> None:
    whole = pse.T5Relative(2)
    first = whole.take([(2, 9), (11, 9)], [(0, 4), (6, 12)], q_len=12, kv_len=12)
    again = first.take([(8, 3), (0, 1)], [(2, 7)])
    assert (again.part, first.part) == (whole, whole)
    right = cells(whole, 12, 12)[:, :, [10, 11, 8, 7, 6, 2]][..., [2, 3, 6, 7, 8]]
    torch.testing.assert_close(cells(again, 6, 5), right)
    cut = pse.ALiBi([1.0]).cut((3, 10), (1, 9), q_len=12, kv_len=9)
    moved = cut.take([(0, 2), (6, 7)], [(3, 8)])
    torch.testing.assert_close(cells(moved, 3, 5), cells(cut, 7, 8)[:, :, [0, 1, 6], 3:])


def test_no_number_is_made_that_was_not_taken() -> None:
    made = []

    class Watched(pse.ALiBi):
        def _values(self, at, dtype, device):
            made.append(at)
            return super()._values(at, dtype, device)

    own = Watched(2).take(
        [(0, 8), (1000, 1008)], [(0, 8), (500, 504)], q_len=1 << 20, kv_len=1 << 20
    )
    assert own.rectangle((6, 10), (0, 12), q_len=16, kv_len=12).shape == (1, 2, 4, 12)
    assert [at.shape for at in made] == [(2, 8), (2, 4), (2, 8), (2, 4)]
    assert {at.batch for at in made} == {EVERY}


def test_a_rank_of_slopes_needs_no_matrix() -> None:
    bias = pse.ALiBi(4)
    assert bias.take([(2, 8)], [(0, 8)], q_len=8, kv_len=8) == bias
    assert bias.take([(0, 3)], [(0, 8)], q_len=8, kv_len=8) == pse.ALiBi(4, align="top_left")
    parts = [Excerpt(n, n, (range(n - 2, n),), (range(n),), b) for b, n in enumerate((4, 7))]
    assert bias.take_excerpts(parts) == bias
    assert bias.for_heads(2, 4) == pse.ALiBi(slopes=bias.slopes[2:])
    far = bias.take([(8, 12)], [(0, 4)], q_len=12, kv_len=12)
    assert far.structure == pse.Linear(8, bias.slopes)  # query 0 stands at its key 8
    assert bias.take([(8, 12), (0, 2)], [(0, 4)], q_len=12, kv_len=12).structure is None


def test_dtypes_and_empty_sides() -> None:
    own = pse.KeyBias(torch.arange(6.0).bfloat16()).take([(0, 2)], [(4, 6), (0, 1)], q_len=2)
    assert own.materialize(2, 3, dtype=torch.float16)[0, 0, 1].tolist() == [4, 5, 0]
    assert own.structure_tensors[0].dtype == torch.bfloat16
    none = pse.T5Relative(2).take([], [(0, 3)], q_len=5, kv_len=5)
    assert none.materialize(0, 3).shape == (1, 2, 0, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pse.ALiBi(2).take([(0, 1)], [(0, 3)]), ["q_len= and kv_len="]),
        (lambda: pse.ALiBi(2).take([(0, 4)], [], q_len=3, kv_len=3), ["rows=[(0, 4)]", "0 to 2"]),
        (lambda: pse.ALiBi(2).take([(0, 4)], 3, q_len=4, kv_len=3), ["keys=3"]),
        (lambda: pse.Dense(torch.zeros(3, 4)).take([(0, 1)], [(0, 4)], q_len=5),
         ["q_len=5", "built for q_len=3", "leave it out"]),
        (lambda: pse.Dense(torch.zeros(3, 4)).cut((0, 1), (0, 4), kv_len=5),
         ["kv_len=5", "built for kv_len=4", "leave it out"]),
        (lambda: pse.Taken(torch.zeros(2), ()), ["positional bias"]),
        (lambda: pse.Taken(pse.ALiBi(2), ()), ["list of excerpts"]),
        (lambda: pse.Taken(pse.Dense(torch.zeros(2, 1, 3, 3)), [(3, 3, [(0, 1)], [(0, 1)], 2)]),
         ["batch element 2"]),
        (lambda: pse.Taken(pse.ALiBi(2), [(3, 3, [(0, 1)], [(0, 2)])]).check(2, 2), ["1 x 2"]),
        (lambda: pse.ALiBi(2).for_heads(1, 3), ["tells 2 apart"]),
        (lambda: pse.ALiBi(2).for_heads(1, 1), ["heads 1 to 1"]),
        (lambda: pse.OfHeads(pse.KeyBias(torch.zeros(3)), 0, 1), ["same for all heads"]),
    ],
)  # fmt: skip
def test_errors_say_what_was_given_and_what_to_do(call, words) -> None:
    with pytest.raises((CompositionError, CompositionTypeError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
