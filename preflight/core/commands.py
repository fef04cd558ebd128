"""Commands that a message tells the user to type: the one place where they are quoted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def find_program() -> tuple[str, ...]:
    """How this program was called: ``python main.py``, or the installed ``preflight``."""
    called = sys.argv[0] if sys.argv else ""
    if Path(called).stem == "preflight":
        return ("preflight",)
    return ("python", called if Path(called).name == "main.py" else "main.py")


def format_command(*flags: object) -> str:
    """A command of this program with these flags, which a shell reads as they are meant."""
    return join_words(*find_program(), *flags)


def join_words(*words: object) -> str:
    """Words as a shell reads them: spaces and control characters are quoted, on one line."""
    return " ".join(_quote(str(word)) for word in words)


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # bash, zsh and ksh read $'...'; shlex.quote would leave line breaks and half-characters.
    shown = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in word.encode("utf-8", "surrogateescape")
    )
    return f"$'{''.join(shown)}'"
