"""What a person is shown of chats: examples that join to the text, and figures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from corpus.chats.fake_encoder import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from preflight.corpus.chats.build import prepare_chats
from preflight.corpus.chats.data import ChatData
from preflight.corpus.chats.facts import ChatCounts, ChatFacts, TemplateEntry
from preflight.corpus.chats.preview import (
    Example,
    decode_stretches,
    describe_chats,
    pick_examples,
)
from preflight.tokenization import load_tokenizer

BYTES = load_tokenizer("byte")


def prepare(tmp_path: Path, answers: list[str], **more: Any) -> ChatData:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{i}?", "completion": text} for i, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_chats([path], FakeEncoder(**more), tmp_path / "data", val_split=1e-9)


def pick(folder: ChatData, *arguments: Any, **more: Any) -> list[Example]:
    with folder.open_rows("train") as rows:
        return pick_examples(folder.facts, rows, BYTES, *arguments, **more)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_stretches_join_to_the_text(text: str, data: st.DataObject) -> None:
    """Wherever the borders are: within a character, too."""
    ids = BYTES.encode(text).astype(np.int64)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), bool)
    stretches = decode_stretches(ids, mask, BYTES, {})
    assert "".join(part for part, _ in stretches) == text
    learned = [kind for _, kind in stretches]
    assert all(a != b for a, b in itertools.pairwise(learned))
    ends = np.cumsum([len(character.encode()) for character in text], dtype=int) - 1
    flags = [kind for part, kind in stretches for _ in part]
    assert flags == mask[ends].tolist()


def test_special_tokens_and_cut_characters() -> None:
    ids = np.array([*"h\u00e9".encode(), 256, 300, *"\u6f22".encode()[:2]])
    mask = np.array([0, 1, 1, 1, 0, 0, 0], bool)
    stretches = decode_stretches(ids, mask, BYTES, {256: "<end>"})
    assert stretches == [("h", False), ("\u00e9<end>", True), ("<300>", False)]


def test_examples(tmp_path: Path) -> None:
    folder = prepare(tmp_path, [f"{i}\x1b[31m \u202e\n\u6f22" for i in range(30)])
    examples = pick(folder)
    assert len(examples) == 3
    for example in examples:
        number = int(example.place.removeprefix("chats.jsonl, line ")) - 1
        assert example.stretches == (
            (f"User: {number}?\nAssistant: ", False),
            (f"{number}\\x1b[31m \\u202e\n\u6f22<|endoftext|>", True),
        )
    assert pick(folder, 1) == examples[:1]
    assert pick(folder) == examples
    named = pick(folder, specials={"</s>": 256})
    assert named[0].stretches[1][0].endswith("</s>")


def test_copies_are_one_example(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{i % 3}?", "completion": "yes"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = prepare_chats([path], FakeEncoder(), tmp_path / "data", val_split=0.3)
    picked = pick(folder)
    assert len({example.stretches for example in picked}) == 2


def test_long_examples_are_shortened(tmp_path: Path) -> None:
    """Begin and end stay, whole stretches that are short too."""
    folder = prepare(tmp_path, [str(i) + "x" * 5000 + "y" for i in range(3)])
    for example in pick(folder):
        head, answer = (text for text, _ in example.stretches)
        assert head.startswith("User: ")
        assert head.endswith("?\nAssistant: ")
        assert len(head) + len(answer) == 600
        assert " … " in answer
        assert answer.endswith("xy<|endoftext|>")


def test_examples_of_many_turns_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"conversations": ["question", f"answer {i}"] * 200} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = prepare_chats([path], FakeEncoder(), tmp_path / "data", val_split=0.5)
    (example,) = pick(folder)
    text = "".join(part for part, _ in example.stretches)
    assert len(text) <= 650
    assert text.startswith("User: question")
    assert text.endswith("<|endoftext|>")


def describe(**counts: int) -> list[str]:
    return describe_chats(
        ChatFacts(
            formats=["Alpaca"],
            template=TemplateEntry(name="x", fingerprint="y"),
            encoder="z",
            context_length=512,
            learn_from="answers",
            counts=ChatCounts(**counts),
            examples=[],
        )
    )


def test_figures_in_words() -> None:
    plain = {"n_chats": 1030, "n_tokens": 200_000, "n_targets": 82_000, "longest": 512}
    assert describe(**plain, n_answers=1030, n_ended=1030) == [
        "1,030 chats (Alpaca), 200,000 tokens, the longest 512",
        "41 % of the tokens are learned from; 0 chats without a target",
        "every answer ends with its end token: 1,030 of 1,030",
    ]
    cuts = {"n_cut": 488, "n_cut_turns": 900, "n_cut_at_end": 7, "n_cut_tokens": 70, "n_open": 2}
    assert describe(**plain, **cuts, n_dropped=4, n_answers=1030, n_ended=1023)[1:] == [
        "41 % of the tokens are learned from; 4 chats without a target are left out",
        "answers that end with their end token: 1,023 of 1,030",
        "488 are longer than 512 tokens and lose their first turns (900 messages)",
        "7 have a last exchange longer than 512 tokens and lose its end (70 tokens)",
        "2 end with a message of the user without an answer, which is left out",
    ]
