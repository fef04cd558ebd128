"""Seconds of a training step on the device at hand, from smaller models of the same shape.

A step of L blocks and V ids takes rest + L * block + V * id. Three models tell the three: one block
and few ids; one block more; more ids. Each is trained for a few steps, so that whatever the CPU,
its libraries and the flags do to a step is in the figures.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from preflight.device.runtime import Runtime
from preflight.foresight.timing import time_steps
from preflight.models.cost import count_parameters, estimate_flops_per_token
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings
from preflight.training.plan import build_plan
from trainer import build_trainer

FEW_IDS, MORE_IDS = 256, 8192
_MODEL_SECONDS = 0.2  # about what one step of such a model may take: fewer tokens where it is more
_LEAST_TOKENS = 512  # with fewer, what a step of any size does would weigh too much
_ROUNDS, _ROUNDS_SECONDS = 3, 0.3  # timed steps of each model: at least so many, and so long
# What compilation leaves of that part of a block which is not its matmuls (benchmarks/LOG.md).
_COMPILED_SHARE = 0.5
_MATMUL_SHARE = 0.75  # of a large matmul's rate, in a whole step: 0.5 to 0.9 were measured
_DECODING_BYTES_PER_SECOND = 15e9  # weights read for a token; 13 to 34 GB/s were measured
_DECODING_BLOCK_SECONDS = 100e-6  # of one token in one block, beside reading its weights


@dataclass(frozen=True)
class LocalEstimate:
    """What the parts say of the whole.

    Attributes:
        step_seconds: one update.
        token_seconds: one generated token; rough.
        basis: where the figures come from, in words.
    """

    step_seconds: float
    token_seconds: float
    basis: str


@dataclass(frozen=True)
class _Seconds:
    """Of a micro-step, forward and backward, and of the optimizer's update; or a part of both."""

    micro_step: float
    update: float

    def __sub__(self, other: _Seconds) -> _Seconds:
        """What this takes longer; nothing is faster than less of it, whatever a clock says."""
        return _Seconds(
            max(0.0, self.micro_step - other.micro_step), max(0.0, self.update - other.update)
        )


def estimate_step(
    model_config: ModelConfig,
    training: TrainingSettings,
    runtime: Runtime,
    *,
    matmul_flops: float,
    gradient_checkpointing: bool = False,
) -> LocalEstimate:
    """Seconds of an update of `training` on windows of `model_config.context_length` tokens.

    It takes about a second, and the memory of two blocks.

    Args:
        model_config: the architecture, the window as its context length.
        training: batch size, accumulation count and optimizer.
        runtime: of a device that is present.
        matmul_flops: FLOP/s of a large matmul there.
        gradient_checkpointing: as in the run.
    """
    few, more = _choose_vocabularies(model_config.vocab_size)
    small = dataclasses.replace(model_config, n_layers=1, vocab_size=few)
    deep = dataclasses.replace(small, n_layers=2)
    wide = dataclasses.replace(small, vocab_size=more)
    costly = estimate_flops_per_token(deep) + estimate_flops_per_token(wide)
    full = (training.batch_size, model_config.context_length)
    shape = _cut_batch(*full, int(_MODEL_SECONDS * matmul_flops / costly))
    timed = [
        _begin_timing(model, training, runtime, shape, gradient_checkpointing)
        for model in (small, deep, wide)
    ]
    rest, block, ids = _time_in_turns(timed)
    block, ids = block - rest, ids - rest
    n_blocks, n_more = model_config.n_layers - 1, (model_config.vocab_size - few) / (more - few)
    # Of the whole batch. What a block computes grows with its tokens and, for attention, with
    # their square; what is there once hardly grows.
    block_flops = _count_flops(deep, full) - _count_flops(small, full)
    longer = block_flops / (_count_flops(deep, shape) - _count_flops(small, shape))
    more_tokens = math.prod(full) / math.prod(shape)
    block_seconds = block.micro_step * longer
    first_block = block.micro_step * (longer - 1)
    if runtime.compile_model:
        floor = block_flops / matmul_flops
        saved = (1 - _COMPILED_SHARE) * max(0.0, block_seconds - floor)
        block_seconds, first_block = block_seconds - saved, first_block - saved
    few_ids = ids.micro_step * few / (more - few) * (more_tokens - 1)
    micro_step = (
        rest.micro_step
        + first_block
        + few_ids
        + n_blocks * block_seconds
        + n_more * ids.micro_step * more_tokens
    )
    update = rest.update + n_blocks * block.update + n_more * ids.update
    return LocalEstimate(
        training.gradient_accumulation_steps * micro_step + update,
        _estimate_token(model_config),
        f"from steps of one and two blocks of the model, {shape[0]} x {shape[1]} tokens",
    )


