"""JSON values that are too large for memory, read piece by piece."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

_MAX_SCALAR_BYTES = 2**16  # of a number or word, and of a key
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'[^ \t\r\n,:"{}\[\]]*+')
_NESTING = re.compile(rb'["{}\[\]]')
_ANY_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Whole escapes only, and both halves of a surrogate pair together.
_STRING = re.compile(
    rb'(?:[^"\\\x00-\x1f]++'
    rb"|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb'|\\["\\/bfnrt])*+'
)
_PAIR_BYTES = 12


class JsonFault(ValueError):
    """What is wrong, and at which byte."""


class JsonStream:
    """A place within JSON that comes in chunks; it moves forward only."""

    def __init__(self, chunks: Iterator[bytes], offset: int = 0) -> None:
        self._chunks = chunks
        self._data, self._at = b"", 0
        self._base = offset  # of the first byte of `_data`

    @property
    def offset(self) -> int:
        """Of the next byte."""
        return self._base + self._at

    def fail(self, what: str) -> JsonFault:
        """The error to raise for a fault at this place."""
        return JsonFault(f"{what} at byte {self.offset:,}")

    def _fill(self) -> bool:
        """Get the next chunk behind what is left; False at the end."""
        chunk = next(self._chunks, b"")
        while not chunk:
            chunk = next(self._chunks, None)  # type: ignore[assignment]
            if chunk is None:
                return False
        self._base += self._at
        self._data, self._at = self._data[self._at :] + chunk, 0
        return True

    def peek(self) -> bytes:
        """The next byte that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._data, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._data) or not self._fill():
                return self._data[self._at : self._at + 1]

    def expect(self, byte: bytes) -> None:
        """Pass that byte; `JsonFault` for another."""
        found = self.peek()
        if found != byte:
            raise self.fail(
                f"expected {byte.decode()}, found "
                + (ascii(found.decode("latin-1")) if found else "the end")
            )
        self._at += 1

    def read_string(self) -> Iterator[str]:
        """Pass a string; its pieces, decoded. None of them ends within a surrogate pair.

        Raises:
            JsonFault: it is no string, has no end, holds half a surrogate pair, or is no UTF-8.
        """
        self.expect(b'"')
        decoder = codecs.getincrementaldecoder("utf-8")()
        while True:
            end = _STRING.match(self._data, self._at).end()  # type: ignore[union-attr]
            is_closed = self._data[end : end + 1] == b'"'
            try:
                piece = decoder.decode(self._data[self._at : end], final=is_closed)
            except UnicodeDecodeError as error:
                raise self.fail(f"not UTF-8 ({error.reason}) in the string") from None
            self._at = end
            if piece:
                yield json.loads(f'"{piece}"') if "\\" in piece else piece
            if is_closed:
                self._at += 1
                return
            self._go_on_in_string()

    def _go_on_in_string(self) -> None:
        rest = self._data[self._at : self._at + _PAIR_BYTES]
        is_escape = rest[:1] == b"\\"
        if (not rest or is_escape) and len(rest) < _PAIR_BYTES and self._fill():
            return
        if re.match(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", rest):
            raise self.fail("half a surrogate pair, which no UTF-8 can hold,")
        if not rest or len(rest) == 1:
            raise self.fail("a string without an end")
        raise self.fail("an invalid escape" if is_escape else "a control character in a string")

    def _skip_string(self) -> None:
        """Pass the rest of a string, behind its quotation mark."""
        while True:
            self._at = _ANY_STRING.match(self._data, self._at).end()  # type: ignore[union-attr]
            if self._data[self._at : self._at + 1] == b'"':
                self._at += 1
                return
            if not self._fill():
                raise self.fail("a string without an end")

    def skip_value(self) -> None:
        """Pass any value; of what it holds, only strings and brackets are looked at."""
        byte = self.peek()
        if byte in (b"{", b"["):
            self._at += 1
            self.skip_nested()
        elif byte == b'"':
            self._at += 1
            self._skip_string()
        else:
            self._skip_scalar()

    def skip_nested(self) -> None:
        """Pass the rest of a list or object, behind its opening bracket."""
        depth = 1
        while depth:
            match = _NESTING.search(self._data, self._at)
            if match is None:
                self._at = len(self._data)
                if not self._fill():
                    raise self.fail("a list or object without an end")
                continue
            self._at = match.end()
            if match[0] == b'"':
                self._skip_string()
            else:
                depth += 1 if match[0] in b"{[" else -1

    def _skip_scalar(self) -> None:
        while True:
            end = _SCALAR.match(self._data, self._at).end()  # type: ignore[union-attr]
            if end < len(self._data) or end - self._at > _MAX_SCALAR_BYTES or not self._fill():
                break
        word = self._data[self._at : end]
        try:
            if len(word) > _MAX_SCALAR_BYTES:
                raise ValueError
            json.loads(word)
        except ValueError:
            raise self.fail("no JSON value") from None
        self._at = end

    def read_keys(self) -> Iterator[str]:
        """The keys of an object; the caller passes each value before it asks for the next key."""
        self.expect(b"{")
        if self.peek() == b"}":
            self._at += 1
            return
        while True:
            key = ""
            for piece in self.read_string():
                key += piece
                if len(key) > _MAX_SCALAR_BYTES:
                    raise self.fail("a key of more than 64 KiB")
            self.expect(b":")
            yield key
            if self.peek() != b",":
                self.expect(b"}")
                return
            self._at += 1


def read_text(stream: JsonStream, keys: tuple[str, ...]) -> Iterator[str]:
    """Pass one value; the pieces of the string at `keys` within it, or nothing.

    Raises:
        JsonFault: it is no JSON, or names the key twice.
    """
    byte = stream.peek()
    if not keys and byte == b'"':
        yield from stream.read_string()
    elif not keys or byte != b"{":
        stream.skip_value()
    else:
        is_found = False
        for key in stream.read_keys():
            if key != keys[0]:
                stream.skip_value()
            elif is_found:
                raise stream.fail(f'the key "{key}" a second time')
            else:
                is_found = True
                yield from read_text(stream, keys[1:])
