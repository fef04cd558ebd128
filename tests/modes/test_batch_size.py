"""The search against a simulated device, and real trials that leave nothing behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, TINY_FLAGS, CommandRunner, MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.processes import end_with_parent
from preflight.core.signals import StopFlag
from preflight.device.runtime import build_runtime
from preflight.foresight import child, trials
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.batch_search import MAX_SIZE, SearchResult, search, split_sequences
from preflight.foresight.memory import MemoryOptions, estimate_memory
from preflight.foresight.trial_spec import TrialResult, TrialSpec
from preflight.foresight.trials import run_trial
from preflight.modes import batch_trials, find_batch_size
from preflight.settings import build_config
from preflight.settings.kinds import OPTIMIZERS
from preflight.training.optimizers import SGD
from trainer import Trainer, build_trainer

GIB = 2**30
PHASES = ("training step", "evaluation", "generation", "save", "resume")
PATIENCE_SECONDS = 300  # until a process has started or ended, on a busy machine
Line = Callable[[int], float]


class Device:
    """A simulated device: memory by size, throughput by size, and an end of its memory."""

    def __init__(
        self, needs: Line, rate: Line = lambda size: 1000.0, physical: float = math.inf
    ) -> None:
        self.needs, self.rate, self.physical = needs, rate, physical
        self.sizes: list[int] = []

    def probe(self, size: int) -> TrialResult:
        assert size >= 1
        assert size not in self.sizes, "no size is tried twice"
        self.sizes.append(size)
        needed = int(self.needs(size))  # a part of a byte is none, here as in `true_maximum`
        if needed > self.physical:
            return TrialResult(size, failure="out of memory")
        seconds = size * 128 / self.rate(size)
        return TrialResult(size, 5, needed, needed, needed, 1, seconds, self.rate(size))

    def search(self, predict: Line, limit: float, **options: Any) -> SearchResult:
        return search(self.probe, lambda size: int(predict(size)), int(limit), **options)


def affine(base: float, slope: float) -> Line:
    return lambda size: base + slope * size


def check_border(device: Device, result: SearchResult, limit: float) -> None:
    """The answer ran and fits, and the size above it ran and does not."""
    tried = {t.batch_size: t for t in result.trials}
    assert len(tried) == len(result.trials)
    assert result.largest is not None
    assert tried[result.largest].fits(int(limit))
    assert not tried[result.largest + 1].fits(int(limit))
    for size in (result.fastest, result.recommended, result.chosen):
        assert size is not None
        assert tried[size].steps > 0
        assert tried[size].fits(int(limit))


def true_maximum(needs: Line, limit: float) -> int:
    low, high = 0, MAX_SIZE + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int(needs(middle)) <= limit else (low, middle)
    return low


slopes = st.floats(1e6, 4e9)
bases = st.floats(1e8, 8e9)
limits = st.floats(1e9, 150e9)


@given(base=bases, slope=slopes, limit=limits, error=st.floats(-0.03, 0.03))
def test_true_maximum_in_six_trials_when_the_prediction_is_near(
    base: float, slope: float, limit: float, error: float
) -> None:
    device = Device(affine(base, slope), rate=lambda size: 1e5 * size / (size + 20))
    result = device.search(affine(base * (1 + error), slope * (1 + error)), int(limit))
    expected = true_maximum(device.needs, int(limit))
    assert (result.largest or 0) == min(expected, MAX_SIZE)
    assert len(result.trials) <= 6
    if 0 < expected < MAX_SIZE:
        check_border(device, result, limit)


@given(
    base=bases,
    slope=slopes,
    limit=limits,
    factor=st.sampled_from([0.5, 0.7, 0.9, 1.3, 2.0]),
    offset=st.floats(-0.3, 0.3),
    physical=st.sampled_from([1.0, 1.18, math.inf]),
)
def test_true_maximum_when_the_prediction_is_wrong(
    base: float, slope: float, limit: float, factor: float, offset: float, physical: float
) -> None:
    device = Device(affine(base, slope), physical=limit * physical)
    result = device.search(affine(base * (1 + offset), slope * factor), int(limit))
    expected = true_maximum(device.needs, int(limit))
    assert (result.largest or 0) == expected
    # A trial that ran out of memory tells nothing but that: then it is a bisection, and its ends.
    assert len(result.trials) <= (8 if physical > 1.1 else 20)
    if expected:
        check_border(device, result, limit)
        assert result.bound == "memory"


@given(base=bases, slope=slopes, limit=limits, factor=st.sampled_from([0.7, 1.3]))
def test_six_trials_are_enough_when_the_line_is_wrong_by_a_third(
    base: float, slope: float, limit: float, factor: float
) -> None:
    device = Device(affine(base, slope))
    result = device.search(affine(base * factor, slope * factor), int(limit))
    assert (result.largest or 0) == true_maximum(device.needs, int(limit))
    assert len(result.trials) <= 6
    device = Device(affine(base, slope))
    result = device.search(affine(base + 4e8, slope), int(limit))  # another interpreter, say
    assert len(result.trials) <= 6


def test_a_curve_that_no_line_follows_still_ends() -> None:
    for limit in (1e9, 3e10, 1e12):
        device = Device(lambda size: 1e8 * 1.01 ** min(size, 5000) + size)
        result = device.search(affine(1e8, 1e6), int(limit))
        check_border(device, result, limit)
        assert len(result.trials) <= 36


@given(base=bases, slope=slopes, limit=limits, step=st.integers(2, 300))
def test_true_maximum_of_stepwise_memory(
    base: float, slope: float, limit: float, step: int
) -> None:
    device = Device(lambda size: base + slope * step * math.ceil(size / step))
    result = device.search(affine(base, slope), int(limit))
    assert (result.largest or 0) == true_maximum(device.needs, int(limit))
    assert len(result.trials) <= 24


@given(
    slope=st.floats(1e6, 1e9),
    limit=st.floats(4e9, 100e9),
    noise=st.floats(0, 0.02),
    seed=st.integers(0, 99),
)
def test_a_border_is_shown_when_memory_is_noisy(
    slope: float, limit: float, noise: float, seed: int
) -> None:
    def needs(size: int) -> float:
        return (1e9 + slope * size) * (1 + noise * random.Random(seed * 7919 + size).random())

    device = Device(needs)
    result = device.search(affine(1e9, slope), int(limit))
    check_border(device, result, limit)
    assert len(result.trials) <= 36


def test_every_limit_of_a_small_device() -> None:
    for limit in range(1, 60):
        device = Device(affine(3, 2))
        result = device.search(affine(2, 2.2), limit)
        assert result.largest == (true_maximum(device.needs, limit) or None)
        assert result.chosen is None or result.chosen in device.sizes


def test_nothing_fits() -> None:
    for device in (Device(affine(10, 1)), Device(affine(10, 1), physical=5)):
        result = device.search(affine(1, 1), 8)
        assert (result.largest, result.fastest, result.recommended, result.chosen) == (None,) * 4
        assert min(device.sizes) == 1
        assert result.bound == "memory"


@given(peak=st.integers(3, 9), limit=st.integers(700, 3000))
def test_fastest_in_the_middle(peak: int, limit: int) -> None:
    device = Device(affine(0, 1), rate=lambda size: 1000 - 60 * abs(math.log2(size) - peak))
    result = device.search(affine(0, 1), limit)
    tried = {t.batch_size: t.tokens_per_second for t in result.trials if t.fits(limit)}
    assert result.largest == limit
    best = max(tried.values())
    assert tried[result.fastest or 0] == best
    assert result.recommended == min(s for s, rate in tried.items() if rate >= 0.98 * best)
    if peak >= 8:  # within the trials there are
        assert result.fastest == 2**peak


def test_flat_throughput_recommends_a_small_size() -> None:
    device = Device(affine(0, 1), rate=lambda size: 1000 - 5 / size)
    result = device.search(affine(0, 1), 1000)
    assert result.largest == 1000
    assert result.recommended == min(t.batch_size for t in result.trials)
    assert result.recommended <= 128


@given(
    constant=st.floats(0.1, 100), critical=st.floats(4, 10_000), first=st.sampled_from([None, 8])
)
def test_the_size_to_take_weighs_speed_against_tokens(
    constant: float, critical: float, first: int | None
) -> None:
    """A step of `constant` + size, and 1 + size / `critical` times the tokens."""
    device = Device(affine(0, 1), rate=lambda size: 1000 * size / (constant + size))

    def times_tokens(size: int) -> float:
        return 1 + size / critical

    result = device.search(affine(0, 1), 5000, first=first, times_tokens=times_tokens)
    assert (result.largest, result.fastest) == (5000, 5000)
    best = max(device.rate(1 << n) / times_tokens(1 << n) for n in range(13))
    found = result.recommended or 0
    assert device.rate(found) / times_tokens(found) >= 0.93 * best
    assert len(result.trials) <= 7


def test_time_and_data_bound_the_search() -> None:
    device = Device(affine(1e9, 1e6), rate=lambda size: 3000)
    result = device.search(affine(1e9, 1e6), 20e9, first=8, max_step_seconds=20)
    assert device.sizes[0] == 8
    assert result.bound == "time"
    assert result.largest == max(device.sizes) == 20 * 3000 // 128
    assert result.predicted_largest == true_maximum(device.needs, 20e9)
    # A rate that rises with the size: one more trial where it more than doubles the bound.
    device = Device(affine(1e9, 1e6), rate=lambda size: 1000 + size)
    result = device.search(affine(1e9, 1e6), 20e9, first=8, max_step_seconds=20)
    assert device.sizes[:2] == [8, 157]
    assert result.largest == 157
    result = Device(affine(1e9, 1e6)).search(affine(1e9, 1e6), 20e9, largest=77)
    assert (result.largest, result.bound) == (77, "data")
    tight = Device(affine(0, 1e9), rate=lambda size: 3000)  # memory ends before time does
    result = tight.search(affine(0, 1e9), 5.5e9, first=8, max_step_seconds=20)
    assert (result.largest, result.bound) == (5, "memory")


def test_given_sizes_are_tried_and_no_others() -> None:
    device = Device(affine(0, 1), physical=40)
    result = device.search(affine(0, 1), 20, sizes=(32, 8, 16, 64, 8))
    assert device.sizes == [32, 8, 16, 64]
    assert (result.largest, result.bound) == (16, "list")


def test_a_size_above_one_that_does_not_fit_is_no_answer() -> None:
    device = Device(lambda size: 50 if size == 16 else 10, rate=lambda size: 1000.0 * size)
    result = device.search(affine(0, 1), 20, sizes=(8, 16, 64))
    assert (result.largest, result.fastest, result.recommended) == (8, 8, 8)


def test_target_that_fits_is_the_only_trial() -> None:
    device = Device(affine(0, 1))
    result = device.search(affine(0, 1), 40, target=32, keep=32)
    assert device.sizes == [32]
    assert (result.chosen, result.accumulation) == (32, 1)


@given(target=st.integers(2, 3000), limit=st.integers(1, 2999), accumulation=st.integers(1, 9))
def test_target_that_does_not_fit_keeps_the_product(
    target: int, limit: int, accumulation: int
) -> None:
    device = Device(affine(0, 1))
    limit = min(limit, target - 1)
    result = device.search(affine(0, 1.02), limit, target=target, keep=target * accumulation)
    assert result.largest == limit
    assert result.chosen in device.sizes
    assert result.chosen * (result.accumulation or 0) == target * accumulation


@given(product=st.integers(1, 10**6), preferred=st.integers(1, 5000), more=st.integers(0, 5000))
def test_split_is_exact_and_within_the_largest(product: int, preferred: int, more: int) -> None:
    size, accumulation = split_sequences(product, preferred, preferred + more)
    assert size * accumulation == product
    assert size <= preferred + more


def test_split_prefers_what_is_near() -> None:
    assert split_sequences(480, 100, 200) == (96, 5)
    assert split_sequences(302, 100, 300) == (151, 2)
    assert split_sequences(7, 4, 6) == (1, 7)


# ---- real trials --------------------------------------------------------------------------------


def build_spec(tmp_path: Path, **flags: Any) -> TrialSpec:
    values = {
        "model_size": "custom",
        "n_layers": 2,
        "n_heads": 2,
        "n_embeddings": 32,
        "context_length": 32,
        "device": "cpu",
        "mixed_precision": False,
    } | flags
    config = build_config(values, dict.fromkeys(values, "the command line"))
    n_ranks = config.processes.ranks or 1
    return TrialSpec(config, config.model.resolve(50257), None, tmp_path / "trial", n_ranks)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TIMED_STEPS", 2)
    monkeypatch.setattr(trials, "SLOW_STEP_SECONDS", math.inf)  # the machine may be busy
    monkeypatch.setattr(trials, "TIMED_SECONDS", math.inf)
    # Threads that wait for each other crawl where other processes run beside them.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_trial_runs_every_phase(tmp_path: Path, device: str) -> None:
    spec = build_spec(tmp_path, batch_size=4, gradient_accumulation_steps=2, device=device)
    spec.folder.mkdir()
    # Memory that was freed and kept must not hide what the model needs.
    build_runtime(spec.config.system)
    freed = [torch.ones(1_000_000) for _ in range(60)]
    del freed
    trial = trials.measure(spec)
    assert list(trial.phases) == [*PHASES]
    assert trial.steps == 3
    assert trial.failure == ""
    # Weights, gradients and AdamW's two averages of 1.6 M parameters in fp32 are 26 MB.
    assert trial.peak_bytes == max(trial.phases.values()) > 26e6
    assert trial.needed_bytes > trial.peak_bytes
    assert trial.tokens_per_second == pytest.approx(4 * 2 * 32 / trial.step_seconds)


def test_out_of_memory_is_a_result_and_names_the_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    spec = build_spec(tmp_path, batch_size=2, gradient_checkpointing=True)
    spec.folder.mkdir()
    built: list[dict[str, Any]] = []

    def build(*args: Any, **options: Any) -> Trainer:
        built.append(options)
        return build_trainer(*args, **options)

    monkeypatch.setattr(trials, "build_trainer", build)
    monkeypatch.setattr(trials.Trainer, "evaluate", exhaust)
    trial = trials.measure(spec)
    assert trial.failure.startswith("out of memory in the evaluation: CUDA out of memory. Tried")
    assert not trial.fits(2**60)
    assert built[-1]["gradient_checkpointing"] is True
    monkeypatch.setattr(trials.Trainer, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trials.measure(spec)


MEASURE_RANK = trials._measure_rank


def list_children() -> list[int]:
    """Living children, but for the tracker that multiprocessing keeps to its end."""
    return [
        p.pid
        for p in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(p.cmdline())
    ]


@pytest.mark.slow
def test_killed_and_greedy_children_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list_children()
    spec = build_spec(tmp_path)
    with StopFlag() as stop:
        greedy = run_trial(spec, 50_000_000, stop)  # less than an interpreter with torch takes
        assert "all the memory that was available" in greedy.failure
        monkeypatch.setattr(trials, "_measure", _die)
        killed = run_trial(spec, GIB * 64, stop)
        assert "signal 9" in killed.failure
        assert killed.steps == greedy.steps == 0
        assert not killed.fits(2**60)
        monkeypatch.setattr(trials, "_measure", _answer_with_error)
        with pytest.raises(PreflightError) as caught:
            run_trial(spec, GIB * 64, stop)
        assert caught.value.code == ExitCode.STORAGE
        monkeypatch.setattr(trials, "_measure", _leave)
        with pytest.raises(PreflightError) as caught:
            run_trial(spec, GIB * 64, stop)
        assert caught.value.code == ExitCode.WORKER_LOST
        stop.received = signal.SIGTERM
        with pytest.raises(PreflightError) as caught:
            run_trial(spec, GIB * 64, stop)
        assert caught.value.code == ExitCode.SIGTERM
    assert list_children() == before
    assert not spec.folder.exists()


def _die(spec: TrialSpec, report: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(spec: TrialSpec, report: Any) -> None:
    os._exit(3)


def _answer_with_error(spec: TrialSpec, report: Any) -> None:
    raise PreflightError(ExitCode.STORAGE, "cannot write")


def _sleep_in_folder(spec: TrialSpec, report: Any) -> None:
    end_with_parent(functools.partial(child._remove_folder, spec.folder))
    (spec.folder / "started").touch()
    time.sleep(PATIENCE_SECONDS)


if __name__ == "__main__":  # the parent of the test below
    trials._measure = _sleep_in_folder
    with StopFlag() as flag:
        run_trial(build_spec(Path(sys.argv[1])), GIB * 64, flag)


@pytest.mark.slow
def test_a_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    parent = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment)
    started = tmp_path / "trial" / "started"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.exists()
    family = psutil.Process(parent.pid).children(recursive=True)
    assert family
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_given_sizes_on_the_command_line_then_train(
    preflight: CommandRunner, tmp_path: Path, tiny_text: Path, device: str
) -> None:
    flags = [*TINY_FLAGS, "--device", device]
    result = preflight(
        "--get-optimal-bs",
        *flags,
        "--test-batch-sizes",
        "4",
        "2",
        "--json",
        "--tokens-per-step",
        "256",
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "training_output/batch_size_report.json").read_text())
    assert [t["batch_size"] for t in report["trials"]][:2] == [4, 2]
    assert all(t["steps"] > 0 and t["fits"] and t["micro_steps"] == 2 for t in report["trials"])
    assert report["largest"] == 4
    assert report["chosen"] * report["accumulation"] * 32 == 256
    assert sorted(p.name for p in (tmp_path / "training_output").iterdir()) == [
        ".lock",
        "batch_size_report.json",
    ]
    trained = preflight(
        "--train",
        *flags,
        *report["flags"].split(),
        "--max-steps",
        "2",
        "--text-file",
        str(tiny_text),
    )
    assert trained.returncode == 0, trained.stderr
    assert "2 steps of 256 tokens" in trained.stderr


@pytest.mark.slow
def test_the_named_size_survives_the_run(
    preflight: CommandRunner, tmp_path: Path, tiny_text: Path
) -> None:
    """Trained at through evaluation, save and sample, killed and resumed, in the memory told."""
    result = preflight(
        "--get-optimal-bs",
        *TINY_FLAGS,
        "--test-batch-sizes",
        "64",
        "--json",
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    needed = next(t["needed_bytes"] for t in report["trials"] if t["batch_size"] == 64)
    flags = [
        "--train",
        *TINY_FLAGS,
        *report["flags"].split(),
        "--max-steps",
        "12",
        "--eval-every",
        "3",
        "--checkpoint-every",
        "6",
        "--text-file",
        str(tiny_text),
    ]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (
        time.monotonic() < deadline
        and not (tmp_path / "training_output/milestones/checkpoint-6").exists()
    ):
        time.sleep(0.02)
    run.kill()
    run.wait()
    resumed = preflight(*flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from" in resumed.stderr
    rows = [
        json.loads(line)
        for line in (tmp_path / "training_output/metrics.jsonl").read_text().splitlines()
    ]
    assert {"step", "eval", "sample", "resume"} <= {row["event"] for row in rows}
    peak = max(row["peak_memory_bytes"] for row in rows if row["event"] == "step")
    assert peak < 1.1 * needed, (peak, needed)


def run_in_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: Device, limit: int, **flags: Any
) -> int:
    """The whole mode with a simulated device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        batch_trials,
        "run_trial",
        lambda spec, *_: device.probe(spec.config.training.batch_size),
    )
    monkeypatch.setattr(batch_trials, "measure_limit", lambda *_: (limit, limit))
    values = {"model_size": "nano", "device": "cpu", "mixed_precision": False} | flags
    return find_batch_size.run(build_config(values, dict.fromkeys(values, "the command line")))


