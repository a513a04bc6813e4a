"""A cut bias is the rectangle of the whole one, whatever the family."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from attnkit.errors import CompositionError
from attnkit.pse import ALiBi, Cut, Dense, SqrtALiBi


def dense(q_len: int, kv_len: int) -> Dense:
    cells = torch.arange(2.0 * q_len * kv_len)
    return Dense(cells.view(2, q_len, kv_len))


def test_rows_of_a_square_are_the_bias_a_decoding_step_asks_for():
    for family, align in itertools.product((ALiBi, SqrtALiBi), ("top_left", "bottom_right")):
        whole = family(4, align=align)
        assert whole.cut((5, 7), (0, 7), q_len=7, kv_len=7) == family(4)
        assert whole.cut((0, 3), (0, 7), q_len=7, kv_len=7) == family(4, align="top_left")


def test_a_cut_of_a_tensor_is_a_view_and_passes_gradients():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    part = Dense(weight).cut((1, 3), (0, 2))
    assert part.tensor.data_ptr() == weight[1:].data_ptr()
    part.materialize(2, 2).sum().backward()
    assert weight.grad.sum() == 4
    assert weight.grad[1:, :2].sum() == 4


def test_a_cut_is_a_value():
    part = ALiBi(2).cut((0, 1), (0, 3), q_len=3, kv_len=4)
    assert isinstance(part, Cut)
    assert part == copy.deepcopy(part) == pickle.loads(pickle.dumps(part))
    assert hash(part) == hash(copy.deepcopy(part))
    assert part.key() == copy.deepcopy(part).key() != ALiBi(2).key()
    assert part.key() != Cut(ALiBi(2), (0, 1), (0, 3), 3, 5).key()
    assert eval(repr(part), {"ALiBi": ALiBi}) == part
    assert (part.toeplitz, part.before_scale, part.tensors) == (True, False, ())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ALiBi(2).cut((0, 1), (0, 3)), ["q_len= and kv_len="]),
        (lambda: ALiBi(2).cut((0, 4), (0, 3), q_len=3, kv_len=3), ["q_range=(0, 4)", "extent 3"]),
        (lambda: dense(3, 4).cut((0, 3), (2, 5)), ["kv_range=(2, 5)", "extent 4"]),
        (lambda: dense(3, 4).cut((0, 3), (0, 4), q_len=5), ["q_len=5"]),
        (lambda: Cut(ALiBi(2), (2, 1), (0, 1), 3, 3), ["q_range=(2, 1)"]),
        (lambda: Cut(ALiBi(2), (0, 1), (0, 3), 3, 4).check(2, 3), ["1 x 3", "2 x 3"]),
        (lambda: Cut(ALiBi(2), (0, 1), (0, 3), 3, 4).check(1, 3, heads=4), ["2 heads"]),
        (lambda: dense(3, 4) + dense(3, 5), ["4 keys", "made for 5"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
