"""Bad command lines: exit 2, a short message, no file made, and an answer at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from preflight.settings import build_options

from .harness import ROOT

BAD_NUMBERS = ["x", "", "nan", "-inf", "1e400", "-1", str(2**70), "0x10", "1,5", "--"]
MODES = [f"--{mode}" for mode in main.MODES.names()]


def generate_bad(draw: random.Random) -> list[str]:
    """One or more mistakes, in a command line that is fine otherwise."""
    options = list(build_options().values())
    numbers = [option for option in options if option.kind in (int, float)]
    chosen = [option for option in options if option.metadata["choices"]]
    switches = [option for option in options if option.kind is bool]
    # An empty prompt starts a new text, an empty separator makes a file one document.
    may_be_empty = ("prompts", "document_separator")
    texts = [option for option in options if option.kind is str and option.name not in may_be_empty]
    argv = [draw.choice(MODES)]
    for _ in range(draw.choice((1, 1, 1, 2, 4, 12))):
        kind = draw.randrange(9)
        if kind == 0:
            argv.append("--" + "".join(draw.choices("abcdefgh-", k=draw.randrange(3, 40))))
        elif kind == 1:  # misspelt
            flag = draw.choice(options).flag
            argv += [flag[:4] + "q" + flag[4:], "1"]
        elif kind == 2:
            argv.append(draw.choice(switches).flag + "=maybe")
        elif kind == 3:
            argv += [draw.choice(chosen).flag, draw.choice(["zzz", "GPT", "Micro", "adam w"])]
        elif kind == 4:
            argv += [draw.choice(texts).flag, ""]
        elif kind == 5:  # another mode
            argv += [mode for mode in MODES if mode not in argv][:1]
        elif kind == 6:
            argv += ["--config", draw.choice(["nothing.json", "/", "/dev/null", "a b.json"])]
        else:
            argv += [f"{draw.choice(numbers).flag}={draw.choice(BAD_NUMBERS)}"]
    draw.shuffle(argv)
    return argv


def test_bad_command_lines(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(main, "run_mode", lambda mode, config: 0)  # what is let through, shows
    draw = random.Random(7)
    count = 300
    slowest = 0.0
    for _ in range(count):
        argv = generate_bad(draw)
        began = time.perf_counter()
        code = main.main(argv)
        slowest = max(slowest, time.perf_counter() - began)
        said = capsys.readouterr()
        assert code == 2, argv
        assert 1 <= len(said.err.splitlines()) <= 5, argv
        assert said.out == ""
        assert all(line.startswith("preflight: ") for line in said.err.splitlines()), argv
        assert os.listdir(place) == []
    assert slowest < 0.5
    print(f"{count} bad command lines, the slowest {slowest:.3f} s in process")


def test_a_lenient_parser_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: a command line that is right is let through."""
    monkeypatch.setattr(main, "run_mode", lambda mode, config: 0)
    assert main.main(["--train", "--batch-size", "4"]) == 0


def test_as_a_user_meets_them(place: Path, full: bool) -> None:
    draw = random.Random(8)
    slowest = 0.0
    count = 300 if full else 15
    for _ in range(count):
        argv = generate_bad(draw)
        seconds = []
        for _ in range(3):  # the machine may be busy: its processor's time, the best of three
            before = sum(os.times()[2:4])  # of children
            done = subprocess.run(
                [sys.executable, str(ROOT / "main.py"), *argv],
                cwd=place,
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            seconds.append(sum(os.times()[2:4]) - before)
            assert done.returncode == 2, argv
            assert len(done.stderr.splitlines()) <= 5
            assert os.listdir(place) == []
            if seconds[-1] < 0.5:
                break
        slowest = max(slowest, min(seconds))
    assert slowest < 0.5
    print(f"{count} processes, the slowest {slowest:.2f} s")
