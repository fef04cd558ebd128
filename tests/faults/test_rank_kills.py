"""Kills of a run on several processes: at random moments, and at every file operation of a save."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from conftest import ROOT
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints.store import list_checkpoints, remove_leftovers
from preflight.core.errors import ExitCode

from .harness import ForkServer, Point, find_points, find_temporaries, hash_tree
from .rank_runs import PATIENCE_SECONDS, Run, assert_gone, list_launcher_words, write_program
from .scenarios import sample

pytestmark = pytest.mark.slow
_TORCHRUN = list_launcher_words(ROOT / "main.py")
# Where a new parent has to load libraries, a case takes five times as long.
_WEIGHTS = {"the parent": 1, "the launcher": 8, "a rank": 16, "the fork server": 1}


class Chaos:
    """One run, again and again disturbed at random moments and begun anew where it has ended.

    What has once been found is found later, or a newer one has taken its place.

    Args:
        launcher: of its ranks; unset: `--ranks`.
    """

    def __init__(
        self, folder: Path, text: Path, seed: int, *flags: str, launcher: Sequence[str] = ()
    ) -> None:
        self.draw, self.launcher = random.Random(seed), launcher
        self.start = lambda: Run(
            folder, text, "--checkpoint-every", "2", *flags, launcher=self.launcher
        )
        self.run, self.newest = self.start(), 0
        self.pauses: list[float] = []  # from a rank's death to the next step, seconds
        self.allowed = {ExitCode.DONE, ExitCode.SIGTERM, ExitCode.WORKER_LOST}
        # A parent that imports libraries does not listen yet: SIGTERM ends it, as any program.
        self.allowed |= {-signal.SIGKILL, -signal.SIGTERM}
        if launcher:  # its code, also for a signal to it
            self.allowed.add(1)

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its last step."""
        return self.run.process.poll() == ExitCode.DONE

    def disturb(self) -> str:
        """A signal to a random process at a random moment; what was done, empty if nothing was."""
        self._check()
        if self.draw.random() < 0.8:  # otherwise mostly starts would be met
            while not self._has_saved() and self.run.process.poll() is None:
                time.sleep(0.05)
        time.sleep(self.draw.uniform(0, 0.5))
        if self.run.process.poll() is not None:
            return ""
        number = self.draw.choice([signal.SIGKILL] * 12 + [signal.SIGSTOP, signal.SIGTERM])
        ranks = self.run.ranks()
        parent = "the launcher" if self.launcher else "the parent"
        kinds = {parent: [self.run.parent], "a rank": ranks, "the fork server": []}
        if number == signal.SIGKILL:  # to the others it does not listen
            kinds["the fork server"] = self.run.servers()
        kind = self.draw.choice([k for k in kinds if kinds[k] for _ in range(_WEIGHTS[k])])
        target = self.draw.choice(kinds[kind])
        try:
            target.send_signal(number)
            if kind == parent and number == signal.SIGSTOP:
                time.sleep(self.draw.uniform(0, 3))
                target.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:  # it has just ended
            return ""
        if kind == parent and number != signal.SIGSTOP:
            self.run.process.wait(PATIENCE_SECONDS)
            assert_gone(ranks)
        elif kind == "a rank" and number == signal.SIGKILL:
            self._measure_pause()
        self._check()
        return f"{number.name} to {kind}"

    def _has_saved(self) -> bool:
        found = list_checkpoints(self.run.output_dir)
        return bool(found) and found[0].step > self.newest

    def _measure_pause(self) -> None:
        """Wait until the run goes on, unless it ends."""
        began, rows = time.monotonic(), self.run.output_dir / "metrics.jsonl"
        before = rows.read_bytes().count(b'"resume"') if rows.exists() else 0
        while self.run.process.poll() is None and time.monotonic() - began < PATIENCE_SECONDS:
            found = rows.read_bytes() if rows.exists() else b""
            if found.count(b'"resume"') > before and b'"loss"' in found.rpartition(b'"resume"')[2]:
                self.pauses.append(time.monotonic() - began)
                return
            time.sleep(0.02)

    def _check(self) -> None:
        """Nothing is lost; where the run has ended before its time, it is begun again."""
        if (code := self.run.process.poll()) is not None:
            assert code in self.allowed, (code, self.run.read_log())
            if code != ExitCode.DONE:
                self.run = self.start()
        found = list_checkpoints(self.run.output_dir)
        assert not self.newest or (found and found[0].step >= self.newest), self.run.read_log()
        self.newest = found[0].step if found else 0

    def finish(self) -> str:
        """The hash of the weights at the run's end."""
        while (code := self.run.process.wait(PATIENCE_SECONDS)) != ExitCode.DONE:
            assert code in self.allowed, (code, self.run.read_log())
            self.run = self.start()
        for found in list_checkpoints(self.run.output_dir):
            checkpoint_format.verify_checkpoint(found)
        assert not find_temporaries(self.run.output_dir)
        assert "internal error" not in self.run.log.read_text("utf-8")
        return self.run.hash_end()


def test_random_signals_cost_nothing(tmp_path: Path, text: Path, full: bool) -> None:
    """Runs that are each disturbed several times, beside one that is not."""
    flags = ["--max-steps", "120" if full else "60"]
    whole = Run(tmp_path, text, *flags)
    assert whole.finish() == ExitCode.DONE, whole.read_log()
    done: list[str] = []
    pauses: list[float] = []
    for seed in itertools.count():
        if len(done) >= (200 if full else 3):
            break
        (tmp_path / str(seed)).mkdir()
        chaos = Chaos(tmp_path / str(seed), text, seed, *flags)
        n_before = len(done)
        while len(done) < n_before + (10 if full else 3) and not chaos.is_done:
            done += [told] if (told := chaos.disturb()) else []
        assert chaos.finish() == whole.hash_end(), (seed, done[n_before:])
        pauses += chaos.pauses
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(done).most_common())
        print(f"seed {seed}: {len(done)} signals at random moments, 0 lost: {kinds}")
        print(f"seconds from a kill to the next step: {sorted(round(p, 1) for p in pauses)}")


def test_random_signals_under_a_launcher_cost_nothing(
    tmp_path: Path, text: Path, unbroken: str, full: bool
) -> None:
    """It starts all ranks again where one is lost, hangs or was sent SIGTERM."""
    launcher = list_launcher_words(write_program(tmp_path), "--max-restarts=100")
    done: list[str] = []
    chaos = Chaos(tmp_path, text, 0, launcher=launcher)
    while len(done) < (20 if full else 2) and not chaos.is_done:
        done += [told] if (told := chaos.disturb()) else []
    assert chaos.finish() == unbroken, done
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(done).most_common())
    print(f"{len(done)} signals at random moments under a launcher, 0 lost: {kinds}")


def test_a_killed_launcher_leaves_no_rank_and_loses_nothing(
    tmp_path: Path, text: Path, unbroken: str
) -> None:
    """torch's launcher; SIGTERM, which it passes on, saves once more."""
    step = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        run = Run(tmp_path, text, launcher=_TORCHRUN)
        run.wait_for_save(step + 10)
        family = run.descendants()
        run.parent.send_signal(number)
        run.process.wait(PATIENCE_SECONDS)
        assert_gone(family)
        step = list_checkpoints(run.output_dir)[0].step
        assert step < run.last_step  # they have not just come to their end
        assert run.read_log().count("stopped at step") == (number == signal.SIGTERM)
        assert "internal error" not in run.read_log()
    again = Run(tmp_path, text, launcher=_TORCHRUN)
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert f"checkpoint-{step} (step {step:,}," in again.read_log()
    assert again.hash_end() == unbroken


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
