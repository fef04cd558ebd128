"""Sources of rows, measured: rate over tiktoken's, peak memory, shares of a mix.

    python benchmarks/sources.py            (200 MB of text in each form; about half an hour)
    python benchmarks/sources.py --smoke    (small; under a minute anywhere)

The rate is file to verified shards, as a share of workers x one core of ``encode_ordinary`` on the
same text, in turns, the median of three; the goal is 0.85 for jsonl and parquet. Memory is the peak
of the process tree, less what an idle interpreter with the same imports has; the goal is under
512 MB and 200 MB for each process. The goal of a mix is 1 % at every 10 M tokens.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prepare import (  # noqa: E402
    gather_text,
    measure_preparation,
    measure_tiktoken,
)
from preflight.corpus.build import prepare_data  # noqa: E402
from preflight.corpus.data_report import read_report  # noqa: E402
from preflight.settings import DataSettings  # noqa: E402
from preflight.tokenization import load_tokenizer  # noqa: E402

GOAL_RATE, GOAL_BYTES, WORKER_BYTES, GOAL_SHARE = 0.85, 512e6, 200e6, 0.01
ROW_CHARACTERS = 4000  # on average, as web pages have
GROUP_ROWS = 1000  # of a parquet file
Texts = Iterator[str]


def cut_documents(text: Path, seed: int = 1) -> Texts:
    """The text in documents of uneven lengths."""
    draw = random.Random(seed)
    with open(text, encoding="utf-8") as file:
        while document := file.read(int(draw.expovariate(1 / ROW_CHARACTERS)) + 1):
            yield document


def write_jsonl(path: Path, texts: Texts) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")


def write_jsonl_gz(path: Path, texts: Texts) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def write_csv(path: Path, texts: Texts) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([number, text] for number, text in enumerate(texts))


def write_parquet(path: Path, texts: Texts) -> None:
    write_groups(path, texts, GROUP_ROWS)


def write_groups(path: Path, texts: Texts, n_rows: int) -> None:
    """Row groups of `n_rows` rows each."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.large_string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[str] = []
        for text in texts:
            rows.append(text)
            if len(rows) == n_rows:
                writer.write_table(pyarrow.table({"text": rows}, schema), row_group_size=n_rows)
                rows = []
        if rows:
            writer.write_table(pyarrow.table({"text": rows}, schema), row_group_size=n_rows)


def write_text_gz(path: Path, texts: Texts) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for text in texts:
            file.write(text)


FORMS: dict[str, Callable[[Path, Texts], None]] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "jsonl.gz": write_jsonl_gz,
    "csv": write_csv,
    "txt.gz": write_text_gz,
}


def measure_rates(text: Path, n_workers: int, n_turns: int) -> Iterator[dict[str, Any]]:
    """A row for each form of the text."""
    n_bytes = text.stat().st_size
    for form, write in FORMS.items():
        path = text.with_suffix(f".{form}")
        write(path, cut_documents(text))
        turns = []
        for _ in range(n_turns):
            before = measure_tiktoken(text, min(n_bytes, 30 * 10**6))
            found = measure_preparation(path, n_workers)
            core = (before + measure_tiktoken(text, min(n_bytes, 30 * 10**6))) / 2
            rate = n_bytes / found["seconds"]
            turns.append(found | {"mb_s": rate / 1e6, "ratio": rate / core / n_workers})
        path.unlink()
        turns.sort(key=lambda turn: turn["ratio"])
        yield turns[len(turns) // 2] | {
            "form": form,
            "ratios": [round(turn["ratio"], 3) for turn in turns],
        }


def list_memory_cases(text: Path, megabytes: int) -> Iterator[tuple[str, Callable[[], Path]]]:
    """(name, function that writes the file) of what could need much memory."""
    row = "a word and another one; " * (megabytes * 10**6 // 5 // 24)

    def write(name: str, to_file: Callable[[Path], None]) -> Callable[[], Path]:
        path = text.with_name(name)
        return lambda: (to_file(path), path)[1]

    def repeat(n_bytes: int) -> Texts:
        size = 0
        while size < n_bytes:
            for document in cut_documents(text):
                yield document
                size += len(document)
                if size >= n_bytes:
                    return

    big = megabytes * 10**6
    rows = [*["short"] * 300, row, *["short"] * 300]
    yield f"jsonl of {megabytes} MB", write("big.jsonl", lambda p: write_jsonl(p, repeat(big)))
    yield (
        f"jsonl, a row of {len(row) // 10**6} MB",
        write("row.jsonl", lambda p: write_jsonl(p, iter(rows))),
    )
    yield (
        f"parquet, a row of {len(row) // 10**6} MB",
        write("row.parquet", lambda p: write_groups(p, iter(rows), 10**6)),
    )
    yield (
        f"parquet, one row group of {megabytes} MB",
        write("group.parquet", lambda p: write_groups(p, repeat(big), 10**9)),
    )


def measure_mix(text: Path) -> dict[str, Any]:
    """The largest difference from the shares asked for, in full stretches of 10 M tokens."""
    half = text.with_name("b.jsonl")
    write_jsonl(half, (document[::-1] for document in cut_documents(text, seed=2)))
    first = text.with_name("a.jsonl")
    write_jsonl(first, cut_documents(text))
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        settings = DataSettings(
            text_file=(str(first), str(half)),
            mix=("a.jsonl=0.7", "b.jsonl=0.3"),
            data_dir=str(Path(folder) / "data"),
        )
        data = prepare_data(settings, load_tokenizer("gpt2"))
        report = read_report(data.path)
    assert report is not None
    mix = report["mix"]
    return {
        "tokens": report["totals"]["n_kept_tokens"],
        "stretches": mix["n_stretches"],
        "largest_difference": mix["largest_difference"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the text")
    parser.add_argument("--memory-megabytes", type=int, default=1000, help="of the large files")
    parser.add_argument("--only", choices=("rates", "memory", "mix"), default=None)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dir", default=None, help="folder for the texts")
    given = parser.parse_args()
    result: dict[str, Any] = {"workers": given.workers, "rates": [], "memory": []}
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        text = Path(folder) / "text"
        gather_text(text, (1 if given.smoke else given.megabytes) * 10**6)
        if given.only in (None, "rates"):
            for row in measure_rates(text, given.workers, 1 if given.smoke else 3):
                result["rates"].append(row)
                print(
                    f"{row['form']:40} {row['mb_s']:6.2f} MB/s, {row['ratio']:.3f} of tiktoken "
                    f"{row['ratios']}, peak {row['peak_over_idle_mb']} MB",
                    flush=True,
                )
        if given.only in (None, "memory"):
            for name, write in list_memory_cases(
                text, 10 if given.smoke else given.memory_megabytes
            ):
                path = write()
                found = measure_preparation(path, given.workers, every=0.1)
                path.unlink()
                result["memory"].append(found | {"name": name})
                print(
                    f"{name:40} peak {found['peak_over_idle_mb']} MB, {found['seconds']} s",
                    flush=True,
                )
        if given.only in (None, "mix"):
            result["mix"] = measure_mix(text)
            print(f"{'mix 0.7, 0.3':40} {result['mix']}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
