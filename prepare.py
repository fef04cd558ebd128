"""Text to token shards: files -> documents -> bounded blocks -> ids in worker processes -> shards.

Two passes. The first reads every source once (size, SHA-256, UTF-8, documents), so that faults in
the text show before anything is written. The second cuts documents into blocks, tokenises them in
worker processes and writes the ids in order, in ``<data_dir>/.building``, with a journal entry per
finished shard. A complete build is then renamed into place. No torch: workers stay light.
"""

from __future__ import annotations

import ast
import codecs
import concurrent.futures
import contextlib
import ctypes
import glob
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import re
import select
import shlex
import signal
import stat
import sys
import sysconfig
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import regex  # comes with tiktoken
import tiktoken
from tqdm import tqdm

from config import DataSettings, ExitCode, PreflightError
from signals import StopFlag
from storage import (
    FolderLock,
    format_bytes,
    free_bytes,
    fsync_folder,
    hash_file,
    make_folder,
    publish_file,
    read_json,
    remove_tree,
    write_json,
)
from tokenizer import Tokenizer

FORMAT = "preflight-shards"
VERSION = 1
SPLITS = ("val", "train")  # in the order of building; each split's ids are one stream
METADATA_NAME = "metadata.json"
BUILDING_NAME = ".building"
BLOCK_BYTES = 512 * 1024  # tiktoken 0.14 panics on a run of a million spaces
MAX_RUN_BYTES = 208 * 2**20  # text without one safe place to cut is held whole up to this
WINDOW_BYTES = 64 * 1024  # a piece above this is merged window by window
SEAM_TOKENS = 8  # at a window's end, merged again with what follows
IN_PROCESS_BYTES = 2 * 2**20  # below this, starting workers costs more than it gains
SAMPLE_BYTES = 2_300_000
_SAMPLE_SEPARATOR = "\x1e"
_READ_BYTES = 2**20
_SHARD_NAME = re.compile(r"shard_\d{5,}\.npy")

# Places where every tiktoken split pattern (gpt2, p50k, cl100k, o200k) ends one piece and begins
# the next, whatever stands further left or right; so encoding both sides apart changes nothing.
# Only characters whose class is beyond doubt are named: letters of ASCII, kana, CJK, hangul.
_LETTER = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARK = r"!-&(-/:-@\[-`{-~"  # ASCII punctuation but the apostrophe, which may begin "'s"
_SAFE_CUT = re.compile(
    r"(?<=\S)(?= )"
    r"|(?<=\S\n)(?=[^\s/])"  # o200k: a slash may follow a newline within a piece
    rf"|(?<=[{_LETTER}])(?=[\s{_MARK}0-9\u3001\u3002\uff01\uff0c\uff1f])"
    rf"|(?<=[0-9])(?=[\s{_MARK}'A-Za-z])"
    rf"|(?<=[A-Za-z{_MARK}'])(?=[0-9])"
)
_MAGIC = (
    (b"\x7fELF", "an ELF program"), (b"\x1f\x8b", "gzip data"), (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive (or docx, xlsx, epub)"), (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"), (b"BZh91AY", "bzip2 data"), (b"\xfd7zXZ\0", "xz data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"), (b"SQLite format 3\0", "an SQLite database"),
    (b"7z\xbc\xaf", "a 7z archive"), (b"\x93NUMPY", "a numpy array"),
)


