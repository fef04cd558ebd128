"""The checks of what a run is given: flags, folders, tokenizer, data, batches."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from preflight.core.errors import PreflightError
from preflight.core.storage import check_writable
from preflight.core.units import format_bytes
from preflight.corpus import shards
from preflight.corpus.metadata import read_metadata
from preflight.corpus.windows import choose_window
from preflight.foresight.fits import check_disk, find_bf16_fault
from preflight.models.cost import count_parameters
from preflight.modes.report import describe_error
from preflight.modes.validation_subject import (
    Fault,
    Lacking,
    Subject,
    borrow_folder,
    collected,
    take_windows,
)

_ROUND_TRIP_BYTES = 64 * 1024


def check_configuration(subject: Subject) -> str:
    """Tokenizer, device, the run to continue, and an architecture that suits them."""
    setup = subject.setup
    faults: list[tuple[str, str]] = []
    for name in ("origin", "adopted", "tokenizer_choice", "runtime", "least_model_config"):
        with collected(faults):
            getattr(setup, name)
    with contextlib.suppress(PreflightError):
        fault = find_bf16_fault(setup.runtime, subject.config.system.mixed_precision)
        subject.warnings += ["; ".join(fault)] if fault else []
    if faults:
        raise Fault(*dict.fromkeys(faults))  # a part that fails takes those that need it with it
    model, runtime = setup.least_model_config, setup.runtime
    return (
        f"{model.label}, {count_parameters(model):,} parameters, "
        f"{runtime.device}, {str(runtime.dtype).removeprefix('torch.')}"
    )


def check_folders(subject: Subject) -> str:
    """Both folders are writable, and the disk has room for the checkpoints."""
    faults: list[tuple[str, str]] = []
    for flag, folder in (
        ("--output-dir", subject.output_dir),
        ("--data-dir", Path(subject.config.data.data_dir)),
    ):
        try:
            with borrow_folder(folder):
                check_writable(folder)
        except PreflightError as error:
            faults.append((error.lines[0], f"choose another {flag}, or fix this one"))
    try:
        model_config = subject.setup.least_model_config
    except PreflightError:  # told by the first check
        if faults:
            raise Fault(*faults) from None
        return "writable"
    training, control = subject.config.training, subject.config.control
    disk = check_disk(subject.output_dir, model_config, training, control, training.max_steps)
    faults += [disk.fault] if disk.fault else []
    if faults:
        raise Fault(*faults)
    return (
        f"writable, {format_bytes(disk.free_bytes)} free, "
        f"{format_bytes(disk.needed_bytes)} needed for checkpoints"
    )


def check_tokenizer(subject: Subject) -> str:
    """Encoding and decoding the user's own text gives the same text."""
    tokenizer = subject.tokenizer
    text, where = _read_own_text(subject)
    ids = tokenizer.encode(text).tolist()
    again = tokenizer.decode(ids)
    if again != text or max(ids, default=0) >= tokenizer.vocab_size:
        at = next(
            (i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b),
            min(len(text), len(again)),
        )
        raise Fault.of(
            f"{where}: the text differs after encoding and decoding, from character {at:,}: "
            f"{text[at : at + 20]!r} became {again[at : at + 20]!r}",
            "choose another --tokenizer (gpt2 is built in)",
        )
    return f"{len(text):,} characters of {where}, {len(ids):,} tokens, decoded to the same text"


def _read_own_text(subject: Subject) -> tuple[str, str]:
    """The beginning of the text: of the first source that is a text file, else of the shards."""
    for name in subject.config.data.text_file:
        path = Path(name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                data = file.read(_ROUND_TRIP_BYTES)
            text = data.decode("utf-8", errors="ignore")
            if len(data) - len(text.encode()) < 4 and "\0" not in text:  # else it is packed
                return text, name
    try:
        first = next(subject.data.train.open())
    except PreflightError:
        raise Lacking(4) from None
    ids = first[: _ROUND_TRIP_BYTES // 4].tolist()
    pieces = [i for i in ids if i != subject.tokenizer.end_of_text_id]
    text = subject.tokenizer.decode_bytes(pieces).decode("utf-8", errors="ignore")
    return text, str(subject.data.path)


def check_shards(subject: Subject) -> str:
    """The data folder is complete, and every byte and id agrees with its metadata."""
    try:
        data = subject.data
    except PreflightError as error:
        raise Fault(*_find_data_faults(subject, error)) from None
    return (
        f"{len(data.train.shards) + len(data.val.shards)} shards, "
        f"{data.train.n_tokens:,} tokens to train on, {data.val.n_tokens:,} to validate"
    )


def _find_data_faults(subject: Subject, error: PreflightError) -> list[tuple[str, str]]:
    """Every fault of the data folder, where preparation stops at the first one."""
    faults = [describe_error(error)]
    data_dir = Path(subject.config.data.data_dir)
    if subject.config.data.has_text:
        return faults  # the text or its preparation was at fault, not an older data folder
    with contextlib.suppress(PreflightError):
        metadata = read_metadata(data_dir)
        for part in ("train", "val"):
            for entry in metadata.get_split(part).shards:
                with collected(faults):
                    shards.verify_shard(data_dir / part, subject.tokenizer, entry)
            with collected(faults):
                split = metadata.get_split(part)
                shards.check_long_enough(split, part)
    return list(dict.fromkeys(faults))


def check_loader(subject: Subject) -> str:
    """Shapes are right, targets are the next tokens, and the order is reproducible."""
    window = choose_window(subject.data.train.n_tokens, subject.setup.window_length)
    shape = (subject.batch_size, window)
    batches = []
    for cursor in (0, 0, subject.batch_size):
        with subject.open_loader(cursor) as loader:
            batches.append([take_windows(loader) for _ in range(2)])
    for inputs, targets in batches[0]:
        if inputs.shape != shape or targets.shape != shape or inputs.dtype != torch.int64:
            raise Fault.of(
                f"batches are {tuple(inputs.shape)} {inputs.dtype}, expected {shape} int64",
                "rebuild the data folder with --text-file",
            )
        if not torch.equal(inputs[:, 1:], targets[:, :-1]):
            raise Fault.of(
                "targets are not the inputs shifted by one",
                "rebuild the data folder with --text-file",
            )
    first, again, resumed = ([torch.stack(pair) for pair in pairs] for pairs in batches)
    if not all(map(torch.equal, first, again)) or not torch.equal(first[1], resumed[0]):
        raise Fault.of(
            "the same cursor gave other batches: a resumed run would repeat or skip text",
            "rebuild the data folder with --text-file, on a disk that keeps its files",
        )
    return f"batches of {shape[0]} x {shape[1]} tokens, reproducible from any cursor"
