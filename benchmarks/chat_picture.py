"""The picture of the chat page in the documents: a real model, asked in a real browser.

    python benchmarks/chat_picture.py RUN docs/images/chat_page.png

RUN is a model that answers chats, such as an import of SmolLM2-135M-Instruct. It needs Chromium and
`pip install playwright`. The answers are greedy, so that the same model gives the same picture.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from playwright.sync_api import sync_playwright
from serve import start_server

SETTINGS = {"#system": "You are a helpful assistant.", "#temperature": "0", "#max_tokens": "90"}
QUESTIONS = ("What is the capital of France?", "Tell me in two sentences why the sky is blue.")
WIDTH, HEIGHT = 1000, 940  # pixels
MAX_BYTES = 300_000


def ask(page: Any, question: str) -> None:
    """Write a message, and wait until the whole answer is there."""
    n_before = page.locator(".facts").count()
    page.fill("#message", question)
    page.keyboard.press("Enter")
    page.locator(".facts").nth(n_before).wait_for(timeout=300_000)


def open_tokens(page: Any) -> None:
    """Show the last answer's tokens, and the alternatives of the least probable one."""
    page.locator("button:has-text('Tokens')").last.click()
    tokens = page.locator(".turn").last.locator(".token")
    levels = tokens.evaluate_all("all => all.map(each => each.className)")
    tokens.nth(levels.index(min(levels))).click()
    page.locator(".others:visible").scroll_into_view_if_needed()


def take_picture(address: str, path: str) -> None:
    """A short conversation on the page at an address, as a PNG file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(address)
        page.locator("#model option").first.wait_for(state="attached")
        page.click("#open-settings")
        for field, value in SETTINGS.items():
            page.fill(field, value)
        page.keyboard.press("Escape")
        for question in QUESTIONS:
            ask(page, question)
        open_tokens(page)
        n_bytes = len(page.screenshot(path=path))
        browser.close()
    if n_bytes > MAX_BYTES:
        sys.exit(f"{path} has {n_bytes:,} bytes; the documents take {MAX_BYTES:,}")
    print(f"{path}: {n_bytes:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run's folder, or a checkpoint")
    parser.add_argument("picture", help="the PNG file to write")
    given = parser.parse_args()
    with start_server(given.run, "--device", "cpu") as (address, _):
        take_picture(address, given.picture)


if __name__ == "__main__":
    main()
