"""What is learned from chats, to be read by a person before the run: examples, and figures."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from preflight.core.streams import escape_controls
from preflight.corpus.chats.facts import ChatFacts
from preflight.corpus.chats.rows import ChatRows
from preflight.tokenization import Tokenizer

MAX_CHARACTERS = 600  # of an example
_LEAST_CHARACTERS = 40  # that are left of a stretch that is cut
_MAX_STRETCHES = 12
_CUT = " … "


@dataclass(frozen=True)
class Example:
    """A row as a person reads it.

    Attributes:
        place: where the chat stands: ``chats.jsonl, line 12``.
        stretches: the text in order, each with whether it is learned. Special tokens are spelled
            out, and characters that would control a terminal are escaped.
    """

    place: str
    stretches: tuple[tuple[str, bool], ...]


def pick_examples(
    facts: ChatFacts,
    rows: ChatRows,
    tokenizer: Tokenizer,
    n: int = 3,
    *,
    specials: Mapping[str, int] | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> list[Example]:
    """Up to three rows of the training part, the same ones each time.

    Args:
        facts: of the chats.
        rows: of the training part.
        tokenizer: of the ids.
        n: examples at most.
        specials: special tokens by their spelling; unset: the end of text alone.
        max_characters: of an example, about; longer ones have gaps, shown as an ellipsis.

    Raises:
        PreflightError: code DATA, when a file was changed since it was verified.
    """
    spellings = {token: spelling for spelling, token in (specials or {}).items()}
    spellings.setdefault(tokenizer.end_of_text_id, "<|endoftext|>")
    chosen = [entry for entry in facts.examples if entry.row < len(rows)][:n]
    read = rows.read(np.array([entry.row for entry in chosen], np.int64))
    stretches = [decode_stretches(ids, mask, tokenizer, spellings) for ids, mask in read]
    return [
        Example(_escape_line(entry.place), _shorten(found, max_characters))
        for entry, found in zip(chosen, stretches, strict=True)
    ]


def decode_stretches(
    ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, spellings: Mapping[int, str]
) -> list[tuple[str, bool]]:
    """The text of a row in stretches that are learned, or not.

    A character whose bytes are in two stretches belongs to the one that completes it, so that all
    stretches together are the text. One that the end of the row cuts is left out.

    Args:
        ids: (T,) int64.
        mask: (T,) bool.
        tokenizer: of the ids.
        spellings: of ids that stand for no text; others are shown as their number.
    """
    stretches: list[tuple[str, bool]] = []
    for text, is_target in _decode(ids.tolist(), mask.tolist(), tokenizer, spellings):
        if stretches and stretches[-1][1] == is_target:
            stretches[-1] = stretches[-1][0] + text, is_target
        elif text:
            stretches.append((text, is_target))
    return stretches


def _decode(
    ids: list[int], mask: list[bool], tokenizer: Tokenizer, spellings: Mapping[int, str]
) -> Iterator[tuple[str, bool]]:
    """Whole characters, token by token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, is_target in zip(ids, mask, strict=True):
        data = tokenizer.token_bytes(token)
        if data is None:  # no character goes on behind a special token
            yield decoder.decode(b"", True) + spellings.get(token, f"<{token}>"), is_target
        else:
            yield decoder.decode(data), is_target


def _shorten(stretches: list[tuple[str, bool]], limit: int) -> tuple[tuple[str, bool], ...]:
    """The stretches with control characters escaped, in about `limit` characters."""
    if sum(len(text) for text, _ in stretches) > limit and len(stretches) > _MAX_STRETCHES:
        half = _MAX_STRETCHES // 2
        stretches = [*stretches[:half], (_CUT, False), *stretches[-half:]]
    room = _find_room([len(text) for text, _ in stretches], limit)
    return tuple((escape_controls(_cut_middle(text, room)), is_t) for text, is_t in stretches)


def _find_room(lengths: list[int], limit: int) -> int:
    """The most characters that each may have so that all have `limit`; short ones leave room."""
    left, waiting = limit, len(lengths)
    for length in sorted(lengths):
        if length * waiting > left:
            return max(left // waiting, _LEAST_CHARACTERS)
        left, waiting = left - length, waiting - 1
    return max(lengths, default=0)


def _cut_middle(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    kept = room - len(_CUT)
    return text[: kept - kept // 2] + _CUT + text[len(text) - kept // 2 :]


def _escape_line(word: str) -> str:
    """A stranger's word within a line."""
    return " ".join(escape_controls(word).split())


def describe_chats(facts: ChatFacts) -> list[str]:
    """What is learned from, and what is left out, in sentences."""
    counts = facts.counts
    forms = _escape_line(", ".join(facts.formats))
    share = 100 * counts.n_targets / max(counts.n_tokens, 1)
    lines = [
        f"{counts.n_chats:,} chats ({forms}), {counts.n_tokens:,} tokens, "
        f"the longest {counts.longest:,}",
        f"{share:.0f} % of the tokens are learned from; "
        f"{counts.n_dropped:,} chats without a target{' are left out' * bool(counts.n_dropped)}",
    ]
    ended = f"{counts.n_ended:,} of {counts.n_answers:,}"
    if counts.n_ended == counts.n_answers:
        lines.append(f"every answer ends with its end token: {ended}")
    else:
        lines.append(f"answers that end with their end token: {ended}")
    if counts.n_cut:
        lines.append(
            f"{counts.n_cut:,} are longer than {facts.context_length:,} tokens and lose their "
            f"first turns ({counts.n_cut_turns:,} messages)"
        )
    if counts.n_cut_at_end:
        lines.append(
            f"{counts.n_cut_at_end:,} have a last exchange longer than {facts.context_length:,} "
            f"tokens and lose its end ({counts.n_cut_tokens:,} tokens)"
        )
    if counts.n_open:
        lines.append(
            f"{counts.n_open:,} end with a message of the user without an answer, which is left out"
        )
    return lines
