"""Runs on several processes, of which one gets a signal, hangs, or runs out of memory."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode

from .rank_runs import (
    EVALUATION,
    SAVE,
    SLEEP,
    SPIN,
    STEP,
    WORK,
    Run,
    assert_gone,
    list_launcher_words,
    write_program,
)

pytestmark = pytest.mark.slow


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
    """To the parent, or to a rank."""
    for number, whom in enumerate((0, 2)):
        run = Run(tmp_path, text, "--checkpoint-every", "1000", "--log-every", "1")
        run.wait_for(lambda run=run: "tokens/s" in run.read_log())
        (run.parent, *run.ranks())[whom].send_signal(signal.SIGTERM)
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
    """One that sleeps, then one that spins. Whoever works may take longer than that."""
    acts = [(1, STEP, 15, SLEEP), (1, STEP, 25, SPIN), (1, EVALUATION, 30, WORK)]
    run = Run(tmp_path, text, program=write_program(tmp_path, *acts))
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("all ranks are ended") == 2
    assert run.read_log().count("a rank was lost; continuing from step 10") == 1
    assert run.read_log().count("a rank was lost; continuing from step 20") == 1
    assert (tmp_path / "done-2").exists()
    assert run.hash_end() == unbroken


def test_a_rank_that_hangs_in_the_first_step_or_outside_of_one_is_lost(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """With no checkpoint yet the run ends; the same command goes on."""
    acts = [(1, STEP, 0, SLEEP), (0, SAVE, 20, SLEEP), (1, EVALUATION, 30, SLEEP)]
    program = write_program(tmp_path, *acts)
    run = Run(tmp_path, text, program=program)
    assert run.finish() == ExitCode.WORKER_LOST, run.read_log()
    assert run.read_log().count("rank 1, for which the others wait, did nothing for 2 s") == 1
    assert "no checkpoint was made" in run.read_log()
    run = Run(tmp_path, text, program=program)
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("did nothing for 2 s") == 2
    assert run.read_log().count("a rank was lost; continuing from step 10") == 1
    assert run.read_log().count("a rank was lost; continuing from step 30") == 1
    assert run.hash_end() == unbroken


def test_ranks_of_a_launcher_watch_each_other(tmp_path: Path, text: Path, unbroken: str) -> None:
    """Rank 1 hangs, in a first step, then in a later one; then rank 0 is stopped."""
    acts = [(1, STEP, 0, SPIN), (1, STEP, 15, SLEEP)]
    acts += [(0, STEP, 25, "os.kill(os.getpid(), signal.SIGSTOP)")]
    launcher = list_launcher_words(write_program(tmp_path, *acts), "--max-restarts=3")
    run = Run(tmp_path, text, launcher=launcher)
    assert run.finish() == ExitCode.DONE, run.read_log()
    for told in (
        "rank 1 has kept the others waiting in the first step for 5 s",
        "rank 1, for which the others wait, did nothing for 2 s",
        "has been stopped",
    ):
        assert run.read_log().count(told) == 1, run.read_log()
    assert run.read_log().count("continuing from") == 2
    assert run.hash_end() == unbroken


def test_a_rank_without_memory_ends_the_run_and_tells_of_a_check(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """The allocator's own error, told once; what was saved before is continued from."""
    program = write_program(tmp_path, (1, STEP, 25, "torch.empty(2**60, dtype=torch.uint8)"))
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
