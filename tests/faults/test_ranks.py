"""Runs on several processes, of which some are killed, or get a signal."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints.store import list_checkpoints, remove_leftovers
from preflight.core.errors import ExitCode

from .harness import ForkServer, Point, find_points, find_temporaries, hash_tree
from .ranked_run import PATIENCE_SECONDS, RankedRun
from .scenarios import sample

pytestmark = pytest.mark.slow
FLAGS = [
    *("--model-size", "custom", "--n-layers", "2", "--n-heads", "2", "--n-embeddings", "32"),
    *("--context-length", "32", "--batch-size", "2", "--device", "cpu", "--no-mixed-precision"),
    *("--tokenizer", "char", "--num-workers", "1", "--max-steps", "60", "--dropout", "0.1"),
    *("--checkpoint-every", "10", "--eval-every", "30", "--max-checkpoints", "10"),
]


class Run(RankedRun):
    """A training on a text."""

    def __init__(self, folder: Path, text: Path, name: str, *flags: str) -> None:
        super().__init__(folder, name, ["--train", "--text-file", str(text), *FLAGS, *flags])

    def hash_end(self, step: int = 60) -> str:
        return super().hash_end(step)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 800, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """The hash of the weights that two ranks reach undisturbed."""
    run = Run(tmp_path_factory.mktemp("unbroken"), text, "out", "--ranks", "2")
    assert run.finish() == ExitCode.DONE, run.read_log()
    return run.hash_end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_nothing(rank: int, tmp_path: Path, text: Path, unbroken: str) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(20)
    run.ranks()[rank].kill()
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("a rank was lost") == 1
    assert run.hash_end() == unbroken


@pytest.mark.parametrize("target", ["parent", "rank 0", "rank 1"])
def test_a_signal_saves_once(target: str, tmp_path: Path, text: Path, unbroken: str) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "step 2/" not in run.read_log():
        assert time.monotonic() < deadline, run.read_log()
        time.sleep(0.05)
    told = run.parent if target == "parent" else run.ranks()[int(target[-1])]
    told.send_signal(signal.SIGTERM)
    assert run.finish() == ExitCode.SIGTERM, run.read_log()
    assert len(list_checkpoints(run.output_dir)) == 1
    assert run.read_log().count("stopped at step") == 1
    again = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.hash_end() == unbroken


def test_ranks_that_are_lost_without_a_step_end_the_run(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2", "--checkpoint-every", "1000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "step 1/" not in run.read_log():
        assert time.monotonic() < deadline, run.read_log()
        time.sleep(0.05)
    run.ranks()[1].kill()
    assert run.finish() == ExitCode.WORKER_LOST, run.read_log()
    assert "no checkpoint was made" in run.read_log()


def test_no_rank_outlives_its_parent(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(10)
    ranks = run.ranks()
    run.parent.kill()
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert not left


def test_a_stopped_rank_is_lost_and_a_busy_one_is_not(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """A stopped process does nothing; neither is there any end of the others' wait for it."""
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(20)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("has been stopped") == 1
    assert run.read_log().count("a rank was lost") == 1
    assert run.hash_end() == unbroken


def test_a_stopped_rank_does_not_outlive_its_parent(tmp_path: Path, text: Path) -> None:
    run = Run(tmp_path, text, "out", "--ranks", "2")
    run.wait_for_step(10)
    ranks = run.ranks()
    ranks[0].send_signal(signal.SIGSTOP)
    run.parent.kill()
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert not left