def test_ranks_share_an_update_and_the_memory_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(batch_trials, "available_host_bytes", lambda: 3 * 10**9)
    spec = build_spec(tmp_path, ranks=3, batch_size=4, gpu_safety_margin=0.1)
    with StopFlag() as stop:
        among = batch_trials.BatchTrials(spec, stop)
        alone = batch_trials.BatchTrials(dataclasses.replace(spec, n_ranks=1), stop)
    assert (among.total_bytes, among.limit_bytes) == (10**9, 9 * 10**8)
    assert (alone.total_bytes, alone.limit_bytes) == (3 * 10**9, 27 * 10**8)
    # Learning sees the whole update: a size on three ranks is three times that on one.
    assert among.count_tokens_per_step(4) == alone.count_tokens_per_step(12) == 12 * 32
    assert among.count_times_tokens(40) == alone.count_times_tokens(120) > 1
    # Each keeps its third of the update that is asked for.
    config = build_spec(tmp_path, ranks=3, tokens_per_step=3 * 32 * 10).config
    with StopFlag() as stop:
        kept = batch_trials.BatchTrials(dataclasses.replace(spec, config=config), stop)
    assert kept.n_kept == 10
    assert kept.count_times_tokens(40) == 1
    assert kept.spec_at(4).config.training.gradient_accumulation_steps == 2


