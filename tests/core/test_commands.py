"""Commands in messages are what a shell reads back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from preflight.core.commands import format_command

WORDS = [
    "plain",
    "a b",
    "it's",
    "x\ny",
    "a\\'b\n",
    "",
    "caf\xe9",
    "\udcff.txt",
    "$HOME",
    "*",
    "\x1b[31m",
]


@pytest.mark.parametrize(
    ("called", "program"),
    [
        ("main.py", "python main.py"),
        ("../my tools/main.py", "python '../my tools/main.py'"),
        ("/usr/bin/preflight", "preflight"),
        ("preflight.exe", "preflight"),
        ("/usr/bin/pytest", "python main.py"),
    ],
)
def test_the_program_is_the_one_that_was_called(
    monkeypatch: pytest.MonkeyPatch, called: str, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert (
        format_command("--train", "--output-dir", "a b") == f"{program} --train --output-dir 'a b'"
    )


def test_a_shell_reads_the_words_back() -> None:
    line = format_command(*WORDS)
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    done = subprocess.run(
        ["bash", "-c", f"set -- {line}; printf '%s\\0' \"$@\""], capture_output=True, check=True
    )
    read = [os.fsdecode(word) for word in done.stdout.split(b"\0")]
    assert read[2:-1] == WORDS
