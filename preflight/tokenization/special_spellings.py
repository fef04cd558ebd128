"""Special tokens in a chat: the template writes them, and a message never does.

Where a message spells one, a character of the spelling is replaced by a stand-in before the
template sees it, and put back after the text has been cut at the template's own special tokens.
Everything else in the message stays as it is, so that a template can strip and split it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from preflight.core.errors import ExitCode, PreflightError
from preflight.tokenization.chats import Message
from preflight.tokenization.protocol import Tokenizer

_STAND_INS = range(0x10FFFD, 0xEFFFF, -1)  # planes 15 and 16, for private use
Table = dict[int, str]  # for `str.translate`: what each stand-in stands for


class SpecialSpellings:
    """The spellings of a tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._whole = re.compile(f"(?=({'|'.join(map(re.escape, names))}))")
        self._longest = len(names[0])
        # A message may end with the beginning of a spelling that the next one completes.
        self._beginnings = {name[:n] for name in names for n in range(1, len(name))}
        self._endings = {name[n:] for name in names for n in range(1, len(name))}
        self._first = {name[0] for name in names}
        self._last = {name[-1] for name in names}

    def hide(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Table]:
        """The messages in which no special token is spelled, and what `find` needs to undo it.

        Raises:
            PreflightError: code TEXT, for messages that hold every character for private use.
        """
        if not all(message.content.isascii() for message in messages):
            messages = [Message(each.role, _mend(each.content)) for each in messages]
        places = [self._find_spelled(message.content) for message in messages]
        if not any(places):
            return messages, {}
        used = set().union(*(message.content for message in messages))
        free = (code for code in _STAND_INS if chr(code) not in used)
        pairs = list(zip(messages, places, strict=True))
        found = {message.content[i] for message, at in pairs for i in at}
        stand_ins = dict(zip(sorted(found), free, strict=False))
        if len(stand_ins) < len(found):
            raise PreflightError(ExitCode.TEXT, "a chat holds every character for private use")
        hidden = []
        for message, at in pairs:
            characters = list(message.content)
            for i in at:
                characters[i] = chr(stand_ins[characters[i]])
            hidden.append(Message(message.role, "".join(characters)))
        return hidden, {code: character for character, code in stand_ins.items()}

    def _find_spelled(self, content: str) -> set[int]:
        """Characters without which no special token is spelled, alone or with what is around."""
        if not any(character in content for character in self._first | self._last):
            return set()
        found = {match.start() for match in self._whole.finditer(content)}
        inner = content.strip()
        begin = len(content) - len(content.lstrip())
        head, tail = inner[: self._longest], inner[-self._longest :]
        if any(head[:n] in self._endings for n in range(1, len(head) + 1)):
            found.add(begin)
        end = begin + len(inner)
        return found | {end - n for n in range(1, len(tail) + 1) if tail[-n:] in self._beginnings}

    def cut(self, text: str, table: Table) -> Iterator[tuple[int, int, int | None, str]]:
        """The stretches of a rendered text: begin, end, the special token or None, the text."""
        specials, at = self._tokenizer.special_tokens, 0
        for match in self._tokenizer.special_pattern.finditer(text):
            if match.start() > at:
                yield at, match.start(), None, text[at : match.start()].translate(table)
            at = match.end()
            yield match.start(), at, specials[match[match.lastindex or 0]], ""
        if at < len(text):
            yield at, len(text), None, text[at:].translate(table)

    def encode(self, text: str, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """The ids (T,) of a rendered text, and where each begins and ends in it (T 2)."""
        ids, offsets = [], []
        for begin, end, special, stretch in self.cut(text, table):
            if special is not None:
                ids.append(np.array([special], np.int64))
                offsets.append(np.array([[begin, end]], np.int64))
            else:
                found, places = self._tokenizer.encode_with_offsets(stretch, begins=not begin)
                ids.append(found.astype(np.int64))
                offsets.append(places + begin)
        if not ids:
            return np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
        return self._settle_beginning(np.concatenate(ids), np.concatenate(offsets))

    def _settle_beginning(
        self, ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One beginning of text where the tokenizer wants one: the template's, or another."""
        bos = self._tokenizer.bos_id
        if bos is None:
            return ids, offsets
        others = np.flatnonzero(ids != bos)
        n_leading = int(others[0]) if len(others) else len(ids)
        if n_leading:
            return ids[n_leading - 1 :], offsets[n_leading - 1 :]
        return np.insert(ids, 0, bos), np.insert(offsets, 0, 0, axis=0)


def _mend(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, as tokenizers have it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
