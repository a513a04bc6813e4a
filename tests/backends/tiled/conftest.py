"""Small cases of these tests are to be walked in tiles, and not taken for decoding steps."""

import pytest

from attnkit.backends.tiled import few


@pytest.fixture(autouse=True)
def walked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no request to `few`, but in its own tests."""
    if request.path.name != "test_few.py":
        monkeypatch.setattr(few, "MOST_ROWS", 0)
