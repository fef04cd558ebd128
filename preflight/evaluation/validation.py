"""Plain text as windows that a model predicts: the validation part of a run, or files of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import DataFolder
from preflight.corpus.sources.protocol import text_error
from preflight.corpus.sources.token_arrays import count_text_bytes
from preflight.corpus.windows import choose_window, count_windows
from preflight.evaluation.encoding import Branch, Row, list_windows
from preflight.evaluation.scoring import BranchScore
from preflight.tokenization import Tokenizer


@dataclass(frozen=True)
class TextWindow:
    """A part of a text: what is predicted after what, and how much text that is."""

    row: Row
    n_words: int
    n_bytes: int


@dataclass(frozen=True)
class WindowScore:
    """A window's figures, as sums: loss in nats, hits among the 1, 5 and 10 most probable."""

    loss: float
    n_tokens: int
    n_words: int
    n_bytes: int
    n_top: tuple[int, ...]


def read_validation(
    data: DataFolder, tokenizer: Tokenizer, context_length: int, n_windows: int | None
) -> tuple[list[TextWindow], int]:
    """Windows of the validation part, those that a training run evaluates on; how many there are.

    Args:
        data: made with `tokenizer`.
        tokenizer: the model's.
        context_length: the model's.
        n_windows: evenly spaced over the part; None: all.

    Raises:
        PreflightError: code DATA, when a shard cannot be read.
    """
    part = data.val
    window = choose_window(part.n_tokens, context_length)
    available = count_windows(part.n_tokens, window)
    count = min(n_windows or available, available)
    starts = np.arange(count, dtype=np.int64) * available // count * window
    reader = ShardReader(part, data.dtype, data.vocab_size)
    try:
        ids = reader.read(starts, window + 1).tolist()
    finally:
        reader.close()
    parts = ((row[:1], row[1:]) for row in ids)
    return list(_measure(parts, tokenizer)), available


def read_texts(
    files: Sequence[str], tokenizer: Tokenizer, context_length: int, n_windows: int | None
) -> tuple[list[TextWindow], int]:
    """Windows of UTF-8 text files, evenly spaced (None: all of them); how many there are.

    Raises:
        PreflightError: code TEXT, for a file that cannot be read, is empty or is not UTF-8.
    """
    found: list[TextWindow] = []
    for name in files:
        try:
            text = Path(name).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise text_error(name, error.strerror or str(error), "check --text-file") from None
        except UnicodeDecodeError as error:
            what = f"not UTF-8 at byte {error.start:,}"
            advice = "--evaluate reads plain text; --prepare makes a data folder of other files"
            raise text_error(name, what, advice) from None
        ids = tokenizer.encode(text).tolist()
        if not ids:
            raise text_error(name, "the text is empty", "give a file with text in it")
        parts = list_windows(ids, tokenizer.end_of_text_id, context_length)
        found += _measure(parts, tokenizer)
    count = min(n_windows or len(found), len(found))
    return [found[i * len(found) // count] for i in range(count)], len(found)


def _measure(
    parts: Iterator[tuple[list[int], list[int]]], tokenizer: Tokenizer
) -> Iterator[TextWindow]:
    sizes = count_text_bytes(tokenizer)
    for number, (context, tokens) in enumerate(parts):
        n_words = _count_words(tokenizer.decode(tokens), tokenizer.decode(context)[-1:])
        n_bytes = int(sizes[np.array(tokens)].sum())
        yield TextWindow(Row(number, context, [Branch(0, tokens)]), n_words, n_bytes)


def _count_words(text: str, before: str) -> int:
    """Words that begin in the text after the character `before`: windows share words out."""
    goes_on = before.strip() and text[:1].strip()
    return len(text.split()) - (1 if goes_on else 0)


def join_windows(
    windows: Sequence[TextWindow], scores: dict[int, list[BranchScore]]
) -> list[WindowScore]:
    """The windows with their scores, which are by index."""
    return [
        WindowScore(
            -scores[i][0].log_likelihood,
            scores[i][0].n_tokens,
            window.n_words,
            window.n_bytes,
            scores[i][0].n_top,
        )
        for i, window in enumerate(windows)
    ]