# ---- what a data folder is ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One verified ``.npy`` file of ids. ``signature`` is its size and mtime when verified."""

    path: Path
    n_tokens: int
    data_offset: int  # bytes of header before the first id
    signature: tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One part of the data. ``n_bytes`` counts the text, for bits per byte."""

    shards: tuple[Shard, ...]
    n_tokens: int
    n_documents: int
    n_bytes: int

    def open(self) -> list[np.ndarray]:
        """The shards as one-dimensional read-only memory maps, in order."""
        return [np.load(shard.path, mmap_mode="r") for shard in self.shards]


@dataclass(frozen=True)
class DataFolder:
    """A complete, verified data folder. ``fingerprint`` stands for every id in it, in order."""

    path: Path
    metadata: dict[str, Any]
    fingerprint: str
    train: Split
    val: Split
    vocab_size: int
    dtype: np.dtype


def load_data_folder(data_dir: Path, tokenizer: Tokenizer) -> DataFolder:
    """Verify every byte of a data folder and return it.

    Raises:
        PreflightError: code DATA for anything missing, damaged, extra, or made with another
            tokenizer; it names the file, what was expected and what was found.
    """
    metadata = _read_metadata(data_dir)
    found = metadata["tokenizer"]
    if found["fingerprint"] != tokenizer.fingerprint:
        raise PreflightError(
            ExitCode.DATA,
            f"{data_dir} was made with tokenizer {found['name']} ({found['fingerprint'][:12]}), "
            f"not {tokenizer.name} ({tokenizer.fingerprint[:12]})",
            f"use --tokenizer {found['name']}, or give --text-file to rebuild it",
        )
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    splits = {}
    for name in ("train", "val"):
        part = metadata[name]
        _check_no_extra_files(data_dir / name, {entry["name"] for entry in part["shards"]})
        shards = tuple(
            _verify_shard(data_dir / name / entry["name"], entry, tokenizer)
            for entry in part["shards"]
        )
        splits[name] = Split(shards, part["n_tokens"], part["n_documents"], part["n_bytes"])
        digest.update(name.encode())
        for entry in part["shards"]:
            digest.update(entry["sha256"].encode())
    return DataFolder(data_dir, metadata, digest.hexdigest(), splits["train"], splits["val"],
                      tokenizer.vocab_size, tokenizer.dtype)


def _damaged(path: Path, what: str) -> PreflightError:
    return PreflightError(
        ExitCode.DATA, f"{path} is damaged: {what}",
        "give --text-file to rebuild the data folder, or restore the file",
    )


_HEX = re.compile(r"[0-9a-f]{64}")
_SCHEMA = {
    "format": str, "version": int, "tokenizer": dict, "dtype": str, "shard_size": int,
    "document_separator": (str, type(None)), "split": dict, "sources": list, "train": dict,
    "val": dict,
}
_SCHEMAS = {
    "tokenizer": {"name": str, "fingerprint": str, "vocab_size": int, "end_of_text_id": int},
    "split": {"val_split": float, "by": str},
    "part": {"n_documents": int, "n_tokens": int, "n_bytes": int, "shards": list},
    "shard": {"name": str, "n_tokens": int, "n_bytes": int, "sha256": str, "max_id": int},
    "source": {"name": str, "size": int, "sha256": str},
}


def _read_metadata(data_dir: Path) -> dict[str, Any]:
    """The metadata, with every key, type and range checked; PreflightError (DATA) otherwise."""
    path = data_dir / METADATA_NAME
    try:
        metadata = read_json(path)
    except OSError as error:
        raise PreflightError(
            ExitCode.DATA, f"{path}: {error.strerror}",
            "give --text-file to build the data folder",
        ) from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if isinstance(metadata, dict) and metadata.get("format") == FORMAT:
        version = metadata.get("version")
        if isinstance(version, int) and version > VERSION:
            raise PreflightError(
                ExitCode.DATA,
                f"{data_dir} was made by a newer Preflight (format {version}, this one reads "
                f"up to {VERSION})", "use that one, or choose another --data-dir",
            )
    try:
        _check_keys(metadata, _SCHEMA, "the top level")
        _check_keys(metadata["tokenizer"], _SCHEMAS["tokenizer"], "tokenizer")
        _check_keys(metadata["split"], _SCHEMAS["split"], "split")
        for source in metadata["sources"]:
            _check_keys(source, _SCHEMAS["source"], "sources")
        for name in ("train", "val"):
            _check_part(metadata[name], name)
        if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
            raise ValueError("format or version is unknown")
        if metadata["dtype"] not in ("uint16", "uint32"):
            raise ValueError("dtype is neither uint16 nor uint32")
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return metadata


def _check_keys(value: Any, schema: dict[str, Any], where: str) -> None:
    """ValueError unless `value` is an object with exactly these keys, types, and no negatives."""
    if not isinstance(value, dict) or set(value) != set(schema):
        odd = sorted(set(value) ^ set(schema))[:3] if isinstance(value, dict) else "no object"
        raise ValueError(f"{where}: missing or unknown keys {odd}"[:200])
    for key, kind in schema.items():
        item = value[key]
        if not isinstance(item, kind) or isinstance(item, bool):
            raise ValueError(f"{where}: {key} has the wrong type")
        if isinstance(item, int) and not 0 <= item < 2**63:
            raise ValueError(f"{where}: {key} is out of range")
        if key == "sha256" and not _HEX.fullmatch(item):
            raise ValueError(f"{where}: {key} is not a SHA-256")


def _check_part(part: Any, name: str) -> None:
    _check_keys(part, _SCHEMAS["part"], name)
    for index, entry in enumerate(part["shards"]):
        _check_keys(entry, _SCHEMAS["shard"], f"{name} shards")
        if entry["name"] != f"shard_{index:05d}.npy":
            raise ValueError(f"{name}: shard {index} has an unexpected name")
    if sum(entry["n_tokens"] for entry in part["shards"]) != part["n_tokens"]:
        raise ValueError(f"{name}: n_tokens is not the sum over its shards")


def _check_no_extra_files(folder: Path, expected: set[str]) -> None:
    found = set(os.listdir(folder)) if folder.is_dir() else set()
    for name in sorted(found - expected):
        raise _damaged(folder / name, "metadata.json does not know it")


def _build_npy_header(dtype: np.dtype, n_tokens: int) -> bytes:
    """The one header that a shard of `n_tokens` ids has."""
    stream = io.BytesIO()
    description = {"descr": dtype.newbyteorder("<").str, "fortran_order": False,
                   "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _verify_shard(path: Path, entry: dict[str, Any], tokenizer: Tokenizer) -> Shard:
    """Size, header, SHA-256 and largest id of one shard, in one read."""
    header = _build_npy_header(tokenizer.dtype, entry["n_tokens"])
    expected = len(header) + entry["n_tokens"] * tokenizer.dtype.itemsize
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if status.st_size != expected or entry["n_bytes"] != expected:
                raise _damaged(path, f"expected {expected:,} bytes, found {status.st_size:,}")
            head = file.read(len(header))
            digest, largest = hashlib.sha256(head), -1
            while block := file.read(_READ_BYTES * 4):
                digest.update(block)
                whole = len(block) // tokenizer.dtype.itemsize * tokenizer.dtype.itemsize
                largest = max(largest, int(np.frombuffer(block[:whole], tokenizer.dtype).max()))
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    if digest.hexdigest() != entry["sha256"]:
        raise _damaged(path, f"its SHA-256 is {digest.hexdigest()[:12]}..., "
                             f"expected {entry['sha256'][:12]}...")
    if head != header:
        raise _damaged(path, "its numpy header is not one of ours")
    if largest != entry["max_id"] or largest >= tokenizer.vocab_size:
        raise _damaged(path, f"its largest id is {largest}, expected {entry['max_id']}, "
                             f"below {tokenizer.vocab_size}")
    return Shard(path, entry["n_tokens"], len(header), (status.st_size, status.st_mtime_ns))


# ---- exact tokenising in parts ------------------------------------------------------------------


def encode_block(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Ids (uint32) of a text of block size, exactly those of ``encode_ordinary``."""
    if hasattr(encoding, "encode_to_numpy"):  # twice as fast as a list of ids
        return encoding.encode_to_numpy(text, disallowed_special=())
    return np.array(encoding.encode_ordinary(text), dtype=np.uint32)


def encode_run(
    encoding: tiktoken.Encoding, text: str, window_bytes: int = WINDOW_BYTES
) -> Iterator[np.ndarray]:
    """Ids of a text of any length in bounded memory, exactly those of ``encode_ordinary``.

    For text without safe cuts (100 MB of one letter): tiktoken itself would need gigabytes or
    give up. The encoding's own pattern splits it, and a long piece is merged in windows.
    """
    if not _has_same_classes(encoding, text):
        if len(text) > 4 * 2**20:
            raise PreflightError(
                ExitCode.TEXT,
                "the text holds more than 4 MiB without a space or line break, with characters "
                "newer than the Unicode tables of the `regex` package",
                "add line breaks to the text, or update: pip install -U regex tiktoken",
            )
        yield encode_block(encoding, text)
        return
    ids: list[int] = []
    for match in regex.finditer(encoding._pat_str, text):
        begin, end = match.span()
        if (end - begin) * 4 <= window_bytes:
            ids += encoding._encode_single_piece(match.group())
        else:
            for part in _merge_in_windows(encoding, text, begin, end, window_bytes):
                yield np.array(ids + part, dtype=np.uint32)
                ids = []
        if len(ids) >= 2**17:
            yield np.array(ids, dtype=np.uint32)
            ids = []
    yield np.array(ids, dtype=np.uint32)


def _has_same_classes(encoding: tiktoken.Encoding, text: str) -> bool:
    """Whether `regex` and tiktoken's engine agree on the class of every character of `text`."""
    characters = "".join(sorted(set(text)))
    if characters.isascii():
        return True
    single_bytes = {bytes([i]): i for i in range(256)}
    for name in sorted(set(re.findall(r"\\p\{\w+\}", encoding._pat_str)) | {r"\s"}):
        probe = tiktoken.Encoding("probe", pat_str=name, mergeable_ranks=single_bytes,
                                  special_tokens={})
        if bytes(probe.encode_ordinary(characters)) != "".join(
            regex.findall(name, characters)
        ).encode():
            return False
    return True


