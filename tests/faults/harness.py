"""What the fault tests share: the fork server, system calls counted and injected, comparisons."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# Every call that changes what a folder holds, or makes it durable.
CALLS = (
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "truncate",
    "ftruncate",
    "fallocate",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "sendfile",
    "copy_file_range",
)
OPENING = ("open", "openat", "creat")
TRAIN_FLAGS = [
    "--train",
    "--model-size",
    "custom",
    "--n-layers",
    "2",
    "--n-heads",
    "2",
    "--n-embeddings",
    "32",
    "--context-length",
    "32",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--no-mixed-precision",
    "--tokenizer",
    "gpt2",
    "--num-workers",
    "1",
    "--text-file",
    "text.txt",
]
PREPARE_FLAGS = [
    "--train",
    "--tokenizer",
    "gpt2",
    "--text-file",
    "text.txt",
    "--shard-size",
    "1024",
    "--val-split",
    "0.2",
    "--num-workers",
    "1",
]


def make_text(size: int, seed: int = 0) -> str:
    """About `size` bytes of lines of words."""
    words = (
        "the quick brown fox jumps over a lazy dog while seven wizards quietly mix jade boxes"
    ).split()
    lines, total, number = [], 0, seed
    while total < size:
        line = " ".join(words[(number * 7 + j * (number % 5 + 1)) % len(words)] for j in range(9))
        lines.append(line + ".\n")
        total, number = total + len(line) + 2, number + 1
    return "".join(lines)[:size]


# ---- the fork server ----------------------------------------------------------------------------


@dataclass
class Process:
    """A case under way in a forked process, and afterwards what came of it."""

    server: ForkServer
    pid: int
    stdout: Path
    stderr: Path

    def wait(self, seconds: float = 60) -> int:
        """Exit code, negative for a signal; AssertionError when it outlives `seconds`."""
        status = self.server.ask({"wait": [self.pid, seconds]})
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.server.ask({"wait": [self.pid, 10]})
            raise AssertionError(f"no end within {seconds} s; it said: {self.said()}")
        return os.waitstatus_to_exitcode(status)

    def said(self) -> str:
        """What it wrote to stderr so far."""
        return self.stderr.read_text(errors="replace") if self.stderr.is_file() else ""


class ForkServer:
    """Starts drivers of `drivers.py` in forks of a process that has torch loaded."""

    def __init__(self, scratch: Path) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._scratch, self._count = scratch, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env=os.environ | {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def ask(self, question: dict[str, Any]) -> Any:
        """One question, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        driver: str,
        *arguments: Any,
        cwd: Path,
        breaks: Sequence[str] = (),
        stopped: bool = False,
        stdout: Path | None = None,
        stderr: Path | None = None,
    ) -> Process:
        """Begin a case; with `stopped` it waits for a SIGCONT."""
        self._count += 1
        streams = [self._scratch / f"{self._count}.{name}" for name in ("out", "err")]
        streams = [stdout or streams[0], stderr or streams[1]]
        pid = self.ask(
            {
                "start": {
                    "driver": driver,
                    "arguments": arguments,
                    "cwd": str(cwd),
                    "breaks": list(breaks),
                    "stopped": stopped,
                    "stdout": str(streams[0]),
                    "stderr": str(streams[1]),
                }
            }
        )
        return Process(self, pid, *streams)

    def run(self, driver: str, *arguments: Any, cwd: Path, **options: Any) -> tuple[int, str]:
        """A case from begin to end: exit code and stderr."""
        process = self.start(driver, *arguments, cwd=cwd, **options)
        return process.wait(), process.said()

    def trace(
        self,
        driver: str,
        *arguments: Any,
        cwd: Path,
        inject: str = "",
        path: str = "",
        **options: Any,
    ) -> tuple[int, str, list[str]]:
        """A case under strace: exit code, stderr, and the lines of the trace.

        With a `path` only the calls that touch it are seen and counted.
        """
        process = self.start(driver, *arguments, cwd=cwd, stopped=True, **options)
        log = process.stderr.with_suffix(".strace")
        command = [
            "strace",
            "-f",
            "-y",
            "-s",
            "0",
            "-qq",
            "-o",
            str(log),
            "-e",
            "signal=none",
            "-e",
            "trace=" + ",".join("?" + name for name in CALLS + OPENING),
        ]
        command += ["-e", f"inject={inject}"] if inject else []
        command += ["-P", path] if path else []
        wait_until(lambda: read_status(process.pid, "State") in ("T", "Z", ""), 20)
        tracer = subprocess.Popen([*command, "-p", str(process.pid)], stderr=subprocess.PIPE)
        wait_until(lambda: read_status(process.pid, "TracerPid") not in ("0", ""), 10)
        os.kill(process.pid, signal.SIGCONT)
        code = process.wait()
        assert tracer.stderr is not None
        assert tracer.wait(timeout=20) == 0, tracer.stderr.read()
        tracer.stderr.close()
        return code, process.said(), log.read_text(errors="replace").splitlines()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)


