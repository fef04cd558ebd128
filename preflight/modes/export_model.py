"""`--export`: a checkpoint goes to another tool, and is published only once it proves to be equal.

What was compared goes to stdout, a line each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from generate import load_model
from preflight.checkpoints.format import Checkpoint
from preflight.checkpoints.store import find_best, open_checkpoint
from preflight.core import storage
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import load_data_folder
from preflight.evaluation.own_tasks import load_own_tasks
from preflight.formats.hf_import import MAX_TEMPLATE_BYTES, TEMPLATE_NAME
from preflight.formats.protocol import Exporter, OutgoingModel
from preflight.modes.export_facts import collect_facts
from preflight.modes.export_weights import export_weights
from preflight.settings import RunConfig
from preflight.settings.kinds import EXPORTERS
from preflight.tokenization import Tokenizer

SAMPLE_TOKENS = 4096
FLOATING = ("f32", "f16", "bf16")


def run(config: RunConfig) -> int:
    """Export what was asked for and return the exit code.

    Raises:
        PreflightError: code CHECK_FAILED, when what was written is not the model; code CHECKPOINT,
            when the format lacks a part of it. Nothing is then written.
    """
    path = Path(config.handover.export or "")
    if os.path.lexists(path):
        raise PreflightError(
            ExitCode.STORAGE,
            f"{path} is there already",
            "nothing was changed; move it away, or choose another name",
        )
    if config.handover.weights_only:
        checkpoint = _open(config)
        storage.make_folder(path.absolute().parent)
        lines = export_weights(checkpoint, path)
        print("\n".join([*lines, f"{path}: weights only, {format_bytes(_measure(path))}"]))
        return int(ExitCode.DONE)
    exporter = find_exporter(path)
    quantization = _choose_quantization(exporter, config.handover.quantize)
    checkpoint = _open(config)
    _refuse_second_quantization(checkpoint, quantization, forced=config.handover.force)
    model = read_outgoing(checkpoint, Path(config.data.data_dir))
    log.info(f"{checkpoint.path}: step {checkpoint.step:,}, {model.config.label}")
    exporter.check(model, quantization)
    storage.make_folder(path.absolute().parent)
    with _publish(path, folder=exporter.makes_folder) as temporary:
        exporter.export(model, temporary, quantization)
        lines = exporter.verify(model, temporary, quantization)
    size = format_bytes(_measure(path))
    print("\n".join([*lines, f"{path}: {exporter.name}, {quantization}, {size}"]), flush=True)
    return int(ExitCode.DONE)


# ---- what is written, and as what ---------------------------------------------------------------


def _open(config: RunConfig) -> Checkpoint:
    named = config.generation.checkpoint_path
    return open_checkpoint(named) if named else find_best(Path(config.control.output_dir))


def find_exporter(path: Path) -> Exporter:
    """The exporter that a path means.

    Raises:
        PreflightError: code FLAGS, when no format fits.
    """
    for name in EXPORTERS.names():
        exporter: Exporter = EXPORTERS.load(name)()
        if exporter.accepts(path):
            return exporter
    raise PreflightError(
        ExitCode.FLAGS,
        f"--export {path}: no format ends in {path.suffix}",
        "give a folder's name for transformers and vLLM, or x.gguf for llama.cpp",
    )


def _choose_quantization(exporter: Exporter, asked: str | None) -> str:
    if asked is not None and asked not in exporter.quantizations:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--quantize {asked}: {exporter.name} has {', '.join(exporter.quantizations)}",
            "leave it out, or export to x.gguf",
        )
    return asked or exporter.quantizations[0]


def _refuse_second_quantization(checkpoint: Checkpoint, asked: str, *, forced: bool) -> None:
    """Quantising weights that were quantised otherwise before destroys them."""
    origin = checkpoint.config.get("origin")
    before = origin.get("quantization") if isinstance(origin, dict) else None
    if before in (None, asked) or asked in FLOATING or forced:
        return
    raise PreflightError(
        ExitCode.CHECKPOINT,
        f"the weights of {checkpoint.path} were quantised as {str(before)[:20]} before; {asked} "
        "on top of it destroys much of what is left",
        f"use --quantize {str(before)[:20]} or f16, or insist with --force",
    )


# ---- the model ----------------------------------------------------------------------------------


def read_outgoing(checkpoint: Checkpoint, data_dir: Path) -> OutgoingModel:
    """The model of a checkpoint with all that goes with it; adapters are merged.

    Raises:
        PreflightError: code CHECKPOINT.
    """
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    return OutgoingModel(
        model.config,
        {name: weight.detach() for name, weight in model.named_parameters()},
        tokenizer,
        _read_template(checkpoint),
        collect_facts(checkpoint),
        read_sample(tokenizer, data_dir),
    )


def _read_template(checkpoint: Checkpoint) -> str | None:
    if TEMPLATE_NAME not in checkpoint.manifest.files:
        return None
    with checkpoint.open(TEMPLATE_NAME) as file:
        raw = file.read(MAX_TEMPLATE_BYTES + 1)
    try:
        if len(raw) > MAX_TEMPLATE_BYTES:
            raise ValueError
        return raw.decode()
    except ValueError:
        raise PreflightError(
            ExitCode.CHECKPOINT,
            f"{checkpoint.path / TEMPLATE_NAME} is no text, or longer than 1 MiB",
            "restore it, or choose another checkpoint",
        ) from None


def read_sample(tokenizer: Tokenizer, data_dir: Path) -> Tensor:
    """Ids (T,) to measure a loss on: validation text of the data folder, if it has this tokenizer's
    ids, else pages of our own writing.
    """
    if os.path.exists(data_dir / METADATA_NAME):
        try:
            data = load_data_folder(data_dir, tokenizer)
        except PreflightError as error:
            log.info(f"{data_dir} is not measured on: {error.lines[0]}")
        else:
            count = min(SAMPLE_TOKENS, data.val.n_tokens)
            reader = ShardReader(data.val, data.dtype, data.vocab_size)
            with contextlib.closing(reader):
                rows = reader.read(torch.zeros(1, dtype=torch.long).numpy(), count)
            return torch.from_numpy(rows[0].astype("int64"))
    pages = next(task for task in load_own_tasks() if task.name == "own-pages")
    text = "\n\n".join(item.continuations[0] for item in pages.items)
    with contextlib.suppress(PreflightError):  # characters that a small table lacks
        tokenizer = tokenizer.replacing_unknown()
        return torch.from_numpy(tokenizer.encode(text).astype("int64"))[:SAMPLE_TOKENS]
    return torch.zeros(0, dtype=torch.long)


# ---- publishing ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _publish(path: Path, *, folder: bool) -> Iterator[Path]:
    """A place to write to, which becomes `path` when the block ends, and else is removed.

    Raises:
        PreflightError: code STORAGE.
    """
    if folder:
        with storage.publish_folder(path) as temporary:
            yield temporary
        return
    temporary = path.with_name(f"{storage.TEMPORARY_PREFIX}{path.name}")
    try:
        if storage.refuse_other_kind(temporary):  # what a killed export left
            temporary.unlink()
        yield temporary
        storage.fsync_file(temporary)
        os.replace(temporary, path)
        storage.fsync_folder(path.absolute().parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise storage.storage_error(path, error) from error
        raise


def _measure(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(item.stat().st_size for item in (path.iterdir() if path.is_dir() else [path]))
