"""Data sets of the Hugging Face hub, read by range requests; nothing is downloaded whole.

``after`` is ``[file, row group, row in it, number of the row]``, each of the next row.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.libraries import import_library
from preflight.core.signals import StopFlag
from preflight.corpus.sources.hub_client import HubClient, Patience
from preflight.corpus.sources.hub_files import HubFile, choose_files
from preflight.corpus.sources.hub_read_ahead import (
    Block,
    ReadAhead,
    choose_block_bytes,
    find_chunk,
    plan_group,
    start_thread,
    wait_for,
)
from preflight.corpus.sources.parquet_layout import Layout, open_parquet, read_layout
from preflight.corpus.sources.parquet_rows import (
    cut_batches,
    note_large_page,
    parse_texts,
    read_group,
    read_long_text,
)
from preflight.corpus.sources.protocol import SourceFacts
from preflight.corpus.sources.rows import Batch, LongRow, RowSource, build_row_facts
from preflight.settings import DataSettings

_NAME = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?")
_CARD_BYTES = 4 * 2**20
_FOOTER_BYTES = 2**16  # fetched at once; a longer footer takes a second request
_SPARE_BYTES = 2**20  # fetched at once of what no plan covers


def find(given: str | None, settings: DataSettings) -> list[HubSource] | None:
    """The data set that ``--source`` names; None for values of ``--text-file``.

    Raises:
        PreflightError: code FLAGS, when the name is none of a data set. Nothing is asked yet.
    """
    if given is not None or settings.source is None:
        return None
    match = _NAME.fullmatch(settings.source)
    if match is None:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--source {settings.source}: not the name of a data set on the hub",
            "such as hf:HuggingFaceFW/fineweb, or with a revision hf:OWNER/NAME@COMMIT",
        )
    return [HubSource(match["repo"], match["revision"] or "main", settings)]


class HubSource(RowSource):
    """The rows of one configuration of a data set, at one commit."""

    parse = staticmethod(parse_texts)
    is_skippable = False

    def __init__(
        self, repo: str, revision: str, settings: DataSettings, patience: Patience | None = None
    ) -> None:
        config = f" {settings.source_config}" if settings.source_config else ""
        self.name = self.label = f"{settings.source or f'hf:{repo}'}{config}"
        self._repo, self._revision, self._settings = repo, revision, settings
        self._patience = patience
        self._stop: StopFlag | None = None
        self._commit, self._text_column = "", ""
        self._files: tuple[HubFile, ...] = ()

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Find the commit and the files, and check the column in the first of them.

        Raises:
            PreflightError: code TEXT, when the hub cannot be reached, refuses, or holds no parquet
                files; FLAGS, when a configuration must be chosen or a library is missing; SIGINT or
                SIGTERM when `stop` says so.
        """
        import_library("pyarrow.parquet", "pyarrow", self.label)
        self._stop = stop
        client = self._connect()
        revision = urllib.parse.quote(self._revision, safe="")
        info, _ = client.read_json(f"/revision/{revision}")
        self._commit = str(info["sha"])
        files = list_files(client, self._commit)
        config = self._settings.source_config
        card = read_card(client, self._commit, files)
        choice = choose_files(files, card, config, self.label)
        self._files = choice.files
        stream = _Stream(client, self._commit, self._files, self._settings, first=0)
        size = sum(file.size for file in self._files)
        content = [self._repo, self._commit, [dataclasses.astuple(file) for file in self._files]]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        told = f"{len(self._files):,} parquet files of {size / 1e9:.2f} GB at commit {self._commit}"
        layout = stream.layout(0)
        self._text_column = layout.text  # of all files, whatever other usual names they have
        return build_row_facts(size, digest, told, *choice.notes, *layout.notes)

    def batches(self, after: Any = None) -> Iterator[Batch | LongRow]:
        """The rows in order, or those behind the batch with that `after`.

        Raises:
            PreflightError: code TEXT, when the hub stays unreachable or a file is damaged; SIGINT
                or SIGTERM while it waits, when the scan's `stop` says so.
        """
        if not self._files:
            self.scan(None)
        file, group, row, number = after or (0, 0, 0, 0)
        client = self._connect()
        settings = dataclasses.replace(self._settings, text_column=self._text_column)
        stream = _Stream(client, self._commit, self._files, settings, file)
        try:
            stream.start(group, self._settings.workers)
            for at in range(file, len(self._files)):
                for item in stream.read_file(at, group, row, number):
                    number = item.after[3]
                    yield item
                group = row = 0
        finally:
            stream.close()

    def check_unchanged(self, facts: SourceFacts) -> None:
        """Nothing to do: a commit does not change."""

    def _connect(self) -> HubClient:
        client = HubClient(self._repo, self.label, self._patience)
        client.stop = self._stop
        client.connect()
        return client


