"""Waiting for a trial, and two searches in one folder."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeConfig
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.core.signals import StopFlag
from preflight.foresight import child
from preflight.modes import find_batch_size


class Receiver:
    """A pipe whose answer comes at the third look; each look lasts an hour."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.n_looks = clock, 0

    def poll(self, seconds: float) -> bool:
        self.clock[0] += 3600
        self.n_looks += 1
        return self.n_looks == 3

    def recv(self) -> tuple[str, str]:
        return "answer", "done"


@pytest.mark.parametrize("longest", [1800.0, 0.2])
def test_a_stop_of_hours_is_no_silence_of_the_trial(
    monkeypatch: pytest.MonkeyPatch, longest: float
) -> None:
    """Ctrl-Z stops the search and its trial; both go on later. A trial that hangs is given up."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(child, "MAX_SILENT_SECONDS", longest)
    process = multiprocessing.current_process()

    rules = child.ChildRules("the trial", Path("unused"), 2**60, StopFlag(), ())

    def wait() -> tuple[str, str]:
        receiver: Any = Receiver(clock)
        return child.await_answer(receiver, process, rules, lambda message: None)

    if longest > 1:
        assert wait() == ("answer", "done")
        return
    with pytest.raises(PreflightError) as caught:
        wait()
    assert caught.value.code == ExitCode.WORKER_LOST


def test_a_second_search_touches_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probe of the disk would disturb the first one's."""
    monkeypatch.setattr(storage, "check_writable", lambda folder: pytest.fail("it wrote"))
    config = make_config()
    output_dir = Path(config.control.output_dir)
    storage.make_folder(output_dir)
    with FolderLock(output_dir), pytest.raises(PreflightError) as caught:
        find_batch_size.run(config)
    assert caught.value.code == ExitCode.LOCKED
    assert [path.name for path in output_dir.iterdir()] == [".lock"]
