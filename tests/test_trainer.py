"""The training step: accumulation, clipping, what is not finite, evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trainer as trainer_module
from preflight.device.runtime import Runtime, build_runtime
from preflight.settings import ControlSettings, ModelConfig, SystemSettings, TrainingSettings
from preflight.training.plan import build_plan
from preflight.training.state import TrainState
from trainer import Trainer

MODEL = ModelConfig(
    vocab_size=97, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
)
CPU = Runtime(torch.device("cpu"), torch.float32, False, ())
Batch = tuple[Tensor, Tensor]


def build_trainer(runtime: Runtime = CPU, **changes: object) -> Trainer:
    flags = {"batch_size": 4, "max_steps": 30, "learning_rate": 1e-2} | changes
    training = TrainingSettings(**flags)  # type: ignore[arg-type]
    plan = build_plan(training, ControlSettings(), MODEL.context_length, 1000, 20)
    return trainer_module.build_trainer(MODEL, training, plan, runtime)


def draw_batches(count: int, batch_size: int = 4, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (count, batch_size, 17), generator=generator)
    return [(row[:, :-1], row[:, 1:]) for row in tokens]


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


MASKED = -100


def cut(inputs: Tensor, targets: Tensor, split: list[int], *, ragged: bool = False) -> list[Batch]:
    """The same targets in micro-batches of `split` rows each.

    `ragged`: each as long as its longest row, where the targets at a row's end are masked.
    """
    batches = list(zip(inputs.split(split), targets.split(split), strict=True))
    if ragged:
        lengths = [int((t != MASKED).sum(dim=1).max()) for _, t in batches]
        batches = [(i[:, :n], t[:, :n]) for (i, t), n in zip(batches, lengths, strict=True)]
    return batches


def mask_nothing(targets: Tensor) -> Tensor:
    return targets


def mask_at_random(targets: Tensor) -> Tensor:
    """The more, the later the row; the first micro-batch of four rows has none left."""
    numbers = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3))
    targets = targets.masked_fill(numbers < torch.linspace(0.1, 0.9, 16)[:, None], MASKED)
    targets[:4] = MASKED
    return targets


def mask_ends(targets: Tensor) -> Tensor:
    """Rows of 1 to 16 tokens."""
    return targets.masked_fill(torch.arange(16) > torch.arange(16)[:, None], MASKED)


@pytest.mark.parametrize("split", [[4, 4, 4, 4], [1] * 16, [1, 9, 2, 4]], ids=str)
@pytest.mark.parametrize("mask", [mask_nothing, mask_at_random, mask_ends])
def test_accumulation_equals_one_large_batch(
    split: list[int], mask: Callable[[Tensor], Tensor]
) -> None:
    whole = build_trainer(batch_size=16)
    parts = build_trainer(batch_size=16 // len(split), gradient_accumulation_steps=len(split))
    for step in range(4):
        inputs, targets = draw_batches(1, 16, seed=step)[0]
        targets = mask(targets)
        one = whole.train_step(step, [(inputs, targets)])
        several = parts.train_step(step, cut(inputs, targets, split, ragged=mask is mask_ends))
        assert float(one.loss) == pytest.approx(float(several.loss), abs=1e-5)
        assert float(one.grad_norm) == pytest.approx(float(several.grad_norm), rel=1e-4)
        if step == 0:  # the definition: the mean over all targets, at the initial weights
            fresh = build_trainer().model
            logits = fresh(inputs).flatten(0, 1).detach()
            expected = F.cross_entropy(logits, targets.flatten(), ignore_index=MASKED)
            assert float(one.loss) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_update_without_targets_changes_nothing() -> None:
    trainer = build_trainer(gradient_accumulation_steps=2)
    before = weights_of(trainer)
    batches = [(i, torch.full_like(t, MASKED)) for i, t in draw_batches(2)]
    assert math.isnan(float(trainer.train_step(0, batches).loss))
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def test_gradient_norm_is_clipped_and_reported_before_clipping() -> None:
    batch = draw_batches(1)
    free = build_trainer(
        optimizer="sgd",
        beta1=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        warmup_steps=0,
        scheduler="none",
    )
    tight = build_trainer(
        optimizer="sgd",
        beta1=0.0,
        weight_decay=0.0,
        max_grad_norm=0.1,
        warmup_steps=0,
        scheduler="none",
    )
    before = weights_of(tight)
    norms = [float(t.train_step(0, batch).grad_norm) for t in (free, tight)]
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] > 0.1
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights_of(tight), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-2, rel=1e-3)


def copy_state(trainer: Trainer) -> list[Tensor]:
    states = trainer.optimizer.state.values()
    return [v.clone() for s in states for v in s.values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "scaled fp16"])
def test_what_is_not_finite_never_reaches_the_weights(
    name: str, place: str, dtype: torch.dtype
) -> None:
    trainer = build_trainer(Runtime(torch.device("cpu"), dtype, False, ()), optimizer=name)
    assert trainer.scaler.is_enabled() == (dtype == torch.float16)
    batches = draw_batches(3)
    start = weights_of(trainer)
    trainer.train_step(0, batches[:1])
    before, state = weights_of(trainer), copy_state(trainer)
    trained = next(p for g in trainer.optimizer.param_groups for p in g["params"])
    index = next(i for i, p in enumerate(trainer.model.parameters()) if p is trained)
    assert not torch.equal(start[index], before[index])
    hook = None
    if place == "loss":
        hook = trainer.model.register_forward_hook(lambda *args: args[2] * math.nan)
    else:
        parameter = trainer.model.layers[0].self_attn.qkv_proj.weight

        def poison(p: Tensor) -> None:
            p.grad.view(-1)[3] = math.inf

        parameter.register_post_accumulate_grad_hook(poison)
    result = trainer.train_step(1, batches[1:2])
    assert not math.isfinite(float(result.loss) + float(result.grad_norm))
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, copy_state(trainer), strict=True))
    if hook is not None:  # and the next sound step is applied
        hook.remove()
        trainer.train_step(2, batches[2:])
        assert not torch.equal(before[index], weights_of(trainer)[index])


def test_one_bad_step_destroys_every_matrix_where_nobody_asks() -> None:
    """Why the question is there: the same step with the weights left to the optimizer."""
    trainer = build_trainer(optimizer="muon")
    trainer.skips_on_device = True  # a false claim
    trainer.model.register_forward_hook(lambda *args: args[2] * math.nan)
    trainer.train_step(0, draw_batches(1))
    matrices = trainer.optimizer.param_groups[0]["params"]
    assert len(matrices) == 4 * MODEL.n_layers
    assert all(matrix.isnan().all() for matrix in matrices)


def test_evaluation_is_the_mean_over_targets_and_leaves_training_mode() -> None:
    trainer = build_trainer()
    batches = [*draw_batches(2, 4), *draw_batches(1, 2, seed=9)]
    batches[1] = (batches[1][0], batches[1][1].clone())
    batches[1][1][:, 5:] = MASKED
    batches.append((batches[0][0], torch.full_like(batches[0][1], MASKED)))
    result = trainer.evaluate(batches, tokens_per_byte=0.25)
    assert result is not None
    with torch.no_grad():
        logits = torch.cat([trainer.model(i).flatten(0, 1) for i, _ in batches])
        expected = F.cross_entropy(
            logits, torch.cat([t.flatten() for _, t in batches]), ignore_index=MASKED
        )
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(float(expected) / math.log(2) / 4, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-4)
    assert trainer.model.training


def test_bf16_follows_fp32() -> None:
    plain = build_trainer()
    mixed = build_trainer(Runtime(torch.device("cpu"), torch.bfloat16, False, ()))
    for step, batch in enumerate(draw_batches(10)):
        a, b = plain.train_step(step, [batch]), mixed.train_step(step, [batch])
        assert float(a.loss) == pytest.approx(float(b.loss), abs=0.03)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_plan_fills_in_shares_of_the_run() -> None:
    training = TrainingSettings(batch_size=4, gradient_accumulation_steps=2, num_epochs=2)
    plan = build_plan(training, ControlSettings(), 128, 1001, 50)
    assert plan.total_steps == 251  # ceil(2 * 1001 / 8)
    assert plan.tokens_per_step == 1024
    assert (plan.warmup_steps, plan.checkpoint_every, plan.eval_every) == (13, 26, 26)
    assert plan.eval_windows <= 50
    both = dataclasses.replace(training, max_steps=10)
    assert build_plan(both, ControlSettings(), 128, 1001, 50).total_steps == 10
    only = TrainingSettings(max_steps=10_000)
    assert build_plan(only, ControlSettings(), 128, 1001, 50).total_steps == 10_000
    resumed = build_plan(
        training, ControlSettings(), 128, 1001, 50, TrainState(step=100, cursor=800)
    )
    assert resumed.total_steps == 251


# Losses of 20 fp32 steps on counting sequences.
GOLDEN = [
    4.5948,
    4.3653,
    4.123,
    3.9657,
    3.8016,
    3.6002,
    3.4154,
    3.2569,
    3.0937,
    2.9704,
    2.8457,
    2.7244,
    2.6275,
    2.5964,
    2.5758,
    2.5755,
    2.5997,
    2.6094,
    2.5995,
    2.5954,
]


def test_golden_losses() -> None:
    trainer = build_trainer(max_steps=20)
    losses = []
    for step in range(20):
        start = torch.arange(4)[:, None] * 11 + step
        tokens = (start + torch.arange(17)) % 97
        losses.append(float(trainer.train_step(step, [(tokens[:, :-1], tokens[:, 1:])]).loss))
    assert losses == pytest.approx(GOLDEN, rel=2e-3)


def test_runtime_says_what_it_chose() -> None:
    runtime = build_runtime(SystemSettings(device="cpu", mixed_precision=False), planned_steps=10)
    assert runtime.dtype == torch.float32
    assert not runtime.compile_model
    assert any("cpu" in note for note in runtime.notes)
    asked = build_runtime(
        SystemSettings(device="cpu", mixed_precision=True, compile_model=True), 10
    )
    assert asked.dtype == torch.bfloat16
    assert asked.compile_model


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_follows_the_cpu(dtype: torch.dtype, compiled: bool) -> None:
    plain = build_trainer()
    mixed = build_trainer(Runtime(torch.device("cuda", 0), dtype, compiled, ()))
    mixed.model.load_state_dict(plain.model.state_dict())
    for step, (inputs, targets) in enumerate(draw_batches(10)):
        a = plain.train_step(step, [(inputs, targets)])
        b = mixed.train_step(step, [(inputs.cuda(), targets.cuda())])
        assert float(a.loss) == pytest.approx(float(b.loss), abs=0.05)
