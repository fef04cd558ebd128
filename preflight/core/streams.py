"""stdout and stderr where they may be missing, closed, or without a reader."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# Characters that control a terminal instead of being shown: C0 but newline and tab, DEL, C1, and
# the marks that turn the direction of text (Boucher and Anderson 2021, "Trojan Source").
_INVISIBLE = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *range(9),
        *range(11, 32),
        *range(127, 160),
        0x61C,
        0x200E,
        0x200F,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}


@contextlib.contextmanager
def replace_missing_streams() -> Iterator[None]:
    """Give a process without stdout or stderr (``>&-``, a service) streams to the null device.

    Missing descriptors 0, 1 and 2 are opened as well. Otherwise the next file that is opened gets
    that number, and what a C library or a child process prints is written into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or stream.closed:
                null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, null)
        stack.enter_context(_buffer_stdout())
        yield


@contextlib.contextmanager
def _buffer_stdout() -> Iterator[None]:
    """Put a buffer between stdout and its descriptor, where ``PYTHONUNBUFFERED`` took it away.

    Without one, Python loses in silence what a full disk did not take of a text.
    """
    stream = sys.stdout
    raw = getattr(stream, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        yield
        return
    buffer = io.BufferedWriter(raw)
    buffered = io.TextIOWrapper(
        buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )
    sys.stdout = buffered
    try:
        yield
    finally:
        sys.stdout = stream
        with contextlib.suppress(OSError, ValueError):  # what failed has been told
            buffered.flush()
        with contextlib.suppress(OSError, ValueError):
            buffered.detach()
            buffer.detach()


def escape_controls(text: str) -> str:
    """A stranger's text for a terminal: characters that would control it are spelled out."""
    return text.translate(_INVISIBLE)


def is_missing(stream: TextIO | None) -> bool:
    """Whether `stream` is missing, or was replaced by `replace_missing_streams`."""
    return stream is None or stream.closed or getattr(stream, "name", "") == os.devnull


def is_on_terminal() -> bool:
    """Whether a person is there, who reads questions and can answer them."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(not is_missing(stream) and stream.isatty() for stream in streams)


def silence_stdout() -> None:
    """Point stdout at the null device, so that what is buffered does not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, sys.stdout.fileno())
        finally:
            os.close(null)


def print_error(*lines: str) -> None:
    """Write the lines to stderr, each after ``preflight: ``. Without a reader they are lost."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write("".join(f"preflight: {line}\n" for line in lines))
        sys.stderr.flush()
