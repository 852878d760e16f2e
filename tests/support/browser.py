"""A real browser for the page: Debian's Chromium, driven by Playwright. Without either, a test says what is missing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = "chromium", "chromium-browser", "google-chrome"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not program:
        pytest.skip("no browser: apt-get install chromium")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page, with all that it says on the console and all whom it asks."""

    def __init__(self, browser: Any, **context: Any):
        self.context = browser.new_context(viewport={"width": 1500, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def until(self, script: str) -> None:
        """Waits until an expression is true; by turns, as the page's policy forbids to watch it from inside."""
        deadline = time.monotonic() + 30
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, f"not in 30 s: {script}"
            self.page.wait_for_timeout(50)

    def tokens(self, within: str = "#talk") -> list[tuple[str, str, int]]:
        """Of the last text there: words, kind and pass of each token that is shown."""
        script = """(where) => [...[...document.querySelectorAll(`${where} .text`)].at(-1).querySelectorAll('.tok')]
            .map((one) => [one.textContent, one.dataset.kind, Number(one.dataset.pass)])"""
        return [tuple(one) for one in self.page.evaluate(script, within)]

    def close(self) -> None:
        self.context.close()
