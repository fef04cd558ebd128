"""`--generate`: load a checkpoint, read prompts, print completions or write them to a file.

Only completions go to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from generate import Generation, generate_batch, stream_text
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import publish_file
from preflight.core.streams import is_missing
from preflight.device.runtime import is_out_of_memory
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig, SamplingConfig, build_config
from preflight.tokenization import Tokenizer
from transformer_model import DecoderOnlyTransformer

try:
    import readline  # line editing and history for input()
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

DEFAULT_PROMPTS = ("Once upon a time", "The", "In the beginning", "It is important to")
MAX_INTERACTIVE_PROMPTS = 5
MAX_PROMPTS_BYTES = 64 * 2**20
SEPARATOR = "-" * 40
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
# Characters that control a terminal instead of being shown: C0 but
# newline and tab, DEL, C1, and the marks that
# turn the direction of text (Boucher and Anderson 2021, "Trojan Source").
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


def run(config: RunConfig) -> int:
    """Generate what was asked for and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a narrow encoding must not end the program
            stream.reconfigure(errors="backslashreplace")
    prompts = read_prompts(config)
    interactive = is_interactive(config)
    check_output(config.generation.output_file)
    setup = RunSetup(config, StopFlag(), trains=False)
    runtime, checkpoint = setup.runtime, setup.checkpoint
    try:
        model, tokenizer = setup.load_model()
        log.info(
            f"{checkpoint.path}: step {checkpoint.step:,}, {model.config.label}, "
            f"{runtime.device}, {str(runtime.dtype).removeprefix('torch.')}"
        )
        if interactive:
            return Session(model, tokenizer, config.sampling).run(prompts)
        return _write_completions(model, tokenizer, prompts, config)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(
            ExitCode.OUT_OF_MEMORY,
            "out of memory on this device",
            f"lower --generation-batch-size {config.generation.generation_batch_size}, "
            "or use --device cpu",
        ) from None


def is_interactive(config: RunConfig) -> bool:
    """Whether to open the interactive prompt: as asked, else on a terminal with few prompts."""
    settings = config.generation
    if settings.interactive is not None:
        return settings.interactive
    few = not settings.prompts_file and len(settings.prompts) <= MAX_INTERACTIVE_PROMPTS
    terminal = all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    return few and terminal and not settings.output_file


def read_prompts(config: RunConfig) -> list[str]:
    """The prompts of the flags or the file; else the default ones, unless prompts will be typed.

    Raises:
        PreflightError: code TEXT, with the numbers of the first lines that cannot be used.
    """
    settings = config.generation
    if settings.prompts_file:
        return _read_prompts_file(settings.prompts_file)
    for number, prompt in enumerate(settings.prompts, 1):
        if not _is_unicode(prompt):
            raise PreflightError(ExitCode.TEXT, f"--prompts: number {number} is not UTF-8")
    return list(settings.prompts or (() if is_interactive(config) else DEFAULT_PROMPTS))


def _read_prompts_file(name: str) -> list[str]:
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            content = file.read(MAX_PROMPTS_BYTES + 1)
    except OSError as error:
        raise PreflightError(ExitCode.TEXT, f"--prompts-file {name}: {error.strerror}") from None
    if len(content) > MAX_PROMPTS_BYTES:
        raise PreflightError(
            ExitCode.TEXT,
            f"--prompts-file {name}: larger than {MAX_PROMPTS_BYTES // 2**20} MiB; split it",
        )
    prompts, faults = [], {}
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                prompts.append(_parse_prompt(line.removesuffix(b"\r"), name.endswith(".jsonl")))
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


def _parse_prompt(line: bytes, as_json: bool) -> str:
    if b"\0" in line:
        raise ValueError("binary")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
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


def check_output(name: str | None) -> None:
    """Check that the output file can be written, before anything is generated.

    Raises:
        PreflightError: code STORAGE.
    """
    if name is None:
        if is_missing(sys.stdout):
            raise PreflightError(ExitCode.STORAGE, "stdout is closed; use --output-file")
        return
    folder = Path(name).absolute().parent
    if Path(name).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is a folder" if Path(name).is_dir() else f"{folder} cannot be written to"
        raise PreflightError(
            ExitCode.STORAGE,
            f"--output-file {name}: {reason}",
            "choose another place, or make the folder first",
        )