class Chaos:
    """One run, again and again disturbed at random moments and begun anew where it has ended.

    What has once been found is found later, or a newer one has taken its place.
    """

    def __init__(self, folder: Path, text: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.start = lambda: Run(folder, text, "out", "--ranks", "2", "--checkpoint-every", "2")
        self.run, self.newest = self.start(), 0
        self.allowed = {ExitCode.DONE, ExitCode.SIGTERM, ExitCode.WORKER_LOST}
        self.allowed |= {-signal.SIGKILL, -signal.SIGTERM}  # the latter before it is listened to

    def disturb(self) -> str:
        """A signal to a random process at a random moment; what was done."""
        self._check()
        time.sleep(self.draw.uniform(0, 8))  # the start of a run takes half of it
        number = self.draw.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
        target: psutil.Process = self.draw.choice([self.run.parent, *self.run.ranks()])
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(number)
            if target == self.run.parent and number == signal.SIGSTOP:
                time.sleep(self.draw.uniform(0, 3))
                target.send_signal(signal.SIGCONT)
        if target == self.run.parent and number != signal.SIGSTOP:
            self.run.process.wait(PATIENCE_SECONDS)
        self._check()
        return f"{number.name} to {'the parent' if target == self.run.parent else 'a rank'}"

    def _check(self) -> None:
        """Nothing is lost; where the run has ended before its time, it is begun again."""
        if (code := self.run.process.poll()) is not None:
            assert code in self.allowed, self.run.read_log()
            self.run = self.start()
        found = list_checkpoints(self.run.output_dir)
        assert not self.newest or (found and found[0].step >= self.newest), self.run.read_log()
        self.newest = found[0].step if found else 0

    def finish(self) -> str:
        """The hash of the weights at the run's end."""
        while (code := self.run.process.wait(PATIENCE_SECONDS)) != ExitCode.DONE:
            assert code in self.allowed, self.run.read_log()
            self.run = self.start()
        for found in list_checkpoints(self.run.output_dir):
            checkpoint_format.verify_checkpoint(found)
        assert not find_temporaries(self.run.output_dir)
        assert "internal error" not in self.run.read_log()
        return self.run.hash_end()


def test_random_signals_cost_nothing(tmp_path: Path, text: Path, unbroken: str, full: bool) -> None:
    """Runs that are each disturbed four times."""
    done: list[str] = []
    for seed in range(50 if full else 1):
        (tmp_path / str(seed)).mkdir()
        chaos = Chaos(tmp_path / str(seed), text, seed)
        done += [chaos.disturb() for _ in range(4 if full else 3)]
        assert chaos.finish() == unbroken, (seed, done[-4:])
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(done).most_common())
    print(f"{len(done)} signals at random moments, 0 lost: {kinds}")


class JointSave:
    """Two ranks that save, of which one is traced: see `drivers.save_as_rank`."""

    def __init__(self, server: ForkServer, place: Path) -> None:
        self.server, self.place, self.out = server, place, place / "out"
        self.out.mkdir()
        assert server.run("rank save", 0, 1, 0, str(self.out), [1], cwd=place)[0] == 0
        shutil.copytree(self.out, place / "before")
        assert server.run("rank save", 0, 1, 0, str(self.out), [1, 2], cwd=place)[0] == 0
        self.expected = hash_tree(self.out)

    def reset(self) -> None:
        """Checkpoint 1 alone is there."""
        shutil.rmtree(self.out)
        shutil.copytree(self.place / "before", self.out)

    def save(self, rank: int, **tracing: str) -> tuple[int, int, list[str]]:
        """Step 1 again, in its place, and step 2.

        The exit codes of this rank and of the other, and the trace of this one.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        case = "rank save", rank, 2, store.port, str(self.out), [1, 2]
        other = self.server.start(*case[:1], 1 - rank, *case[2:], cwd=self.place)
        code, _, lines = self.server.trace(*case, cwd=self.place, **tracing)
        return code, other.wait(), lines

    def save_killed(self, rank: int, point: Point) -> tuple[int, int]:
        """The exit codes, where this rank is killed at one of `points`.

        Its number among all calls differs, since the ranks also wait for each other. That among
        the calls on its path, of two on the first, does not.
        """
        path = point.paths[0]
        before = self.points[: self.points.index(point) + 1]
        number = sum(p.call == point.call and p.paths[0] == path for p in before)
        inject = f"{point.call}:signal=SIGKILL:when={number}"
        return self.save(rank, inject=inject, path=path)[:2]

    def record(self, rank: int) -> None:
        """Find the `points` of an undisturbed save, which has come to the right end."""
        self.reset()
        *codes, lines = self.save(rank)
        assert codes == [0, 0]
        assert hash_tree(self.out) == self.expected
        self.points = find_points(lines, [self.out])


def test_a_rank_killed_at_every_file_operation_of_a_save(
    server: ForkServer, place: Path, full: bool
) -> None:
    joint, n_points = JointSave(server, place), 0
    for rank in (0, 1):
        joint.record(rank)
        assert len(joint.points) > (80, 4)[rank]
        for point in sample(joint.points, full):
            joint.reset()
            codes = joint.save_killed(rank, point)
            assert codes == (-signal.SIGKILL, ExitCode.WORKER_LOST), point
            remove_leftovers(joint.out)  # as the next run does
            checkpoint_format.forget_verified()
            found = list_checkpoints(joint.out)
            assert found, point
            for each in found:
                checkpoint_format.verify_checkpoint(each)
            assert joint.save(rank)[:2] == (0, 0), point
            assert hash_tree(joint.out) == joint.expected, point
            n_points += 1
    print(f"{n_points} crash points of either rank, 0 lost")
