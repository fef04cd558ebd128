"""Sources of rows to shards: the ids of each document, whatever the batches and interruptions."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus import collector
from preflight.corpus.build import prepare_data
from preflight.corpus.data_report import read_report
from preflight.corpus.shards import DataFolder
from preflight.corpus.sources.protocol import SourceFacts, text_error
from preflight.corpus.sources.rows import Batch, LongRow, Row, RowSource, build_row_facts
from preflight.corpus.split import is_validation
from preflight.settings import DataSettings
from preflight.settings.kinds import SOURCES
from preflight.tokenization import TokenizerRecipe, load_tokenizer

GPT2 = load_tokenizer("gpt2")
ROOT = Path(__file__).parents[2]
WORDS = "the quick brown fox \u6f22\u5b57 jumps over 12 lazy dogs\n and sleeps".split(" ")


def parse_lines(payload: list[str | None], first_row: int) -> Iterator[Row]:
    """Texts as they are; a `!` is a fault."""
    for row, text in enumerate(payload, first_row):
        if text == "!":
            raise text_error("rows", f"row {row + 1}: no row")
        yield Row(text, {"score": len(text or "") % 10})


class Rows(RowSource):
    """Rows of a JSON file: a text, null, or a number for a long row of so many words."""

    parse = staticmethod(parse_lines)
    batch_rows = 7

    def __init__(self, path: str) -> None:
        self.name, self.label = Path(path).name, path

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        data = Path(self.label).read_bytes()
        return build_row_facts(len(data), hashlib.sha256(data).hexdigest())

    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        rows = json.loads(Path(self.label).read_text())
        at = after or 0
        while at < len(rows):
            if isinstance(rows[at], int):
                yield LongRow(spell_long(rows[at]), at, at + 1, lambda: 10)
                at += 1
                continue
            batch = list(
                itertools.takewhile(
                    lambda row: not isinstance(row, int), rows[at:][: self.batch_rows]
                )
            )
            yield Batch(batch, at, at + len(batch), 10)
            at += len(batch)


def spell_long(n_words: int) -> Iterator[bytes]:
    text = " ".join(itertools.islice(itertools.cycle(WORDS), n_words)).encode()
    return (text[i : i + 1000] for i in range(0, len(text), 1000))


def find_rows(given: str | None, settings: DataSettings) -> list[RowSource] | None:
    return [Rows(given)] if given is not None and given.endswith(".rows") else None


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_targets", SOURCES._targets | {"rows": find_rows})


def draw_text(draw: random.Random, most: int = 60) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, most)))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def build(tmp_path: Path, *paths: Path, n_workers: int = 0, **values: Any) -> DataFolder:
    settings = DataSettings(
        text_file=tuple(map(str, paths)),
        data_dir=str(tmp_path / values.pop("data_dir", "data")),
        **{"shard_size": 1024, **values},
    )
    return prepare_data(settings, GPT2, n_workers=n_workers, block_bytes=700)


def read_ids(data: DataFolder, split: str) -> list[int]:
    return np.concatenate([*getattr(data, split).open()]).tolist()


def encode_all(rows: list[Any], split: str, share: float = 0.05) -> list[int]:
    """The oracle: each row in one piece, and the end of the text behind it."""
    ids: list[int] = []
    for number, row in enumerate(rows):
        text = b"".join(spell_long(row)).decode() if isinstance(row, int) else row
        if text and is_validation(number, share) == (split == "val"):
            ids += [*GPT2.encoding.encode_ordinary(text), GPT2.end_of_text_id]
    return ids


def draw_rows(seed: int, n_rows: int) -> list[Any]:
    draw = random.Random(seed)
    rows: list[Any] = [draw_text(draw) for _ in range(n_rows)]
    for at in draw.sample(range(n_rows), 3):
        rows[at] = draw.randrange(500, 3000)
    rows[n_rows // 2] = ""
    return rows


@pytest.mark.parametrize("n_workers", [0, 2])
def test_ids_are_those_of_each_row(tmp_path: Path, n_workers: int) -> None:
    rows = draw_rows(1, 400)
    data = build(tmp_path, write_rows(tmp_path / "a.rows", rows), n_workers=n_workers)
    for split in ("train", "val"):
        assert read_ids(data, split) == encode_all(rows, split)
    assert data.train.n_documents + data.val.n_documents == 399
    texts = [b"".join(spell_long(r)).decode() if isinstance(r, int) else r for r in rows]
    assert data.train.n_bytes + data.val.n_bytes == sum(len(text.encode()) for text in texts)


def test_text_and_rows_together(tmp_path: Path) -> None:
    rows = draw_rows(2, 300)
    text = tmp_path / "b.txt"
    text.write_text("one line\n" * 500)
    data = build(tmp_path, text, write_rows(tmp_path / "a.rows", rows))
    from_rows = encode_all(rows, "train")
    assert read_ids(data, "train")[-len(from_rows) :] == from_rows
    assert read_ids(data, "val")[-len(encode_all(rows, "val")) :] == encode_all(rows, "val")


DRIVER = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from corpus.test_rows import GPT2, SOURCES, find_rows
from preflight.corpus import collector
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings

SOURCES._targets["rows"] = find_rows
collector.SAVE_SECONDS = 0.01
settings = DataSettings(**{values!r})
print("go", flush=True)
prepare_data(settings, GPT2, n_workers={n_workers}, block_bytes=700)
"""


