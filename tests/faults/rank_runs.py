"""Runs on several processes, started and watched from outside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from conftest import ROOT
from preflight.checkpoints.store import list_checkpoints

FLAGS = [
    *("--model-size", "custom", "--n-layers", "2", "--n-heads", "2", "--n-embeddings", "32"),
    *("--context-length", "32", "--batch-size", "2", "--device", "cpu", "--no-mixed-precision"),
    *("--tokenizer", "char", "--num-workers", "1", "--max-steps", "60", "--dropout", "0.1"),
    *("--checkpoint-every", "10", "--eval-every", "30", "--max-checkpoints", "10"),
]
PATIENCE_SECONDS = 240
# The command line, with shorter limits, and ranks that may run another program.
# A step may take long beside other tests.
MAIN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import main
from preflight.device import hang_watch
from preflight.modes import rank_process
hang_watch.STOPPED_SECONDS = hang_watch.IDLE_SECONDS = 2
hang_watch.STEP_SECONDS, hang_watch.STEP_FACTOR = 10, 3
rank_process.PROGRAM = Path(sys.argv[1])
sys.exit(main.main(sys.argv[2:]))
"""

# A program for ranks, with shorter limits, in which things happen to a rank, each once in a folder.
_PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import main, trainer
from preflight.device import hang_watch
from preflight.modes import train
from preflight.training.saving import CheckpointSaver
hang_watch.STOPPED_SECONDS = hang_watch.IDLE_SECONDS = 2
hang_watch.STEP_SECONDS, hang_watch.STEP_FACTOR = 5, 3

def disturb(owner, name, find_step):
    method = getattr(owner, name)
    def disturbed(self, *arguments):
        for number, (rank, where, step, act) in enumerate({acts}):
            done = Path(f"done-{{number}}")
            here = (self.ranks.rank, name, find_step(self, *arguments))
            if (rank, where, step) == here and not done.exists():
                done.touch()
                exec(act)
                break
        return method(self, *arguments)
    setattr(owner, name, disturbed)

disturb(trainer.Trainer, "train_step", lambda self, step, batches: step)
disturb(train.TrainingRun, "_evaluate", lambda self: self.state.step)
disturb(CheckpointSaver, "_check_place", lambda self: self.state.step)
sys.exit(main.main(sys.argv[1:]))
"""
STEP, EVALUATION, SAVE = "train_step", "_evaluate", "_check_place"
SLEEP, SPIN = "time.sleep(10**6)", "while True: pass"
# Longer than a rank may do nothing; the rank itself only waits for it.
WORK = "subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 5: pass'])"


def write_program(folder: Path, *acts: tuple[int, str, int, str]) -> Path:
    """Such a program. Each of the `acts` has a rank, a place, a step there, and a statement."""
    path = folder / "rank.py"
    path.write_text(_PROGRAM.format(root=str(ROOT), acts=acts), encoding="utf-8")
    return path


def list_launcher_words(program: Path, *options: str) -> list[str]:
    """What starts a program on two ranks with torch's launcher."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*words, *options, str(program)]


class RankedRun:
    """`main.py` on two ranks in a folder of its own, watched from outside.

    Args:
        folder: where it runs.
        words: of the command line, without those for the ranks.
        name: of its output folder.
        program: the program of the ranks; unset: `main.py`.
        launcher: that starts the ranks; unset: `MAIN`.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        name: str = "out",
        *,
        program: Path | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self.output_dir, self.log = folder / name, folder / f"{name}.log"
        argv = [*(launcher or (sys.executable, "-c", MAIN, str(program or ROOT / "main.py")))]
        argv += ["--output-dir", name, *([] if launcher else ["--ranks", "2"]), *words]
        self.last_step = int(argv[-argv[::-1].index("--max-steps")])  # the last of a flag holds
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stderr=log, env=environment
            )
        self.parent = psutil.Process(self.process.pid)

    def descendants(self) -> list[psutil.Process]:
        """Its processes without the parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.parent.children(recursive=True)
        return []

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in their order."""
        named: list[tuple[str, psutil.Process]] = []
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if process.name().startswith("rank ") and process.is_running():
                    named.append((process.name(), process))
        return [process for _, process in sorted(named, key=lambda pair: pair[0])]

    def servers(self) -> list[psutil.Process]:
        """The process whose forks its ranks are."""
        found: list[psutil.Process] = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                is_fork = process.ppid() != self.parent.pid
                if not is_fork and "forkserver" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_for(self, there: Any) -> None:
        """Until something is `there`, while the run goes on."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < deadline, self.read_log()
            time.sleep(0.02)

    def wait_for_save(self, step: int) -> None:
        self.wait_for(lambda: any(c.step >= step for c in list_checkpoints(self.output_dir)))

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: f"\nstep {step}/" in self.read_log())

    def finish(self) -> int:
        """Its exit code; none of its processes is left."""
        family = self.descendants()
        code = self.process.wait(PATIENCE_SECONDS)
        assert_gone(family)
        return code

    def read_log(self) -> str:
        """What it has told, without what runs of this folder told before it."""
        return self.log.read_bytes()[self._said_before :].decode()

    def hash_end(self) -> str:
        """Of the tensors after its last step: weights or adapters, and the optimizer's."""
        newest = list_checkpoints(self.output_dir)[0]
        assert newest.step == self.last_step
        paths = sorted(newest.path.glob("*.safetensors"))
        assert len(paths) == 2
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


class Run(RankedRun):
    """A training on a text; `options` are those of `RankedRun`."""

    def __init__(self, folder: Path, text: Path, *flags: str, **options: Any) -> None:
        super().__init__(folder, ["--train", "--text-file", str(text), *FLAGS, *flags], **options)


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait a little for processes to end."""
    _, left = psutil.wait_procs(processes, timeout=10)
    assert not left
