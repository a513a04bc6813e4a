"""A thousand wrong uses, and more: each gets one of our errors, in bounded words."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from tests.bad_use.table import CASES, verdict
from tests.bad_use.values import Case


def test_there_are_thousands_and_each_is_another() -> None:
    names = Counter(case.name for case in CASES)
    assert len(CASES) >= 1_000
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("case", CASES, ids=[ascii(case.name) for case in CASES])
def test_a_wrong_use_gets_an_error_of_ours(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about nested and sparse tensors
        assert verdict(case) == ""
