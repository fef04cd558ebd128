"""TensorBoard's files: what its reader sees, after a resume too, and without the library."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ControlSettings
from preflight.training import tensorboard
from preflight.training.trackers import Trackers, load_trackers

ON = ControlSettings(tensorboard=True)


def read_scalars(output_dir: Path, tag: str) -> list[tuple[int, float]]:
    """The points of a tag as TensorBoard shows them: a START hides its step and later ones."""
    points: list[tuple[int, float]] = []
    for path in sorted((output_dir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return points


def log_steps(trackers: Trackers, steps: range) -> None:
    for step in steps:
        trackers.log({"event": "step", "step": step, "loss": 1.0 / step, "grad_norm": float("nan")})
        if step % 2 == 0:
            trackers.log({"event": "eval", "step": step, "val_loss": 2.0 / step, "perplexity": 1})


def test_a_resumed_run_repeats_no_point_and_loses_none(tmp_path: Path) -> None:
    first = Trackers(tmp_path, ON)
    first.resume(0)
    log_steps(first, range(1, 8))
    again = Trackers(tmp_path, ON)
    again.resume(4)
    again.log({"event": "eval", "step": 4, "val_loss": 0.5, "perplexity": 1})
    log_steps(again, range(5, 7))
    assert read_scalars(tmp_path, "training/loss") == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]
    assert [s for s, _ in read_scalars(tmp_path, "validation/val_loss")] == [2, 4, 6]
    assert read_scalars(tmp_path, "training/grad_norm") == []


def test_nothing_is_written_without_the_flag(tmp_path: Path) -> None:
    trackers = Trackers(tmp_path, ControlSettings())
    trackers.resume(0)
    log_steps(trackers, range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_ends_the_files_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = Trackers(tmp_path, ON)
    trackers.resume(0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.EventsWriter, "flush", fail)
    log_steps(trackers, range(1, 4))
    assert capsys.readouterr().err.count("TensorBoard's files end here") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count('"step"') >= 3


def test_a_missing_library_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "preflight.training.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(PreflightError, match="pip install tensorboardX") as caught:
        load_trackers(ON)
    assert caught.value.code == ExitCode.FLAGS
    assert len(load_trackers(ControlSettings())) == 1
