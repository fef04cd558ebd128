"""Limits that the system sets to a process: address space, and the size of a file."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import main

from .harness import ROOT, TRAIN_FLAGS, find_message_faults, make_text

MODES = {"train": [*TRAIN_FLAGS, "--max-steps", "1"], "generate": ["--generate"]}


@pytest.mark.parametrize("mode", MODES)
def test_too_little_address_space(tmp_path: Path, mode: str) -> None:
    """As after ``ulimit -v``: torch's libraries do not fit, whose loader says so in its own way."""
    (tmp_path / "text.txt").write_text(make_text(6000))
    limit = 300 * 2**20
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *MODES[mode]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 8, done.stderr
    assert not find_message_faults(done.stderr, "300.0 MiB", "ulimit -v")
    assert not list(tmp_path.rglob("crash.log"))


def test_no_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all disks are full, or files may have no size, a library asks for one in vain."""

    def fail(mode: str, config: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "run_mode", fail)
    assert main.main(["--generate"]) == 6
    assert not find_message_faults(capsys.readouterr().err, "No usable temporary directory")
    assert list(tmp_path.iterdir()) == []
