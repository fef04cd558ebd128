"""How long a run with `--ranks` pauses when one of its ranks is killed, and what takes the time.

    python benchmarks/lost_rank.py                      (2 ranks, killed 5 times)
    python benchmarks/lost_rank.py --ranks 4 --kills 10
    python benchmarks/lost_rank.py --smoke              (killed once)

A tiny model, so that the pause is nothing but the way from one start to the next. Seconds since
SIGKILL, seen from outside with a delay of some 0.03 s: when the other ranks have ended, when the
new ones run, when they have their checkpoint, when the first new step is logged; and the CPU
seconds of all processes until then. The goal is the project's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import print_rows  # noqa: E402

_SAVE_EVERY = 10
_FLAGS = [
    *("--model-size", "custom", "--n-layers", "2", "--n-heads", "2", "--n-embeddings", "32"),
    *("--context-length", "32", "--batch-size", "2", "--device", "cpu", "--no-mixed-precision"),
    *("--tokenizer", "char", "--num-workers", "1", "--checkpoint-every", str(_SAVE_EVERY)),
    *("--max-steps", "1000000", "--eval-every", "1000000"),
]
_GOAL_SECONDS = 10
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 120


class Run:
    """A training run with `--ranks`, watched from outside."""

    def __init__(self, folder: Path, n_ranks: int) -> None:
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 800, encoding="utf-8")
        self.n_ranks, self.log, self.rows = n_ranks, folder / "log", folder / "out/metrics.jsonl"
        argv = [sys.executable, str(ROOT / "main.py"), "--train", "--text-file", str(text)]
        argv += [*_FLAGS, "--ranks", str(n_ranks), "--output-dir", str(folder / "out")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stderr=log, env=environment
            )
        self.parent = psutil.Process(self.process.pid)
        self.cpu: dict[psutil.Process, float] = {}

    def list_ranks(self) -> list[psutil.Process]:
        """Its ranks that are alive, in their order; the CPU seconds of all processes are noted."""
        found: list[tuple[str, psutil.Process]] = []
        for process in [self.parent, *self.parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                self.cpu[process] = sum(process.cpu_times()[:2])
                if process.name().startswith("rank ") and process.is_running():
                    found.append((process.name(), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def wait_for(self, there: Callable[[], bool]) -> float:
        """The time at which it is `there`."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not there():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(self.log.read_text("utf-8"))
            time.sleep(_LOOK_SECONDS)
        return time.monotonic()

    def count_steps(self, resumes: int) -> int:
        """The steps logged since it was continued so many times; -1 before."""
        rows = self.rows.read_text("utf-8").splitlines() if self.rows.exists() else []
        events = [row.partition('"event": "')[2].partition('"')[0] for row in rows]
        for _ in range(resumes):
            if "resume" not in events:
                return -1
            events = events[events.index("resume") + 1 :]
        return events.count("step")

    def measure_kill(self, victim: int, resumes: int) -> dict[str, float]:
        """Seconds from a kill of one rank to each of what follows, and the CPU seconds of all."""
        self.wait_for(lambda: self.count_steps(resumes) > 2 * _SAVE_EVERY)
        old = self.list_ranks()
        before = sum(self.cpu.values())
        old[victim].kill()
        began = time.monotonic()
        ended = self.wait_for(lambda: not {*old} & {*self.list_ranks()})
        started = self.wait_for(lambda: len(self.list_ranks()) == self.n_ranks)
        loaded = self.wait_for(lambda: self.count_steps(resumes + 1) >= 0)
        resumed = self.wait_for(lambda: self.count_steps(resumes + 1) > 0)
        self.list_ranks()
        return {
            "the other ranks have ended": ended - began,
            "new ranks run": started - began,
            "the checkpoint is loaded": loaded - began,
            "the first new step is logged": resumed - began,
            "CPU seconds of all processes": sum(self.cpu.values()) - before,
        }


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lost-rank-") as folder:
        run = Run(Path(folder), flags.ranks)
        n_kills = 1 if flags.smoke else flags.kills
        try:
            found = [run.measure_kill(n % flags.ranks, n) for n in range(n_kills)]
        finally:
            run.process.terminate()
            run.process.wait()
    rows: list[tuple[str, Any, str]] = []
    for name in found[0]:
        values = [row[name] for row in found]
        rows.append((f"{name}: median", statistics.median(values), ""))
        goal = f"<= {_GOAL_SECONDS}" if "new step" in name else ""
        rows.append((f"{name}: most", max(values), goal))
    print_rows(rows)
    print(json.dumps({"rows": [{"name": name, "value": value} for name, value, _ in rows]}))


if __name__ == "__main__":
    main()
