"""The training step against torch's own optimizers and schedules, and against itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import trainer as trainer_module
from preflight.device.runtime import Runtime, build_runtime
from preflight.settings import ControlSettings, ModelConfig, SystemSettings, TrainingSettings
from preflight.training.plan import build_plan
from preflight.training.schedules import learning_rate_at
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


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_equal_torchs_plain_optimizer(name: str) -> None:
    trainer = build_trainer(optimizer=name, scheduler="none", warmup_steps=0, max_grad_norm=0.0)
    reference = build_trainer(optimizer=name).model
    decay = {
        p: 0.1 if p.dim() == 2 and "embed" not in n else 0.0
        for n, p in reference.named_parameters()
    }
    groups = [{"params": [p], "weight_decay": d} for p, d in decay.items()]
    plain = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False),
        "adam": lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False),
    }[name]()
    # The plain optimizer gets our gradients: Adam would magnify rounding in those near zero.
    seen: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.model.parameters())
    )
    for step, batch in enumerate(draw_batches(5)):
        seen.clear()
        trainer.train_step(step, [batch])
        for parameter, gradient in zip(reference.parameters(), seen, strict=True):
            parameter.grad = gradient
        plain.step()
    for ours, theirs in zip(weights_of(trainer), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_only_weight_matrices_decay() -> None:
    trainer = build_trainer()
    decaying, others = (group["params"] for group in trainer.optimizer.param_groups)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decaying} == {
        "qkv_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert len(decaying) + len(others) == len(names)
    assert trainer.optimizer.param_groups[1]["weight_decay"] == 0


def torch_rates(scheduler: str, total: int, warmup: int, peak: float) -> list[float]:
    """The same schedule from torch.optim.lr_scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedules = torch.optim.lr_scheduler
    if scheduler == "onecycle":
        # OneCycleLR ends its rise at pct_start * total - 1.
        chain: object = schedules.OneCycleLR(
            optimizer, peak, total_steps=total, pct_start=warmup / total, cycle_momentum=False
        )
    else:
        rise = schedules.LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        fall = {
            "cosine": lambda: schedules.CosineAnnealingLR(optimizer, total - warmup, 0.1 * peak),
            "linear": lambda: schedules.LinearLR(optimizer, 1.0, 0.0, total - warmup),
            "none": lambda: schedules.ConstantLR(optimizer, 1.0),
        }[scheduler]()
        chain = schedules.SequentialLR(optimizer, [rise, fall], [warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chain.step()  # type: ignore[attr-defined]
    return rates


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "onecycle", "none"])
def test_learning_rates_equal_torchs_schedules(scheduler: str) -> None:
    training = TrainingSettings(
        max_steps=50, warmup_steps=10, scheduler=scheduler, learning_rate=3e-3
    )
    plan = build_plan(training, ControlSettings(), 16, 1000, 20)
    ours = [learning_rate_at(step, plan) for step in range(50)]
    assert ours == pytest.approx(torch_rates(scheduler, 50, 10, 3e-3), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "onecycle", "none"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_learning_rate_is_sane_for_the_shortest_runs(scheduler: str, steps: int) -> None:
    training = TrainingSettings(max_steps=steps, scheduler=scheduler, learning_rate=1.0)
    plan = build_plan(training, ControlSettings(), 16, 1000, 20)
    for step in range(steps):
        assert 0 <= learning_rate_at(step, plan) <= 1.0
    assert max(learning_rate_at(step, plan) for step in range(steps)) > 0


def test_accumulation_equals_one_large_batch() -> None:
    whole = build_trainer(batch_size=16)
    parts = build_trainer(batch_size=4, gradient_accumulation_steps=4)
    for step in range(4):
        inputs, targets = draw_batches(1, 16, seed=step)[0]
        one = whole.train_step(step, [(inputs, targets)])
        four = parts.train_step(step, zip(inputs.split(4), targets.split(4), strict=True))
        assert float(one.loss) == pytest.approx(float(four.loss), abs=1e-5)
        assert float(one.grad_norm) == pytest.approx(float(four.grad_norm), rel=1e-4)
    for a, b in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(name: str, place: str) -> None:
    trainer = build_trainer(optimizer=name)
    batches = draw_batches(3)
    trainer.train_step(0, batches[:1])
    hook = None
    if place == "loss":
        hook = trainer.model.register_forward_hook(lambda *args: args[2] * math.nan)
    else:
        parameter = trainer.model.layers[0].self_attn.qkv_proj.weight

        def poison(p: Tensor) -> None:
            p.grad.view(-1)[3] = math.inf

        parameter.register_post_accumulate_grad_hook(poison)
    before = weights_of(trainer)
    state = [
        v.clone() for s in trainer.optimizer.state.values() for v in s.values() if v is not None
    ]
    result = trainer.train_step(1, batches[1:2])
    assert not math.isfinite(float(result.loss) + float(result.grad_norm))
    after = [v for s in trainer.optimizer.state.values() for v in s.values() if v is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    if hook is not None:  # and the next sound step is applied
        hook.remove()
        trainer.train_step(2, batches[2:])
        assert not torch.equal(before[0], weights_of(trainer)[0])


def test_evaluation_is_the_mean_over_tokens_and_leaves_training_mode() -> None:
    trainer = build_trainer()
    batches = [*draw_batches(2, 4), *draw_batches(1, 2, seed=9)]
    result = trainer.evaluate(batches, tokens_per_byte=0.25)
    assert result is not None
    with torch.no_grad():
        logits = torch.cat([trainer.model(i).flatten(0, 1) for i, _ in batches])
        expected = torch.nn.functional.cross_entropy(
            logits, torch.cat([t.flatten() for _, t in batches])
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