def _merge_in_windows(
    encoding: tiktoken.Encoding, text: str, begin: int, end: int, window_bytes: int
) -> Iterator[list[int]]:
    """Ids of the one piece ``text[begin:end]``, merged window by window.

    A sequence of tokens is the BPE encoding of its bytes if and only if each adjacent pair
    encodes to itself (Neubeck and van Antwerpen 2024, https://github.com/github/rust-gems, crate
    bpe). Within a window that holds; between two windows the pair at the seam is looked at.
    """
    merge, spell = encoding._encode_single_piece, encoding.decode_single_token_bytes
    size = window_bytes
    given: list[int] = []  # the last id given out, where there is one
    kept: list[int] = []  # the ids behind it, up to the window: a seam may step back over them
    window = b""
    while True:
        while len(window) < size and begin < end:
            window += text[begin : min(begin + size, end)].encode()
            begin += size
        ids = merge(window)
        last = (given + kept)[-1:]
        if last and merge(spell(last[0]) + spell(ids[0])) != [last[0], ids[0]]:
            if kept:
                window = spell(kept.pop()) + window
            elif begin >= end:
                raise RuntimeError("no seam between two windows; please report this text")
            else:
                size *= 2
            continue
        if begin >= end:
            yield kept + ids
            return
        # The window's own end distorts its last ids; the seam goes before them.
        usable = ids[: len(ids) - SEAM_TOKENS]
        if not usable:
            size *= 2
            continue
        window = window[sum(len(spell(i)) for i in usable) :]
        size = window_bytes
        half = len(kept) // 2
        if half:
            yield kept[:half]
            given = [kept[half - 1]]
        kept = kept[half:] + usable


def find_last_cut(buffer: bytes | bytearray) -> int:
    """Bytes before the last safe place to cut, 0 when there is none; the end may cut a letter."""
    for size in (4096, len(buffer)):
        begin = max(0, len(buffer) - size)
        while begin < len(buffer) and buffer[begin] & 0xC0 == 0x80:  # inside a character
            begin += 1
        text = buffer[begin:].decode("utf-8", "ignore")
        last = 0
        for match in _SAFE_CUT.finditer(text):
            last = match.end()
        if last:
            return begin + len(text[:last].encode())
    return 0


def find_first_cut(buffer: bytes | bytearray, begin: int) -> int:
    """Bytes before the first safe place to cut behind `begin`, 0 when there is none."""
    while begin > 0 and buffer[begin] & 0xC0 == 0x80:
        begin -= 1
    text = buffer[begin:].decode("utf-8", "ignore")
    match = _SAFE_CUT.search(text)
    return begin + len(text[: match.end()].encode()) if match else 0


_blocks_done = 0
_worker_state: tuple[tiktoken.Encoding, np.dtype, int] | None = None


def _start_worker(encoding: tiktoken.Encoding, dtype: np.dtype, end_of_text_id: int) -> None:
    """Set a worker process up: deaf to Ctrl-C, which the parent handles; gone with its parent."""
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _worker_state = (encoding, dtype, end_of_text_id)


def _encode_parts(parts: list[tuple[bytes, bool]]) -> bytes:
    """In a worker: ids of parts of documents, the end-of-text id after each that ends one."""
    global _blocks_done
    assert _worker_state is not None
    _blocks_done += 1
    if _blocks_done % 50 == 0:
        # glibc's heap frays: it grew by 160 KB with each MB of text until it was trimmed.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
    return _encode_all(parts, *_worker_state).tobytes()


def _encode_all(
    parts: list[tuple[bytes, bool]], encoding: tiktoken.Encoding, dtype: np.dtype,
    end_of_text_id: int,
) -> np.ndarray:
    pieces = []
    end = np.array([end_of_text_id], dtype)
    for data, ends_document in parts:
        text = str(data, "utf-8")
        try:
            pieces.append(encode_block(encoding, text).astype(dtype))
        except Exception:
            raise
        except BaseException as error:  # a panic in tiktoken's Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            pieces += [ids.astype(dtype) for ids in encode_run(encoding, text)]
        if ends_document:
            pieces.append(end)
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


# ---- sources: first pass ------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One text file after the first pass; ``spans`` are begin and end of each document in it."""

    name: str
    path: Path
    size: int
    sha256: str
    signature: tuple[int, ...]
    spans: array  # of 'q': begin, end, begin, end ...

    def describe(self) -> dict[str, Any]:
        """The source as metadata.json keeps it: no absolute path."""
        return {"name": self.name, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class _Input:
    name: str
    path: Path
    from_folder: bool = False
    is_pipe: bool = False


def _text_error(path: Path | str, what: str, *more: str) -> PreflightError:
    return PreflightError(ExitCode.TEXT, f"{path}: {what}", *more)


def _find_inputs(settings: DataSettings) -> list[_Input]:
    """The files that `--text-file` means, sorted within folders and globs, each once.

    Raises:
        PreflightError: code TEXT for what is missing or no file, before anything is read.
    """
    inputs: dict[str, _Input] = {}
    for given in settings.text_file:
        found = [Path(given)]
        if not os.path.lexists(given) and glob.has_magic(given):
            found = [Path(name) for name in sorted(glob.glob(given, recursive=True))]
            if not found:
                raise _text_error(given, "no file matches")
        for path in found:
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                raise _text_error(path, error.strerror or str(error),
                                  "check --text-file") from None
            if stat.S_ISDIR(mode):
                inside = _walk(path, Path(settings.data_dir))
                if not inside:
                    raise _text_error(path, "the folder holds no files")
                for file in inside:
                    name = (Path(path.resolve().name) / file.relative_to(path)).as_posix()
                    inputs.setdefault(os.path.abspath(file), _Input(name, file, True))
            elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
                item = _Input(path.name, path, is_pipe=stat.S_ISFIFO(mode))
                inputs.setdefault(os.path.abspath(path), item)
            else:
                raise _text_error(path, "a device or socket, not a text file")
    return list(inputs.values())


def _walk(folder: Path, data_dir: Path) -> list[Path]:
    """Every file below `folder` but hidden ones and our own data folder, in a fixed order."""
    files: list[Path] = []
    own = os.path.realpath(data_dir)
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and os.path.realpath(os.path.join(place, name)) != own)
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _scan_inputs(
    inputs: list[_Input], separator: str | None, stop: StopFlag | None
) -> list[Source]:
    """The first pass over all sources. Files of a folder that are no text are skipped, and said."""
    sources: list[Source] = []
    skipped: list[PreflightError] = []
    for item in inputs:
        if stop is not None:
            stop.leave_if_stopping("stopped while reading the text; nothing was changed")
        try:
            sources.append(_scan_file(item, separator))
        except PreflightError as error:
            if not item.from_folder:
                raise
            skipped.append(error)
    if skipped:
        _say(f"skipped {len(skipped)} of {len(inputs)} files, the first: {skipped[0].lines[0]}")
    if not any(source.spans for source in sources):
        raise skipped[0] if skipped else _text_error(inputs[0].path, "the text is empty",
                                                     "give a file with text in it")
    return sources


