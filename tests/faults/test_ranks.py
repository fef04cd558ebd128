"""Runs on several processes, of which one gets a signal, hangs, or runs out of memory."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from conftest import ROOT
from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode

from .rank_runs import Run, assert_gone

pytestmark = pytest.mark.slow
# A program for the ranks, in which something happens to rank 1 in a step, once for each folder.
_PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import main, trainer
ACTS = {acts}
train_step, evaluate = trainer.Trainer.train_step, trainer.Trainer.evaluate

def step(self, number, batches):
    done = Path(f"done-{{number}}")
    if number in ACTS and self.ranks.rank == 1 and not done.exists():
        done.touch()
        exec(ACTS[number])
    return train_step(self, number, batches)

def evaluate_slowly(self, *case):
    time.sleep(4 * self.ranks.rank)
    return evaluate(self, *case)

trainer.Trainer.train_step, trainer.Trainer.evaluate = step, evaluate_slowly
sys.exit(main.main(sys.argv[1:]))
"""


def write_program(folder: Path, acts: dict[int, str]) -> Path:
    """Such a program; `acts` are by step."""
    path = folder / "rank.py"
    path.write_text(_PROGRAM.format(root=str(ROOT), acts=acts), encoding="utf-8")
    return path


def test_a_lost_rank_costs_nothing(tmp_path: Path, text: Path, unbroken: str) -> None:
    """Either rank is killed, then one is stopped, which makes it lost as well."""
    run = Run(tmp_path, text)
    for number, signal_sent in enumerate([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP], 1):
        run.wait_for_save(10 * number)
        run.ranks()[number % 2].send_signal(signal_sent)
        run.wait_for(lambda number=number: run.read_log().count("a rank was lost") == number)
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("has been stopped") == 1
    assert run.read_log().count("a rank was lost") == 3
    assert run.hash_end() == unbroken


def test_a_signal_saves_once(tmp_path: Path, text: Path, unbroken: str) -> None:
    """To the parent, or to either rank."""
    for number in range(3):
        run = Run(tmp_path, text, "--checkpoint-every", "1000", "--log-every", "1")
        run.wait_for(lambda run=run: "tokens/s" in run.read_log())
        (run.parent, *run.ranks())[number].send_signal(signal.SIGTERM)
        assert run.finish() == ExitCode.SIGTERM, run.read_log()
        assert len(list_checkpoints(run.output_dir)) == number + 1
        assert run.read_log().count("stopped at step") == 1
    again = Run(tmp_path, text, "--checkpoint-every", "1000")
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.hash_end() == unbroken


def test_ranks_that_are_lost_without_a_step_end_the_run(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "--checkpoint-every", "1000")
    run.wait_for_step(1)
    run.ranks()[1].kill()
    assert run.finish() == ExitCode.WORKER_LOST, run.read_log()
    assert "no checkpoint was made" in run.read_log()


def test_no_rank_outlives_its_parent_not_even_a_stopped_one(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text)
    run.wait_for_save(10)
    family = run.descendants()
    for rank in run.ranks():
        rank.send_signal(signal.SIGSTOP)
    run.parent.kill()
    assert_gone(family)


def test_a_rank_that_hangs_is_lost_and_a_slow_evaluation_is_not(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """One that sleeps, then one that spins. An evaluation may take longer than a step may."""
    acts = {15: "time.sleep(10**6)", 25: "while True: pass"}
    run = Run(tmp_path, text, program=write_program(tmp_path, acts))
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("a step has not ended for") == 2
    assert run.read_log().count("a rank was lost; continuing from step 10") == 1
    assert run.read_log().count("a rank was lost; continuing from step 20") == 1
    assert run.hash_end() == unbroken


def test_a_rank_without_memory_ends_the_run_and_tells_of_a_check(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """The allocator's own error, told once; what was saved before is continued from."""
    program = write_program(tmp_path, {25: "torch.empty(2**60, dtype=torch.uint8)"})
    run = Run(tmp_path, text, program=program)
    assert run.finish() == ExitCode.OUT_OF_MEMORY, run.read_log()
    assert run.read_log().count("rank 1: out of memory with 2 sequences") == 1
    assert "--check --ranks 2 " in run.read_log()
    assert "a rank was lost" not in run.read_log()
    assert "internal error" not in run.read_log()
    assert list_checkpoints(run.output_dir)[0].step == 20
    again = Run(tmp_path, text)
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.hash_end() == unbroken
