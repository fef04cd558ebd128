"""Several processes that wait for each other, of which one fails, or all are waited for."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.foresight import children
from preflight.foresight.child import ChildRules, LackOfMemory
from preflight.foresight.children import run_in_children

RESIDENT = 1000  # bytes of each fake child
Script = list[tuple[int, Any]]  # at which look what comes


class FakeChild:
    """A child whose messages come after so many looks."""

    ended: ClassVar[list[int]] = []

    def __init__(self, script: Script, folder: Path) -> None:
        self.script, self.looks = list(script), 0
        self.process, self.receiver = SimpleNamespace(join=lambda: None, exitcode=-9), self
        self.now: Any = None

    def poll(self, seconds: float) -> bool:
        self.looks += 1
        if self.script and self.script[0][0] <= self.looks:
            self.now = self.script.pop(0)[1]
            return True
        return False

    def recv(self) -> Any:
        if self.now is EOFError:
            raise EOFError
        return self.now

    def end(self) -> None:
        FakeChild.ended.append(self.looks)


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *scripts: Script, limit: int = 2**60
) -> list[Any]:
    monkeypatch.setattr(children, "Child", FakeChild)
    monkeypatch.setattr(children, "measure_resident_bytes", lambda process: RESIDENT)
    monkeypatch.setattr(FakeChild, "ended", [])
    rules = ChildRules("the trial", tmp_path / "trial", limit, StopFlag(), (), silent_seconds=60)
    works: Any = scripts
    found = run_in_children(works, rules, lambda answer: answer == "full")
    assert len(FakeChild.ended) == len(scripts)
    assert not (tmp_path / "trial").exists()
    return found


DONE = [(2, ("answer", "done"))]
GOES_ON: Script = []
LOST = ("error", (ExitCode.WORKER_LOST, ("rank 0 has lost another one",)))
STORAGE = ("error", (ExitCode.STORAGE, ("the disk is full",)))


def test_all_answers_come_in_the_order_of_the_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    late = [(9, ("answer", "late"))]
    assert run(monkeypatch, tmp_path, late, DONE, late) == ["late", "done", "late"]


@pytest.mark.parametrize("other", [GOES_ON, DONE, [(1, LOST)], [(1, ("crash", "trace"))]])
def test_a_rank_without_memory_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: Script
) -> None:
    """Whether it answers so or is killed, and whatever the others met before."""
    assert run(monkeypatch, tmp_path, other, [(5, ("answer", "full"))]) == ["full"]
    (found,) = run(monkeypatch, tmp_path, other, [(5, EOFError)])
    assert isinstance(found, LackOfMemory)
    assert "signal 9" in found.reason


def test_all_ranks_share_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, DONE, DONE, limit=2 * RESIDENT) == ["done", "done"]
    (found,) = run(monkeypatch, tmp_path, DONE, DONE, limit=2 * RESIDENT - 1)
    assert found == LackOfMemory("it held all the memory that was available")


@pytest.mark.parametrize("scripts", [([(1, LOST)], [(8, STORAGE)]), ([(8, STORAGE)], [(1, LOST)])])
def test_the_cause_is_told_and_not_its_effect_on_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripts: tuple[Script, Script]
) -> None:
    with pytest.raises(PreflightError, match="the disk is full"):
        run(monkeypatch, tmp_path, *scripts)


def test_a_failure_is_not_waited_after_for_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="the trial failed"):
        run(monkeypatch, tmp_path, GOES_ON, [(1, ("crash", "trace"))])
    assert max(FakeChild.ended) < 200
    with pytest.raises(PreflightError, match="no result in 60") as caught:
        run(monkeypatch, tmp_path, GOES_ON, DONE)
    assert caught.value.code == ExitCode.WORKER_LOST
    assert max(FakeChild.ended) == 600


def _die_or_wait(number: int, report: Any) -> None:
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.slow
def test_a_child_that_is_killed_ends_one_that_waits(tmp_path: Path) -> None:
    rules = ChildRules("the trial", tmp_path / "trial", 2**60, StopFlag(), ())
    works = [functools.partial(_die_or_wait, number) for number in (0, 1)]
    (found,) = run_in_children(works, rules, lambda answer: False)
    assert isinstance(found, LackOfMemory)
    assert list(tmp_path.iterdir()) == []