@pytest.mark.slow
def test_the_memory_that_is_predicted_is_that_of_a_rank(tmp_path: Path) -> None:
    spec = build_spec(tmp_path, ranks=2, batch_size=4)
    with StopFlag() as stop:
        search_trials = batch_trials.BatchTrials(spec, stop)
    runtime = spec.runtime()
    expected = estimate_memory(
        spec.model_config,
        spec.config.resolve_training(),
        MemoryOptions.of(runtime, False, sharing=Sharing(2)),
    )
    assert search_trials.estimate(4).items == expected.items
    assert search_trials.predict(4) == expected.required_bytes


def test_a_search_has_the_ranks_of_a_run(make_config: MakeConfig, monkeypatch: Any) -> None:
    """All cards, where no flag says otherwise; what cannot be shared is refused at once."""
    asked: list[TrialSpec] = []

    def stop_here(spec: TrialSpec, _: StopFlag) -> None:
        asked.append(spec)
        raise PreflightError(ExitCode.INTERNAL, "far enough")

    monkeypatch.setattr(find_batch_size, "BatchTrials", stop_here)
    monkeypatch.setattr(find_batch_size, "count_ranks", lambda config: 3)
    with pytest.raises(PreflightError, match="far enough"):
        find_batch_size.run(make_config(tokenizer="byte"))
    assert [spec.n_ranks for spec in asked] == [3]
    monkeypatch.setattr(OPTIMIZERS, "load", lambda _: dataclasses.replace(SGD, knows_shards=False))
    with pytest.raises(PreflightError, match="not on 3 ranks"):
        find_batch_size.run(make_config(tokenizer="byte"))