def hash_tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


MODES: dict[str, dict[str, Any]] = {
    "in order": {},
    "mixed": {"mix": ("a.rows=0.7", "b.rows=0.3")},
    "deduplicated": {"deduplicate": "exact"},
    "near copies": {"deduplicate": "near", "mix": ("a.rows=0.7", "b.rows=0.3")},
}


def write_two(tmp_path: Path, n_rows: int) -> list[Path]:
    rows = draw_rows(3, n_rows)
    rows[n_rows // 2 : n_rows // 2 + 50] = rows[:50]
    write_rows(tmp_path / "b.rows", draw_rows(4, n_rows // 2))
    return [write_rows(tmp_path / "a.rows", rows), tmp_path / "b.rows"]


class StopSoon(StopFlag):
    """A signal that comes when the flag was looked at so many times."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    @property
    def stopping(self) -> bool:
        self._left -= 1
        if self._left < 0:
            self.received = signal.SIGTERM
        return self.received is not None


@pytest.mark.parametrize("mode", MODES)
def test_stopped_again_and_again(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call comes a little further; what comes out is what an unbroken build gives."""
    paths = write_two(tmp_path, 400)
    whole = build(tmp_path, *paths, data_dir="whole", **MODES[mode])
    settings = DataSettings(
        text_file=tuple(map(str, paths)),
        shard_size=1024,
        data_dir=str(tmp_path / "cut"),
        **MODES[mode],
    )
    for n_stops in range(100):
        try:
            prepare_data(settings, GPT2, StopSoon(13 + n_stops), n_workers=0, block_bytes=700)
        except PreflightError as error:
            assert error.code == ExitCode.SIGTERM
        else:
            break
    assert n_stops > 3
    assert hash_tree(tmp_path / "cut") == hash_tree(whole.path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(tmp_path: Path, mode: str) -> None:
    """SIGKILL up to 30 times; what comes out is what an unbroken build gives."""
    draw = random.Random(mode)
    paths, more = write_two(tmp_path, 6000), MODES[mode]
    values = {"text_file": tuple(map(str, paths)), "shard_size": 4096, **more}
    began = time.perf_counter()
    whole = build(tmp_path, *paths, data_dir="whole", shard_size=4096, **more)
    seconds = time.perf_counter() - began  # a fast machine is killed sooner
    target = tmp_path / "cut"
    environment = dict(os.environ)
    code = DRIVER.format(root=str(ROOT), values={**values, "data_dir": str(target)}, n_workers=0)
    n_killed = 0
    for _ in range(40):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n", child.stderr and child.stderr.read()[-2000:]
        time.sleep(draw.uniform(0.02, 0.3) * seconds)
        child.kill()
        _, errors = child.communicate()
        n_killed += child.returncode == -signal.SIGKILL
        if child.returncode == 0 or n_killed == 30:
            break
        assert child.returncode == -signal.SIGKILL, errors[-2000:]
    assert n_killed > 3
    settings = DataSettings(**{**values, "data_dir": str(target)})
    prepare_data(settings, GPT2, n_workers=0, block_bytes=700)
    assert hash_tree(target) == hash_tree(whole.path)


def test_a_mix_has_its_shares_at_every_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = draw_rows(5, 4000), draw_rows(6, 2000)
    a[7] = b[9] = "a"
    paths = [write_rows(tmp_path / "wiki.rows", a), write_rows(tmp_path / "code.rows", b)]
    data = build(tmp_path, *paths, mix=("code=0.25", "wiki=0.75"), val_split=0.01)
    order = read_ids(data, "train")
    assert order != encode_all(a, "train", 0.01) + encode_all(b, "train", 0.01)
    # Of two sources with an alphabet of its own each, the shares can be read off the ids.
    marked = [write_rows(tmp_path / "x.rows", ["x" * 40] * 4000)]
    marked += [write_rows(tmp_path / "y.rows", ["y" * 40] * 4000)]
    data = build(tmp_path, *marked, mix=("x=0.6", "y=0.4"), data_dir="xy", val_split=0.01)
    ids = np.array(read_ids(data, "train"))
    documents = np.split(ids, np.flatnonzero(ids == GPT2.end_of_text_id) + 1)
    is_x = np.array([GPT2.decode(d[:-1].tolist()).startswith("x") for d in documents if len(d)])
    sizes = np.array([len(d) for d in documents if len(d)])
    for mark in range(1000, len(ids), 1000):
        upto = np.cumsum(sizes) <= mark
        share = sizes[upto & is_x].sum() / sizes[upto].sum()
        assert abs(share - 0.6) < 40 / mark + 0.01
    n_y = int((~is_x).sum())
    assert n_y < 4000  # x is used up first
    assert int(is_x.sum()) + len(encode_all(["x" * 40] * 4000, "val", 0.01)) // 21 >= 3950


@pytest.mark.parametrize(
    ("mix", "match"),
    [
        (("a=0.5", "b=0.6"), "sum is 1"),
        (("a=0.5", "zebra=0.5"), "no source has that name"),
        (("a.r=1.0",), "none of its names"),
        (("rows=0.5", "a.rows=0.5"), "several of its names"),
    ],
)
def test_a_mix_that_fits_no_source(tmp_path: Path, mix: tuple[str, ...], match: str) -> None:
    paths = [write_rows(tmp_path / name, draw_rows(1, 300)) for name in ("a.rows", "b.rows")]
    with pytest.raises(PreflightError, match=match) as caught:
        build(tmp_path, *paths, mix=mix)
    assert caught.value.code == ExitCode.FLAGS


def test_few_rows_share_out_by_their_number(tmp_path: Path) -> None:
    rows = ["one two", "three", "four", "five six"]
    data = build(tmp_path, write_rows(tmp_path / "a.rows", rows))
    expected = [*GPT2.encoding.encode_ordinary("five six"), GPT2.end_of_text_id]
    assert read_ids(data, "val") == expected
    assert data.train.n_documents == 3


def test_few_rows_in_each_of_many_sources(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(200)]
    paths = [write_rows(tmp_path / f"{i:03}.rows", rows[i : i + 2]) for i in range(0, 200, 2)]
    data = build(tmp_path, *paths)
    assert read_ids(data, "val") == encode_all(rows, "val")
    few = build(tmp_path, *paths[:3], data_dir="few")
    assert read_ids(few, "val") == [*GPT2.encoding.encode_ordinary(rows[5]), GPT2.end_of_text_id]


def test_very_many_sources_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "MAX_TALLIES", 3)
    paths = [write_rows(tmp_path / f"{i}.rows", [f"row {i}"] * 60) for i in range(6)]
    data = build(tmp_path, *paths)
    report = read_report(data.path)
    assert report is not None
    assert [source["name"] for source in report["sources"]] == ["0.rows", "1.rows", "4 more files"]
    assert [source["n_kept"] for source in report["sources"]] == [60, 60, 240]
    assert report["totals"]["n_kept_tokens"] == data.train.n_tokens + data.val.n_tokens


def test_rows_of_one_batch_are_counted_before_they_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rows, "batch_rows", 1000)
    rows = ["some text"] * 300
    data = build(tmp_path, write_rows(tmp_path / "a.rows", rows))
    assert read_ids(data, "val") == encode_all(rows, "val")


def test_bad_rows_are_refused_above_one_percent(tmp_path: Path) -> None:
    rows: list[Any] = ["some text"] * 990 + [None] * 10
    build(tmp_path, write_rows(tmp_path / "a.rows", rows))
    rows[5] = None
    with pytest.raises(
        PreflightError, match="11 of 1,000 rows hold no text, the first: row 6"
    ) as e:
        build(tmp_path, write_rows(tmp_path / "b.rows", rows), data_dir="other")
    assert e.value.code == ExitCode.TEXT
    data = build(tmp_path, tmp_path / "b.rows", data_dir="other", allow_bad_rows=True)
    assert data.train.n_documents + data.val.n_documents == 989


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_fault_in_a_worker_is_told(tmp_path: Path, n_workers: int) -> None:
    rows: list[Any] = [*draw_rows(1, 300), "!"]
    with pytest.raises(PreflightError, match="row 301: no row") as caught:
        build(tmp_path, write_rows(tmp_path / "a.rows", rows), n_workers=n_workers)
    assert caught.value.code == ExitCode.TEXT
    assert not (tmp_path / "data" / "metadata.json").exists()


def test_limit_and_validation_file(tmp_path: Path) -> None:
    rows = draw_rows(1, 300)
    path, val = (write_rows(tmp_path / name, rows) for name in ("a.rows", "b.rows"))
    data = build(tmp_path, path, val_file=(str(val),), limit_documents=50)
    expected = encode_all(rows[:50], "train") and [
        i
        for row in rows[:50]
        for i in encode_all([row], "train", 1e-9) or encode_all([row], "val", 1e-9)
    ]
    assert read_ids(data, "train") == expected
    assert read_ids(data, "val") == expected


def test_exact_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [f"text number {i % 90}" for i in range(300)]
    data = build(tmp_path, write_rows(tmp_path / "a.rows", rows), deduplicate="exact")
    assert data.train.n_documents + data.val.n_documents == 90
    assert read_ids(data, "train") == encode_all(rows[:90], "train")


def test_filters_and_cleaning(tmp_path: Path) -> None:
    rows = draw_rows(1, 400)
    data = build(
        tmp_path, write_rows(tmp_path / "a.rows", rows), filter=("score>=5", "min_tokens=10")
    )
    kept = [
        row if isinstance(row, str) and len(row) % 10 >= 5 and len(GPT2.encode(row)) >= 10 else ""
        for row in rows
    ]
    for split in ("train", "val"):
        assert read_ids(data, split) == encode_all(kept, split)


def test_token_arrays(tmp_path: Path) -> None:
    ids = np.array(encode_all(["some words"] * 400, "train", 1e-9), np.uint16)
    ids.tofile(tmp_path / "train.bin")
    np.save(tmp_path / "val.npy", ids[:300])
    data = build(tmp_path, tmp_path / "train.bin", val_file=(str(tmp_path / "val.npy"),))
    assert read_ids(data, "train") == ids.tolist()
    assert read_ids(data, "val") == ids[:300].tolist()
    assert data.train.n_bytes == len("some words") * data.train.n_documents
    assert data.train.n_documents == int((ids == GPT2.end_of_text_id).sum())
    shared = build(tmp_path, tmp_path / "train.bin", data_dir="shared", val_split=0.1)
    assert read_ids(shared, "train") + read_ids(shared, "val") == ids.tolist()
    assert shared.val.n_tokens == round(len(ids) * 0.1)
    settings = DataSettings(text_file=(str(tmp_path / "train.bin"),), data_dir=str(tmp_path / "d"))
    with pytest.raises(PreflightError, match="--tokenizer must name") as caught:
        prepare_data(settings, TokenizerRecipe("auto"))
    assert caught.value.code == ExitCode.FLAGS


def test_a_tokenizer_is_made_from_rows(tmp_path: Path) -> None:
    rows = draw_rows(1, 300)
    settings = DataSettings(
        text_file=(str(write_rows(tmp_path / "a.rows", rows)),), data_dir=str(tmp_path / "data")
    )
    data = prepare_data(settings, TokenizerRecipe("char"), n_workers=0)
    tokenizer = data.load_tokenizer()
    ids = [i for i in read_ids(data, "train") if i != tokenizer.end_of_text_id]
    texts = [b"".join(spell_long(r)).decode() if isinstance(r, int) else r for r in rows]
    kept = [text for number, text in enumerate(texts) if not is_validation(number, 0.05)]
    assert tokenizer.decode(ids) == "".join(kept)


def test_another_preparation_is_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.rows", draw_rows(1, 300))
    first = build(tmp_path, path)
    assert build(tmp_path, path).fingerprint == first.fingerprint
    assert "reusing" in capsys.readouterr().err
    changed = build(tmp_path, path, limit_documents=100)
    assert "--limit-documents changed" in capsys.readouterr().err
    assert changed.fingerprint != first.fingerprint
    assert collector.SAVE_SECONDS > 1
