"""The checks of `--validate-only`: each tries one part of a run once, on the real model.

Each check is a small function that returns what it saw, or raises `Fault` with the fix. None stops
the others, and what a check writes is gone when it ends; only the data folder may be built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from generate import generate_text
from preflight.checkpoints.format import (
    load_optimizer,
    load_training_state,
    load_weights,
    verify_checkpoint,
)
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import TEMPORARY_PREFIX, check_writable
from preflight.core.units import format_bytes
from preflight.corpus import shards
from preflight.corpus.metadata import read_metadata
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import choose_window
from preflight.decoding.assembling import TextAssembler
from preflight.device.runtime import Runtime
from preflight.foresight.fits import check_disk, find_bf16_fault
from preflight.models.cost import count_parameters
from preflight.models.loss import count_targets
from preflight.models.protocol import LanguageModel
from preflight.modes.report import describe_error
from preflight.modes.setup import RunSetup
from preflight.settings import ControlSettings, RunConfig, SamplingConfig
from preflight.tokenization import Tokenizer, TokenizerRecipe
from preflight.training.plan import build_plan
from train_utils import Loader
from trainer import Trainer, build_trainer

MAX_SEQUENCES = 2
_ROUND_TRIP_BYTES = 64 * 1024
_GENERATED_TOKENS = 8
# Updates that fp16's scaler, which starts at 2^16, may skip until it has found its scale.
_SCALER_STEPS = 20
# An untrained model's loss is ln(vocabulary) plus half the variance of its logits, which GPT-2's
# initialisation makes 0.02^2 x hidden size.
_LOSS_TOLERANCE, _LOGIT_VARIANCE = 0.5, 0.02**2

Status = Literal["passed", "failed", "not run"]


class Fault(Exception):
    """What a check found wrong, each with its fix."""

    def __init__(self, *faults: tuple[str, str]) -> None:
        super().__init__(faults[0][0])
        self.faults = faults

    @classmethod
    def of(cls, what: str, fix: str) -> Fault:
        """The one thing that is wrong."""
        return cls((what, fix))


class Lacking(Exception):
    """A check that cannot run because the check of that number did not pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"needs check {number}")


class Subject:
    """What the checks share: the run's set-up, and a trainer with a small batch."""

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.warnings: list[str] = []

    @property
    def config(self) -> RunConfig:
        """The flags, with what a checkpoint to continue from adds."""
        return self.setup.known_config

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.setup.output_dir

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; the data answers for one that is made from the text."""
        choice = self._need("tokenizer_choice", 1)
        return self._need("tokenizer", 4 if isinstance(choice, TokenizerRecipe) else 1)

    @property
    def data(self) -> DataFolder:
        """The prepared and verified data folder.

        Raises:
            PreflightError: it cannot be had.
        """
        self._need("tokenizer_choice", 1)  # without one, the data is not at fault
        data = self.setup.data
        self.setup.stop.leave_if_stopping("stopped; the data folder is complete")
        return data

    def _need(self, name: str, check: int) -> Any:
        """A part of the set-up for which the `check` of that number answers."""
        try:
            return getattr(self.setup, name)
        except PreflightError:
            raise Lacking(check) from None

    @property
    def runtime(self) -> Runtime:
        """The run's device and precision."""
        return self._need("runtime", 1)

    @property
    def batch_size(self) -> int:
        """At most two sequences: these checks ask whether, not how fast."""
        return min(MAX_SEQUENCES, self.config.training.batch_size)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The real model at its full learning rate from the first step, with a small batch."""
        training = dataclasses.replace(
            self.config.training,
            batch_size=self.batch_size,
            warmup_steps=0,
            max_steps=1000,
            num_epochs=None,
            scheduler="none",
            gradient_accumulation_steps=min(2, self.config.training.gradient_accumulation_steps),
        )
        model_config = self.setup.model_config
        plan = build_plan(training, ControlSettings(), model_config.context_length, 1, 1)
        return build_trainer(
            model_config,
            training,
            plan,
            self.runtime,
            gradient_checkpointing=self.config.system.gradient_checkpointing,
        )

    @functools.cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets: the user's own text, or random ids where it cannot be had."""
        try:
            with self.open_loader() as loader:
                return take_windows(loader)
        except (PreflightError, Lacking):
            model_config = self.setup.model_config
            shape = (self.batch_size, model_config.context_length + 1)
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(model_config.vocab_size, shape, generator=draw)
            ids = ids.to(self.runtime.device)
            return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def open_loader(self, cursor: int = 0) -> Loader:
        """The training part as a run reads it."""
        self.runtime  # noqa: B018  # without one, the loader is not at fault
        self.data  # noqa: B018
        return self.setup.open_loader(cursor, self.batch_size)

    def compute_loss(self, *, mixed: bool = False) -> Tensor:
        """The model's loss on the batch, in fp32 or as a training step computes it."""
        context = self.trainer.runtime.autocast() if mixed else contextlib.nullcontext()
        with context:
            return self.trainer.model(*self.batch) / count_targets(self.batch[1])


