"""`--window` and `--overlap`: how many windows, which tokens, and that a run keeps to them."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import make_folder, read_all

import train_utils
from conftest import MakeConfig
from preflight.checkpoints.store import open_checkpoint
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.shards import DataFolder
from preflight.corpus.windows import (
    build_epoch,
    choose_stride,
    choose_window,
    count_run_windows,
    count_windows,
)
from preflight.foresight.learnability import find_plan_warnings
from preflight.modes import check, train
from preflight.modes.setup import RunSetup
from preflight.settings import TrainingSettings
from preflight.training import resume
from preflight.training.state import StepResult
from train_utils import BatchLoader, iterate_windows
from trainer import Trainer

OVERLAPS = st.one_of(st.just(0.0), st.floats(0, 0.99))


# ---- numbers ------------------------------------------------------------------------------------


@given(st.integers(2, 400), st.integers(1, 50), OVERLAPS)
@settings(max_examples=300)
def test_the_number_of_windows_is_the_most_that_fit_at_every_offset(
    n_tokens: int, context: int, overlap: float
) -> None:
    window = choose_window(n_tokens, context)
    stride = choose_stride(window, overlap)
    assert stride == max(1, round(window * (1 - overlap)))
    n_windows = 1
    while (stride - 1) + n_windows * stride + window + 1 <= n_tokens:
        n_windows += 1
    assert count_windows(n_tokens, context, overlap) == n_windows


@given(st.integers(2, 400), st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=200)
def test_without_overlap_nothing_is_otherwise(n_tokens: int, context: int, number: int) -> None:
    """Against the formulas of the releases that had no overlap."""
    n_windows = count_windows(n_tokens, context)
    assert n_windows == max(1, (n_tokens - context) // context)
    assert choose_stride(context, 0.0) == context
    window = choose_window(n_tokens, context)
    plain, zero = (
        build_epoch(n_tokens, length, 7, "f", number, *more)
        for length, more in ((context, ()), (window, (0.0,)))
    )
    assert plain.offset == zero.offset
    assert plain.order.tolist() == zero.order.tolist()


@given(st.integers(2, 300), st.integers(1, 40), OVERLAPS, st.integers(0, 3))
@settings(max_examples=200)
def test_every_window_fits_and_every_offset_is_below_the_stride(
    n_tokens: int, context: int, overlap: float, number: int
) -> None:
    window = choose_window(n_tokens, context)
    stride = choose_stride(window, overlap)
    epoch = build_epoch(n_tokens, context, 1, "f", number, overlap)
    n_windows = count_windows(n_tokens, context, overlap)
    assert sorted(epoch.order.tolist()) == list(range(n_windows))
    assert 0 <= epoch.offset < stride
    assert epoch.offset + (n_windows - 1) * stride + window + 1 <= n_tokens


def test_offsets_use_all_of_the_stride() -> None:
    offsets = {build_epoch(500, 20, 1, "f", number, 0.75).offset for number in range(60)}
    assert offsets == set(range(5))


def test_the_order_with_overlap_is_fixed_for_ever() -> None:
    """A golden value: another machine, or another NumPy, must give the same order."""
    epoch = build_epoch(1000, 200, 42, "fingerprint", 3, 0.5)
    assert (epoch.offset, epoch.order.tolist()) == GOLDEN


GOLDEN = (34, [4, 3, 1, 5, 0, 6, 2, 7])


@given(st.integers(1, 40), OVERLAPS, st.integers(1, 7), st.integers(0, 200))
@settings(max_examples=60)
def test_batches_are_slices_a_stride_apart(
    folder: DataFolder, context: int, overlap: float, batch_size: int, cursor: int
) -> None:
    tokens = read_all(folder)
    stride = choose_stride(context, overlap)
    n_windows = count_windows(len(tokens), context, overlap)
    with BatchLoader(
        folder,
        "train",
        batch_size=batch_size,
        context_length=context,
        seed=5,
        device="cpu",
        cursor=cursor,
        overlap=overlap,
    ) as loader:
        assert loader.n_windows == n_windows
        for first in range(cursor, cursor + 3 * batch_size, batch_size):
            inputs, targets = loader.next_batch()
            for row in range(batch_size):
                number, index = divmod(first + row, n_windows)
                epoch = build_epoch(len(tokens), context, 5, folder.fingerprint, number, overlap)
                start = epoch.offset + int(epoch.order[index]) * stride
                assert inputs[row].tolist() == tokens[start : start + context].tolist()
                assert targets[row].tolist() == tokens[start + 1 : start + context + 1].tolist()


@pytest.fixture(scope="module", autouse=True)
def _read_little_and_close_at_once() -> Iterator[None]:
    """A loader that is closed waits for its thread, which may be waiting for room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_utils, "_POLL_SECONDS", 0.001)
        patch.setattr(train_utils, "_CHUNK_TOKENS", 2000)  # many chunks of few tokens
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return make_folder(tmp_path_factory.mktemp("tokens"), [300, 40, 1, 360])


def test_half_overlap_reads_each_token_twice(folder: DataFolder) -> None:
    """All but those at the ends of the text."""
    with BatchLoader(
        folder, "train", batch_size=1, context_length=20, seed=1, device="cpu", overlap=0.5
    ) as loader:
        rows = [loader.next_batch()[0][0] for _ in range(loader.n_windows)]
    tokens = read_all(folder)
    place = {int(token): index for index, token in enumerate(tokens)}
    assert len(place) == len(tokens), "each token of the test data is another"
    seen = np.bincount([place[int(t)] for row in rows for t in row], minlength=len(tokens))
    covered = np.flatnonzero(seen)
    assert set(seen[covered[0] + 10 : covered[-1] - 9]) == {2}
    assert len(covered) > len(tokens) - 40