def _write_completions(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, prompts: list[str], config: RunConfig
) -> int:
    """Complete all prompts in batches. Completions are printed in order, as soon as they can be."""
    settings = config.generation
    repeated = [p for p in prompts for _ in range(settings.num_return_sequences)]
    done: dict[int, Generation] = {}
    shown = 0
    began, written = time.perf_counter(), 0
    bar = tqdm(
        total=len(repeated),
        unit="completion",
        file=sys.stderr,
        disable=None if len(repeated) > settings.generation_batch_size else True,
    )

    def note_step(ended: list[tuple[int, Generation]], n_tokens: int) -> None:
        nonlocal shown, written
        written += n_tokens
        done.update(ended)
        bar.update(len(ended))
        while shown in done and not settings.output_file:
            with bar.external_write_mode():
                rule = f"\n{SEPARATOR}\n" if shown else ""
                _show(f"{rule}{repeated[shown]}{done[shown].text}\n")
            shown += 1
        stop.leave_if_stopping(
            f"stopped: {len(done):,} of {len(repeated):,} completions are finished"
        )

    with StopFlag() as stop:
        try:
            generate_batch(
                model,
                tokenizer,
                repeated,
                config.sampling,
                settings.generation_batch_size,
                note_step,
            )
        finally:
            bar.close()
            if settings.output_file and done:
                _save_completions(
                    Path(settings.output_file), repeated, done, settings.num_return_sequences
                )
    _log_rate(len(done), written, time.perf_counter() - began)
    return int(ExitCode.DONE)


def _save_completions(
    path: Path, prompts: list[str], done: dict[int, Generation], n_sequences: int
) -> None:
    """Publish the finished completions, in the order of the prompts."""
    records: list[dict[str, Any]] = [
        {"prompt": prompts[i], "sequence": i % n_sequences, **dataclasses.asdict(done[i])}
        for i in sorted(done)
    ]
    if path.suffix == ".json":
        content = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        content = f"\n{SEPARATOR}\n".join(f"{r['prompt']}{r['text']}\n" for r in records)
    with publish_file(path, len(data := content.encode())) as file:
        file.write(data)
    log.info(f"{len(records):,} completions in {path}")


class Session:
    """The interactive prompt. Commands change the sampling; every completion streams."""

    def __init__(
        self, model: DecoderOnlyTransformer, tokenizer: Tokenizer, sampling: SamplingConfig
    ) -> None:
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
        while True:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                return int(ExitCode.DONE)
            except KeyboardInterrupt:
                if readline is None or not readline.get_line_buffer():
                    raise
                _show("\n")  # half a line was typed: only it is dropped
                continue
            if line.strip() == "/quit":
                return int(ExitCode.DONE)
            if line.startswith("/"):
                self.command(line)
            elif line.strip():
                self.complete(line, echo=not terminal)

    def complete(self, prompt: str, *, echo: bool = True) -> None:
        """Stream one completion; Ctrl-C ends it, and only it."""
        config = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._n_completions)
        self._n_completions += 1
        steps: list[int] = []
        began = time.perf_counter()
        try:
            _show(prompt if echo else "")
            for piece in stream_text(
                self.model,
                self.tokenizer,
                prompt,
                config,
                lambda ended, n_tokens: steps.append(n_tokens),
            ):
                _show(piece)
            _show("\n")
        except KeyboardInterrupt:
            _show("\n")
            log.info("stopped")
        _log_rate(1, sum(steps), time.perf_counter() - began)

    def command(self, line: str) -> None:
        """Execute a line that starts with a slash; a wrong one changes nothing."""
        name, _, value = line.strip().partition(" ")
        if name == "/help":
            log.info(HELP)
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


def _show(text: str) -> None:
    """Print text at once; on a terminal, control characters are made visible."""
    if sys.stdout.isatty():
        text = text.translate(_INVISIBLE)
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


def _log_rate(n_completions: int, n_tokens: int, seconds: float) -> None:
    what = "completion" if n_completions == 1 else "completions"
    log.info(
        f"{n_completions:,} {what}, {n_tokens:,} tokens in {seconds:.1f} s, "
        f"{n_tokens / max(seconds, 1e-9):,.1f} tokens/s"
    )
