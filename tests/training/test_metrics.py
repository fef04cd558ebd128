"""metrics.jsonl under cuts and full disks, and the picture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from preflight.core.log import configure_logging, log
from preflight.core.units import format_seconds
from preflight.training import metrics
from preflight.training.curve import save_loss_curve
from preflight.training.metrics import MetricsLog, read_metrics


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
    rows = read_metrics(log.path)
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
    save_loss_curve(path, [], "nothing")
    assert not path.exists()
    for steps in (range(1, 2), range(2, 200)):
        fill(log, steps)
        save_loss_curve(path, read_metrics(log.path), "a title")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


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
from preflight.training.curve import save_loss_curve
assert "matplotlib" not in sys.modules
save_loss_curve(Path("curve.png"), [{"event": "step", "tokens": 1, "loss": 1.0,
                                     "learning_rate": 1.0}], "")
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
