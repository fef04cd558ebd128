"""`--quantize int8` of `--generate`, `--evaluate` and `--serve`, with what it costs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.device.runtime import Runtime, has_fast_bf16
from preflight.models.base import TokenModel
from preflight.models.int8_kernels import has_exact_products
from preflight.models.quantization import quantize_model
from preflight.modes.export_model import read_sample
from preflight.settings import RunConfig
from preflight.tokenization import Tokenizer

INT8 = "int8"
SAMPLE_TOKENS = 2048  # of text that the loss is measured on
_WINDOW_TOKENS = 256


def check_quantize(config: RunConfig) -> bool:
    """Whether the model is to be quantised.

    Raises:
        PreflightError: code FLAGS, for a kind that only files have.
    """
    asked = config.handover.quantize
    if asked not in (None, INT8):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--quantize {asked} is for --export; here there is {INT8}",
            f"use --quantize {INT8}, or leave it out",
        )
    return asked == INT8


def choose_dtype(runtime: Runtime) -> torch.dtype:
    """The type of a quantised model's activations: bf16 where the hardware multiplies in it, and
    not in integers. These take fp32 as well, in which one row is decoded in numpy.
    """
    if runtime.device.type == "cpu" and has_exact_products():
        return torch.float32
    return torch.bfloat16 if has_fast_bf16(runtime.device) else runtime.dtype


def quantize_loaded(
    model: TokenModel, tokenizer: Tokenizer, config: RunConfig, runtime: Runtime
) -> TokenModel:
    """The model in int8, made in place, with its loss before and after in the log.

    Args:
        model: loaded, on its device.
        tokenizer: the checkpoint's.
        config: its data folder has the text that the loss is measured on, if it is this model's;
            else that is text of our own.
        runtime: of the mode.
    """
    sample = read_sample(tokenizer, Path(config.data.data_dir))[:SAMPLE_TOKENS].to(runtime.device)
    before = measure_loss(model, sample)
    size = _count_bytes(model)
    dtype = choose_dtype(runtime)
    model = model.to(dtype)
    quantize_model(model, dtype)
    after = measure_loss(model, sample)
    log.info(
        f"int8: {_count_bytes(model) / size:.2f} of the bytes; loss on {len(sample):,} tokens "
        f"{before:.4f} before, {after:.4f} after ({after - before:+.4f} nats per token)"
        if len(sample) > 1
        else f"int8: {_count_bytes(model) / size:.2f} of the bytes; no text to measure a loss on"
    )
    return model


@torch.inference_mode()
def measure_loss(model: TokenModel, sample: Tensor) -> float:
    """Mean loss in nats per token on ids (T,), read in windows."""
    width, total = min(_WINDOW_TOKENS, model.config.context_length), 0.0
    for begin in range(0, len(sample) - 1, width):
        targets = sample[begin + 1 : begin + width + 1]
        logits = model(sample[begin : begin + len(targets)][None])[0].float()  # T V
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / max(1, len(sample) - 1) if len(sample) > 1 else math.nan


def _count_bytes(model: TokenModel) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
