"""Exact encoding in parts for tiktoken's split patterns, with the proof of each step.

The ids are those of ``encode_ordinary`` on the whole text. Text is cut only where no split pattern
can join the text on both sides. A text without such a place is split by the pattern itself, and
a long piece is merged in windows whose seams are checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from preflight.core.errors import ExitCode, PreflightError

WINDOW_BYTES = 64 * 1024  # a piece above this is merged window by window
SEAM_TOKENS = 8  # at a window's end, merged again with what follows

# The split patterns for which the cuts below are proven, as tiktoken spells them
# (tiktoken_ext/openai_public.py, MIT). Text for any other pattern is never cut.
GPT2_PATTERN = (  # of p50k too
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROVEN_PATTERNS = frozenset({GPT2_PATTERN, CL100K_PATTERN, _O200K_PATTERN})

# Places where each of these patterns ends one piece and begins the next, whatever the text further
# left or right; so encoding both sides apart changes nothing. Only characters whose class is beyond
# doubt are named: letters of ASCII, kana, CJK, hangul.
_LETTER = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARK = r"!-&(-/:-@\[-`{-~"  # ASCII punctuation but the apostrophe, which may begin "'s"
_SAFE_CUT = re.compile(
    r"(?<=\S)(?= )"
    r"|(?<=\S\n)(?=[^\s/])"  # o200k: a slash may follow a newline within a piece
    rf"|(?<=[{_LETTER}])(?=[\s{_MARK}0-9\u3001\u3002\uff01\uff0c\uff1f])"
    rf"|(?<=[0-9])(?=[\s{_MARK}'A-Za-z])"
    rf"|(?<=[A-Za-z{_MARK}'])(?=[0-9])"
)


def find_last_cut(text: str) -> int:
    """The index of the last safe place to cut, 0 where there is none."""
    last = 0
    for match in _SAFE_CUT.finditer(text):
        last = match.end()
    return last


def encode_long(
    encoding: tiktoken.Encoding, text: str, window_bytes: int = WINDOW_BYTES
) -> Iterator[np.ndarray]:
    """Ids (uint32) of a text of any length in bounded memory, in parts.

    For text without safe cuts (100 MB of one letter): tiktoken itself would need gigabytes or
    give up. The encoding's own pattern splits it, and a long piece is merged in windows.

    Raises:
        PreflightError: code TEXT, when the text is long and `regex` cannot split it as tiktoken
            does.
    """
    if not _has_same_classes(encoding, text):
        if len(text) > 4 * 2**20:
            raise PreflightError(
                ExitCode.TEXT,
                "the text holds more than 4 MiB without a space or line break, with characters "
                "newer than the Unicode tables of the `regex` package",
                "add line breaks to the text, or update: pip install -U regex tiktoken",
            )
        yield encoding.encode_to_numpy(text, disallowed_special=())
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
    given: list[int] = []  # the last id that was yielded, where there is one
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
