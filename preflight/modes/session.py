"""A prompt on the terminal, or lines of a pipe: each is answered at once, on stdout."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import time
from collections.abc import Callable, Iterator

from generate import Generation, OnStep, stream_text
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.streams import escape_controls
from preflight.models.base import TokenModel
from preflight.modes.completion_files import format_logprobs
from preflight.settings import SamplingConfig, build_config
from preflight.tokenization import Tokenizer

try:
    import readline  # line editing and history for input()
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

HELP = """\
Type a prompt and press Enter: the model continues it. Ctrl-C stops a completion. Commands:
  /temp X   sampling temperature, 0: greedy    /topk N   top-k, 0: all tokens
  /topp X   top-p (nucleus sampling), 0 to 1   /len N    tokens to generate at most
  /seed N   seed of the next completions       /help     this text      /quit   leave"""
COMMANDS = {
    "/temp": "temperature",
    "/topk": "top_k",
    "/topp": "top_p",
    "/len": "max_new_tokens",
    "/seed": "seed",
}


class Session:
    """The interactive prompt. Commands change the sampling; every completion streams.

    Attributes:
        help_text: what ``/help`` tells.
    """

    help_text = HELP

    def __init__(self, model: TokenModel, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._n_completions = 0  # since the seed was set: a prompt given twice has two completions

    def run(self, prompts: list[str]) -> int:
        """Complete `prompts`, then what is typed until /quit, Ctrl-D or Ctrl-C at the prompt."""
        for prompt in prompts:
            self.complete(prompt)
        if sys.stdin is None:
            return int(ExitCode.DONE)
        terminal = sys.stdin.isatty()
        if terminal:
            log.info("/help lists the commands, Ctrl-D quits")
        elif hasattr(sys.stdin, "reconfigure"):  # without it a line of a CRLF text ends in \r
            sys.stdin.reconfigure(newline=None)
        while True:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                return int(ExitCode.DONE)
            except KeyboardInterrupt:
                if readline is None or not readline.get_line_buffer():
                    raise
                show("\n")  # half a line was typed: only it is dropped
                continue
            if line.strip() == "/quit":
                return int(ExitCode.DONE)
            if line.startswith("/"):
                self.command(line)
            elif line.strip():
                self.complete(line, echo=not terminal)

    def complete(self, prompt: str, *, echo: bool = True) -> None:
        """Stream one completion; Ctrl-C ends it, and only it."""
        self.stream(
            lambda note_step, index: stream_text(
                self.model, self.tokenizer, prompt, self.sampling, note_step, index
            ),
            prompt if echo else "",
        )

    def stream(self, generate: Callable[[OnStep, int], Iterator[str]], before: str = "") -> str:
        """Show `before`, and what `generate` yields.

        Args:
            generate: takes a function to call at each step, and the index of the completion.
            before: is shown first.

        Returns:
            What it yielded, also where Ctrl-C ended it or the text cannot be encoded.
        """
        index, self._n_completions = self._n_completions, self._n_completions + 1
        steps: list[int] = []
        found: list[tuple[int, Generation]] = []
        pieces: list[str] = []

        def note_step(ended: list[tuple[int, Generation]], n_tokens: int) -> None:
            steps.append(n_tokens)
            found.extend(ended)

        began = time.perf_counter()
        try:
            show(before)
            for piece in generate(note_step, index):
                pieces.append(piece)
                show(piece)
            show("\n" + "".join(format_logprobs(each, self.tokenizer) for _, each in found))
        except KeyboardInterrupt:
            show("\n")
            log.info("stopped")
        except PreflightError as error:
            if error.code != ExitCode.TEXT:  # a character that the tokenizer does not know
                raise
            show("\n")
            log.info("\n".join(error.lines))
        log_rate(1, sum(steps), time.perf_counter() - began)
        return "".join(pieces)

    def command(self, line: str) -> None:
        """Execute a line that starts with a slash; a wrong one changes nothing."""
        name, _, value = line.strip().partition(" ")
        if name == "/help":
            log.info(self.help_text)
            return
        field = COMMANDS.get(name)
        if field is None:
            log.info(f"{name}: no such command; /help lists them")
            return
        if not value.strip():
            log.info(f"{name} is {getattr(self.sampling, field)}")
            return
        try:
            checked = build_config({field: value.strip()}, {}).sampling
        except PreflightError as error:
            log.info(error.lines[0].replace("--" + field.replace("_", "-"), name))
            return
        self.sampling = dataclasses.replace(self.sampling, **{field: getattr(checked, field)})
        self._n_completions = 0 if field == "seed" else self._n_completions
        log.info(f"{name} is now {getattr(self.sampling, field)}")


# \r\n and \r are line ends too, also where \n comes in a later piece.
_line_ends = io.IncrementalNewlineDecoder(None, translate=True)


def show(text: str) -> None:
    """Print text at once. On a terminal, control characters are made visible."""
    if sys.stdout.isatty():
        text = escape_controls(_line_ends.decode(text))
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is buffered cannot be written at exit either: point stdout elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise PreflightError(
            ExitCode.STORAGE,
            f"cannot write to stdout: {error.strerror}",
            "free space or use --output-file on another disk",
        ) from None


def log_rate(n_completions: int, n_tokens: int, seconds: float) -> None:
    """Tell how many completions of how many tokens were generated, and how fast."""
    what = "completion" if n_completions == 1 else "completions"
    log.info(
        f"{n_completions:,} {what}, {n_tokens:,} tokens in {seconds:.1f} s, "
        f"{n_tokens / max(seconds, 1e-9):,.1f} tokens/s"
    )