def list_files(client: HubClient, commit: str) -> list[HubFile]:
    """All files of the data set at that commit."""
    files, page = [], f"/tree/{commit}?recursive=true&expand=false"
    while page:
        entries, following = client.read_json(page)
        for entry in entries:
            if entry["type"] == "file":
                lfs = entry.get("lfs") or {}
                size, oid = lfs.get("size", entry["size"]), lfs.get("oid", entry["oid"])
                files.append(HubFile(str(entry["path"]), int(size), str(oid)))
        page = following or ""
    return files


def read_card(client: HubClient, commit: str, files: list[HubFile]) -> dict[str, Any]:
    """The metadata at the beginning of the data set's README.md; empty without any."""
    if not any(file.path == "README.md" for file in files):
        return {}
    text = client.read_small("README.md", commit, _CARD_BYTES).decode(errors="replace")
    hub = import_library("huggingface_hub", "huggingface_hub", client.label)
    try:
        return dict(hub.DatasetCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever a YAML parser makes of a stranger's card: then by the folders
        return {}


class _Stream:
    """One pass over the files from `first` on."""

    def __init__(
        self,
        client: HubClient,
        commit: str,
        files: tuple[HubFile, ...],
        settings: DataSettings,
        first: int,
    ) -> None:
        self._client, self._commit, self._files = client, commit, files
        self._settings, self._first = settings, first
        self._footers: dict[int, Future[tuple[Any, Layout]]] = {}
        self._ahead: ReadAhead | None = None

    # ---- footers --------------------------------------------------------------------------------

    def layout(self, at: int) -> Layout:
        """What the footer of file `at` says."""
        return self._read_footer(at)[1]

    def _read_footer(self, at: int) -> tuple[Any, Layout]:
        """The metadata and the layout of a file; the next file's are fetched meanwhile."""
        for i in (at, at + 1):
            if i not in self._footers and i < len(self._files) and (i == at or self._ahead):
                self._footers[i] = start_thread(functools.partial(self._fetch_footer, i))
        return wait_for(self._footers[at], self._client.leave_if_stopping)

    def _fetch_footer(self, at: int) -> tuple[Any, Layout]:
        file = self._files[at]
        place = f"{self._client.label}: {file.path}"
        remote = _RemoteFile(self, at, None, place, _FOOTER_BYTES)
        opened = open_parquet(remote, file.size, place, has_head=False)
        return opened.metadata, read_layout(opened, file.size, self._settings, place)

    def fetch(self, block: Block) -> bytearray:
        """The bytes of a block."""
        file = self._files[block.file]
        return self._client.read_range(file.path, self._commit, block.begin, block.end, file.size)

    def size(self, at: int) -> int:
        """The bytes of file `at`."""
        return self._files[at].size

    # ---- rows -----------------------------------------------------------------------------------

    def start(self, group: int, workers: int) -> None:
        """Begin to read ahead from that row group of the first file on."""
        plan = self._plan(group, choose_block_bytes(workers))
        self._ahead = ReadAhead(self.fetch, plan, workers, self._client.leave_if_stopping)

    def close(self) -> None:
        """End all threads."""
        self._client.close()
        if self._ahead is not None:
            self._ahead.close()

    def _plan(self, group: int, block_bytes: int) -> Iterator[Block]:
        for at in range(self._first, len(self._files)):
            try:
                metadata, layout = self._read_footer(at)
            except PreflightError:
                return  # it is raised again when the rows before it have been handed on
            for i in range(group, len(layout.rows)):
                chunk = metadata.row_group(i)
                yield from plan_group(at, chunk, _find_columns(metadata, layout), block_bytes)
            group = 0

    def read_file(self, at: int, group: int, row: int, number: int) -> Iterator[Batch | LongRow]:
        """The rows of file `at` from `row` of `group` on; `number` is that of the first."""
        metadata, layout = self._read_footer(at)
        for i in range(group, len(layout.rows)):

            def open_again() -> Any:
                remote = _RemoteFile(self, at, self._ahead, layout.place, _SPARE_BYTES)
                return open_parquet(remote, layout.size, layout.place, metadata)

            start, row = row, 0
            for texts, is_long in cut_batches(read_group(open_again, layout, i, start)):
                end = texts.row + len(texts.ends) // 8
                after = [at, i, end, number + end - texts.row]
                if end == layout.rows[i]:
                    after[1:3] = [i + 1, 0]
                if after[1] == len(layout.rows):
                    after[:2] = [at + 1, 0]
                base = layout.starts[i]
                share = layout.measure_share(base + texts.row, base + end)
                if is_long:
                    document = read_long_text(texts, number)
                    yield LongRow(document, number, after, functools.partial(int, share))
                else:
                    yield Batch(texts, number, after, share)
                number = after[3]
                del texts  # before the next is decoded
            self._drop_rest(at, metadata.row_group(i), _find_columns(metadata, layout))
        self._footers.pop(at, None)

    def _drop_rest(self, at: int, group: Any, columns: list[int]) -> None:
        ends = [sum(find_chunk(group.column(number))) for number in columns]
        if self._ahead is not None:
            self._ahead.release_until(at, max(ends))


def _find_columns(metadata: Any, layout: Layout) -> list[int]:
    """The numbers of the columns that are read."""
    paths = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    return [paths[name] for name in (layout.text, *layout.columns)]


class _RemoteFile:
    """A file on the hub, as Arrow reads it: by the blocks that are read ahead.

    What no block covers, such as the footer, is fetched `spare_bytes` at once.
    """

    closed = False

    def __init__(
        self, stream: _Stream, at: int, ahead: ReadAhead | None, place: str, spare_bytes: int
    ) -> None:
        self._stream, self._file, self._ahead, self._place = stream, at, ahead, place
        self._size, self._spare_bytes = stream.size(at), spare_bytes
        self._spares: list[tuple[int, bytearray]] = []
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """As of a file."""
        return self._at

    def read(self, n_bytes: int = -1) -> bytes:
        """So many bytes, or fewer at the end of the file."""
        left = self._size - self._at
        n_bytes = left if n_bytes < 0 else min(n_bytes, left)
        note_large_page(self._place, n_bytes)
        got = bytearray()
        while len(got) < n_bytes:
            got += self._read_part(n_bytes - len(got))
        return bytes(got)

    def _read_part(self, n_bytes: int) -> memoryview:
        block = self._ahead.find(self._file, self._at) if self._ahead is not None else None
        if block is None or self._ahead is None:
            return self._read_spare(n_bytes)
        end = min(self._at + n_bytes, block.end)
        part = memoryview(self._ahead.read(block))[self._at - block.begin : end - block.begin]
        self._at = end
        if end == block.end:
            self._ahead.release(block)
        return part

    def _read_spare(self, n_bytes: int) -> memoryview:
        for begin, content in self._spares:
            if begin <= self._at < begin + len(content):
                break
        else:
            end = min(self._at + max(n_bytes, self._spare_bytes), self._size)
            begin = min(self._at, max(end - self._spare_bytes, 0))
            content = self._stream.fetch(Block(self._file, begin, end))
            self._spares = [*self._spares[-3:], (begin, content)]
        part = memoryview(content)[self._at - begin :][:n_bytes]
        self._at += len(part)
        return part

    def readable(self) -> bool:
        """Always."""
        return True

    seekable = readable

    def close(self) -> None:
        """Nothing is open."""
