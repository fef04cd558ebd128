"""What fits: the verdict, the batch that is suggested, the refusals, the disk, bf16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.device.runtime import Runtime
from preflight.foresight import fits
from preflight.foresight.fits import (
    check_disk,
    check_memory,
    estimate_disk_bytes,
    explain_out_of_memory,
    find_bf16_fault,
    find_fitting_batch,
    judge_fit,
    suggest_fit,
)
from preflight.foresight.memory import (
    HOST_BASE_BYTES,
    MemoryEstimate,
    MemoryOptions,
    estimate_checkpoint_bytes,
)
from preflight.settings import ControlSettings, ModelConfig, TrainingSettings

MODEL = ModelConfig(1000, 64, 64, 4, 3, 256)
ON_CPU = MemoryOptions(torch.float32, "cpu")
RUNTIME = Runtime(torch.device("cpu"), torch.float32, False, ())


def settings(batch: int, accumulation: int = 1) -> TrainingSettings:
    return TrainingSettings(batch_size=batch, gradient_accumulation_steps=accumulation)


def require(batch: int, options: MemoryOptions = ON_CPU, accumulation: int = 2) -> int:
    """A made-up requirement of an update: accumulation and batch raise it, checkpointing less."""
    gradients = 50 if accumulation > 1 else 0
    return 1000 + gradients + (3 if options.gradient_checkpointing else 10) * batch


@pytest.fixture(autouse=True)
def made_up_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is tested against a simple formula; what is traced is tested in test_memory."""

    def estimate(
        model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
    ) -> MemoryEstimate:
        assert model_config == MODEL
        accumulation = training.gradient_accumulation_steps
        needed = require(training.batch_size, options, accumulation)
        return MemoryEstimate({}, {}, 0, 0, needed + 7, needed, 0, 0, options.device_type)

    def build_curve(
        model_config: ModelConfig, training: TrainingSettings, options: MemoryOptions
    ) -> Callable[[int], MemoryEstimate]:
        return lambda size: estimate(model_config, replace(training, batch_size=size), options)

    monkeypatch.setattr(fits, "estimate_memory", estimate)
    monkeypatch.setattr(fits, "build_batch_curve", build_curve)
    monkeypatch.setattr(
        fits, "estimate_savings", lambda *_: {"--gradient-checkpointing": 5 * 2**20}
    )


def test_verdict() -> None:
    assert judge_fit(80, 100, 0.15) == "fits"
    assert judge_fit(90, 100, 0.15) == "tight"
    assert judge_fit(101, 100, 0.15) == "does not fit"


