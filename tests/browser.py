"""A headless browser for tests of pages: a Chromium or Chrome of the machine, or the one that playwright installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

__all__ = ["headless_browser"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


@contextmanager
def headless_browser() -> Iterator[Browser]:
    """Start it; tests are skipped where there is none."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = own if Path(own).is_file() else next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip("no browser: install Chromium or Chrome, or run `playwright install chromium`")
        # Without a sandbox, since containers run as root; the pages are our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
