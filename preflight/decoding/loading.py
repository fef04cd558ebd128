"""x"""

from __future__ import annotations

import torch

from preflight.checkpoints.format import Checkpoint, load_weights
from preflight.core.errors import ExitCode, PreflightError
from preflight.tokenization.tokenizer import Tokenizer, load_tokenizer
from preflight.training.resume import check_tokenizer
from transformer_model import DecoderOnlyTransformer


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[DecoderOnlyTransformer, Tokenizer]:
    """The model of a checkpoint, ready to write, and its tokenizer.

    Raises:
        PreflightError: code CHECKPOINT, when its parts are damaged or do not belong together.
    """
    try:
        tokenizer = load_tokenizer(checkpoint.config["tokenizer"]["name"])
    except PreflightError as error:  # there it is a flag's fault, here the checkpoint asks for it
        raise PreflightError(ExitCode.CHECKPOINT, f"{checkpoint.path}:", *error.lines) from None
    check_tokenizer(checkpoint, tokenizer)
    with torch.device("meta"):  # shapes alone: the weights come from the file
        model = DecoderOnlyTransformer(checkpoint.model_config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(load_weights(checkpoint, shapes), assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer
