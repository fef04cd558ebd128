"""Seconds from a command to its answer, by the clock and of the processor, children included.

    python benchmarks/startup.py             (three rounds; two to three minutes)
    python benchmarks/startup.py --smoke     (one round of the quick commands)

The commands: `--help`, `--check` of nano with and without measuring, and `--train` of nano until
the line of its first step. The data is prepared before; in the first round nothing is remembered of
the machine, so that `--check` may try precision. The median of the rounds counts, and the first
round stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--model-size", "nano", "--text-file", "text.txt", "--tokenizer", "gpt2"]
COMMANDS = {  # with the seconds that each may take
    "--help": (["--help"], 0.1),
    "--check --no-measure": (["--check", "--no-measure", *RUN], 3.0),
    "--train, to step 1": (["--train", *RUN, "--max-steps", "300"], 2.5),
    "--check": (["--check", *RUN], 10.0),
}


def time_command(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor, to the end or to the line of the first step."""
    before, began = psutil.Process().cpu_times(), time.perf_counter()
    command = [sys.executable, str(ROOT / "main.py"), *words]
    environment = os.environ | {"PREFLIGHT_CACHE_DIR": str(folder / "cache")}
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                process.kill()
                break
        else:
            process.wait()
            seconds = time.perf_counter() - began
            if process.returncode:
                raise RuntimeError(f"{' '.join(words)}: exit {process.returncode}")
    after = psutil.Process().cpu_times()
    shutil.rmtree(folder / "training_output", ignore_errors=True)
    spent = after.children_user + after.children_system
    return seconds, spent - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("a line of words to learn from, and more\n" * 20_000)
        time_command(["--prepare", *RUN], folder)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        found: dict[str, tuple[float, float]] = {}
        for told, (words, goal) in list(COMMANDS.items())[: 3 if given.smoke else None]:
            rounds = [
                time_command(words, folder) for _ in range(1 if given.smoke else given.rounds)
            ]
            clock, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
            found[told] = clock, processor
            print(
                f"{told:22} {clock:7.3f} s by the clock, {processor:7.3f} s of the processor; "
                f"first round {rounds[0][0]:7.3f} s  <= {goal}",
                flush=True,
            )
    print(json.dumps({"seconds_by_clock_and_processor": found}))


if __name__ == "__main__":
    main()
