"""metrics.jsonl under cuts and full disks, and the picture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from conftest import ROOT
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import configure_logging, log
from preflight.core.units import format_seconds
from preflight.training import curve as curve_module
from preflight.training import metrics
from preflight.training.curve import LossCurve
from preflight.training.metrics import MetricsLog, open_metrics, read_metrics


def fill(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.log(
            {
                "event": "step",
                "step": step,
                "loss": 9.0 / step,
                "tokens": 64 * step,
                "learning_rate": 1e-3,
            }
        )
        if step % 2 == 0:
            log.log({"event": "eval", "step": step, "val_loss": 10 / step, "tokens": 64 * step})


def test_rows_come_back_and_infinities_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"event": "step", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    lines = log.path.read_text().splitlines()
    assert json.loads(lines[0]) == {"event": "step", "step": 1, "loss": None, "grad_norm": None}


def test_trim_keeps_what_a_resumed_run_will_not_redo(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    fill(log, range(1, 7))
    log.path.write_bytes(log.path.read_bytes() + b'{"event": "step", "step": 7, "lo')
    log.trim(4)
    rows = list(read_metrics(log.path))
    assert [(r["event"], r["step"]) for r in rows] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
    ]
    log.trim(-1)
    assert log.path.read_bytes() == b""


def test_a_full_disk_is_told_once_and_leaves_no_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    fill(log, range(1, 2))
    real = metrics.os.write
    monkeypatch.setattr(metrics.os, "write", lambda fd, data: real(fd, data[:5]))
    fill(log, range(2, 4))
    assert capsys.readouterr().err.count("warning") == 1
    monkeypatch.setattr(metrics.os, "write", real)
    fill(log, range(4, 5))
    assert [r["step"] for r in read_metrics(log.path) if r["event"] == "step"] == [1, 4]
    for line in log.path.read_text().splitlines():
        json.loads(line)


def test_the_curve_is_drawn_from_any_amount_of_rows(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    path = tmp_path / "curve.png"
    LossCurve([]).save(path, "nothing")
    assert not path.exists()
    for steps in (range(1, 2), range(2, 200)):
        fill(log, steps)
        LossCurve(read_metrics(log.path)).save(path, "a title")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_the_curve_has_an_axis_in_bits_per_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **flags: drawn.append(figure))
    steps = [
        {"event": "step", "step": n, "tokens": n, "loss": 9.0 / n, "learning_rate": 1.0}
        for n in (1, 2)
    ]
    evaluation = {"event": "eval", "step": 2, "tokens": 2, "val_loss": 4.5}
    for more in ({}, {"bits_per_byte": 1.5}):
        LossCurve([*steps, evaluation | more]).save(tmp_path / "curve.png", "")
    without, figure = drawn
    assert without.axes[0].child_axes == []
    nats, (bits,) = figure.axes[0], figure.axes[0].child_axes
    assert nats.get_ylabel() == "loss (nats per token)"
    assert bits.get_ylabel() == "bits per byte"
    figure.draw_without_rendering()  # gives the second axis its limits
    assert bits.get_ylim() == pytest.approx([limit / 3 for limit in nats.get_ylim()])
    assert [text.get_text() for text in nats.texts] == [
        "best 4.500\nperplexity 90.0\n1.500 bits per byte"
    ]


HOSTILE = [
    b"[" * 100_000,
    b"",
    b"\xff\xfe",
    b"null",
    b"[1]",
    b"1" * 5000,
    b'{"event": "step"}',
    b'{"event": "step", "step": true, "loss": 1, "tokens": 1, "learning_rate": 1}',
    b'{"event": 7, "step": 2}',
    b'{"event": "step", "step": "2"}',
    b'{"event": "step", "step": 2, "loss": "low", "tokens": 1, "learning_rate": 1}',
    b'{"event": "step", "step": 2, "loss": 1e999, "tokens": 1, "learning_rate": 1}',
    b'{"event": "step", "step": 2, "loss": NaN, "tokens": 1, "learning_rate": 1}',
    b'{"event": "step", "step": 2, "loss": 1, "learning_rate": 1}',
    b'{"event": "eval", "step": 2, "val_loss": [1], "tokens": 1}',
    b'{"event": "sample", "step": 2, "text": "' + b"x" * 3_000_000 + b'"}',
    b'{"event": "profile", "step": 2}',
]


def test_lines_that_nobody_expects_end_no_run_and_are_kept(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    fill(log, range(1, 3))
    odd = b"\n".join(HOSTILE) + b"\n"
    log.path.write_bytes(log.path.read_bytes() + odd)
    before = log.path.read_bytes()
    curve = LossCurve(read_metrics(log.path))
    curve.save(tmp_path / "curve.png", "")
    assert curve._steps.columns() == [[64.0, 128.0], [9.0, 4.5], [1e-3, 1e-3]]
    log.trim(2)
    kept = log.path.read_bytes()
    later = [line for line in before.split(b"\n") if line not in kept.split(b"\n")]
    # Rows of the same step that are not its ``step`` row come again: two ``eval``, one ``profile``.
    assert all(b'"eval"' in line or b'"profile"' in line for line in later)
    assert len(later) == 3


@pytest.mark.parametrize("content", [b'{"loss": 3}\n', b"a diary", b'{"step": 1, "event": "x"}'])
def test_another_programs_log_is_never_cut(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(PreflightError, match="another program's file") as caught:
        open_metrics(tmp_path).resume(0)
    assert caught.value.code == ExitCode.STORAGE
    assert path.read_bytes() == content


def test_rows_are_not_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_bytes(b'{"event": "')
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(PreflightError, match="symbolic link"):
        open_metrics(tmp_path).resume(0)
    fill(open_metrics(tmp_path), range(1, 3))
    assert "warning" in capsys.readouterr().err
    assert (tmp_path / "mine").read_bytes() == b'{"event": "'


def test_a_long_log_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The points are means of equally many neighbours, and their mean is that of all values."""
    monkeypatch.setattr(curve_module, "MAX_POINTS", 64)
    rows = [
        {"event": "step", "step": n, "tokens": n, "loss": float(n % 7), "learning_rate": 1.0}
        for n in range(64 * 5)
    ]
    tokens, losses, _ = LossCurve(rows)._steps.columns()
    assert tokens == [4 * i * 2 + 3.5 for i in range(40)]
    means = [sum(n % 7 for n in range(8 * i, 8 * i + 8)) / 8 for i in range(40)]
    assert losses == pytest.approx(means)
    evaluations = [
        {"event": "eval", "step": n, "tokens": n, "val_loss": abs(n - 57.0)} for n in range(999)
    ]
    curve = LossCurve(evaluations)
    assert len(curve._evaluations.columns()[0]) <= 64
    assert curve._best == (57, 0.0)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (11_100, "3 h 05 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_log_level(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        for level, expected in (
            ("debug", "a\nb\nwarning: c\n"),
            ("info", "b\nwarning: c\n"),
            ("warning", "warning: c\n"),
            ("error", ""),
        ):
            configure_logging(level)
            log.debug("a")
            log.info("b")
            log.warning("c")
            assert capsys.readouterr().err == expected
    finally:
        configure_logging("info")


def test_drawing_waits_for_its_time_and_heeds_no_backend(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import preflight.modes.train
from preflight.training.curve import LossCurve
assert "matplotlib" not in sys.modules
row = {"event": "step", "tokens": 1, "loss": 1.0, "learning_rate": 1.0}
LossCurve([row]).save(Path("curve.png"), "")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "nonsense"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
