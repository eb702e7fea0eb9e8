"""A real browser for tests of pages: Debian's chromium, driven by Playwright, which may reach this machine only."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


@contextlib.contextmanager
def browser_page(width: int = 1200, height: int = 900) -> Iterator[tuple[Page, list[str]]]:
    """(an empty page, a list that grows by each request that would leave this machine and is refused)."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        left: list[str] = []

        def decide(route) -> None:
            url = route.request.url
            if url.startswith(("file:", "data:", "blob:", "http://127.0.0.1", "http://localhost", "ws://127.0.0.1")):
                route.continue_()
            else:
                left.append(url)
                route.abort()

        page.route("**/*", decide)
        yield page, left
        browser.close()
