"""Hostile text: the shards decode to the very bytes, or the command says what is wrong with it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus.bad_texts import BAD_TEXTS, GOOD
from tokenization import hostile_texts

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import load_tokenizer

from .harness import ForkServer, find_message_faults

GPT2 = load_tokenizer("gpt2")
UNITS = [
    *hostile_texts.UNITS,
    "we'll",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "e\u0301",
    "\U0001f468\u200d\U0001f469",
    "\u202e",
    "\u200b",
    "\x07",
    "\x1b[31m",
    "\x85",
    "\u2028",
    "<|endofprompt|>",
    "<|fim_prefix|>",
    "\U0010ffff",
    "\ufffd",
    '{"a": 1}',
    "://",
    "0x1F",
]


def decode_shards(data_dir: Path, settings: DataSettings) -> bytes:
    """The text that a data folder's ids stand for, training part first."""
    data = prepare_data(settings, GPT2)
    ids = [i for part in (data.train, data.val) for shard in part.open() for i in shard.tolist()]
    return GPT2.decode_bytes([i for i in ids if i != GPT2.end_of_text_id])


def generate_hostile(draw: random.Random) -> str:
    """Runs and mixtures of what tokenizers and text readers stumble over."""
    parts = []
    for _ in range(draw.randrange(1, 30)):
        repeats = draw.choice((1, 1, 1, 2, 5, 60, 700))
        parts.append(
            draw.choice(UNITS) * repeats
            if draw.random() < 0.8
            else chr(draw.choice((draw.randrange(0x80, 0xD800), draw.randrange(0x10000, 0x110000))))
        )
    return "words before " + "".join(parts).replace("\0", "\x01") + " and words after"


@pytest.mark.slow
def test_generated_texts(place: Path) -> None:
    draw = random.Random(5)
    count = 200
    for number in range(count):
        text = generate_hostile(draw).encode()
        path = place / f"{number}.txt"
        path.write_bytes(text)
        settings = DataSettings(
            text_file=(str(path),),
            data_dir=str(place / f"d{number}"),
            shard_size=1024,
            val_split=0.3,
        )
        assert decode_shards(path, settings) == text, text
    print(f"{count} hostile texts, every one decoded to its bytes")


# Group F of the catalogue, as files that can be learned from; the rest is in the next table.
EXACT: dict[str, bytes] = {
    "CRLF": GOOD.replace("\n", "\r\n").encode(),
    "lone CR": GOOD.replace("\n", "\r").encode(),
    "BOM": b"\xef\xbb\xbf" + GOOD.encode(),
    "two BOMs": b"\xef\xbb\xbf" * 2 + GOOD.encode(),
    "few NULs": b"a\0b " * 3 + GOOD.encode(),
    "no final newline": GOOD.strip().encode(),
    "special tokens": b"<|endoftext|>" * 50 + GOOD.encode(),
    "one long line of a": b"a" * 400_000,
    "one long line of ^": b"^" * 300_000,
    "spaces": b"x" + b" " * 1_100_000 + b"y z",
    "emoji": "\U0001f600".encode() * 60_000,
    "base64": b"QUJD0123+/" * 40_000,
    "newlines": b"a" + b"\n" * 100_000 + b"b c d e f g",
    "noncharacters": "\ufffe\uffff\U0010ffff ".encode() * 200,
    "escapes": b"\x1b[2J\x07\x08" * 300 + GOOD.encode(),
}


@pytest.mark.parametrize("name", EXACT)
def test_odd_but_honest_files_are_exact(place: Path, name: str) -> None:
    raw = EXACT[name]
    path = place / "text.txt"
    path.write_bytes(raw)
    settings = DataSettings(text_file=(str(path),), data_dir=str(place / "data"), num_workers=1)
    wanted = raw[3:] if raw.startswith(b"\xef\xbb\xbf") else raw  # one leading mark is dropped
    assert decode_shards(path, settings) == wanted


def test_refused_files_and_nothing_made(place: Path) -> None:
    for name, (raw, words) in BAD_TEXTS.items():
        path = place / "bad.txt"
        path.write_bytes(raw)
        with pytest.raises(PreflightError) as caught:
            prepare_data(DataSettings(text_file=(str(path),), data_dir=str(place / "data")), GPT2)
        assert caught.value.code == ExitCode.TEXT, name
        assert words in str(caught.value), name
        assert len(caught.value.lines) <= 5
        assert not (place / "data" / "metadata.json").exists()


def test_refused_through_the_command_line(server: ForkServer, place: Path) -> None:
    """Exit code and message as the user meets them, before any model is built."""
    makers: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "directory": lambda path: path.mkdir(),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "random": lambda path: path.write_bytes(random.Random(6).randbytes(5000)),
        "random with even bytes": lambda path: path.write_bytes(os.urandom(10) * 500),
        "UTF-16": lambda path: path.write_bytes(GOOD.encode("utf-16")),
        "UTF-32": lambda path: path.write_bytes(GOOD.encode("utf-32-be")),
    }
    for name, make in makers.items():
        path = place / name
        make(path)
        flags = [
            "--train",
            "--text-file",
            str(path),
            "--data-dir",
            str(place / "data"),
            "--output-dir",
            str(place / "out"),
            "--device",
            "cpu",
        ]
        code, said = server.run("main", flags, cwd=place)
        assert code == 3, (name, said)
        assert find_message_faults(said, name) == ""
    for device in ("/dev/zero", "/dev/urandom", "/proc/self/mem"):
        flags[2] = device
        assert server.run("main", flags, cwd=place)[0] == 3


def test_a_reader_in_text_mode_is_found(place: Path) -> None:
    """The check of the check: Python's text mode turns CRLF and CR into LF."""
    path = place / "text.txt"
    path.write_bytes(EXACT["CRLF"])
    path.write_text(path.read_text())
    settings = DataSettings(text_file=(str(path),), data_dir=str(place / "data"))
    assert decode_shards(path, settings) != EXACT["CRLF"]
