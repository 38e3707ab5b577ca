"""A real Chromium for tests of the page. Where there is none, a test is skipped with a reason; in CI it fails."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT_MS = 45_000  # for something to appear; a busy machine needs long

_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright Browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        _none("there is no Chromium on this machine (apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _none("the package playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


def type_into(tab: Any, box: str, text: str) -> None:
    """Fill a box that may have been opened this moment: Gradio 6 sets its value once more about 30 ms after it drew it."""
    for _again in range(20):
        tab.fill(box, text)
        tab.wait_for_timeout(250)
        if tab.input_value(box) == text:
            return
    pytest.fail(f"{box} did not keep {text!r}")


def _none(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"The page was not tested: {why}.")
    pytest.skip(why)
