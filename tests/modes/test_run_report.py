"""The page of a run: its figures against the files, texts that try to break it, damaged files."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus.test_data_report import HOSTILE, Page
from hypothesis import given
from hypothesis import strategies as st
from modes.made_run import TOKENS_PER_STEP, make_run
from mutations import find_places

import main
from conftest import build
from preflight.core.errors import ExitCode, PreflightError
from preflight.modes import run_page, run_report, train
from preflight.modes.charts import Chart, Line, draw_chart, format_count, format_plain

SAFE_TAGS = {
    *"html head meta title style body main h1 h2 h3 p dl div dt dd ul li table thead tbody".split(),
    *"tr th td span figure figcaption svg path pre".split(),
}


def report(*folders: Path, **flags: Any) -> Page:
    """Run the mode and parse its page."""
    run_report.run(build({"runs": [str(folder) for folder in folders]} | flags))
    return read_page(folders[0])


def read_page(folder: Path) -> Page:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert set(page.tags) <= SAFE_TAGS
    assert not [key for key, value in page.attributes if key.startswith("on") or key == "src"]
    return page


def find_row(page: Page, name: str) -> list[str]:
    (row,) = (row for row in page.rows if row[:1] == [name])
    return row


def test_predictions_stand_beside_what_was_measured(tmp_path):
    rows = make_run(tmp_path / "a")
    page = report(tmp_path / "a")
    steps = [row for row in rows if row["event"] == "step"]
    last = [row for row in rows if row["event"] == "eval"][-1]
    speed = statistics.median(row["tokens_per_second"] for row in steps[3:])
    seconds = sum(TOKENS_PER_STEP / row["tokens_per_second"] for row in steps)
    peak = steps[-1]["peak_memory_bytes"]
    assert find_row(page, "steps")[1:4] == ["300", "300", "1.000"]
    assert find_row(page, "tokens per second")[1:4] == [
        *("16,000", f"{speed:,.0f}", f"{speed / 16_000:.3f}")
    ]
    predicted = 300 * TOKENS_PER_STEP / 16_000
    assert find_row(page, "time of the steps")[3] == f"{seconds / predicted:.3f}"
    assert find_row(page, "peak memory")[3] == f"{peak / 5e8:.3f}"
    bits = last["bits_per_byte"]
    assert find_row(page, "bits per byte")[1:4] == [
        *("1.2500 (1.0000 to 1.5000)", f"{bits:.4f}", f"{bits / 1.25:.3f}")
    ]
    assert find_row(page, "perplexity")[2] == f"{last['perplexity']:,.1f}"


def test_the_page_shows_evaluations_samples_commands_and_what_is_missing(tmp_path):
    make_run(tmp_path / "a")
    page = report(tmp_path / "a")
    cells = [row for row in page.rows if row[:1] == ["our choices"]]
    assert [row[1:4] for row in cells] == [
        ["acc", "0.3500 (0.1200 to 0.5800)", "20"],
        ["perplexity", "21.5000 (20.2500 to 22.7500)", "9"],
    ]
    assert ("style", "left:12.00%;width:46.00%") in page.attributes
    assert len(page.by_class["text"]) == 5
    assert all("<script>document.title" in text for text in page.by_class["text"])
    assert page.by_class["pre"] == ["python main.py --train --text-file '<b>my</b>.txt'"]
    notes = page.by_class["warnings"][0]
    assert "The data folder nowhere is not here" in notes
    assert "There are no checkpoints." in notes


def test_runs_side_by_side(tmp_path):
    rows = {name: make_run(tmp_path / name, n, n) for name, n in (("a", 300), ("b", 150))}
    page = report(tmp_path / "a", tmp_path / "b")
    for name, column in (("steps", 1), ("best validation loss", 1)):
        for number, run in enumerate(rows.values()):
            losses = [row["val_loss"] for row in run if row["event"] == "eval"]
            wanted = {"steps": f"{300 // (number + 1)} (1.000)"}.get(name, f"{min(losses):.4f}")
            assert find_row(page, name)[column + number] == wanted
    assert ["our choices", "acc", *["0.3500 (0.1200 to 0.5800)"] * 2] in page.rows
    assert page.by_class["chart wide"][0].startswith("Bits per byte")


def test_the_runs_of_a_comparison_are_reported(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    words = ["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--report"]
    mode, config = main.parse_command_line(words)
    assert mode == "report"
    assert main.run_mode(mode, config) == 0
    assert len(find_row(read_page(tmp_path / "a"), "steps")) == 3


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"]
    assert run_report.name_runs(folders) == [str(folders[0]), str(folders[1]), "z"]


def test_a_report_of_check_for_another_run_is_not_shown(tmp_path):
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "check_report.json"
    content = json.loads(path.read_text())
    content["training_configuration"] = {"total_steps": 9, "tokens_per_step": TOKENS_PER_STEP}
    path.write_text(json.dumps(content))
    page = report(tmp_path / "a")
    assert find_row(page, "tokens per second")[1] == "-"
    assert "total steps 9 there, 300 in the run" in page.by_class["warnings"][0]


def test_hostile_texts_are_inert_and_the_page_stays_small(tmp_path):
    folders = [tmp_path / f"run{number}" for number in range(run_report.MAX_RUNS)]
    for folder in folders:
        make_run(folder, 40)
        rows = [
            {"event": "sample", "step": step, "text": (text + "\x00\u202e") * 500}
            for step, text in enumerate(HOSTILE)
        ]
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        plan = {"commands": HOSTILE * 9, "choices": HOSTILE * 99, "tokenizer": HOSTILE[0] * 999}
        (folder / "run_plan.json").write_text(json.dumps(plan))
        task = {"name": HOSTILE[1], "figures": [{"name": text, "value": 1} for text in HOSTILE * 9]}
        content = {"model": HOSTILE[2] * 99, "tasks": [task] * 9}
        (folder / "evaluation" / "quick-1.json").write_text(json.dumps(content))
    report(*folders)
    assert (folders[0] / "report.html").stat().st_size <= run_page.MAX_PAGE_BYTES
    report(folders[1])
    assert (folders[1] / "report.html").stat().st_size <= run_page.MAX_PAGE_BYTES


def break_log(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], lines[5][:20] + b"\n", *lines[6:]]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (break_log, "metrics.jsonl is damaged: 1 of 310 lines are no rows"),
        (lambda f: (f / "run_plan.json").write_text("{"), "run_plan.json is damaged"),
        (lambda f: (f / "check_report.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "forecast.json").write_bytes(b"\xff"), "not UTF-8"),
        (lambda f: (f / "evaluation" / "x.json").write_text("1"), "x.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_on_the_page_and_by_the_exit_code(tmp_path, damage, told):
    make_run(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(PreflightError) as caught:
        report(tmp_path / "a")
    assert caught.value.code == ExitCode.CHECKPOINT
    assert told in caught.value.lines[0]
    page = read_page(tmp_path / "a")
    assert told in page.by_class["warnings"][0]
    assert find_row(page, "best validation loss")  # the rest of the run is shown


@pytest.mark.parametrize(
    "name", ["run_plan.json", "check_report.json", "forecast.json", "evaluation/quick-1.json"]
)
def test_a_file_of_another_shape_ends_in_a_page(tmp_path, name):
    """Each value in turn is replaced by one of every kind."""
    make_run(tmp_path / "a", 20)
    path = tmp_path / "a" / name
    before = path.read_text()
    for number in range(len(find_places(json.loads(before)))):
        content = json.loads(before)
        container, key = find_places(content)[number]
        container[key] = (None, [1], {"a": []}, 1e308, "<b>\0", True)[number % 6]
        path.write_text(json.dumps(content))
        report(tmp_path / "a")


def test_a_damaged_checkpoint_is_named(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "a" / "milestones" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(PreflightError, match="checkpoint-3"):
        report(tmp_path / "a")


def test_a_torn_last_line_is_no_damage(tmp_path):
    make_run(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    report(tmp_path / "a")


def test_what_is_no_run_is_refused_and_another_page_is_kept(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(PreflightError, match="holds no run") as caught:
            report(folder)
        assert caught.value.code == ExitCode.CHECKPOINT
    make_run(tmp_path / "a")
    (tmp_path / "a" / "report.html").write_text("<!doctype html>\nmine")
    with pytest.raises(PreflightError, match="another program's") as caught:
        report(tmp_path / "a")
    assert caught.value.code == ExitCode.STORAGE
    assert (tmp_path / "a" / "report.html").read_text().endswith("mine")
    too_many = [str(tmp_path / str(number)) for number in range(13)]
    with pytest.raises(PreflightError, match="at most 12") as caught:
        run_report.run(build({"runs": too_many}))
    assert caught.value.code == ExitCode.FLAGS


def test_a_real_run_and_its_report(tmp_path, make_config):
    out = tmp_path / "training_output"
    train.run(make_config(max_steps=3))
    train.run(make_config(max_steps=4))
    page = report(out, data_dir=str(tmp_path / "data"))
    plan = json.loads((out / "run_plan.json").read_text())
    assert plan["plan"]["total_steps"] == 4
    assert ["--max-steps 3" in plan["commands"][0], "--max-steps 4" in plan["commands"][1]] == [
        True
    ] * 2
    newest = out / "milestones" / "checkpoint-4"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["sha256"] in find_row(page, "checkpoint-4")
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    figures = dict(zip(page.by_class["dt"], page.by_class["dd"], strict=True))
    assert figures["to train on"] == f"{metadata['train']['n_tokens']:,}"
    assert "Resumed at step 3." in page.by_class["warnings"][0]
    assert find_row(page, "steps")[1:4] == ["4", "4", "1.000"]


# ---- charts -------------------------------------------------------------------------------------


def read_points(figure: str, class_: str) -> np.ndarray:
    path = re.search(f'class="{class_}" d="([^"]*)"', figure)
    assert path
    numbers = [float(word) for word in re.findall(r"-?[0-9.]+", path[1])]
    return np.array(numbers).reshape(-1, 2)


def draw(xs: Any, ys: Any, **facts: Any) -> str:
    return draw_chart(Chart("t", "u", [Line(xs, ys, 0)], format_plain, **facts), format_count)


def test_a_long_line_keeps_its_shape():
    xs = np.arange(1, 50_001)
    points = read_points(draw(xs, 3 * xs + 7.0), "s0")
    assert len(points) <= 401
    slopes = np.diff(1000 - points[:, 1]) / np.diff(points[:, 0])
    assert np.ptp(slopes) < 0.2 * slopes.mean()  # coordinates have one decimal
    # the axis runs from 0 to 200,000: the ends of the line are known
    assert points[-1] == pytest.approx([1000, 1000 - 1000 * 150_007 / 200_000], abs=0.1)
    assert points[0] == pytest.approx([0, 1000 - 1000 * 10 / 200_000], abs=0.1)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=50),
    st.booleans(),
)
def test_every_finite_point_is_inside_the_plot_between_round_ticks(values, from_zero):
    figure = draw(range(len(values)), values, from_zero=from_zero)
    finite = [value for value in values if abs(value) < 1e300]
    if not finite:
        assert figure == ""
        return
    points = read_points(figure, "s0")
    assert len(points) == len(finite)
    assert points.min() >= 0
    assert points.max() <= 1000
    places = [float(place) for place in re.findall(r"bottom:([0-9.]+)%", figure)]
    assert 2 <= len(places) <= 8
    assert places == sorted(places)


def test_values_can_be_read_from_the_ticks():
    figure = draw([0, 1, 2], [0.0012, 0.0031, 0.0088])
    ticks = re.findall(r'class="y" style="bottom:([0-9.]+)%">([^<]+)<', figure)
    share = (1000 - read_points(figure, "s0")[1, 1]) / 10
    places, values = ([float(pair[part]) for pair in ticks] for part in (0, 1))
    assert np.interp(share, places, values) == pytest.approx(0.0031, rel=1e-2)