def estimate_by_rate(
    model_config: ModelConfig,
    training: TrainingSettings,
    *,
    matmul_flops: float,
    flops_per_token: int,
    gradient_checkpointing: bool = False,
) -> LocalEstimate:
    """The same from the rate of a matmul alone, where even a part of the model does not fit."""
    samples = training.batch_size * training.gradient_accumulation_steps
    flops = flops_per_token * samples * model_config.context_length
    again = 4 / 3 if gradient_checkpointing else 1.0
    return LocalEstimate(
        again * flops / (_MATMUL_SHARE * matmul_flops),
        _estimate_token(model_config),
        f"assumes {_MATMUL_SHARE:.0%} of the rate of a matrix product here",
    )


def _estimate_token(model_config: ModelConfig) -> float:
    """Seconds of a generated token: its weights are read, and its blocks called."""
    read = 4 * count_parameters(model_config) / _DECODING_BYTES_PER_SECOND
    return read + model_config.n_layers * _DECODING_BLOCK_SECONDS


def _choose_vocabularies(vocab_size: int) -> tuple[int, int]:
    """Two different sizes, of which the larger has the speed of the model's own."""
    more = max(2, min(MORE_IDS, vocab_size))
    return max(1, min(FEW_IDS, more // 2)), more


def _cut_batch(sequences: int, tokens: int, affordable: int) -> tuple[int, int]:
    """As much of a batch as `affordable` tokens are, in whole sequences if they suffice for one."""
    affordable = max(_LEAST_TOKENS, affordable)
    return max(1, min(sequences, affordable // tokens)), min(tokens, affordable)


def _count_flops(config: ModelConfig, shape: tuple[int, int]) -> float:
    """Floating-point operations of a micro-step on sequences of tokens."""
    shorter = dataclasses.replace(config, context_length=shape[1])
    return float(estimate_flops_per_token(shorter) * math.prod(shape))


def _begin_timing(
    model_config: ModelConfig,
    training: TrainingSettings,
    runtime: Runtime,
    shape: tuple[int, int],
    gradient_checkpointing: bool,
) -> Iterator[_Seconds]:
    """A trainer of that model, and the seconds of one of its steps after another, for ever."""
    training = dataclasses.replace(training, gradient_accumulation_steps=1)
    plan = build_plan(training, ControlSettings(), model_config.context_length, 1, 1)
    trainer = build_trainer(
        model_config,
        training,
        plan,
        dataclasses.replace(runtime, compile_model=False),
        gradient_checkpointing=gradient_checkpointing,
    )
    updates: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: updates.append(-time.perf_counter()))
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(time.perf_counter()))
    ids = torch.randint(model_config.vocab_size, (shape[0], shape[1] + 1), device=runtime.device)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    while True:
        updates.clear()
        (seconds,) = time_steps(trainer, lambda: [batch], 1)
        yield _Seconds(seconds - sum(updates), sum(updates))


def _time_in_turns(timed: Sequence[Iterator[_Seconds]]) -> list[_Seconds]:
    """The least of each, in turns, so that a busy neighbour slows all of them alike."""
    began, rounds = time.perf_counter(), [[next(one) for one in timed]]  # warms up
    while len(rounds) <= _ROUNDS or time.perf_counter() - began < _ROUNDS_SECONDS:
        rounds.append([next(one) for one in timed])
    return [
        _Seconds(min(s.micro_step for s in steps), min(s.update for s in steps))
        for steps in zip(*rounds[1:], strict=True)
    ]
