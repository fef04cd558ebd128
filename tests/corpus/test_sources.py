"""A new kind of source is one file and one row."""

from __future__ import annotations

import hashlib
import json
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.build import prepare_data
from preflight.corpus.shards import DataFolder
from preflight.corpus.sources import Document, Source, SourceFacts, find_sources
from preflight.settings import DataSettings
from preflight.settings.kinds import SOURCES
from preflight.tokenization import load_tokenizer

GPT2 = load_tokenizer("gpt2")


class JsonLines(Source):
    """A document on each line, given out in chunks of 5 bytes that cut characters."""

    def __init__(self, path: Path) -> None:
        self.name, self.label = path.name, f"jsonl:{path}"
        self._path = path

    def _read(self) -> list[bytes]:
        return [json.loads(line).encode() for line in self._path.read_text().splitlines()]

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        content = self._path.read_bytes()
        sizes = array("q", map(len, self._read()))
        return SourceFacts(len(content), hashlib.sha256(content).hexdigest(), sizes)

    def documents(self, start: int = 0, offset: int = 0) -> Iterator[Document]:
        for document in self._read()[start:]:
            yield (document[i : i + 5] for i in range(offset, len(document), 5))
            offset = 0


def find(given: str | None, settings: DataSettings) -> list[Source] | None:
    if given is None or not given.startswith("jsonl:"):
        return None
    return [JsonLines(Path(given.removeprefix("jsonl:")))]


@pytest.fixture(autouse=True)
def fake_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_targets", SOURCES._targets | {"jsonl": find})


def write(folder: Path, texts: list[str]) -> tuple[str, str]:
    """The same documents as JSON lines and as a text with separators: two values of the flag."""
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (folder / "a.txt").write_text("|||".join(texts))
    return f"jsonl:{folder / 'a.jsonl'}", str(folder / "a.txt")


def prepare(
    folder: Path, given: str, stop: StopFlag | None = None, block_bytes: int = 64
) -> DataFolder:
    settings = DataSettings(
        text_file=(given,), data_dir=str(folder), shard_size=1024, document_separator="|||"
    )
    return prepare_data(settings, GPT2, stop, block_bytes=block_bytes, n_workers=0)


MANY = [f"document {i} \u6f22\u5b57 and some words" * (1 + i % 4) for i in range(300)]
FEW = ["one long document \u6f22\u5b57. " * 700, "a short one", "another" * 30]


class StopSoon(StopFlag):
    """A stop after a number of looks at the flag."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.polls = polls

    @property
    def stopping(self) -> bool:
        self.polls -= 1
        if self.polls < 0:
            self.received = signal.SIGTERM
        return self.received is not None


@pytest.mark.parametrize(("texts", "by"), [(MANY, "documents"), (FEW, "tail")])
def test_the_ids_are_those_of_a_text_file(tmp_path: Path, texts: list[str], by: str) -> None:
    fake, text = write(tmp_path, texts)
    expected = prepare(tmp_path / "text", text)
    assert expected.metadata.split.by == by
    for name, block_bytes in (("fake", 64), ("large", 10_000)):
        data = prepare(tmp_path / name, fake, block_bytes=block_bytes)
        assert data.fingerprint == expected.fingerprint
        assert data.metadata.sources[0].name == "a.jsonl"


@pytest.mark.parametrize("texts", [MANY, FEW])
def test_an_interrupted_build_continues(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, text = write(tmp_path, texts)
    expected = prepare(tmp_path / "text", text)
    resumed = 0
    for polls in range(20, 300, 40):
        folder = tmp_path / str(polls)
        try:
            prepare(folder, fake, StopSoon(polls), block_bytes=100)
        except PreflightError as error:
            assert error.code == ExitCode.SIGTERM
        assert prepare(folder, fake, block_bytes=30).fingerprint == expected.fingerprint
        resumed += "resuming" in capsys.readouterr().err
    assert resumed > 2


def test_a_source_that_changes_or_ends_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, _ = write(tmp_path, MANY)
    for broken in (
        lambda self, start=0, offset=0: (iter([b"x"]) for _ in MANY[start:]),
        lambda self, start=0, offset=0: iter([]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(JsonLines, "documents", broken)
            with pytest.raises(PreflightError, match="changed while it was being read") as caught:
                prepare(tmp_path / "d", fake)
            assert caught.value.code == ExitCode.TEXT
    original = JsonLines.scan

    def scan(self: JsonLines, stop: StopFlag | None) -> SourceFacts:
        facts = original(self, stop)
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n")
        return facts

    monkeypatch.setattr(JsonLines, "scan", scan)
    with pytest.raises(PreflightError, match="changed while it was being read"):
        prepare(tmp_path / "d", fake)
    assert not (tmp_path / "d" / "metadata.json").exists()


def test_each_file_comes_once_whatever_names_it(tmp_path: Path) -> None:
    fake, text = write(tmp_path, FEW)
    (tmp_path / "b.txt").write_text("more")
    pattern, folder = str(tmp_path / "*.txt"), str(tmp_path)
    found = find_sources(DataSettings(text_file=(text, pattern, fake, folder, fake)))
    names = ["a.txt", "b.txt", "a.jsonl", f"{tmp_path.name}/a.jsonl"]
    assert [source.name for source in found] == names