def test_validation_windows_never_overlap(folder: DataFolder) -> None:
    training = TrainingSettings(window=20, overlap=0.5)
    windows = count_run_windows(folder, training, 50)
    assert (windows.window_tokens, windows.stride_tokens) == (20, 10)
    assert windows.n_val == count_windows(folder.val.n_tokens, 20)
    assert windows.n_train == count_windows(folder.train.n_tokens, 20, 0.5)
    read = iterate_windows(
        folder, "val", batch_size=9, context_length=20, n_windows=10**6, device="cpu"
    )
    ids = [int(t) for inputs, _ in read for t in inputs.flatten()]
    assert len(ids) == len(set(ids)) == 20 * windows.n_val


# ---- runs ---------------------------------------------------------------------------------------

HALF = {"window": 16, "overlap": 0.5}


def open_setup(make_config: MakeConfig, **flags: Any) -> RunSetup:
    return RunSetup(make_config(**flags), StopFlag())


def test_the_plan_counts_the_windows(make_config: MakeConfig) -> None:
    plain = open_setup(make_config, max_steps=None, num_epochs=2).plan
    run = open_setup(make_config, max_steps=None, num_epochs=2, **HALF)
    plan, n_tokens = run.plan, run.data.train.n_tokens
    n_windows = (n_tokens - 16) // 8
    assert plan.total_steps == math.ceil(2 * n_windows / 4)
    assert (plan.window_tokens, plan.stride_tokens, plan.tokens_per_step) == (16, 8, 64)
    assert plan.epochs == pytest.approx(2, rel=0.01)
    assert plan.text_reads == pytest.approx(4, rel=0.01)
    assert plain.text_reads == plain.epochs
    assert plain.stride_tokens == plain.window_tokens == 32
    with run.open_loader() as loader:
        assert loader.n_windows == n_windows
        assert loader.next_batch()[0].shape == (4, 16)
    assert next(iter(run.list_validation(3)))[0].shape == (3, 16)


def test_text_that_is_read_twice_an_epoch_counts_twice(make_config: MakeConfig) -> None:
    texts = {}
    for overlap in (0.0, 0.75):
        run = open_setup(make_config, max_steps=None, num_epochs=2, overlap=overlap)
        found = find_plan_warnings(run.config, run.model_config, run.plan, run.data)
        texts[overlap] = {advice.key: advice.text for advice in found}
    assert "epochs" not in texts[0.0]
    assert texts[0.75]["epochs"].startswith("8.0 epochs")


@pytest.mark.slow
def test_run_and_check_tell_what_the_windows_do(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        "16 tokens each; the context's positions from 16 on are not trained; one begins every 8 "
        "tokens, so that an epoch reads the text 2.00 times; validation windows do not overlap"
    )
    assert check.run(make_config(**HALF)) == 0
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert train.run(make_config(max_steps=2, **HALF)) == 0
    assert f"windows: {told}\n" in capsys.readouterr().err
    assert train.run(make_config(max_steps=2, output_dir="plain")) == 0
    assert "windows: " not in capsys.readouterr().err


def test_a_window_longer_than_the_context_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(PreflightError, match="--window 33: the model's context is 32") as caught:
        train.run(make_config(window=33))
    assert caught.value.code == ExitCode.FLAGS
    assert not Path("data/metadata.json").exists()


def read_end(folder: str, step: int) -> tuple[bytes, list[float]]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    weights = Path(folder, f"milestones/checkpoint-{step}/model.safetensors").read_bytes()
    return weights, [row["loss"] for row in rows if row["event"] == "step"]


def test_a_cut_run_equals_the_unbroken_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = HALF | {"max_steps": 12, "checkpoint_every": 100, "eval_every": 100}
    assert train.run(make_config(output_dir="whole", **flags)) == 0
    original = Trainer.train_step

    def stopping(self: Trainer, step: int, batches: Any) -> StepResult:
        result = original(self, step, batches)
        if result.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        assert train.run(make_config(output_dir="cut", **flags)) == ExitCode.SIGTERM
    rest = {name: value for name, value in flags.items() if name not in HALF}
    assert train.run(make_config(output_dir="cut", **rest)) == 0  # the checkpoint knows them
    assert read_end("cut", 12) == read_end("whole", 12)


def test_the_order_of_the_samples_cannot_change_within_a_run(make_config: MakeConfig) -> None:
    assert train.run(make_config(max_steps=2, **HALF)) == 0
    for flag, value in (("overlap", 0.25), ("overlap", 0.0), ("window", 32), ("window", 8)):
        with pytest.raises(PreflightError, match=f"--{flag} was .* cannot change") as caught:
            train.run(make_config(max_steps=4, **{flag: value}))
        assert caught.value.code == ExitCode.CHECKPOINT
    assert train.run(make_config(max_steps=4, **HALF)) == 0


def test_a_checkpoint_from_before_these_flags_has_their_defaults(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.run(make_config(max_steps=2)) == 0
    origin = open_checkpoint("training_output/milestones/checkpoint-2")
    for name in HALF:
        del origin.config["training"][name]
    adopted = resume.adopt_settings(make_config(window=32, overlap=0.0), origin).training
    assert (adopted.window, adopted.overlap) == (32, 0.0)
    for flags in ({"window": 16}, {"overlap": 0.5}):
        with pytest.raises(PreflightError, match="cannot change within a run"):
            resume.adopt_settings(make_config(**flags), origin)
