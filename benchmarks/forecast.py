"""`--forecast`, measured: the bits per byte that six different runs reach beside their forecasts.

    python benchmarks/forecast.py                (about 80 minutes: six runs of ten minutes each)
    python benchmarks/forecast.py --only NAME    (one of them)
    python benchmarks/forecast.py --smoke        (a tiny model; some seconds)

Each run is timed for a few steps, so that it lasts about `--seconds`. Then `--forecast` and
`--train` run with the same flags, each in a process of its own. What a run reached is its last
evaluation on the validation part. The goals: within 3 %, and inside the 90 % interval in five of
six. A row is written to `--output` as soon as its run has ended; other rows of that file are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prepare import gather_text  # noqa: E402
from preflight.corpus.metadata import METADATA_NAME  # noqa: E402
from preflight.modes.forecast import REPORT_NAME  # noqa: E402
from preflight.training.metrics import METRICS_NAME, read_metrics  # noqa: E402

RESULTS = ROOT / "benchmarks/results/forecast.json"
SHAKESPEARE = ROOT.parent / "shared/corpora/tinyshakespeare.txt"
GOAL_ERROR, GOAL_INSIDE = 0.03, 5 / 6
TIMED_STEPS = 24  # of which the second half counts
STEPS_SHARE = 0.93  # of a run's time; the rest is for evaluations, samples and checkpoints
PYTHON_BYTES = 30_000_000  # of the standard library: nearly all of it

# Name, text, flags. Sizes are such that ten minutes on one core have a thousand steps and more, and
# read a text not many times.
_TINY = "--model-size custom --n-heads 4 --context-length 64 --batch-size 8 "
RUNS: dict[str, tuple[str, str]] = {
    "gpt2-sample-bpe": (
        "sample",
        _TINY + "--n-layers 2 --n-embeddings 64 --tokenizer bpe --vocab-size 1024",
    ),
    "llama-shakespeare-char": (
        "shakespeare",
        "--model-family llama --model-size custom --n-layers 4 --n-heads 4 --n-embeddings 192 "
        "--context-length 128 --tokenizer char --batch-size 16",
    ),
    "modern-python-bpe-muon": (
        "python",
        _TINY + "--model-family modern --n-layers 2 --n-embeddings 128 --tokenizer bpe "
        "--vocab-size 2048 --optimizer muon",
    ),
    "mlp-python-byte": (
        "python",
        "--model-family mlp --model-size custom --n-layers 2 --n-embeddings 64 "
        "--ffn-hid-dim 256 --context-length 64 --tokenizer byte --batch-size 16",
    ),
    "modern-sample-byte": (
        "sample",
        _TINY + "--model-family modern --n-layers 3 --n-embeddings 96 --tokenizer byte",
    ),
    "gpt2-python-byte": (
        "python",
        _TINY + "--n-layers 4 --n-embeddings 128 --tokenizer byte --learning-rate 1e-3",
    ),
}
SMOKE = {
    "smoke": (
        "small",
        "--model-size custom --n-layers 1 --n-heads 2 --n-embeddings 16 --context-length 16 "
        "--tokenizer byte --batch-size 4 --device cpu --no-mixed-precision --eval-every 64",
    )
}


def list_text_flags(kind: str, folder: Path) -> list[str]:
    """The flags of a text, which is written to `folder` where it is no file yet.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    if kind == "sample":
        return []
    path = SHAKESPEARE if kind == "shakespeare" else folder / f"{kind}.txt"
    if kind in ("python", "small") and not path.exists():
        gather_text(path, PYTHON_BYTES if kind == "python" else 100_000)
    if not path.is_file():
        raise FileNotFoundError(path)
    # nanoGPT's split of tiny Shakespeare: the last tenth.
    return ["--text-file", str(path), "--val-split", "0.1" if kind == "shakespeare" else "0.05"]