def wait_until(holds: Any, seconds: float) -> None:
    """Poll until `holds()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def read_status(pid: int, key: str) -> str:
    """A field of /proc/PID/status, empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{key}:\s*(\S*)", text, re.MULTILINE)
    return found[1] if found else ""


# ---- system calls -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The `number`-th call of that name by a process, and what it touches."""

    call: str
    number: int
    text: str = field(compare=False)

    @property
    def paths(self) -> list[str]:
        """Absolute paths in the call's arguments, descriptors' included."""
        return re.findall(r'[<"](/[^>"]+)[>"]', self.text)

    def inject(self, what: str) -> str:
        """The strace expression that makes `what` happen at this call."""
        return f"{self.call}:{what}:when={self.number}"


_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)")


def find_points(lines: list[str], folders: list[Path], opening: bool = False) -> list[Point]:
    """The calls of the first process in a trace that change one of `folders`.

    With `opening` also those that open a file there to write, which may fail but, undone by no
    crash, are no crash points of their own.
    """
    counts: Counter[str] = Counter()
    points: list[Point] = []
    main_pid = _LINE.match(lines[0])[1] if lines else ""  # type: ignore[index]
    for line in lines:
        match = _LINE.match(line)
        if not match or match[1] != main_pid:
            continue
        call, text = match[2], match[3]
        counts[call] += 1
        touches = any(str(folder) in text for folder in folders)
        writes = call in CALLS or (
            opening and ("O_WRONLY" in text or "O_CREAT" in text or "O_RDWR" in text)
        )
        if touches and writes:
            points.append(Point(call, counts[call], text))
    return points


# ---- comparisons --------------------------------------------------------------------------------


def hash_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the lock, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def find_temporaries(folder: Path) -> list[str]:
    """What a writer should not have left."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.name.startswith(".") and path.name != ".lock"
    ]


def read_rows(output_dir: Path, *, clocks: bool = False) -> list[dict[str, Any]]:
    """The rows of the metrics file, without `resume` rows, and without what a clock decides."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = () if clocks else ("tokens_per_second", "peak_memory_bytes")
    return [
        {k: v for k, v in row.items() if k not in timed} for row in rows if row["event"] != "resume"
    ]


def read_state(output_dir: Path, step: int) -> tuple[str, dict[str, Any]]:
    """A checkpoint's weights (their hash) and its training state, less what a clock decides."""
    folder = output_dir / "milestones" / f"checkpoint-{step}"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    if (folder / "optimizer.safetensors").exists():  # since format v3
        state["optimizer"] = load_file(folder / "optimizer.safetensors")
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), state


def is_equal(a: Any, b: Any) -> bool:
    """Equal bit for bit, tensors and plain types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and a == b


def read_message(said: str) -> list[str]:
    """The closing message of a command that failed: its last lines that begin alike."""
    lines = said.splitlines()
    message: list[str] = []
    while lines and lines[-1].startswith("preflight: "):
        message.insert(0, lines.pop())
    return message


def find_message_faults(said: str, *words: str) -> str:
    """Why what was said is no good message; empty when it is one."""
    if "Traceback" in said or "internal error" in said:
        return f"a traceback or an internal error: {said}"
    message = read_message(said)
    if not 1 <= len(message) <= 5:
        return f"{len(message)} lines: {message}; the end of what was said: {said[-1000:]!r}"
    return "".join(f"no {word!r} in {message}" for word in words if word not in "\n".join(message))
