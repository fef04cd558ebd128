"""Every benchmark runs anywhere: its smoke form ends well and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # each is a process, or several, of some ten seconds


NAMES = [
    "train",
    "prepare",
    "foresight",
    "durability",
    "curves",
    "startup",
    "families",
    "forecast",
    "int8",
    "save_ranks",
    "lost_rank",
    "learning",
    "loader",
    "sources",
    "filters",
    "wiki",
    "step_parts",
]


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result
    assert not [row for row in result.get("rows", []) if "error" in row], result
    assert list(tmp_path.iterdir()) == []


def test_the_command_for_a_gpu_runs_its_parts_in_turn(tmp_path: Path) -> None:
    parts = {"tests": " passed", "generate": "ours over Hugging Face"}
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--smoke",
        "--output",
        str(tmp_path / "out"),
        "--parts",
        *parts,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part, words in parts.items():
        kept = (tmp_path / "out" / f"{part}.txt").read_text()
        assert words in kept
        assert kept in done.stdout
    late = subprocess.run(
        [*command, "--budget", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert late.returncode == 1
    assert "its time ended" in late.stdout
