"""Everything that wants a GPU, in one command and within its time: tests, speed, modes, foresight.

    python benchmarks/gpu.py --output FOLDER             (under ten minutes)
    python benchmarks/gpu.py --output FOLDER --smoke     (tiny shapes on the CPU; three minutes)

Each part has a process of its own. Its lines are shown as they come and kept in FOLDER/PART.txt,
so that a part whose time ends has lost nothing of what it found. `--parts foresight` gives all of
the time to foresight, which needs it for every configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds that a part may take; what is left of them goes to the last one.
LIMITS = {
    "gpu_parts": 170,
    "tests": 90,
    "loader": 20,
    "generate": 60,
    "int8": 40,
    "train": 120,
    "foresight": 120,
}
GRACE = 10  # for foresight to print its table


def build_command(part: str, limit: float, smoke: bool) -> list[str]:
    """The part's command line."""
    if part == "tests":
        on_gpu = ["-n8", "-m", "cuda", "--continue-on-collection-errors"]
        chosen = ["-n0", "tests/device/test_hardware.py"] if smoke else on_gpu
        return [sys.executable, "-m", "pytest", "-q", *chosen]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{part}.py")]
    if part == "foresight":
        command += ["--budget", str(limit - GRACE)]
    return command + (["--smoke"] if smoke else [])


def run_part(command: list[str], limit: float, file: Path) -> str:
    """Run it, its lines to stdout and to `file`; how it ended."""
    with (
        file.open("w", encoding="utf-8") as copy,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process,
    ):

        def kill() -> None:  # its own processes too: they hold the pipe open
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, kill)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=copy, flush=True)
            code = process.wait()
            in_time = timer.is_alive()
        finally:
            timer.cancel()
            kill()
    return "ended well" if code == 0 else f"exit {code}" if in_time else "its time ended"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where each part's lines go"
    )
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    given = parser.parse_args()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    outcomes = []
    for part in given.parts:
        left = given.budget - (time.monotonic() - began)
        limit = left if part == given.parts[-1] else min(left, LIMITS[part])
        print(f"==== {part}: {limit:.0f} s at most", flush=True)
        started = time.monotonic()
        outcome = run_part(build_command(part, limit, given.smoke), limit, folder / f"{part}.txt")
        outcomes.append((part, time.monotonic() - started, outcome))
    for part, seconds, outcome in outcomes:
        print(f"{part:12} {seconds:6.0f} s  {outcome}")
    return int(any(outcome != "ended well" for _, _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
