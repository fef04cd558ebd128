"""`--generate`: load a checkpoint, read prompts, print completions or write them to a file.

Only completions go to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from generate import Generation, generate_batch, load_model
from preflight.checkpoints.format import MILESTONES_NAME, Checkpoint
from preflight.checkpoints.manifest import MANIFEST_NAME
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import TEMPORARY_PREFIX
from preflight.core.streams import is_missing
from preflight.corpus.metadata import METADATA_NAME, SPLITS
from preflight.decoding.vocabulary import list_ids_without_text
from preflight.device.runtime import Runtime, build_runtime, is_out_of_memory
from preflight.models.base import TokenModel
from preflight.modes.chat import ChatSession, choose_template
from preflight.modes.completion_files import SEPARATOR, format_logprobs, save_completions
from preflight.modes.decoding_way import choose_decoding
from preflight.modes.prompts import is_interactive, read_prompts
from preflight.modes.quantizing import check_quantize, choose_dtype, quantize_loaded
from preflight.modes.session import Session, log_rate, show
from preflight.settings import RunConfig, SamplingConfig, SystemSettings
from preflight.tokenization import Tokenizer
from preflight.training.metrics import METRICS_NAME
from preflight.training.resume import check_model_flags


def run(config: RunConfig) -> int:
    """Generate what was asked for and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a narrow encoding must not end the program
            stream.reconfigure(errors="backslashreplace")
    check_output(config)
    quantizes = check_quantize(config)
    # A device that is not there is told before a prompt is waited for.
    runtime = build_runtime(_choose_precision(config.system))
    if runtime.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # TF32 rounds nearly as coarsely as bf16
    chats = config.generation.chat
    prompts = [] if chats else read_prompts(config)
    interactive = is_interactive(config)
    checkpoint = choose_checkpoint(config)
    template = choose_template(config, checkpoint) if chats else None
    try:
        model, tokenizer = load_chosen(config, checkpoint, runtime)
        check_vocabulary(config.sampling, model, tokenizer)
        dtype = f"int8 and {choose_dtype(runtime)}" if quantizes else f"{runtime.dtype}"
        log.info(
            f"{checkpoint.path}: step {checkpoint.step:,}, {model.config.label}, "
            f"{runtime.device}, {dtype.replace('torch.', '')}"
        )
        if quantizes:
            model = quantize_loaded(model, tokenizer, config, runtime)
        else:
            n_rows, n_steps = _count_work(config, len(prompts))
            model = choose_decoding(model, config.system.mixed_precision, [n_rows], n_steps)
        if template is not None:
            return ChatSession(model, tokenizer, config, template).run([])
        if interactive:
            return Session(model, tokenizer, config.sampling).run(prompts)
        return _write_completions(model, tokenizer, prompts, config)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(
            ExitCode.OUT_OF_MEMORY,
            "out of memory on this device",
            f"lower --generation-batch-size {config.generation.generation_batch_size}"
            f"{f' or --beams {config.sampling.beams}' if config.sampling.beams > 1 else ''}, "
            "or use --device cpu",
        ) from None


def choose_checkpoint(config: RunConfig) -> Checkpoint:
    """The checkpoint to generate with: the one that is named, else the best of the run."""
    named = config.generation.checkpoint_path
    return open_checkpoint(named) if named else find_best(Path(config.control.output_dir))


def load_chosen(
    config: RunConfig, checkpoint: Checkpoint, runtime: Runtime
) -> tuple[TokenModel, Tokenizer]:
    """The model of the chosen checkpoint, ready to generate, and its tokenizer.

    Raises:
        PreflightError: code CHECKPOINT, when it is damaged, or not the model that flags name.
    """
    try:
        model, tokenizer = load_model(checkpoint, runtime.device, runtime.dtype)
    except PreflightError:
        if os.path.lexists(checkpoint.path):
            raise
        # A run has just deleted it: look again.
        return load_chosen(config, choose_checkpoint(config), runtime)
    check_model_flags(config, checkpoint)
    return model, tokenizer.replacing_unknown() if config.generation.replace_unknown else tokenizer


def _choose_precision(system: SystemSettings) -> SystemSettings:
    """The flags of the machine, with fp32 where none asks for another precision.

    A matmul rounds differently for another number of rows. From batch size 1 to 16, in bf16 34 of
    96 completions changed, in fp32 none. fp32 was as fast on a CPU without bf16 (1.0 times the
    tokens/s, batch 1 and 8); on a GPU it reads twice the bytes for a token. On a CPU with bf16
    `choose_decoding` may take it for a generation long enough to gain from it.
    """
    if system.mixed_precision is not None:
        return system
    return dataclasses.replace(system, mixed_precision=False)