def test_of_ranks_the_fullest_is_told_and_the_slowest() -> None:
    first = TrialResult(4, 5, 20, 0, 320, 1, 2.0, 64.0, phases={"save": 20}, rank_bytes=(320,))
    second = TrialResult(4, 5, 30, 0, 330, 1, 4.0, 32.0, phases={"save": 30}, rank_bytes=(330,))
    joined = trials._join_results([first, second])
    assert joined == dataclasses.replace(second, rank_bytes=(320, 330))
    assert trials._join_results([first]) == first
    assert trials._join_results([second, first]).step_seconds == 4.0


@pytest.mark.slow
def test_real_ranks_need_what_is_predicted_and_then_train(
    preflight: CommandRunner, tmp_path: Path, tiny_text: Path
) -> None:
    flags = [*TINY_FLAGS, "--device", "cpu"]
    sizes = ("--test-batch-sizes", "128", "16")
    search_flags = [*flags, "--ranks", "2", *sizes, "--tokens-per-step", "8192"]
    result = preflight("--get-optimal-bs", *search_flags, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "training_output/batch_size_report.json").read_text())
    assert report["ranks"] == 2
    assert [t["batch_size"] for t in report["trials"]][:2] == [128, 16]
    for trial in report["trials"]:
        assert len(trial["rank_bytes"]) == 2
        assert trial["needed_bytes"] == max(trial["rank_bytes"])
        assert list(trial["phases"]) == [*PHASES]
        assert trial["fits"]
        tokens = 2 * trial["batch_size"] * trial["micro_steps"] * 32
        assert trial["tokens_per_second"] * trial["step_seconds"] == pytest.approx(tokens)
        assert 0.7 < trial["ratio"] < 1.1
    assert report["chosen"] * report["accumulation"] * 32 * 2 == 8192
    assert "ranks: 2 on one host; batch size of each" in result.stdout
    assert f"2 ranks x {report['chosen']}" in result.stdout
    trained = preflight(
        *("--train", *flags, *report["flags"].split()),
        *("--max-steps", "2", "--text-file", str(tiny_text)),
    )
    assert trained.returncode == 0, trained.stderr
    assert "2 steps of 8,192 tokens" in trained.stderr


