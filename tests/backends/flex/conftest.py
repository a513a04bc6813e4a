"""The eager backend, known by name while these tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnkit.backends import BACKENDS, register
from tests.backends.flex.eager import EagerFlex


@pytest.fixture(scope="package", autouse=True)
def eager_backend() -> Iterator[None]:
    register(EagerFlex())
    yield
    BACKENDS.remove(EagerFlex.name)
