"""Messages are bounded, whatever was given."""

from __future__ import annotations

import pickle

import pytest
import torch

from attnkit import errors
from attnkit.errors import LONGEST, LONGEST_MESSAGE, AttnkitError, clipped, shown


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**7,
        b"x" * 10**7,
        [1] * 10**6,
        {str(k): "y" * 1000 for k in range(1000)},
        10**5000,
        [[10**5000] * 9] * 9,
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(1, device="meta"),
        torch.zeros(3, 3).to_mkldnn(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_given_value_is_shown_in_a_line(value):
    assert 0 < len(shown(value)) <= LONGEST + 60
    assert "\n" not in shown(value)


def test_what_refers_to_itself_is_shown():
    loop: list = []
    loop += [loop] * 9
    deep = [0]
    for _ in range(60):
        deep = [deep, deep]
    assert len(shown(loop)) + len(shown(deep)) <= 2 * (LONGEST + 60)


def test_short_values_are_shown_whole():
    for value in ("causal", 3, 2.5, None, (1, 2), {"a": [1]}, torch.tensor(4)):
        assert shown(value) == repr(value)
    assert clipped("abc", 3) == "abc"


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_no_message_is_longer_than_the_longest(name):
    error = getattr(errors, name)("begin " + "x" * 10**6 + " end")
    assert isinstance(error, AttnkitError)
    assert len(str(error)) == LONGEST_MESSAGE
    assert str(error).startswith("begin")
    assert str(error).endswith("end")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
