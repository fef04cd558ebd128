"""A run cut at every step equals the unbroken one: weights, optimizer, random state, log."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from .harness import TRAIN_FLAGS, ForkServer, is_equal, make_text, read_rows, read_state

STEPS = 50


def run_whole(server: ForkServer, place: Path) -> tuple[list[str], Any]:
    """50 steps over an epoch end, with dropout and accumulation; the flags and the outcome."""
    (place / "text.txt").write_text(make_text(8000))
    flags = [
        *TRAIN_FLAGS,
        "--data-dir",
        str(place / "data"),
        "--max-steps",
        str(STEPS),
        "--gradient-accumulation-steps",
        "2",
        "--dropout",
        "0.1",
        "--eval-every",
        "25",
        "--checkpoint-every",
        "20",
    ]
    code, said = server.run("main", [*flags, "--output-dir", str(place / "whole")], cwd=place)
    assert code == 0, said
    expected = (*read_state(place / "whole", STEPS), read_rows(place / "whole"))
    n_windows = 7600 // 32 - 1
    assert n_windows < expected[1]["state"]["cursor"] < 2 * n_windows  # an epoch end lies inside
    return flags, expected


def cut_and_resume(
    server: ForkServer, place: Path, flags: list[str], cut: int, *breaks: str
) -> Any:
    """The outcome of a run stopped after step `cut` and started again."""
    shutil.rmtree(place / "cut", ignore_errors=True)
    flags = [*flags, "--output-dir", str(place / "cut")]
    code, said = server.run("stopped", flags, cut, cwd=place)
    assert code == 143, said
    code, said = server.run("main", flags, cwd=place, breaks=breaks)
    assert code == 0, said
    assert f"continuing from {place}/cut/milestones/checkpoint-{cut} " in said
    return *read_state(place / "cut", STEPS), read_rows(place / "cut")


@pytest.mark.slow
def test_resume_at_every_step(server: ForkServer, place: Path, full: bool) -> None:
    flags, expected = run_whole(server, place)
    cuts = range(1, STEPS) if full else (1, 2, 19, 20, 25, 28, 29, 30, 41, 49)
    for cut in cuts:
        found = cut_and_resume(server, place, flags, cut)
        assert is_equal(found, expected), f"cut after step {cut}"
    print(f"{len(cuts)} resume points of {STEPS} steps, all bit-identical")


def test_a_forgotten_optimizer_is_found(server: ForkServer, place: Path) -> None:
    """The check of the check."""
    flags, expected = run_whole(server, place)
    assert not is_equal(cut_and_resume(server, place, flags, 30, "resuming"), expected)
