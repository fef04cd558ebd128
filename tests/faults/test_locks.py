"""Ten runs started on one folder at once: exactly one goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .harness import ForkServer

STARTS = 10


def start_together(server: ForkServer, place: Path, number: int, *breaks: str) -> list[int]:
    """Exit codes of ten runs that reach for one folder at the same time."""
    folder, go, release = (place / f"{name}{number}" for name in ("out", "go", "release"))
    runs = [
        server.start("lock", str(folder), str(go), str(release), cwd=place, breaks=breaks)
        for _ in range(STARTS)
    ]
    go.touch()
    codes: dict[int, int] = {}
    deadline = time.monotonic() + (2 if breaks else 30)
    while len(codes) < STARTS - 1 and time.monotonic() < deadline:
        for run in runs:
            status = None if run.pid in codes else server.ask({"wait": [run.pid, 0]})
            if status is not None:
                codes[run.pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    if not breaks:  # those that did not go on say who did
        holder = next(run.pid for run in runs if run.pid not in codes)
        for run in runs:
            said = run.said()
            assert run.pid == holder or "is in use by another run" in said
            assert len(said.splitlines()) <= 5
    release.touch()
    return [codes[run.pid] if run.pid in codes else run.wait() for run in runs]


def test_exactly_one_goes_on(server: ForkServer, place: Path, full: bool) -> None:
    rounds = 50 if full else 4
    for number in range(rounds):
        codes = start_together(server, place, number)
        assert sorted(codes) == [0] + [7] * (STARTS - 1), codes
    print(f"{rounds} rounds of {STARTS} starts, exactly one went on each time")


def test_a_pid_file_is_found_out(server: ForkServer, place: Path) -> None:
    """The check of the check: a file looked for and then written lets several in."""
    winners = [start_together(server, place, number, "locks").count(0) for number in range(3)]
    assert max(winners) > 1
