"""A picture of the page of a running server, with a text that it is just writing, in Chromium.

pearl serve &
python scripts/page_picture.py http://127.0.0.1:8000 docs/pictures/page.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WORDS = "Write a Python class for a bank account with deposit, withdraw and a history."
LARGEST = 150_000  # bytes of a picture that is committed
BRANCHES, TOKENS = 3, 60  # nodes beside the way, and tokens of the text, that make a picture


def main(url: str, out: str) -> int:
    with sync_playwright() as driver:
        program = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1380, "height": 800})
        page.goto(url)
        page.wait_for_selector("#status[data-is=ready]", timeout=120_000)
        page.fill("#prompt", WORDS)
        page.fill("#tokens", "160")
        page.select_option("#mode", "tree")
        page.click("#send")
        page.wait_for_selector("#stop:enabled")
        while page.locator("#stop:enabled").count() or page.locator("#send:disabled").count():
            branches, tokens = page.locator("#tree .node:not(.on)").count(), page.locator("#talk .tok").count()
            if branches >= BRANCHES and tokens >= TOKENS:
                break
            page.wait_for_timeout(20)
        page.screenshot(path=out)
        browser.close()
    if (size := Path(out).stat().st_size) > LARGEST:
        print(f"error: {out} has {size} bytes, more than {LARGEST}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
