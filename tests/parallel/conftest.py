"""The processes that tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.processes import Pool


@pytest.fixture(scope="session")
def processes() -> Iterator[Pool]:
    """Up to four processes of a gloo group; they start with the first test that asks."""
    pool = Pool(4)
    yield pool
    pool.close()