def _count_work(config: RunConfig, n_prompts: int) -> tuple[int, int]:
    """Rows that are decoded at once, and steps to come: of a conversation, those of one answer."""
    settings, sampling = config.generation, config.sampling
    n_rows = max(1, n_prompts) * max(settings.num_return_sequences, sampling.beams)
    n_at_once = min(n_rows, settings.generation_batch_size)
    return n_at_once, -(-n_rows // n_at_once) * sampling.max_new_tokens


def check_vocabulary(sampling: SamplingConfig, model: TokenModel, tokenizer: Tokenizer) -> None:
    """Check that the model can generate as many different ids as the flags ask for.

    Raises:
        PreflightError: code FLAGS, when it cannot.
    """
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    n_ids -= len(list_ids_without_text(tokenizer))
    for flag, asked in (("--beams", sampling.beams), ("--logprobs", sampling.logprobs or 0)):
        if asked > n_ids:
            raise PreflightError(
                ExitCode.FLAGS,
                f"{flag} {asked:,} is more than the {n_ids:,} ids that this model can generate",
                f"use {flag} {n_ids} or less",
            )


def check_output(config: RunConfig) -> None:
    """Check that the output can be written and replaces no input, before anything is read.

    Raises:
        PreflightError: code FLAGS, when the output file, or the file that stdout goes to, is an
            input; code STORAGE, when it cannot be written, or exists already and `--overwrite` is
            not given.
    """
    name = config.generation.output_file
    if name is None and is_missing(sys.stdout):
        raise PreflightError(ExitCode.STORAGE, "stdout is closed; use --output-file")
    path = Path(name or "")
    flag = _find_input((path, _temporary_of(path)) if name else (1,), config)
    if flag:
        raise PreflightError(
            ExitCode.FLAGS,
            f"{f'--output-file {name}' if name else 'stdout'}: the same file is read as {flag}",
            "nothing was changed; choose another name for the completions",
        )
    if not name:
        return
    fault = _find_output_fault(path, config.generation.overwrite)
    if fault:
        raise PreflightError(
            ExitCode.STORAGE,
            f"--output-file {name}: {fault}",
            "nothing was changed; choose another name, or make the folder first",
        )


def _find_output_fault(path: Path, overwrite: bool) -> str:
    """Why no completions can be written to `path`; empty if nothing speaks against it."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return f"{folder} cannot be written to"
    try:
        os.lstat(_temporary_of(path))  # a name that is too long shows here
    except FileNotFoundError:
        pass
    except OSError as error:
        return error.strerror or str(error)
    if os.path.isdir(path):
        return "is a folder"
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        return "is a link or no regular file, and is not replaced"
    if os.path.exists(path) and not overwrite:
        return "exists already; --overwrite replaces it"
    return ""


def _temporary_of(path: Path) -> Path:
    """What `publish_file` writes before it becomes `path`."""
    return path.parent / (TEMPORARY_PREFIX + path.name)


def _find_input(outputs: Iterable[Path | int], config: RunConfig) -> str:
    """The flag of an input that is one of these files, under whatever name; empty if none is."""
    own = {_identify(place) for place in outputs} - {None}
    if not own:
        return ""
    return next((flag for flag, place in _list_inputs(config) if _identify(place) in own), "")


def _identify(place: Path | str | int) -> tuple[int, int] | None:
    """Device and inode of a regular file, links followed; None for anything else."""
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _list_inputs(config: RunConfig) -> Iterator[tuple[str, str | int]]:
    """Files that `--generate` or the run behind it reads, with the flag that names each."""
    settings, output_dir = config.generation, config.control.output_dir
    yield "stdin", 0
    named = (
        ("--prompts-file", settings.prompts_file),
        ("--config", config.system.config),
        *(("--text-file", name) for name in config.data.text_file),
        ("metrics of --output-dir", os.path.join(output_dir, METRICS_NAME)),
    )
    yield from ((flag, name) for flag, name in named if name)
    place = settings.checkpoint_path or output_dir
    folder = place if os.path.isdir(place) else os.path.dirname(place)
    own = ("*",) if os.path.exists(os.path.join(folder, MANIFEST_NAME)) else ()
    for flag, parent, patterns in (
        ("--data-dir", config.data.data_dir, (METADATA_NAME, *(f"{split}/*" for split in SPLITS))),
        ("the checkpoint", folder, (*own, "checkpoint-*/*", f"{MILESTONES_NAME}/checkpoint-*/*")),
    ):
        for pattern in patterns:
            found = glob.iglob(os.path.join(glob.escape(parent), pattern))
            yield from ((flag, name) for name in found)


def _write_completions(
    model: TokenModel, tokenizer: Tokenizer, prompts: list[str], config: RunConfig
) -> int:
    """Complete all prompts in batches. Completions are printed in order, as soon as they can be."""
    settings, is_search = config.generation, config.sampling.beams > 1
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
                details = format_logprobs(done[shown], tokenizer)
                show(f"{rule}{repeated[shown]}{done[shown].text}\n{details}")
            shown += 1
        stop.leave_if_stopping(
            f"stopped: {len(done):,} of {len(repeated):,} completions are finished"
        )

    with StopFlag() as stop:
        try:
            generate_batch(
                model,
                tokenizer,
                prompts if is_search else repeated,
                config.sampling,
                settings.generation_batch_size,
                note_step,
                n_best=settings.num_return_sequences if is_search else 1,
            )
        finally:
            bar.close()
            if settings.output_file and done:
                path, n_sequences = Path(settings.output_file), settings.num_return_sequences
                save_completions(path, repeated, done, n_sequences, tokenizer)
    log_rate(len(done), written, time.perf_counter() - began)
    return int(ExitCode.DONE)