def test_the_largest_divisor_that_fits_is_found() -> None:
    def find(batch: int, limit: int, **options: Any) -> tuple[int, int] | None:
        return find_fitting_batch(MODEL, settings(batch, 72 // batch), ON_CPU, limit, **options)

    # Of 72 sequences the divisors around 13 are 12 and 18.
    assert find(36, require(13)) == find(36, require(12)) == (12, 6)
    assert find(36, require(12) - 1) == (9, 8)
    assert find(12, require(13)) == (9, 8)  # only sizes below the present one
    assert find(36, require(13), below=9) == (8, 9)
    assert find(72, require(60)) == (36, 2)  # a smaller one accumulates, which needs more
    assert find(36, math.ceil(require(8) / 0.85), margin_share=0.15) == (8, 9)
    assert find(36, require(9), margin_share=0.15) is None
    assert find(1, 10**12) is None
    on_cuda = replace(ON_CPU, device_type="cuda")
    assert find_fitting_batch(MODEL, settings(36, 2), on_cuda, require(12) + 7) == (12, 6)
    assert find_fitting_batch(MODEL, settings(36, 2), on_cuda, require(12) + 6) == (9, 8)


def test_what_is_suggested_fits_with_the_margin() -> None:
    limit = math.ceil(require(4) / 0.85)
    assert suggest_fit(MODEL, settings(32), ON_CPU, limit) == (
        "--batch-size 4 --gradient-accumulation-steps 8 fits"
    )
    assert "no batch size fits" in suggest_fit(MODEL, settings(32), ON_CPU, 1000)


def test_gradient_checkpointing_is_suggested_where_nothing_else_fits() -> None:
    checkpointing = replace(ON_CPU, gradient_checkpointing=True)
    limit = math.ceil(require(2, checkpointing) / 0.85)
    assert limit < require(1) / 0.85
    flags = "--gradient-checkpointing --batch-size"
    accumulation = "--gradient-accumulation-steps"
    assert suggest_fit(MODEL, settings(4), ON_CPU, limit) == f"{flags} 2 {accumulation} 2 fits"
    # The present size counts too, once checkpointing is switched on; but not when it is on.
    assert suggest_fit(MODEL, settings(1), ON_CPU, limit) == f"{flags} 1 {accumulation} 1 fits"
    assert "no batch size" in suggest_fit(MODEL, settings(1), checkpointing, limit)
    # A run with checkpointing keeps it, though a smaller batch would do without.
    limit = math.ceil(require(1) / 0.85)
    assert "--gradient-checkpointing" not in suggest_fit(MODEL, settings(8), ON_CPU, limit)
    assert suggest_fit(MODEL, settings(8), checkpointing, limit).startswith(flags)


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`explain_out_of_memory` on a machine of a certain size."""

    def call(
        reachable: int, training: TrainingSettings, message: str = "", checkpointing: bool = False
    ) -> list[str]:
        monkeypatch.setattr(fits, "reachable_host_bytes", lambda: reachable)
        monkeypatch.setattr(fits, "available_host_bytes", lambda: 3 * 2**30)
        error = explain_out_of_memory(
            MemoryError(message),
            MODEL,
            training,
            RUNTIME,
            replace(ON_CPU, gradient_checkpointing=checkpointing),
            "out/checkpoint-3",
        )
        assert error.code == ExitCode.OUT_OF_MEMORY
        return error.lines

    return call


def test_out_of_memory_keeps_the_update(explain: Any) -> None:
    lines = explain(require(12), settings(36, 2))
    assert lines[0] == "out of memory with 36 sequences of 64 tokens: no memory is left"
    assert "--batch-size 12 --gradient-accumulation-steps 6: the same update of 72" in lines[1]
    assert lines[2] == "--gradient-checkpointing would save 5.0 MiB"
    assert lines[3] == "last checkpoint, safe: out/checkpoint-3"
    # A prediction that has just been wrong is trusted by half.
    assert "--batch-size 18 " in explain(10**12, settings(36, 2))[1]
    # What is predicted not to fit at all is still worth a try with a single sequence.
    assert "--batch-size 1 --gradient-accumulation-steps 72" in explain(10, settings(36, 2))[1]


def test_out_of_memory_with_a_single_sequence_suggests_no_batch(explain: Any) -> None:
    lines = explain(10**12, settings(1, 8), checkpointing=True)
    assert len(lines) == 2
    assert lines[1].startswith("last checkpoint")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", "20.00 MiB, 3.0 GiB are available"),
        (
            "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB of which 1.50 GiB is "
            "free.",
            "tried to allocate 2.00 GiB, 1.50 GiB were free",
        ),
        ("DefaultCPUAllocator: you tried to allocate 4194304 bytes.", "tried to allocate 4.0 MiB,"),
        ("something else", "something else"),
    ],
)
def test_the_allocators_message_in_few_words(explain: Any, message: str, told: str) -> None:
    assert told in explain(10**12, settings(2), message)[0]


def test_a_run_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(reachable: int, runtime: Runtime = RUNTIME) -> None:
        monkeypatch.setattr(fits, "measure_reachable_bytes", lambda runtime: reachable)
        check_memory(MODEL, settings(1024), runtime, ON_CPU, "none")

    monkeypatch.setattr(fits, "estimate_least_bytes", lambda *_: 10**9)
    required = require(1024, accumulation=1)
    check(required)
    with pytest.raises(PreflightError) as caught:
        check(required - 1)
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    assert "are needed" in caught.value.lines[0]
    assert "--batch-size 512 --gradient-accumulation-steps 2" in caught.value.lines[1]
    check(required - 1, replace(RUNTIME, device=torch.device("cuda")))  # a card fails at once


def test_plenty_of_memory_is_seen_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "measure_reachable_bytes", lambda runtime: 10**12)
    monkeypatch.setattr(fits, "estimate_memory", lambda *_: pytest.fail("traced"))
    check_memory(MODEL, settings(4), RUNTIME, ON_CPU, "none")


def test_memory_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    card = replace(RUNTIME, device=torch.device("cuda"))
    assert fits.measure_reachable_bytes(card) == 12 * gib + fits.CUDA_CONTEXT_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * gib, 24 * gib))
    assert fits.measure_reachable_bytes(card) == 24 * gib
    assert fits.measure_reachable_bytes(RUNTIME) > HOST_BASE_BYTES["cpu"] / 10


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training, control = settings(2), ControlSettings(max_checkpoints=3)
    one = estimate_checkpoint_bytes(MODEL, training)
    assert estimate_disk_bytes(MODEL, training, control, 1) == one
    assert estimate_disk_bytes(MODEL, training, control) == 5 * one
    # One more is kept, from which the run can be made longer.
    assert estimate_disk_bytes(MODEL, replace(training, scheduler="wsd"), control) == 6 * one
    folder = tmp_path / "milestones/checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr(fits, "free_bytes", lambda path: 5 * one - 1000)
    disk = check_disk(tmp_path, MODEL, training, control, 100)
    assert (disk.needed_bytes, disk.free_bytes, disk.kept_bytes) == (5 * one, 5 * one - 1000, 1000)
    assert disk.fault is None
    monkeypatch.setattr(fits, "free_bytes", lambda path: 5 * one - 1001)
    fault = check_disk(tmp_path, MODEL, training, control, 100).fault
    assert fault is not None
    assert fault[0].startswith("disk: ")
    assert "--max-checkpoints (now 3)" in fault[1]
    assert check_disk(tmp_path, MODEL, training, control, 1).fault is None


def test_bf16_that_the_hardware_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = replace(RUNTIME, dtype=torch.bfloat16)
    monkeypatch.setattr(fits, "has_fast_bf16", lambda device: False)
    fault = find_bf16_fault(runtime, True)
    assert fault is not None
    assert "cpu has no bf16 in hardware: bfloat16 is used" in fault[0]
    assert find_bf16_fault(runtime, None) is find_bf16_fault(runtime, False) is None
    monkeypatch.setattr(fits, "has_fast_bf16", lambda device: True)
    assert find_bf16_fault(runtime, True) is None