def take_windows(loader: Loader) -> tuple[Tensor, Tensor]:
    """The next batch of a text: inputs and targets (B T)."""
    inputs, targets = loader.next_batch()
    assert isinstance(targets, Tensor)
    return inputs, targets


@contextlib.contextmanager
def collected(faults: list[tuple[str, str]]) -> Iterator[None]:
    """A `PreflightError` joins `faults` instead of ending the check; signals still do."""
    try:
        yield
    except PreflightError as error:
        faults.append(describe_error(error))


# ---- the checks ---------------------------------------------------------------------------------


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
            with _borrow_folder(folder):
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


def check_forward(subject: Subject) -> str:
    """The loss of an untrained model is ln(vocabulary)."""
    subject.trainer.model.eval()
    with torch.no_grad():
        loss = float(subject.compute_loss())
    subject.trainer.model.train()
    model_config = subject.trainer.model.config
    expected = math.log(model_config.vocab_size)
    tolerance = _LOSS_TOLERANCE + _LOGIT_VARIANCE / 2 * model_config.n_embeddings
    if not abs(loss - expected) <= tolerance:  # true for NaN as well
        raise Fault.of(
            f"the loss is {loss:.3f}, expected {expected:.3f} within {tolerance:.2f}",
            "try another --device: this hardware may compute wrong results",
        )
    return f"loss {loss:.3f}, ln(vocabulary) {expected:.3f}"


def check_backward(subject: Subject) -> str:
    """Every parameter gets a finite gradient that is not all zeros."""
    model = subject.trainer.model
    model.zero_grad(set_to_none=True)
    subject.compute_loss().backward()
    wrong = _find_wrong_gradients(model)
    model.zero_grad(set_to_none=True)
    if wrong:
        raise Fault.of(
            f"{len(wrong)} parameters: {wrong[0]}", "another --device, or --no-mixed-precision"
        )
    return f"finite gradients in {sum(1 for _ in model.parameters())} tensors"


def _find_wrong_gradients(model: LanguageModel, *, scaled: bool = False) -> list[str]:
    wrong = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            wrong.append(f"{name} has no gradient")
        elif not parameter.grad.isfinite().all():
            wrong.append(f"{name} has a gradient that is not finite")
        elif not scaled and not parameter.grad.any():
            wrong.append(f"{name} has a gradient of zeros")
    return wrong


def check_update(subject: Subject) -> str:
    """One update lowers the loss on its own batch."""
    trainer = subject.trainer
    trainer.model.eval()
    with torch.no_grad():
        before = float(subject.compute_loss())
    trainer.model.train()
    probe = next(trainer.model.parameters())
    start = probe.detach().clone()
    accumulation = trainer.plan.accumulation_steps
    for step in range(_SCALER_STEPS if trainer.runtime.needs_scaler else 1):
        trainer.train_step(step, [subject.batch] * accumulation)
        if not torch.equal(probe, start):
            break
    trainer.model.eval()
    with torch.no_grad():
        after = float(subject.compute_loss())
    trainer.model.train()
    if not after < before:
        raise Fault.of(
            f"the loss went from {before:.4f} to {after:.4f} on the batch of the update",
            f"a lower --learning-rate (now {subject.config.peak_learning_rate:.1e}), "
            "or --warmup-steps",
        )
    return f"loss {before:.4f} before, {after:.4f} after"


