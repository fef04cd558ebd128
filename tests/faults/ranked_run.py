"""`main.py` on several ranks, watched from outside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from conftest import ROOT
from preflight.checkpoints.store import list_checkpoints

PATIENCE_SECONDS = 240
# The command line, for which a rank may be stopped for two seconds.
_MAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main
from preflight.modes import launch
launch.STOPPED_SECONDS = 2
sys.exit(main.main(sys.argv[1:]))
"""


class RankedRun:
    """A run in `folder`, whose output folder and log have a `name`.

    Args:
        folder: where it runs.
        name: of its output folder.
        words: of the command line.
        launcher: the words before them; unset: those of `main.py`.
    """

    def __init__(
        self, folder: Path, name: str, words: Sequence[str], launcher: Sequence[str] = ()
    ) -> None:
        self.output_dir = folder / name
        argv = [*(launcher or (sys.executable, "-c", _MAIN)), *words, "--output-dir", name]
        self.log = folder / f"{name}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stderr=log, env=environment
            )
        self.parent = psutil.Process(self.process.pid)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in their order."""
        with contextlib.suppress(psutil.Error):  # some have just ended
            found = [p for p in self.parent.children() if "RANK" in p.environ()]
            return sorted(found, key=lambda process: int(process.environ()["RANK"]))
        return []

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(c.step >= step for c in list_checkpoints(self.output_dir)):
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < deadline, self.read_log()
            time.sleep(0.05)

    def finish(self) -> int:
        """Its exit code; none of its processes is left."""
        family = [self.parent, *self.parent.children(recursive=True)]
        code = self.process.wait(PATIENCE_SECONDS)
        _, left = psutil.wait_procs(family, timeout=5)
        assert not left
        return code

    def read_log(self) -> str:
        return self.log.read_text("utf-8")

    def hash_end(self, step: int) -> str:
        """Of the tensors at the run's end: weights or adapters, and the optimizer's."""
        newest = list_checkpoints(self.output_dir)[0]
        assert newest.step == step
        paths = sorted(newest.path.glob("*.safetensors"))
        assert len(paths) == 2
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
