"""The eager backend, known by name while these tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.flex.eager import registered


@pytest.fixture(scope="package", autouse=True)
def eager_backend() -> Iterator[None]:
    with registered():
        yield