def check_checkpoint(subject: Subject) -> str:
    """Weights and training state are saved, verified and read back bit for bit."""
    trainer = subject.trainer
    weights = trainer.model.state_dict()
    optimizer, state = trainer.list_optimizer_tensors(), {"trainer": trainer.state_dict()}
    with (
        _borrow_folder(subject.output_dir),
        tempfile.TemporaryDirectory(
            prefix=f"{TEMPORARY_PREFIX}check-", dir=subject.output_dir
        ) as name,
    ):
        saved = save_checkpoint(
            Path(name),
            1,
            weights,
            state,
            {"model": dataclasses.asdict(trainer.model.config)},
            {"val_loss": None},
            optimizer=optimizer,
        )
        verify_checkpoint(saved)
        shapes = {n: tuple(p.shape) for n, p in trainer.model.named_parameters()}
        read = load_weights(saved, shapes)
        restored = {"optimizer": load_optimizer(saved), **load_training_state(saved)}
        size = sum(path.stat().st_size for path in saved.path.iterdir())
    odd = [name for name in weights if not _is_same(weights[name], read.get(name))]
    if odd or not _is_same({"optimizer": optimizer, **state}, restored):
        raise Fault.of(
            f"read back differs from what was written: {odd[0] if odd else 'the state'}",
            "the disk or the memory is failing: choose another --output-dir",
        )
    return f"{format_bytes(size)} written, verified and read back equal"


def _is_same(a: Any, b: Any) -> bool:
    """Equal values; tensors bit for bit, on any device."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(_is_same(a[key], b[key]) for key in a)
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_is_same, a, b))
    return bool(a == b)


def check_evaluation(subject: Subject) -> str:
    """The validation loss is finite and reproducible."""
    val = subject.data.val
    windows = (
        subject.setup.list_validation(2 * MAX_SEQUENCES, subject.batch_size) for _ in range(2)
    )
    results = [subject.trainer.evaluate(part, val.n_tokens / val.n_bytes) for part in windows]
    losses = [result.loss for result in results if result is not None]
    if len(losses) < 2 or not math.isfinite(losses[0]) or abs(losses[0] - losses[1]) > 1e-3:
        raise Fault.of(
            f"two evaluations of the same windows gave {losses}",
            "try another --device: this hardware may compute wrong results",
        )
    return f"validation loss {losses[0]:.3f}, the same twice"


def check_generation(subject: Subject) -> str:
    """Greedy decoding with the KV cache gives the same text as without it."""
    model, tokenizer = subject.trainer.model, subject.tokenizer
    n_tokens = min(_GENERATED_TOKENS, model.config.context_length - 1)
    greedy = SamplingConfig(max_new_tokens=n_tokens, temperature=0)
    cached = generate_text(model, tokenizer, "", greedy)
    ids = [tokenizer.end_of_text_id]
    model.eval()
    with torch.no_grad():
        for _ in range(n_tokens):
            tokens = torch.tensor([ids], device=subject.trainer.runtime.device)
            ids.append(int(model(tokens)[0, -1, : tokenizer.vocab_size].argmax()))
            if ids[-1] == tokenizer.end_of_text_id:
                break
    model.train()
    is_cut = ids[-1] != tokenizer.end_of_text_id
    data = tokenizer.decode_bytes(i for i in ids if i != tokenizer.end_of_text_id)
    plain = TextAssembler(()).push(data, final=True, cut=is_cut)
    if cached != plain:
        raise Fault.of(
            f"greedy decoding with the KV cache gives {cached[:60]!r}, without it {plain[:60]!r}",
            "try another --device: this hardware may compute wrong results",
        )
    return f"{len(ids) - 1} greedy tokens, the same with and without the KV cache"


def check_mixed_precision(subject: Subject) -> str:
    """Loss and gradients are finite in the precision of the run."""
    trainer, dtype = subject.trainer, subject.trainer.runtime.dtype
    if dtype == torch.float32:
        return "the run computes in float32"
    name = str(dtype).removeprefix("torch.")
    trainer.model.zero_grad(set_to_none=True)
    loss = subject.compute_loss(mixed=True)
    # The scaler starts too high on purpose, and is near a thousand after its first steps.
    factor = 1024.0 if trainer.runtime.needs_scaler else 1.0
    (loss * factor).backward()
    rounded = float(loss.detach())
    wrong = _find_wrong_gradients(trainer.model, scaled=True)
    trainer.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        exact = float(subject.compute_loss())
    if wrong or not abs(rounded - exact) <= 0.05 * max(1.0, exact):
        what = wrong[0] if wrong else f"the loss is {rounded:.3f}, in float32 {exact:.3f}"
        raise Fault((f"{name}: {what}", "--no-mixed-precision computes in float32"))
    return f"{name}: loss {rounded:.3f}, in float32 {exact:.3f}, gradients finite"


@contextlib.contextmanager
def _borrow_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents, and remove those that are empty afterwards."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
        yield
    except OSError as error:
        raise PreflightError(
            ExitCode.STORAGE, f"cannot write {folder}: {error.strerror}", "choose another folder"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
