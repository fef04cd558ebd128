"""What the parent of several ranks makes of their heartbeats and of their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device.heartbeat import Heartbeat, read_heartbeat
from preflight.modes import launch, rank_group, rank_process
from preflight.modes.rank_group import HangWatch


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look each second; a step may take 60 s, or 20 times the longest."""
    monkeypatch.setattr(rank_group, "_LOOK_SECONDS", 1.0)


def count_looks(watch: HangWatch, heartbeats: list[int], most: int = 2_000) -> int:
    """The looks at these heartbeats until the step is taken to hang; `most` where it is not."""
    return next((n for n in range(most) if watch.look(heartbeats)), most)


def test_a_heartbeat_is_odd_within_a_step(tmp_path: Path) -> None:
    path = tmp_path / "0"
    assert read_heartbeat(path) == 0
    heartbeat = Heartbeat(path)
    assert read_heartbeat(path) == 0
    for number in range(300):  # more than a byte holds
        with heartbeat.step():
            assert read_heartbeat(path) == 2 * number + 1
        assert read_heartbeat(path) == 2 * number + 2
    with pytest.raises(ValueError, match="any"), heartbeat.step():
        raise ValueError("any")
    assert read_heartbeat(path) == 602


def test_a_step_hangs_when_all_ranks_stay_within_it() -> None:
    watch = HangWatch()
    assert count_looks(watch, [5, 5]) == 60
    assert (watch.seconds, watch.longest_seconds) == (60, 0)


@pytest.mark.parametrize(
    "heartbeats", [[5, 6], [6, 6], [0, 5], [1, 1]], ids=["save", "loader", "start", "compilation"]
)
def test_whoever_is_not_within_a_later_step_is_waited_for(heartbeats: list[int]) -> None:
    assert count_looks(HangWatch(), heartbeats) == 2_000


def test_a_step_may_take_many_times_the_longest_before_it() -> None:
    """The first one too, which compiles."""
    watch = HangWatch()
    assert count_looks(watch, [1, 1], most=11) == 11  # ten seconds, after the look that began
    assert count_looks(watch, [3, 3]) == 200
    assert watch.longest_seconds == 10
    assert count_looks(watch, [5, 5], most=150) == 150  # slow, not hanging
    assert count_looks(watch, [7, 7], most=2_900) == 2_900


LOST, INTERNAL = ExitCode.WORKER_LOST, ExitCode.INTERNAL


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], ExitCode.DONE),
        ([143, 143], ExitCode.SIGTERM),
        ([10, -9], LOST),
        ([-9, 0], LOST),
        ([255, 255], LOST),  # their fork server was killed
        ([70, -9], LOST),  # the loss may have been an internal error to another
        ([70, 70], INTERNAL),
        ([10, 8], ExitCode.OUT_OF_MEMORY),
        ([6, -9], ExitCode.STORAGE),
    ],
)
def test_what_a_rank_knows_to_be_the_end_is_the_end(codes: list[int], expected: int) -> None:
    assert launch._choose_code(codes) == expected


@pytest.mark.parametrize("error", [EOFError, ConnectionRefusedError, BrokenPipeError])
def test_a_server_that_is_killed_while_it_forks_is_replaced_once(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[object] = [error(), "started", error(), error()]

    def start(*_: object) -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(rank_process, "_start", start)
    assert rank_process.start_rank(0, [], {}) == "started"
    with pytest.raises(PreflightError, match="killed twice") as caught:
        rank_process.start_rank(0, [], {})
    assert caught.value.code == ExitCode.WORKER_LOST


class KilledGroup:
    """Ranks that are killed while they delete a checkpoint."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> KilledGroup:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> list[int]:
        Path("training_output/milestones/.tmp-retired-checkpoint-8").mkdir(parents=True)
        return [-9, ExitCode.WORKER_LOST]


def test_what_a_lost_rank_leaves_is_cleared(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RankGroup", KilledGroup)
    with pytest.raises(PreflightError) as caught:
        launch.launch_ranks(make_config(), 2, StopFlag())
    assert caught.value.code == ExitCode.WORKER_LOST
    assert list(Path("training_output/milestones").iterdir()) == []


_LOAD = """
import os, torch
def refuse(*_): raise AssertionError("a card was asked for")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import preflight.modes.rank_imports
print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized())
"""


@pytest.mark.slow
def test_what_ranks_are_forked_from_has_one_thread_and_no_card() -> None:
    """Neither outlives a fork. OpenBLAS alone, which numpy loads, ends its threads before one."""
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LOAD]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "False"]
