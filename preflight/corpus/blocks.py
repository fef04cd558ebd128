"""Exact tokenising in parts: documents -> bounded blocks -> ids, in worker processes.

The ids are those of ``encode_ordinary`` on each whole document: blocks end only where no split
pattern can join what stands on both sides, and text without such a place is merged in windows
whose seams are checked. No torch: workers stay light.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.units import format_bytes
from preflight.corpus.sources import Document, changed_error, open_source, text_error

BLOCK_BYTES = 512 * 1024  # tiktoken 0.14 panics on a run of a million spaces
MAX_RUN_BYTES = 208 * 2**20  # text without one safe place to cut is held whole up to this
WINDOW_BYTES = 64 * 1024  # a piece above this is merged window by window
SEAM_TOKENS = 8  # at a window's end, merged again with what follows

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


# ---- encoding -----------------------------------------------------------------------------------


def encode_block(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Ids (uint32) of a text of block size, exactly those of ``encode_ordinary``."""
    return encoding.encode_to_numpy(text, disallowed_special=())  # twice as fast as a list


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
        probe = tiktoken.Encoding(
            "probe", pat_str=name, mergeable_ranks=single_bytes, special_tokens={}
        )
        ours = "".join(regex.findall(name, characters)).encode()
        if bytes(probe.encode_ordinary(characters)) != ours:
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


# ---- cutting ------------------------------------------------------------------------------------


def _find_last_cut(buffer: bytearray) -> int:
    """Bytes before the last safe place to cut, 0 when there is none; the end may cut a letter."""
    for size in (128, 4096, len(buffer)):  # most texts have one near
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


def _find_first_cut(buffer: bytearray, begin: int) -> int:
    """Bytes before the first safe place to cut behind `begin`, 0 when there is none."""
    while begin > 0 and buffer[begin] & 0xC0 == 0x80:
        begin -= 1
    text = buffer[begin:].decode("utf-8", "ignore")
    match = _SAFE_CUT.search(text)
    return begin + len(text[: match.end()].encode()) if match else 0


@dataclass(frozen=True)
class Block:
    """Consecutive parts of documents, with the place of the first: document number and offset."""

    document: int
    offset: int
    parts: list[tuple[Any, bool]]  # text, whether its document ends there
    n_bytes: int
    is_run: bool = False  # its one part is a str without a safe place to cut, of any length


def read_blocks(
    documents: list[Document], document: int, offset: int, block_bytes: int
) -> Iterator[Block]:
    """Blocks of about `block_bytes` from the given place on.

    Raises:
        PreflightError: code TEXT when a source has changed or cannot be cut.
    """
    parts: list[tuple[bytes, bool]] = []
    size, place = 0, (document, offset)
    with contextlib.ExitStack() as opened:
        source, file = None, None
        for number in range(document, len(documents)):
            item = documents[number]
            if file is None or item.source is not source:
                opened.close()
                source, file = item.source, opened.enter_context(open_source(item.source))
            begin = item.begin + (offset if number == document else 0)
            for at, data, n_bytes, ends in _cut_document(item, file, begin, block_bytes):
                if not parts or isinstance(data, str) or size + n_bytes > block_bytes:
                    if parts:
                        yield Block(*place, parts, size)
                    parts, size, place = [], 0, (number, at - item.begin)
                if isinstance(data, str):
                    yield Block(*place, [(data, ends)], n_bytes, True)
                else:
                    parts.append((data, ends))
                    size += n_bytes
    if parts:
        yield Block(*place, parts, size)


def _cut_document(
    document: Document, file: IO[bytes], begin: int, block_bytes: int
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
            raise changed_error(document.source)
        buffer.extend(data)

    while at < document.end:
        fill(buffer, block_bytes - len(buffer))
        if at + len(buffer) == document.end and len(buffer) <= block_bytes:
            yield at, bytes(buffer), len(buffer), True
            return
        cut = _find_last_cut(buffer)
        is_run = cut == 0
        while cut == 0 and at + len(buffer) < document.end:
            seen = len(buffer)
            fill(buffer, block_bytes)
            if len(buffer) > MAX_RUN_BYTES:
                raise text_error(
                    document.source.path,
                    f"more than {format_bytes(MAX_RUN_BYTES)} without a place to cut, from byte "
                    f"{at:,} on",
                    "break the text into lines",
                )
            cut = _find_first_cut(buffer, max(seen - 16, 0))
        cut = cut or len(buffer)
        rest = buffer[cut:]
        del buffer[cut:]
        # A run is decoded here, so that its bytes and its text are held together only once.
        data = buffer.decode() if is_run else bytes(buffer)
        buffer = rest
        yield at, data, cut, at + cut == document.end
        del data
        at += cut


# ---- worker processes ---------------------------------------------------------------------------
