"""The chat page in Debian's Chromium: it streams, stops and shows tokens; scripts stay text."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving.fake_store import FakeModel, FakeSettings, FakeStore, serve

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ATTACK = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [x](javascript:alert(3)) "
    "<a href='http://evil.example'>y</a> **<b onclick=alert(4)>z</b>** `<svg onload=alert(5)>`"
)
MARKDOWN = """# Title
A **bold** and an *emphasised* word, `code` and [a link](https://example.org/x).

1. one
2. two
   - below

> quoted

```python
print("<b>")
```
"""


def cut(text: str) -> list[str]:
    return re.findall(r"\s?\w+|\s?[^\w\s]+|\s", text)


def open_page(browser: Any, url: str, width: int = 1200, scheme: str = "light") -> Any:
    tab = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
    tab.told = []
    tab.on("console", lambda message: tab.told.append(("console", message.text)))
    tab.on("pageerror", lambda error: tab.told.append(("error", str(error))))
    tab.on("dialog", lambda dialog: tab.told.append(("dialog", dialog.message)))
    tab.on("request", lambda request: tab.told.append(("request", request.url)))
    tab.goto(url)
    tab.wait_for_selector("#model option", state="attached")
    return tab


@pytest.fixture(params=[(1200, "light"), (390, "dark")])
def page(browser: Any, url: str, model: FakeModel, request: Any) -> Iterator[Any]:
    model.script, model.delay = cut(MARKDOWN), 0.002
    tab = open_page(browser, url, *request.param)
    yield tab
    requests = [what for kind, what in tab.told if kind == "request"]
    assert [told for told in tab.told if told[0] != "request"] == []
    assert all(what.startswith((url, "data:image/svg+xml")) for what in requests)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.close()


def wait(page: Any, expression: str) -> None:
    """Until the expression is true; the page's policy forbids Playwright's own way."""
    end = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < end
        time.sleep(0.02)


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")


def test_a_conversation(page, model):
    page.keyboard.type("What is it?")  # the message has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Tell.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".facts")
    answer = page.locator(".answer")
    assert answer.locator("h3").inner_text() == "Title"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("em").inner_text() == "emphasised"
    assert answer.locator("p code").inner_text() == "code"
    assert answer.locator("pre code").inner_text().strip() == 'print("<b>")'
    assert answer.locator("ol > li").count() == 2
    assert answer.locator("ol li ul li").inner_text() == "below"
    assert answer.locator("blockquote").inner_text() == "quoted"
    assert "a link (https://example.org/x)" in answer.inner_text()
    assert page.locator(".answer a").count() == 0
    assert bytes(model.jobs[-1].ids) == b"user: What is it?\nTell.\n"
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "4")
    page.keyboard.press("Escape")
    page.select_option("#model", "fox")
    say(page, "Again")
    wait(page, "document.querySelectorAll('.facts').length === 2")
    asked = bytes(model.jobs[-1].ids).decode()
    assert asked.startswith("system: Be brief.\nuser: What is it?\nTell.\nassistant: # Title")
    assert asked.endswith("user: Again\n")
    assert "4 tokens" in page.locator(".facts").last.inner_text()
    assert "cut at the limit" in page.locator(".facts").last.inner_text()
    n_asked = len(model.jobs)
    page.click(".again")
    wait(page, "document.querySelector('#stop').hidden")
    assert len(model.jobs) == n_asked + 1
    assert bytes(model.jobs[-1].ids).decode() == asked
    assert page.locator(".turn").count() == 4
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.locator("#welcome").is_visible()


def test_text_streams_and_stops(page, model):
    model.script, model.delay = ["word "] * 400, 0.03
    say(page, "Go")
    wait(page, "document.querySelector('.answer').innerText.length > 20")
    before = len(page.locator(".answer").inner_text())
    wait(page, f"document.querySelector('.answer').innerText.length > {before + 20}")
    assert page.locator("#chat").get_attribute("aria-busy") == "true"
    assert model.running
    page.keyboard.press("Escape")
    page.wait_for_selector(".facts")
    end = time.monotonic() + 1
    while model.running:
        assert time.monotonic() < end
    assert "stopped" in page.locator(".facts").inner_text()
    assert page.locator("#status").inner_text() == "Stopped"
    assert page.locator("#send").is_visible()
    assert page.evaluate("document.activeElement.id") == "message"


def test_the_token_view(page, model):
    model.script = [" one", " two\n", " three", " é"]
    say(page, "Count")
    page.wait_for_selector(".facts")
    page.click("text=Tokens")
    tokens = page.locator(".token")
    assert tokens.all_inner_texts() == [" one", "⏎ two\n", " three", " é"]
    assert tokens.first.get_attribute("class").split()[1] in {f"l{n}" for n in range(6)}
    colour = tokens.first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert colour not in ("rgba(0, 0, 0, 0)", "transparent")
    tokens.nth(0).click()
    rows = page.locator(".others li")
    assert rows.count() == 6
    assert rows.first.locator(".name").inner_text() == "␣one"
    shares = [row.locator(".fill").evaluate("e => e.offsetWidth") for row in rows.all()]
    assert shares == sorted(shares, reverse=True)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(".others li.taken .name").inner_text() == "␣three"
    assert page.locator(".others").bounding_box()["y"] < 850
    page.keyboard.press("Enter")
    assert not page.locator(".others").is_visible()
    page.click("text=Tokens")
    assert page.locator(".token").count() == 0


def test_scripts_stay_text(page, model):
    model.script = cut(ATTACK)
    say(page, ATTACK)
    page.wait_for_selector(".facts")
    assert page.locator(".said").inner_text() == ATTACK
    shown = page.locator(".answer").inner_text()
    for piece in ("<script>alert(1)</script>", "onerror=alert(2)", "x (javascript:alert(3))"):
        assert piece in shown
    page.click("text=Tokens")
    assert "".join(page.locator(".token").all_inner_texts()) == ATTACK
    page.locator(".token").first.click()
    for tag in ("script", "img", "a", "b", "iframe"):
        assert page.locator(f"#chat {tag}").count() == 0
    assert page.locator("#chat svg [onload], #chat [onclick]").count() == 0


def test_every_control_has_a_name_and_can_be_reached(page):
    say(page, "Hi")
    page.wait_for_selector(".facts")
    nameless = page.evaluate("""() =>
        [...document.querySelectorAll('button, select, input, textarea')]
        .filter(e => !(e.getAttribute('aria-label') || e.innerText || e.labels?.length))
        .map(e => e.outerHTML)""")
    assert nameless == []
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    for name in (
        "model",
        "new",
        "theme",
        "open-settings",
        "Copy",
        "Regenerate",
        "Tokens",
        "message",
    ):
        assert name in seen
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
    page.click("#theme")


def test_errors_and_the_key_are_asked_for(browser):
    with serve(FakeStore(FakeModel("fox")), FakeSettings(api_key="s3cret")) as url:
        tab = browser.new_page()
        tab.goto(url)
        tab.wait_for_selector("#settings[open]")
        tab.fill("#key", "s3cret")
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#model option", state="attached")
        tab.select_option("#model", "broken")
        say(tab, "Hi")
        tab.wait_for_selector(".fault")
        assert "weights are damaged" in tab.locator(".fault").inner_text()
        tab.close()
