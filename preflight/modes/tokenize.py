"""`--tokenize` and `--detokenize`: a text and its tokens, piece by piece.

Only the result goes to stdout; which tokenizer it is from goes to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from preflight.checkpoints.store import open_checkpoint, scan_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.streams import is_missing
from preflight.corpus.metadata import METADATA_NAME, read_metadata
from preflight.corpus.shards import load_data_tokenizer
from preflight.modes.report import is_in_colour
from preflight.settings import RunConfig
from preflight.settings.kinds import TOKENIZERS
from preflight.tokenization import Tokenizer, is_choice, load_saved_tokenizer, load_tokenizer
from preflight.tokenization.choosing import AUTO

MAX_STDIN_BYTES = 2**20
_BACKGROUNDS = (42, 43, 46, 45, 44)  # in turn, so that neighbours differ (ECMA-48)


def run_tokenize(config: RunConfig) -> int:
    """Show the tokens of a text, and return the exit code.

    Raises:
        PreflightError: code TEXT, for a stdin that is not UTF-8, or a character that the tokenizer
            does not know; otherwise as `find_tokenizer`.
    """
    text = config.tokens.tokenize or ""
    text = _read_stdin() if text == "-" else text
    tokenizer = find_tokenizer(config)
    if config.generation.replace_unknown:
        tokenizer = tokenizer.replacing_unknown()
    ids = [int(token) for token in tokenizer.encode(text)]
    _show(tokenizer, ids, len(text.encode()))
    return int(ExitCode.DONE)


def run_detokenize(config: RunConfig) -> int:
    """Show the text that ids stand for, and return the exit code.

    Raises:
        PreflightError: code FLAGS, for an id that is not in the vocabulary; otherwise as
            `find_tokenizer`.
    """
    tokenizer, ids = find_tokenizer(config), config.tokens.ids
    unknown = next((token for token in ids if token >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--detokenize: {unknown} is no id of tokenizer {tokenizer.name}, whose ids go from 0 "
            f"to {tokenizer.vocab_size - 1}",
        )
    print(f"text    {_escape(tokenizer.decode(ids).encode())}")
    _show(tokenizer, ids, sum(len(tokenizer.token_bytes(token) or b"") for token in ids))
    return int(ExitCode.DONE)


def find_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the checkpoint, else of the data folder, else by name.

    A ``--tokenizer`` that is given passes over those that it cannot mean.

    Raises:
        PreflightError: code CHECKPOINT or DATA, where the one that is found is damaged; code
            CHECKPOINT, when the checkpoint that is named has another one than ``--tokenizer``;
            code FLAGS, where none is found and the name is unknown, or made from a text.
    """
    name = config.model.tokenizer
    tokenizer, place = _find_saved(config, name)
    if tokenizer is None:
        output_dir, data_dir = config.control.output_dir, config.data.data_dir
        nowhere = f"no checkpoint in {output_dir} and no data folder {data_dir}"
        if name in TOKENIZERS.names() and TOKENIZERS.load(name).is_trained:
            raise PreflightError(
                ExitCode.FLAGS,
                f"--tokenizer {name} is made from a text: {nowhere} has one",
                "name a checkpoint with --checkpoint-path, or use --tokenizer gpt2 or byte",
            )
        tokenizer = load_tokenizer("gpt2" if name == AUTO else name)
        place = f"since there is {nowhere}" if name == AUTO else "by its name"
    log.info(f"tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids: {place}")
    return tokenizer


def _find_saved(config: RunConfig, name: str) -> tuple[Tokenizer | None, str]:
    """The tokenizer that a checkpoint or the data folder brings and its place, or None."""
    named, output_dir = config.generation.checkpoint_path, Path(config.control.output_dir)
    checkpoints, damaged = ([open_checkpoint(named)], {}) if named else scan_checkpoints(output_dir)
    for checkpoint in checkpoints[:1]:
        facts = checkpoint.config["tokenizer"]
        if is_choice(name, facts):
            return load_saved_tokenizer(checkpoint.path, facts), f"that of {checkpoint.path}"
        if named:
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"{checkpoint.path} has tokenizer {facts['name']}, not {name}",
                "leave out --tokenizer or --checkpoint-path",
            )
    if damaged and not checkpoints:
        raise PreflightError(ExitCode.CHECKPOINT, next(iter(damaged.values())))
    data_dir = Path(config.data.data_dir)
    if os.path.lexists(data_dir / METADATA_NAME):
        metadata = read_metadata(data_dir)
        if is_choice(name, metadata.tokenizer.model_dump()):
            return load_data_tokenizer(data_dir, metadata), f"that of {data_dir}"
    return None, ""


def _read_stdin() -> str:
    """The text of a pipe, whose line ends stay as they are."""
    try:
        content = b"" if is_missing(sys.stdin) else sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
        if not content or len(content) > MAX_STDIN_BYTES:
            raise ValueError(
                f"it has {len(content):,} bytes, and 1 to {MAX_STDIN_BYTES:,} are read"
            )
        return content.decode()
    except UnicodeDecodeError as error:
        fault = f"it is not UTF-8 at byte {error.start}"
    except (OSError, ValueError) as error:
        fault = (error.strerror if isinstance(error, OSError) else None) or str(error)
    raise PreflightError(ExitCode.TEXT, f"--tokenize -: stdin cannot be used: {fault}")


# ---- what is shown ------------------------------------------------------------------------------


def _show(tokenizer: Tokenizer, ids: list[int], n_bytes: int) -> None:
    """Print the pieces, the ids and their number; `n_bytes` are those of the text."""
    pieces = [_spell(tokenizer, token) for token in ids]
    in_colour = is_in_colour(sys.stdout)
    if not in_colour:  # a bar ends a piece, so one within a piece is escaped
        pieces = [piece.replace("|", "\\|") for piece in pieces]
    print(f"pieces  {_join(pieces, '' if in_colour else '|')}")
    print(f"ids     {_join([str(token) for token in ids], ',')}")
    per_token = n_bytes / max(len(ids), 1)  # a tokenizer that drops spaces has none for a space
    print(f"tokens  {len(ids):,} ({n_bytes:,} bytes, {per_token:.2f} bytes per token)")


def _join(items: list[str], separator: str) -> str:
    """The items on one line, on a terminal each on the background of its number."""
    if is_in_colour(sys.stdout):
        items = [
            f"\x1b[30;{_BACKGROUNDS[number % len(_BACKGROUNDS)]}m{item}\x1b[0m"
            for number, item in enumerate(items)
        ]
    return separator.join(items)


def _spell(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.token_bytes(token)
    if piece is None:
        return "<end of text>" if token == tokenizer.end_of_text_id else "<no text>"
    return _escape(piece)


def _escape(piece: bytes) -> str:
    """A piece on one line: bytes that are not UTF-8 and what cannot be printed are escaped."""
    text = piece.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