def call(mode: str, flags: list[str], threads: int | None) -> tuple[str, float]:
    """A mode's standard output, and its seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), mode, *flags],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{mode}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout, time.perf_counter() - began


def time_step(flags: list[str], folder: Path, threads: int | None) -> float:
    """Median seconds of a training step; the data folder is made on the way."""
    output = folder / "timed"
    call("--train", [*flags, "--max-steps", str(TIMED_STEPS), "--output-dir", str(output)], threads)
    rows = [row for row in read_metrics(output / METRICS_NAME) if row["event"] == "step"]
    tokens = rows[0]["tokens"]
    return statistics.median(tokens / row["tokens_per_second"] for row in rows[TIMED_STEPS // 2 :])


def measure_run(
    name: str, text: str, words: str, folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """The row of one run: its forecast, and what came."""
    row: dict[str, Any] = {"name": name, "text": text, "flags": words, "threads": given.threads}
    own = folder / name
    flags = [*words.split(), *list_text_flags(text, folder), "--data-dir", str(own / "data")]
    if given.smoke:
        steps = 64
    else:
        step_seconds = time_step(flags, own, given.threads)
        steps = max(64, round(STEPS_SHARE * given.seconds / step_seconds))
        print(f"{name}: {steps:,} steps of {step_seconds:.3f} s", file=sys.stderr, flush=True)
    flags += ["--max-steps", str(steps), "--output-dir", str(own / "run")]
    answer, forecast_seconds = call("--forecast", [*flags, "--json"], given.threads)
    forecast = json.loads(answer)
    _, train_seconds = call("--train", flags, given.threads)
    evaluations = [
        row for row in read_metrics(own / "run" / METRICS_NAME) if row["event"] == "eval"
    ]
    reached, bits = evaluations[-1]["bits_per_byte"], forecast["bits_per_byte"]
    kept = json.loads((own / "run" / REPORT_NAME).read_text(encoding="utf-8"))
    assert kept["reached"] == reached, "the run did not find its forecast"
    described = json.loads((own / "data" / METADATA_NAME).read_text(encoding="utf-8"))
    return row | {
        "steps": steps,
        "tokens": evaluations[-1]["tokens"],
        "epochs": evaluations[-1]["tokens"] / described["train"]["n_tokens"],
        "trainings": [
            {key: each[key] for key in ("n_steps", "bits_per_byte")}
            for each in forecast["trainings"]
        ],
        "val_loss": [forecast["val_loss"]["loss"], evaluations[-1]["val_loss"]],
        "forecast": bits["loss"],
        "interval": [bits["low"], bits["high"]],
        "reached": reached,
        "best": min(each["bits_per_byte"] for each in evaluations),
        "error_percent": 100 * (bits["loss"] / reached - 1),
        "inside": bits["low"] <= reached <= bits["high"],
        "seconds": [forecast["seconds"], train_seconds],
        "forecast_seconds": forecast_seconds,
    }


def describe(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    if "error" in row:
        return f"{row['name']:28} {row['error'].splitlines()[-1][:80]}"
    low, high = row["interval"]
    met = abs(row["error_percent"]) <= 100 * GOAL_ERROR
    return (
        f"{row['name']:28} {row['steps']:>7,} {row['epochs']:>6.1f} {row['forecast']:>8.3f} "
        f"{low:>6.3f}-{high:<6.3f} {row['reached']:>8.3f} {row['error_percent']:>+6.1f} % "
        f"{'inside' if row['inside'] else 'outside':>8} {'met' if met else 'MISSED':>7}"
    )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All rows and whether the goals are met."""
    ended = [row for row in rows if "error" not in row]
    return {
        "goals": {"error_percent": 100 * GOAL_ERROR, "inside": GOAL_INSIDE},
        "within": sum(abs(row["error_percent"]) <= 100 * GOAL_ERROR for row in ended),
        "inside": sum(row["inside"] for row in ended),
        "cores": os.cpu_count(),
        "rows": rows,
    }


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier call."""
    if path is None or not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600, help="length of each run")
    parser.add_argument("--threads", type=int, default=None, help="OMP_NUM_THREADS; unset: all")
    parser.add_argument("--output", type=Path, default=None, help="unset: results/forecast.json")
    parser.add_argument("--dir", default=None, help="folder for data and checkpoints")
    given = parser.parse_args()
    if given.smoke:  # tiny shapes gain nothing from a second thread, and wait for it
        given.threads = 1
    output = given.output or (None if given.smoke else RESULTS)
    runs = SMOKE if given.smoke else {name: RUNS[name] for name in given.only}
    rows = {row["name"]: row for row in read_rows(output)}
    print(
        f"{'run':28} {'steps':>7} {'epochs':>6} {'forecast':>8} {'90 % interval':13} "
        f"{'reached':>8} {'error':>8}"
    )
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        for name, (text, words) in runs.items():
            try:
                row = measure_run(name, text, words, Path(folder), given)
            except (RuntimeError, FileNotFoundError) as error:
                row = {"name": name, "error": f"{type(error).__name__}: {error}"}
            rows[name] = row
            print(describe(row), flush=True)
            if output is not None:
                text = json.dumps(summarize([*rows.values()]), indent=2)
                output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(summarize([*rows.values()])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
