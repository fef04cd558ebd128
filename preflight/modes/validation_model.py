"""The checks of the real model: its passes, an update, a checkpoint, evaluation, generation."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

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
from preflight.core.storage import TEMPORARY_PREFIX
from preflight.core.units import format_bytes
from preflight.decoding.assembling import TextAssembler
from preflight.models.protocol import LanguageModel
from preflight.modes.validation_subject import MAX_SEQUENCES, Fault, Subject, borrow_folder
from preflight.settings import SamplingConfig

_GENERATED_TOKENS = 8
# Updates that fp16's scaler, which starts at 2^16, may skip until it has found its scale.
_SCALER_STEPS = 20
# An untrained model's loss is ln(vocabulary) plus half the variance of its logits, which GPT-2's
# initialisation makes 0.02^2 x hidden size.
_LOSS_TOLERANCE, _LOGIT_VARIANCE = 0.5, 0.02**2


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
        borrow_folder(subject.output_dir),
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
