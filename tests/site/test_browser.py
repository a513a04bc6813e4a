"""The browser of these tests is there, draws, and runs scripts."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def test_scripts_run(page: Page) -> None:
    page.set_content("<p id=a></p><script>a.textContent = 6 * 7</script>")
    assert page.inner_text("#a") == "42"