def _signature(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _scan_file(item: _Input, separator: str | None) -> Source:
    """Read one file to its end, whatever its size claims to be, and judge it as text.

    Raises:
        PreflightError: code TEXT when it is unreadable, binary, UTF-16 or -32, not UTF-8, or empty.
    """
    path, digest, decoder = item.path, hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    finder = _SeparatorFinder(separator.encode() if separator else None)
    size = lines = nuls = specials = 0
    tail, blank = b"", True
    try:
        with open(path, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _text_error(path, "not a regular file")
            signature = _signature(file)
            while block := file.read(_READ_BYTES):
                if not size:
                    _refuse_binary(path, block)
                    if block.startswith(codecs.BOM_UTF8):
                        finder.begin = len(codecs.BOM_UTF8)
                        _say(f"{path}: a byte order mark at its beginning is left out")
                digest.update(block)
                nuls += block.count(0)
                if nuls * 10 > size + len(block):
                    raise _text_error(path, "binary data (many NUL bytes), not text")
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise _explain_not_utf8(path, error, size - waiting, lines) from None
                blank = blank and not text.strip("\ufeff \t\r\n\v\f\0")
                lines += block.count(b"\n")
                specials += (tail + block).count(b"<|endoftext|>")
                tail = block[-12:]
                finder.feed(block)
                size += len(block)
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise _explain_not_utf8(path, error, size - len(error.object), lines) from None
    except OSError as error:
        raise _text_error(path, error.strerror or str(error)) from None
    if blank:
        raise _text_error(path, "empty" if not size else "holds only whitespace",
                          "give a file with text in it")
    if specials and separator != "<|endoftext|>":
        _say(f"{path}: '<|endoftext|>' stands {specials:,} times in it and is taken as plain text; "
             "--document-separator '<|endoftext|>' would split documents there")
    return Source(item.name, path, size, digest.hexdigest(), signature, finder.finish(size))


class _SeparatorFinder:
    """Collects begin and end of each non-empty document while the bytes go by."""

    def __init__(self, separator: bytes | None) -> None:
        self.separator = separator
        self.begin = 0
        self._spans = array("q")
        self._rest = b""
        self._position = 0  # in the file, of the first byte of _rest

    def feed(self, block: bytes) -> None:
        """Look for separators in the next block of the file."""
        if self.separator is None:
            return
        data, at = self._rest + block, 0
        while (found := data.find(self.separator, at)) >= 0:
            self._add(self._position + found)
            at = found + len(self.separator)
            self.begin = self._position + at
        at = max(at, len(data) - len(self.separator) + 1)
        self._rest, self._position = data[at:], self._position + at

    def _add(self, end: int) -> None:
        if end > self.begin:
            self._spans.extend((self.begin, end))

    def finish(self, size: int) -> array:
        """The spans of a file of `size` bytes."""
        self._add(size)
        return self._spans


def _refuse_binary(path: Path, head: bytes) -> None:
    """PreflightError (TEXT) that names what a file is, when it is clearly not UTF-8 text."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            raise _text_error(path, f"{kind}, not text", "give a plain text file in UTF-8")
    encoding = None
    marks = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"),
             (b"\xfe\xff", "UTF-16"))
    for mark, name in marks:
        if encoding is None and head.startswith(mark):
            encoding = name
    sample = head[:4096]
    sample = sample[: len(sample) // 4 * 4]
    if encoding is None and len(sample) >= 8 and sample.count(0) * 4 > len(sample):
        # Latin text without a byte order mark: NULs at fixed places within each character.
        zero = [sample[i::4].count(0) * 4 > len(sample) * 0.8 for i in range(4)]
        shapes = {"0001": "UTF-32LE", "0111": "UTF-32LE", "1110": "UTF-32BE", "0101": "UTF-16LE",
                  "1010": "UTF-16BE"}
        encoding = shapes.get("".join("1" if z else "0" for z in zero))
    if encoding is not None:
        quoted = shlex.quote(str(path))
        raise _text_error(path, f"{encoding} text, not UTF-8; convert it:",
                          f"iconv -f {encoding} -t UTF-8 {quoted} > utf8.txt")


def _explain_not_utf8(
    path: Path, error: UnicodeDecodeError, base: int, lines: int
) -> PreflightError:
    waiting = error.object[: error.start]
    line = lines + waiting.count(b"\n") + 1
    return _text_error(
        path,
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
        f"{base + error.start:,} (line {line:,})",
        f"if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(path))} > utf8.txt",
    )


def _say(text: str) -> None:
    sys.stderr.write(f"preflight: {text}\n")
    sys.stderr.flush()


# ---- the plan: which documents go where ---------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    source: Source
    begin: int
    end: int


@dataclass(frozen=True)
class _Plan:
    """What is going to be built. ``key`` stands for all that decides the ids and their shards."""

    sources: list[Source]
    documents: dict[str, list[_Document]]  # by split
    by: str  # "documents" or "tail"
    key: str

    def count_bytes(self, split: str) -> int:
        return sum(document.end - document.begin for document in self.documents[split])


def _build_plan(sources: list[Source], settings: DataSettings, tokenizer: Tokenizer) -> _Plan:
    """Share the documents out: every 1/val_split-th or so, where there are many, else the tail."""
    documents = [
        _Document(source, *source.spans[i : i + 2])
        for source in sources for i in range(0, len(source.spans), 2)
    ]
    share = settings.val_split
    total = sum(document.end - document.begin for document in documents)
    largest = max(document.end - document.begin for document in documents)
    # One huge document among many would make the validation part huge or all but empty.
    if len(documents) * share >= 8 and largest <= share * total:
        by = "documents"
        chosen = [_is_validation(i, share) for i in range(len(documents))]
        parts = {
            "val": [d for d, is_val in zip(documents, chosen, strict=True) if is_val],
            "train": [d for d, is_val in zip(documents, chosen, strict=True) if not is_val],
        }
    else:
        by, parts = "tail", _split_tail(documents, total - math.ceil(total * share))
    facts = [VERSION, [[s.name, s.size, s.sha256] for s in sources], tokenizer.fingerprint,
             settings.document_separator, share, settings.shard_size]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _Plan(sources, parts, by, key)


def _is_validation(index: int, share: float) -> bool:
    """One document of each group of 1/share, picked by a hash: an even share without a period."""
    group = math.floor(index * share)
    first, behind = math.ceil(group / share), math.ceil((group + 1) / share)
    draw = int.from_bytes(hashlib.sha256(b"%d" % group).digest()[:8], "big")
    return index == first + draw % max(1, behind - first)


def _split_tail(documents: list[_Document], target: int) -> dict[str, list[_Document]]:
    """Documents before and behind `target` bytes of text; the one it falls into becomes two."""
    passed = 0
    for number, document in enumerate(documents):
        length = document.end - document.begin
        if passed + length > target:
            cut = document.begin + target - passed
            cut = _find_tail_cut(document, cut)
            left = _Document(document.source, document.begin, cut)
            right = _Document(document.source, cut, document.end)
            train = documents[:number] + [d for d in (left,) if d.end > d.begin]
            return {"train": train, "val": [right, *documents[number + 1 :]]}
        passed += length
    return {"train": documents[:-1], "val": documents[-1:]}


def _find_tail_cut(document: _Document, target: int) -> int:
    """An offset at or behind `target`: behind a line break or space where one is near."""
    with _open_source(document.source) as file:
        file.seek(target)
        near = file.read(min(64 * 1024, document.end - target))
    if target == document.begin:
        return target
    for mark in (b"\n", b" "):
        found = near.find(mark) + 1
        if 0 < found < len(near):
            return target + found
    inside = 0
    while inside < len(near) and near[inside] & 0xC0 == 0x80:
        inside += 1
    return target + inside


def _open_source(source: Source) -> IO[bytes]:
    """The source to read again; PreflightError (TEXT) when it is not the file of the first pass."""
    try:
        file = open(source.path, "rb")  # noqa: SIM115
    except OSError as error:
        raise _text_error(source.path, error.strerror or str(error)) from None
    if _signature(file) != source.signature:
        file.close()
        raise _changed(source)
    return file


def _changed(source: Source) -> PreflightError:
    return _text_error(source.path, "changed while it was being read; nothing was published",
                       "run the same command again when the file is at rest")


# ---- blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Consecutive parts of documents, with the place of the first: document number and offset."""

    document: int
    offset: int
    parts: list[tuple[Any, bool]]  # text, whether its document ends there
    n_bytes: int
    is_run: bool = False  # its one part is a str without a safe place to cut, of any length


def _read_blocks(
    documents: list[_Document], document: int, offset: int, block_bytes: int
) -> Iterator[_Block]:
    """Blocks of about `block_bytes` from the given place on."""
    parts: list[tuple[bytes, bool]] = []
    size, place = 0, (document, offset)
    with contextlib.ExitStack() as opened:
        source, file = None, None
        for number in range(document, len(documents)):
            item = documents[number]
            if file is None or item.source is not source:
                opened.close()
                source, file = item.source, opened.enter_context(_open_source(item.source))
            begin = item.begin + (offset if number == document else 0)
            for at, data, n_bytes, ends in _cut_document(item, file, begin, block_bytes):
                if not parts or isinstance(data, str) or size + n_bytes > block_bytes:
                    if parts:
                        yield _Block(*place, parts, size)
                    parts, size, place = [], 0, (number, at - item.begin)
                if isinstance(data, str):
                    yield _Block(*place, [(data, ends)], n_bytes, True)
                else:
                    parts.append((data, ends))
                    size += n_bytes
    if parts:
        yield _Block(*place, parts, size)


def _cut_document(
    document: _Document, file: IO[bytes], begin: int, block_bytes: int
) -> Iterator[tuple[int, bytes | str, int, bool]]:
    """(offset in the file, text, its bytes, ends the document) for each part of a document.

    A part is bytes of at most `block_bytes`; one without a safe cut, of any length, is a str.
    """
    file.seek(begin)
    buffer, at = bytearray(), begin  # `at`: offset in the file of the buffer's first byte

    def fill(buffer: bytearray, size: int) -> None:
        wanted = max(0, min(size, document.end - at - len(buffer)))
        data = file.read(wanted)
        if len(data) < wanted:
            raise _changed(document.source)
        buffer.extend(data)

    while at < document.end:
        fill(buffer, block_bytes - len(buffer))
        if at + len(buffer) == document.end and len(buffer) <= block_bytes:
            yield at, bytes(buffer), len(buffer), True
            return
        cut = find_last_cut(buffer)
        is_run = cut == 0
        while cut == 0 and at + len(buffer) < document.end:
            seen = len(buffer)
            fill(buffer, block_bytes)
            if len(buffer) > MAX_RUN_BYTES:
                raise _text_error(
                    document.source.path,
                    f"more than {format_bytes(MAX_RUN_BYTES)} without a place to cut, from byte "
                    f"{at:,} on", "break the text into lines",
                )
            cut = find_first_cut(buffer, max(seen - 16, 0))
        cut = cut or len(buffer)
        ends = at + cut == document.end
        rest = buffer[cut:]
        del buffer[cut:]
        if is_run:  # decoded here, so that its bytes and its text are held together only once
            text, buffer = buffer.decode(), rest
            yield at, text, cut, ends
            del text
        else:
            yield at, bytes(buffer), cut, ends
            buffer = rest
        at += cut


class _Encoders:
    """Blocks in, ids out, in order: in worker processes, or here where they would not pay."""

    def __init__(self, tokenizer: Tokenizer, n_workers: int) -> None:
        self._state = (tokenizer.encoding, tokenizer.dtype, tokenizer.end_of_text_id)
        self._n_workers = n_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if n_workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                n_workers, multiprocessing.get_context("spawn"), _start_worker, self._state
            )

    def close(self) -> None:
        """End the workers without waiting for blocks that nobody wants any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def encode(self, blocks: Iterator[_Block]) -> Iterator[tuple[_Block, np.ndarray, bool]]:
        """(block, ids, whether these are its last) in order; few blocks are in flight at once."""
        pending: deque[tuple[_Block, concurrent.futures.Future[bytes] | None]] = deque()
        for block in blocks:
            if block.is_run:  # held whole: finish everything else first
                while pending:
                    yield self._collect(*pending.popleft())
                yield from self._encode_run(block)
                continue
            pending.append((block, self._submit(block)))
            if len(pending) > 2 * self._n_workers:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def _submit(self, block: _Block) -> concurrent.futures.Future[bytes] | None:
        if self._pool is None:
            return None
        try:
            return self._pool.submit(_encode_parts, block.parts)
        except BrokenProcessPool:
            self._go_on_alone()
            return None

    def _collect(
        self, block: _Block, future: concurrent.futures.Future[bytes] | None
    ) -> tuple[_Block, np.ndarray, bool]:
        if future is not None:
            try:
                return block, np.frombuffer(future.result(), self._state[1]), True
            except BrokenProcessPool:
                self._go_on_alone()
        return block, _encode_all(block.parts, *self._state), True

    def _go_on_alone(self) -> None:
        if self._pool is not None:
            _say("a tokenising process was lost (out of memory, or killed?); going on without")
            self.close()

    def _encode_run(self, block: _Block) -> Iterator[tuple[_Block, np.ndarray, bool]]:
        encoding, dtype, end_of_text_id = self._state
        text, ends = block.parts.pop()
        for ids in encode_run(encoding, text):
            yield block, ids.astype(dtype), False
        yield block, np.array([end_of_text_id] if ends else [], dtype), True


# ---- building -----------------------------------------------------------------------------------


class _ShardWriter:
    """One shard being written; it appears under its name when it is closed, or not at all."""

    def __init__(self, path: Path, dtype: np.dtype, capacity: int, bound: int) -> None:
        """`capacity`: tokens when full; `bound`: tokens that it can get at most."""
        self.n_tokens, self._max_id = 0, -1
        self._path, self._dtype, self._capacity = path, dtype, capacity
        header = _build_npy_header(dtype, capacity)
        self._digest = hashlib.sha256(header)
        self._opened = contextlib.ExitStack()
        size = len(header) + min(capacity, bound) * dtype.itemsize
        self._file = self._opened.enter_context(publish_file(path, size))
        self._file.write(header)

    @property
    def is_full(self) -> bool:
        return self.n_tokens == self._capacity

    def write(self, ids: np.ndarray) -> int:
        """Take as many ids as there is room for, and say how many."""
        ids = ids[: self._capacity - self.n_tokens]
        if len(ids):
            data = ids.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._max_id = max(self._max_id, int(ids.max()))
            self.n_tokens += len(ids)
        return len(ids)

    def close(self) -> dict[str, Any]:
        """Publish the shard and return its entry for the metadata."""
        self._file.truncate(self._file.tell())
        if not self.is_full:
            self._file.seek(0)
            self._file.write(_build_npy_header(self._dtype, self.n_tokens))
        self._opened.close()
        sha256 = self._digest.hexdigest() if self.is_full else hash_file(self._path)
        return {"name": self._path.name, "n_tokens": self.n_tokens,
                "n_bytes": self._path.stat().st_size, "sha256": sha256, "max_id": self._max_id}

    def abandon(self, error: BaseException) -> None:
        """Delete what was written."""
        with contextlib.suppress(BaseException):
            self._opened.__exit__(type(error), error, error.__traceback__)


class _Progress:
    """A bar in bytes with the time left on a terminal; elsewhere a plain line now and then."""

    EVERY_SECONDS = 5.0

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None)
        self._total, self._done = total, 0
        self._first = 0
        self._began = self._said = time.monotonic()

    def skip(self, n_bytes: int) -> None:
        """Count bytes that an earlier run finished."""
        self._first += n_bytes
        self.add(n_bytes)

    def add(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self.EVERY_SECONDS:
            self._said = now
            rate = max(self._done - self._first, 1) / (now - self._began)
            _say(f"preparing: {format_bytes(self._done)} of {format_bytes(self._total)}, "
                 f"{format_bytes(rate)}/s, {(self._total - self._done) / rate:.0f} s left")

    def close(self) -> None:
        self._bar.close()


class _Builder:
    """Builds one plan in ``.building``, continuing where the journal says."""

    def __init__(
        self, building: Path, plan: _Plan, settings: DataSettings, tokenizer: Tokenizer,
        stop: StopFlag | None, block_bytes: int, n_workers: int | None = None,
    ) -> None:
        self._building, self._plan, self._settings = building, plan, settings
        self._tokenizer, self._stop, self._block_bytes = tokenizer, stop, block_bytes
        self._total = sum(plan.count_bytes(split) for split in SPLITS)
        self._n_workers = self._choose_workers() if n_workers is None else n_workers
        self._shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._position: list[Any] = [SPLITS[0], 0, 0, 0]  # split, document, offset, ids to skip

    def _choose_workers(self) -> int:
        if self._total < IN_PROCESS_BYTES:
            return 0
        if self._settings.num_workers is not None:
            return self._settings.num_workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)

    def build(self, context_length: int) -> None:
        """Write all shards and, last, the metadata."""
        self._resume()
        self._check_space()
        for split in SPLITS:
            make_folder(self._building / split)
        encoders = _Encoders(self._tokenizer, self._n_workers)
        progress = _Progress(self._total)
        try:
            for split in SPLITS:
                if self._position[0] == split:
                    self._build_split(split, encoders, progress)
        finally:
            progress.close()
            encoders.close()
        for source in self._plan.sources:  # the ids are those of the text that was judged
            with _open_source(source) as file:
                same = hash_file(source.path) == source.sha256
                if not same or _signature(file) != source.signature:
                    raise _changed(source)
        metadata = self._build_metadata()
        try:
            for name in ("train", "val"):
                _check_long_enough(metadata[name], name, context_length)
        except PreflightError:
            remove_tree(self._building)
            raise
        write_json(self._building / METADATA_NAME, metadata)

    def _resume(self) -> None:
        """Take over the shards that an interrupted build of the same plan finished."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            journal = read_json(self._building / "journal.json")
            if journal["key"] == self._plan.key:
                for split in SPLITS:
                    for entry in journal["shards"][split]:
                        _verify_shard(self._building / split / entry["name"], entry,
                                      self._tokenizer)
                self._shards, self._position = journal["shards"], journal["position"]
        n_kept = sum(map(len, self._shards.values()))
        if n_kept:
            _say(f"resuming at shard {n_kept}")
        for split in SPLITS:
            kept = {entry["name"] for entry in self._shards[split]}
            folder = self._building / split
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in kept:
                    remove_tree(path)

    def _check_space(self) -> None:
        """A disk that cannot hold the shards is told of before the work, not after."""
        itemsize = self._tokenizer.dtype.itemsize
        done = sum(e["n_bytes"] for split in SPLITS for e in self._shards[split])
        needed = self._total * itemsize // 5 - done  # text has rarely more than 5 bytes a token
        free = free_bytes(self._building)
        if self._total > 20_000 * self._settings.shard_size:
            raise PreflightError(
                ExitCode.FLAGS, f"--shard-size {self._settings.shard_size:,} would make too many "
                "files of this text", "leave it out",
            )
        if needed > free:
            raise PreflightError(
                ExitCode.STORAGE,
                f"{self._building.parent}: about {format_bytes(needed)} needed for the shards, "
                f"{format_bytes(free)} free",
                "nothing was changed; free space or choose another --data-dir",
            )

    def _build_split(self, split: str, encoders: _Encoders, progress: _Progress) -> None:
        documents, shards = self._plan.documents[split], self._shards[split]
        _, document, offset, skip = self._position
        progress.skip(offset + sum(d.end - d.begin for d in documents[:document]))
        consumed, writer = 0, None
        bound = self._plan.count_bytes(split) + len(documents)
        blocks = _read_blocks(documents, document, offset, self._block_bytes)
        try:
            for block, ids, is_last in encoders.encode(blocks):
                passed = min(skip, len(ids))
                ids, skip, consumed = ids[passed:], skip - passed, consumed + passed
                while len(ids):
                    if writer is None:
                        path = self._building / split / f"shard_{len(shards):05d}.npy"
                        writer = _ShardWriter(path, self._tokenizer.dtype,
                                              self._settings.shard_size, bound)
                    taken = writer.write(ids)
                    ids, consumed = ids[taken:], consumed + taken
                    if writer.is_full:
                        entry, writer = writer.close(), None
                        self._record(split, entry, [split, block.document, block.offset, consumed])
                if is_last:
                    consumed = 0
                    progress.add(block.n_bytes)
                if self._stop is not None:
                    self._stop.leave_if_stopping(
                        "stopped while preparing the text; finished shards are kept",
                        "run the same command to go on")
        except BaseException as error:
            if writer is not None:
                writer.abandon(error)
            raise
        follower = "train" if split == "val" else "end"
        if writer is not None:
            self._record(split, writer.close(), [follower, 0, 0, 0])
        self._position = [follower, 0, 0, 0]

    def _record(self, split: str, entry: dict[str, Any], position: list[Any]) -> None:
        self._shards[split].append(entry)
        self._position = position
        write_json(self._building / "journal.json",
                   {"key": self._plan.key, "position": position, "shards": self._shards})

    def _build_metadata(self) -> dict[str, Any]:
        tokenizer, settings, plan = self._tokenizer, self._settings, self._plan
        parts = {
            split: {
                "n_documents": len(plan.documents[split]),
                "n_tokens": sum(entry["n_tokens"] for entry in self._shards[split]),
                "n_bytes": plan.count_bytes(split),
                "shards": self._shards[split],
            }
            for split in SPLITS
        }
        return {
            "format": FORMAT, "version": VERSION,
            "tokenizer": {
                "name": tokenizer.name, "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id,
            },
            "dtype": tokenizer.dtype.name, "shard_size": settings.shard_size,
            "document_separator": settings.document_separator,
            "split": {"val_split": settings.val_split, "by": plan.by},
            "sources": _describe_sources(plan.sources),
            "train": parts["train"], "val": parts["val"],
        }


def _describe_sources(sources: list[Source]) -> list[dict[str, Any]]:
    """Each source's entry; very many are summed up, since metadata.json has a size limit."""
    entries = [source.describe() for source in sources]
    if len(entries) <= 10_000:
        return entries
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return [{"name": f"{len(entries)} files", "size": sum(s.size for s in sources),
             "sha256": digest}]


# ---- the data folder ----------------------------------------------------------------------------


def prepare_data(
    settings: DataSettings, tokenizer: Tokenizer, context_length: int,
    stop: StopFlag | None = None,
) -> DataFolder:
    """Make, reuse or rebuild the data folder, and return it verified.

    What is done, and why, is said on stderr. Without text and with an empty folder the built-in
    sample is prepared.

    Raises:
        PreflightError: TEXT for input text; DATA for a folder that cannot be used and not be
            rebuilt; STORAGE; LOCKED when another run uses the folder; SIGINT or SIGTERM when
            `stop` says so.
    """
    return _prepare(settings, tokenizer, context_length, stop)


def _check_long_enough(part: dict[str, Any], name: str, context_length: int) -> None:
    found = part["n_tokens"]
    if found <= context_length:
        what = {"train": "training", "val": "validation"}[name]
        mend = "a larger --val-split" if name == "val" else "a smaller --val-split"
        raise PreflightError(
            ExitCode.TEXT,
            f"the {what} part has {found:,} token{'s' * (found != 1)}, needs "
            f"{context_length + 1:,}: one window of --context-length {context_length} and the "
            "token behind it",
            f"give more text, a smaller --context-length, or {mend}",
        )


def _prepare(
    settings: DataSettings, tokenizer: Tokenizer, context_length: int,
    stop: StopFlag | None = None, block_bytes: int = BLOCK_BYTES, n_workers: int | None = None,
) -> DataFolder:
    data_dir = Path(settings.data_dir)
    inputs = _find_inputs(settings)
    is_complete = ((data_dir / METADATA_NAME).exists()
                   and not (data_dir / BUILDING_NAME / METADATA_NAME).exists())
    if not inputs and is_complete:
        return _load_to_reuse(data_dir, tokenizer, context_length)
    sources: list[Source] | None = None
    if inputs and not any(item.is_pipe for item in inputs):
        sources = _scan_inputs(inputs, settings.document_separator, stop)
        # Before the lock, so that several runs can share a data folder that needs no change.
        if is_complete and not _find_reason_to_rebuild(data_dir, sources, settings, tokenizer):
            return _load_to_reuse(data_dir, tokenizer, context_length)
    make_folder(data_dir)
    with FolderLock(data_dir):
        building = data_dir / BUILDING_NAME
        _finish_swap(data_dir)
        if not inputs and (data_dir / METADATA_NAME).exists():
            return _load_to_reuse(data_dir, tokenizer, context_length)
        if not inputs and _holds_leftovers(data_dir):
            raise PreflightError(
                ExitCode.DATA, f"{data_dir} is unfinished: it has no {METADATA_NAME}",
                "rerun with --text-file to finish it, or choose another --data-dir",
            )
        _refuse_foreign(data_dir)
        make_folder(building)
        if sources is None:
            sources = _gather(inputs, building, settings, stop)
        if (data_dir / METADATA_NAME).exists():
            reason = _find_reason_to_rebuild(data_dir, sources, settings, tokenizer)
            if not reason:
                remove_tree(building)
                return _load_to_reuse(data_dir, tokenizer, context_length)
            _say(f"rebuilding {data_dir} because {reason}")
        plan = _build_plan(sources, settings, tokenizer)
        builder = _Builder(building, plan, settings, tokenizer, stop, block_bytes, n_workers)
        builder.build(context_length)
        _finish_swap(data_dir)
        return load_data_folder(data_dir, tokenizer)


def _load_to_reuse(data_dir: Path, tokenizer: Tokenizer, context_length: int) -> DataFolder:
    data = load_data_folder(data_dir, tokenizer)
    for name in ("train", "val"):
        _check_long_enough(data.metadata[name], name, context_length)
    _say(f"reusing {data_dir} ({data.train.n_tokens:,} training tokens)")
    return data


def _find_reason_to_rebuild(
    data_dir: Path, sources: list[Source], settings: DataSettings, tokenizer: Tokenizer
) -> str:
    """Why the data folder is not what these settings make of the text; empty when it is."""
    try:
        metadata = _read_metadata(data_dir)
        if metadata["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            return f"the tokenizer changed from {metadata['tokenizer']['name']} to {tokenizer.name}"
        load_data_folder(data_dir, tokenizer)
    except PreflightError as error:
        return error.lines[0]
    described, known = _describe_sources(sources), metadata["sources"]
    if described != known:
        pairs = zip(described, known, strict=False)
        name = next((new["name"] for new, old in pairs if new != old), None)
        return f"the text changed ({name or f'{len(known)} files before, {len(described)} now'})"
    for flag, before, now in (
        ("--document-separator", metadata["document_separator"], settings.document_separator),
        ("--val-split", metadata["split"]["val_split"], settings.val_split),
    ):
        if before != now:
            return f"{flag} changed from {before!r} to {now!r}"
    return ""


def _finish_swap(data_dir: Path) -> None:
    """Move a complete build into place. Killed anywhere, calling it again finishes the move."""
    building = data_dir / BUILDING_NAME
    if (building / METADATA_NAME).exists():
        remove_tree(data_dir / METADATA_NAME)  # from here to the last rename: unfinished
        fsync_folder(data_dir)
        for split in SPLITS:
            if (building / split).exists():
                remove_tree(data_dir / split)
                os.rename(building / split, data_dir / split)
        fsync_folder(data_dir)
        for path in building.iterdir():  # before the last rename, so that nothing is left behind
            if path.name != METADATA_NAME:
                remove_tree(path)
        os.rename(building / METADATA_NAME, data_dir / METADATA_NAME)
        fsync_folder(data_dir)
        remove_tree(building)


def _holds_leftovers(data_dir: Path) -> bool:
    journal = data_dir / BUILDING_NAME / "journal.json"
    is_own_sample = (data_dir / BUILDING_NAME / "sample.txt").exists()
    return (journal.exists() and not is_own_sample) or any(
        (data_dir / split).exists() for split in SPLITS)


def _refuse_foreign(data_dir: Path) -> None:
    """Never delete what another program made: PreflightError (DATA) when something else is here."""
    foreign = [
        path for split in SPLITS if (data_dir / split).is_dir()
        for path in (data_dir / split).iterdir()
        if not _SHARD_NAME.fullmatch(path.name) or path.is_dir()
    ]
    foreign += [data_dir / s for s in SPLITS if (data_dir / s).exists()
                and ((data_dir / s).is_symlink() or not (data_dir / s).is_dir())]
    path = data_dir / METADATA_NAME
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            foreign.append(path)
    if foreign:
        raise PreflightError(
            ExitCode.DATA, f"{foreign[0]} is not Preflight's, and building would replace it",
            "choose another --data-dir",
        )


def _gather(
    inputs: list[_Input], building: Path, settings: DataSettings, stop: StopFlag | None
) -> list[Source]:
    """Scan all inputs, pipes copied to a file first; without any input, the built-in sample."""
    if inputs:
        ready = [
            _Input(item.name, _spool_pipe(item.path, building / f"pipe-{number}", stop))
            if item.is_pipe else item
            for number, item in enumerate(inputs)
        ]
        return _scan_inputs(ready, settings.document_separator, stop)
    name = f"built-in sample (python {platform.python_version()})"
    _say("no --text-file given and the data folder is empty: preparing the built-in sample, "
         "the documentation that comes with Python")
    path = building / "sample.txt"
    content = _SAMPLE_SEPARATOR.join(build_sample()).encode()
    with publish_file(path, len(content)) as file:
        file.write(content)
    return [_scan_file(_Input(name, path), _SAMPLE_SEPARATOR)]


def _spool_pipe(path: Path, target: Path, stop: StopFlag | None) -> Path:
    """Copy a pipe to a file, since the text is read twice; PreflightError (TEXT) if none writes."""
    _say(f"{path} is a pipe: it is copied first, and cannot be read again to resume")
    began, waited = time.monotonic(), False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a plain open may block for ever
    except OSError as error:
        raise _text_error(path, error.strerror or str(error)) from None
    with open(descriptor, "rb", buffering=0) as pipe, publish_file(target) as file:
        while True:
            if stop is not None:
                stop.leave_if_stopping("stopped while reading a pipe; nothing was changed")
            select.select([pipe], [], [], 0.5)
            data = pipe.read(_READ_BYTES)  # None: nothing yet; empty: no writer, or no more
            if data:
                file.write(data)
            elif data is not None and file.tell():
                return target
            elif not file.tell():
                seconds = time.monotonic() - began
                if seconds > 5 and not waited:
                    waited = True
                    _say(f"{path}: nothing has been written to this pipe yet; waiting")
                if seconds > 60:
                    raise _text_error(path, "nothing was written to this pipe for a minute")
                time.sleep(0.05)


def build_sample() -> list[str]:
    """The English prose that comes with every Python, one document per topic or module.

    Documentation topics, then docstrings of the standard library in the order of file names, up
    to `SAMPLE_BYTES`.
    """
    from pydoc_data import topics  # large, and needed here alone

    documents = [text for _, text in sorted(topics.topics.items())]
    size = sum(len(text.encode()) for text in documents)
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages",
               "pydoc_data", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if skipped & set(path.relative_to(library).parts):
            continue
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            text = "\n\n\n".join(_find_docstrings(ast.parse(path.read_bytes()), path.stem))
            if text and size < SAMPLE_BYTES:
                documents.append(text + "\n")
                size += len(text.encode()) + 1
        if size >= SAMPLE_BYTES:
            break
    return [text.replace(_SAMPLE_SEPARATOR, " ") for text in documents]


def _find_docstrings(tree: ast.Module, name: str) -> Iterator[str]:
    """Module, class and function docstrings in their order, each under its qualified name."""
    waiting: list[tuple[str, Any]] = [(name, tree)]
    while waiting:
        label, node = waiting.pop()
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield f"{label}\n\n{inspect.cleandoc(text)}"
        inner = [child for child in node.body
                 if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        waiting += [(f"{label}.{child.name}", child) for child in reversed(inner)]
