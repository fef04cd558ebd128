"""What the parent of several ranks makes of their ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.modes import launch, rank_process

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
