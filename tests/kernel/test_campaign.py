"""A few hundred calls of the campaign, the same ones every time."""

from __future__ import annotations

import pytest

from tests.kernel.campaign import check

SHARES = 8


@pytest.mark.sweep
@pytest.mark.parametrize("share", range(SHARES))
def test_random_calls_are_what_the_second_statement_says(share: int):
    """`python -m tests.kernel.campaign --seed 0 --only N` repeats the call 0:N of a failure."""
    found = []
    for number in range(share, 400, SHARES):
        try:
            found.append(check(f"0:{number}")[0])
        except Exception as error:
            pytest.fail(f"call 0:{number}: {type(error).__name__}: {error}")
    assert {"legal dense", "legal packed", "illegal"} <= set(found)
