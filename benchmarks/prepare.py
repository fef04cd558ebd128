"""Preparation of text, measured: rate against tiktoken, peak memory.

    python benchmarks/prepare.py            (300 MB of text, a 200 MB line; some minutes)
    python benchmarks/prepare.py --smoke    (small; under a minute anywhere)
    python benchmarks/prepare.py --growth   (10 MB to 2 GB: is the time linear, the memory flat?)

The rate is file to verified shards, as a share of workers x one core of ``encode_ordinary`` on
the same text, in turns, the median of three; the goal is 0.9. Memory is the peak of the whole
process tree, less what an idle interpreter with the same imports has; the goal is under 512 MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.tokenization import load_tokenizer  # noqa: E402

_PREPARE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from preflight.corpus import build
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer
if __name__ == "__main__":
    tokenizer = load_tokenizer("gpt2")
    tokenizer.fingerprint
    values = DataSettings(text_file=(sys.argv[2],), data_dir=sys.argv[3],
                          num_workers=int(sys.argv[4]))
    print("ready", flush=True)
    sys.stdin.readline()
    began, used = time.perf_counter(), time.process_time()
    data = build.prepare_data(values, tokenizer)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    print(json.dumps([seconds, used, data.train.n_tokens + data.val.n_tokens]))
"""


def gather_text(path: Path, n_bytes: int) -> None:
    """Write a text of about `n_bytes`: the standard library's source, repeated."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with open(path, "wb") as out:
        while out.tell() < n_bytes:
            for file in files:
                if "site-packages" in file.parts:
                    continue
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                out.write(text.encode())
                if out.tell() >= n_bytes:
                    break


def write_line(path: Path, n_bytes: int) -> None:
    """One letter, again and again: one line, one piece of the split pattern."""
    with open(path, "wb") as out:
        out.write(b"the line: ")
        for _ in range(n_bytes // 2**20):
            out.write(b"a" * 2**20)
        out.write(b" and its end is here.\n" * 200)


def measure_tiktoken(
    path: Path, n_bytes: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Bytes a second of one core of ``encode_ordinary``, in calls of 1 MB."""
    encoding = load_tokenizer("gpt2").encoding
    with open(path, "rb") as file:
        blocks = [file.read(10**6).decode("utf-8", "ignore") for _ in range(n_bytes // 10**6)]
    began = clock()
    for block in blocks:
        encoding.encode_ordinary(block)
    return sum(len(block.encode()) for block in blocks) / (clock() - began)


def measure_tiktoken_together(path: Path, n_bytes: int, n_workers: int) -> float:
    """The same of `n_workers` bare processes at once: what the machine has to give."""
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
        return sum(
            pool.map(
                measure_tiktoken,
                [path] * n_workers,
                [n_bytes] * n_workers,
                [time.perf_counter] * n_workers,
            )
        )


def measure_preparation(path: Path, n_workers: int, every: float = 0.5) -> dict[str, Any]:
    """Seconds, tokens and peak memory of preparing one file in a process of its own.

    `every`: seconds between two looks at the memory. A look takes 8 ms of a core.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        script = Path(folder) / "prepare_one.py"
        script.write_text(_PREPARE)
        process = subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(ROOT),
                str(path),
                str(Path(folder) / "data"),
                str(n_workers),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        idle, peak = measure_tree_bytes(process.pid), 0
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, measure_tree_bytes(process.pid))
            time.sleep(every)
        seconds, used, n_tokens = json.loads(process.stdout.read())
    return {
        "seconds": round(seconds, 2),
        "parent_cpu_seconds": round(used, 2),
        "tokens": n_tokens,
        "peak_over_idle_mb": round((peak - idle) / 1e6),
        "idle_mb": round(idle / 1e6),
    }


def measure_tree_bytes(pid: int) -> int:
    """Memory of a process and its children; pages that they share count once (PSS), on Linux."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                full = process.memory_full_info()
                total += getattr(full, "pss", full.rss)
            except psutil.Error:
                continue
    except psutil.Error:
        return 0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dir", default=None, help="folder for the texts")
    parser.add_argument("--growth", action="store_true", help="several sizes, the rate alone")
    given = parser.parse_args()
    if given.growth:
        measure_growth(given.workers, given.dir)
        return
    n_bytes = (24 if given.smoke else given.megabytes) * 10**6
    line_bytes = (4 if given.smoke else 200) * 10**6
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        text, line = (Path(folder) / name for name in ("text", "line"))
        gather_text(text, n_bytes)
        write_line(line, line_bytes)
        n_sample = min(n_bytes, 30 * 10**6)
        result: dict[str, Any] = {"text_mb": n_bytes // 10**6, "workers": given.workers}
        turns = []
        for _ in range(1 if given.smoke else 3):  # a machine's clock moves
            core = given.workers * measure_tiktoken(text, n_sample)
            together = measure_tiktoken_together(text, n_sample, given.workers)
            found = measure_preparation(text, given.workers)
            core = (core + given.workers * measure_tiktoken(text, n_sample)) / 2
            rate = text.stat().st_size / found["seconds"]
            turns.append(
                found
                | {
                    "mb_s": round(rate / 1e6, 2),
                    "ratio": round(rate / core, 3),
                    "tiktoken_core_mb_s": round(core / given.workers / 1e6, 2),
                    "tiktoken_together_ratio": round(together / core, 3),
                }
            )
        result["text"] = sorted(turns, key=lambda turn: turn["ratio"])[len(turns) // 2]
        result["text"]["ratios"] = [turn["ratio"] for turn in turns]
        result["line"] = {
            "mb": line_bytes // 10**6,
            **measure_preparation(line, given.workers, every=0.1),
        }
    print_table(result)
    print(json.dumps(result))


def measure_growth(n_workers: int, folder: str | None) -> None:
    """Rate and memory over sizes; linear time is an even rate."""
    rows = []
    for megabytes in (10, 100, 1000, 2000):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path = Path(name) / "text"
            gather_text(path, megabytes * 10**6)
            found = measure_preparation(path, n_workers)
            rows.append(
                {
                    "mb": megabytes,
                    **found,
                    "mb_s": round(path.stat().st_size / 1e6 / found["seconds"], 2),
                }
            )
        print(
            f"{megabytes:>6} MB: {rows[-1]['seconds']:>7.2f} s, {rows[-1]['mb_s']:>6.2f} MB/s, "
            f"peak over idle {rows[-1]['peak_over_idle_mb']} MB"
        )
    print(json.dumps(rows))


def print_table(result: dict[str, Any]) -> None:
    """The figures beside their goals."""
    text, line = result["text"], result["line"]
    rows: list[tuple[str, Any, str]] = [
        (f"rate over {result['workers']} x one core of tiktoken", text["ratio"], ">= 0.9"),
        (
            f"{result['workers']} bare processes of tiktoken at once, over the same",
            text["tiktoken_together_ratio"],
            "",
        ),
        (f"MB/s ({result['text_mb']} MB text)", text["mb_s"], ""),
        ("peak memory over idle, text (MB)", text["peak_over_idle_mb"], "< 512"),
        (f"peak memory over idle, {line['mb']} MB line (MB)", line["peak_over_idle_mb"], "< 512"),
        (f"seconds, {line['mb']} MB line", line["seconds"], ""),
    ]
    for name, value, goal in rows:
        print(f"{name:48} {value:>10} {goal:>8}")


if __name__ == "__main__":
    main()
