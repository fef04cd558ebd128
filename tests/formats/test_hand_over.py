"""The whole way of a published model, as ``examples/hand_over.py`` goes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_gguf_smollm2 import path  # noqa: F401  # the fixture that fetches the file

from conftest import ROOT

pytestmark = pytest.mark.slow


def test_a_taught_model_answers_in_llama_cpp(path: Path, tmp_path: Path) -> None:  # noqa: F811
    command = [sys.executable, str(ROOT / "examples" / "hand_over.py"), str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert said[-2].endswith("answers 'Aye, captain! Whale ahoy!'")
    assert any(line.startswith("llama.cpp: 30 of 30 greedy tokens") for line in said)
    assert (tmp_path / "taught/milestones").is_dir()
    assert (tmp_path / "model.gguf").stat().st_size < 150 * 10**6