@pytest.mark.slow
def test_a_rank_that_lacks_memory_ends_the_trial_and_not_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list_children()
    monkeypatch.setattr(trials, "_measure_rank", _exhaust_rank_1)
    with StopFlag() as stop:
        trial = run_trial(build_spec(tmp_path, ranks=2), GIB * 64, stop)
    assert trial.failure.startswith("out of memory in the evaluation: CUDA out of memory")
    assert list_children() == before


def _exhaust_rank_1(spec: TrialSpec, port: int, rank: int, report: Any) -> TrialResult:
    def exhaust(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    if rank:
        trials.Trainer.evaluate = exhaust  # type: ignore[assignment, method-assign]
    return MEASURE_RANK(spec, port, rank, report)


@pytest.mark.slow
def test_the_table_the_flags_and_the_exit_codes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(limit: int, rate: float = 1e6, **flags: Any) -> int:
        device = Device(affine(450e6, 5e6), rate=lambda size: rate * size / (size + 9))
        return run_in_process(monkeypatch, tmp_path, device, limit, **flags)

    assert run(10**9, tokens_per_step=128 * 480) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "largest that fits: 110 (the next larger size was tried and does not fit)" in told
    assert "96 x 5 x 128 = 61,440 tokens per step\n" in told
    assert told.endswith(
        "python main.py --train --model-size nano --device cpu "
        "--no-mixed-precision --batch-size 96 --gradient-accumulation-steps 5\n"
    )
    assert run(10**9, tokens_per_step=1000) == ExitCode.DONE
    assert "= 1,024 tokens per step, the nearest to 1,000" in capsys.readouterr().out
    assert run(10**9, target_batch_size=110) == ExitCode.DONE
    assert "batch size 110 fits" in capsys.readouterr().out
    assert run(10**9, target_batch_size=128) == ExitCode.CHECK_FAILED
    told = capsys.readouterr().out
    assert "batch size 128 does not fit; largest that fits: 110" in told
    assert told.endswith("--batch-size 64 --gradient-accumulation-steps 2\n")
    assert run(10**9, rate=1000.0) == ExitCode.DONE
    assert "a step would take over 20 s; predicted to fit up to 110" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "context", "checkpointing_helps", "smaller"),
    [  # with one sequence, nano needs most memory where its blocks keep nothing any more
        ("nano", 64, False, "--n-layers, --n-embeddings"),
        ("micro", 128, True, "--model-size nano"),
    ],
)
def test_nothing_fits_says_what_would_help(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    size: str,
    context: int,
    checkpointing_helps: bool,
    smaller: str,
) -> None:
    device = Device(affine(450e6, 5e6))
    with pytest.raises(PreflightError) as caught:
        run_in_process(monkeypatch, tmp_path, device, 10**8, model_size=size)
    assert caught.value.lines[1].endswith(f"or a smaller model: {smaller}")
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    assert f"--context-length {context} saves" in str(caught.value)
    assert ("--gradient-checkpointing saves" in str(caught.value)) == checkpointing_helps
    assert len(caught.value.lines) <= 5
    report = json.loads((tmp_path / "training_output/batch_size_report.json").read_text())
    assert report["chosen"] is None
