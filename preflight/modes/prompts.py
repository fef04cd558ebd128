"""The prompts of `--generate`: those of the flags, of a file or of a pipe, or the default ones."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from typing import IO

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.streams import is_missing
from preflight.settings import RunConfig

DEFAULT_PROMPTS = ("Once upon a time", "The", "In the beginning", "It is important to")
MAX_INTERACTIVE_PROMPTS = 5
MAX_PROMPTS_BYTES = 64 * 2**20
PATIENCE_SECONDS = 1.0  # after it, a user is told what is waited for


def is_interactive(config: RunConfig) -> bool:
    """Whether to open the interactive prompt: as asked, else on a terminal with few prompts."""
    settings = config.generation
    if settings.interactive is not None:
        return settings.interactive
    few = not settings.prompts_file and len(settings.prompts) <= MAX_INTERACTIVE_PROMPTS
    terminal = all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    return few and terminal and not settings.output_file


def read_prompts(config: RunConfig) -> list[str]:
    """The prompts of the flags, else of the file, else of a pipe, else the default ones.

    There are none where they will be typed. stdin is read only where no flag names a prompt: a pipe
    that never ends, as a service may have it, would be waited for.

    Raises:
        PreflightError: code TEXT, with the numbers of the first lines that cannot be used.
    """
    settings = config.generation
    if settings.prompts_file:
        return _read_prompts_file(settings.prompts_file)
    for number, prompt in enumerate(settings.prompts, 1):
        if not _is_unicode(prompt):
            raise PreflightError(ExitCode.TEXT, f"--prompts: number {number} is not UTF-8")
    if any(r"\n" in prompt for prompt in settings.prompts):
        log.info(r"--prompts: \n is read as two characters; a line end is written $'...\n' in bash")
    if settings.prompts or is_interactive(config):
        return list(settings.prompts)
    piped = _read_pipe()
    if piped is not None:
        return [piped]
    log.info(f"no prompt is given: {len(DEFAULT_PROMPTS)} examples are completed; use --prompts")
    return list(DEFAULT_PROMPTS)


def _read_pipe() -> str | None:
    """All that stdin holds, as one prompt; None where it is a terminal, missing or empty."""
    if is_missing(sys.stdin) or sys.stdin.isatty():
        return None
    try:
        with _telling_of_a_wait("the prompt on stdin"):
            content = sys.stdin.buffer.read(MAX_PROMPTS_BYTES + 1)
    except OSError as error:  # nohup leaves a stdin that cannot be read
        log.info(f"stdin cannot be read: {error.strerror or error}")
        return None
    if not content:
        return None
    try:
        text = _decode(_check_size("the prompt on stdin", content))
    except ValueError as error:
        raise PreflightError(ExitCode.TEXT, f"the prompt on stdin: {error}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if "\n" in text:
        n_lines = text.count("\n") + 1
        log.info(
            f"the {n_lines:,} lines of stdin are one prompt; --prompts-file - reads one a line"
        )
    return text


def _read_prompts_file(name: str) -> list[str]:
    try:
        with (
            _telling_of_a_wait(f"--prompts-file {name}"),
            _open(name) as file,
        ):
            content = _check_size(f"--prompts-file {name}", file.read(MAX_PROMPTS_BYTES + 1))
    except OSError as error:
        raise PreflightError(ExitCode.TEXT, f"--prompts-file {name}: {error.strerror}") from None
    prompts, faults = [], {}
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()  # at \n, \r\n and \r
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                prompts.append(_parse_prompt(line, name.lower().endswith(".jsonl")))
        except ValueError as error:
            faults[number] = str(error)
    if faults:
        first = [f"line {number}: {fault}" for number, fault in list(faults.items())[:5]]
        raise PreflightError(
            ExitCode.TEXT,
            f"--prompts-file {name}: {len(faults):,} of {len(lines):,} lines cannot be used",
            "; ".join(first),
            'expected: UTF-8 text, one prompt a line; in .jsonl, objects like {"prompt": "Hi"}',
        )
    if not prompts:
        raise PreflightError(ExitCode.TEXT, f"--prompts-file {name}: there is no prompt in it")
    return prompts


def _open(name: str) -> IO[bytes]:
    return open(0 if name == "-" else name, "rb", closefd=name != "-")


@contextlib.contextmanager
def _telling_of_a_wait(what: str) -> Iterator[None]:
    """Say so if the block takes long: a pipe is waited for until its writer closes it."""
    message = f"waiting for the end of {what} (on a terminal Ctrl-D); Ctrl-C stops"
    timer = threading.Timer(PATIENCE_SECONDS, log.info, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_size(what: str, content: bytes) -> bytes:
    if len(content) > MAX_PROMPTS_BYTES:
        limit = f"{MAX_PROMPTS_BYTES // 2**20} MiB"
        raise PreflightError(ExitCode.TEXT, f"{what}: larger than {limit}; split it")
    return content


def _decode(content: bytes) -> str:
    if b"\0" in content:
        raise ValueError("binary")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _parse_prompt(line: bytes, as_json: bool) -> str:
    text = _decode(line)
    if not as_json:
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not _is_unicode(prompt):
        raise ValueError('no "prompt" with a text')
    return prompt


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair: bytes of a command line that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
