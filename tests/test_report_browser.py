"""Pages of a report in Debian's Chromium: nothing is fetched or run, everything can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from modes.made_run import make_run

from conftest import build
from preflight.modes import run_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module", params=[1, 2])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run, and of two."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [folder / name for name in ("a", "b")[: request.param]]
    for seed, run in enumerate(runs):
        make_run(run, 300 - 100 * seed, seed)
    run_report.run(build({"runs": [str(run) for run in runs]}))
    return runs[0] / "report.html"


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")])
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.told = []
    tab.on("request", lambda request: tab.told.append(("request", request.url)))
    tab.on("console", lambda message: tab.told.append(("console", message.text)))
    tab.on("pageerror", lambda error: tab.told.append(("error", str(error))))
    tab.on("dialog", lambda dialog: tab.told.append(("dialog", dialog.message)))
    tab.goto(report.as_uri())
    yield tab
    tab.close()


def test_nothing_is_fetched_or_run(page, report):
    assert page.told == [("request", report.as_uri())]
    assert page.title() in ("Run a", "2 runs side by side")  # which the sample would change
    shown = page.locator(".example .text").first.inner_text()
    assert shown.startswith("Return the <script>")


def test_curves_and_labels_can_be_seen(page):
    """Each line has a colour of its own that is not the paper's, and lies within its plot."""
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    figures = page.locator("figure.chart")
    assert figures.count() == (5 if page.title() == "Run a" else 6)
    for number in range(figures.count()):
        figure = figures.nth(number)
        plot = figure.locator("svg").bounding_box()
        assert plot["width"] > 200
        assert plot["height"] > 150
        lines = figure.locator("path:not(.grid)")
        strokes = [
            line.evaluate("e => getComputedStyle(e).stroke")
            for line in (lines.nth(n) for n in range(lines.count()))
        ]
        assert lines.count() >= 1
        assert paper not in strokes
        assert "none" not in strokes
        for n in range(lines.count()):
            box = lines.nth(n).bounding_box()
            assert box["width"] > plot["width"] / 2
            assert box["x"] >= plot["x"] - 4
            assert box["y"] >= plot["y"] - 4
            assert box["x"] + box["width"] <= plot["x"] + plot["width"] + 4
            assert box["y"] + box["height"] <= plot["y"] + plot["height"] + 4
        for side in ("x", "y"):
            boxes = [label.bounding_box() for label in figure.locator(f"span.{side}").all()]
            axis, size = (side, "width" if side == "x" else "height")
            boxes.sort(key=lambda box: box[axis])
            for before, after in pairwise(boxes):
                assert before[axis] + before[size] <= after[axis]  # no label covers another
            assert all(box["x"] >= 0 for box in boxes)


def test_the_page_prints(browser, report):
    tab = browser.new_page()
    tab.goto(report.as_uri())
    pdf = tab.pdf(format="A4")
    tab.emulate_media(media="print")
    height = tab.locator("figure.chart.wide").first.bounding_box()["height"]
    tab.close()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 20
    assert 150 < height < 900  # it fits on a sheet
