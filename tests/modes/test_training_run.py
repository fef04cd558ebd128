"""Whole runs: what they leave behind, how they stop, and that a cut run equals the unbroken one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from conftest import ROOT, TINY_FLAGS, CommandRunner
from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store
from preflight.core.errors import ExitCode, PreflightError
from preflight.foresight import fits
from preflight.modes import train
from preflight.settings import build_config
from preflight.training import divergence, resume
from preflight.training.state import StepResult
from trainer import Trainer

TINY = {
    "model_size": "custom",
    "n_layers": 2,
    "n_heads": 2,
    "n_embeddings": 32,
    "context_length": 32,
    "batch_size": 8,
    "device": "cpu",
    "mixed_precision": False,
    "max_steps": 12,
    "num_workers": 1,
}
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train the tiny model in this process; keywords are flags."""
    monkeypatch.chdir(tmp_path)

    def run_flags(**flags: Any) -> int:
        values = TINY | {"text_file": [str(tiny_text)]} | flags
        return train.run(build_config(values, dict.fromkeys(values, "the command line")))

    return run_flags


def read_rows(folder: Path, event: str = "step") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def read_state(folder: Path, step: int) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint's weights and its training state, less what a clock decides."""
    path = folder / "milestones" / f"checkpoint-{step}"
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["optimizer"] = safetensors.torch.load_file(path / "optimizer.safetensors")
    return (path / "model.safetensors").read_bytes(), state


def assert_equal_states(a: Any, b: Any, error: float = 0.0) -> None:
    """The same values; floating-point numbers may be off by `error`."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=error if a.is_floating_point() else 0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key], error)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y, error)
    else:
        assert a == (pytest.approx(b, abs=error, rel=0) if isinstance(a, float) else b)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM at the end of update `step`."""
    original = Trainer.train_step

    def stopping(self: Trainer, number: int, batches: Any) -> StepResult:
        result = original(self, number, batches)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_run_leaves_checkpoints_metrics_and_a_picture(run: Run, tmp_path: Path) -> None:
    assert run(output_dir="out", max_steps=20, learning_rate=0.02, max_checkpoints=2) == 0
    out = tmp_path / "out"
    rows = read_rows(out)
    assert [row["step"] for row in rows] == list(range(1, 21))
    tokenizer = json.loads((tmp_path / "data/metadata.json").read_text())["tokenizer"]
    assert rows[0]["loss"] == pytest.approx(math.log(tokenizer["vocab_size"]), abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 2
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert [row["step"] for row in read_rows(out, "eval")] == list(range(2, 21, 2))
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    kept = store.list_checkpoints(out)
    assert [c.step for c in kept][:2] == [20, 18]
    losses = {row["step"]: row["val_loss"] for row in read_rows(out, "eval")}
    assert kept[0].val_loss == pytest.approx(losses[20])
    assert store.find_best(out).val_loss == pytest.approx(min(losses.values()))


def test_weights_and_log_of_a_cut_run_equal_the_unbroken_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    error = 0.0 if device == "cpu" else 1e-3  # CUDA's attention adds up its gradients in any order
    # 260 windows of 32 tokens: at 16 a step the epoch ends within step 17.
    flags = {
        "max_steps": 24,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
        "checkpoint_every": 6,
        "eval_every": 12,
        "device": device,
    }
    assert run(output_dir="whole", **flags) == 0
    whole = read_state(tmp_path / "whole", 24)
    logged = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    log = [[row[name] for name in logged] for row in read_rows(tmp_path / "whole")]
    losses = [row["val_loss"] for row in read_rows(tmp_path / "whole", "eval")]
    assert whole[1]["state"]["cursor"] > 300  # an epoch end lies inside
    for cuts in ((6,), (16, 17)):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        for cut in cuts:
            with monkeypatch.context() as patch:
                stop_after(patch, cut)
                assert run(output_dir="cut", **flags) == 143
        assert run(output_dir="cut", **flags) == 0
        again = read_state(tmp_path / "cut", 24)
        weights = [safetensors.torch.load(data) for data in (again[0], whole[0])]
        assert_equal_states(*weights, error)
        assert_equal_states(again[1], whole[1], error)
        rows = [[row[name] for name in logged] for row in read_rows(tmp_path / "cut")]
        assert_equal_states(rows, log, error)
        evaluations = [row["val_loss"] for row in read_rows(tmp_path / "cut", "eval")]
        assert_equal_states(evaluations, losses, error)


def test_the_comparison_above_can_fail(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that forgets the optimizer's state must not pass."""
    assert run(output_dir="whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run(output_dir="cut") == 143
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert run(output_dir="cut") == 0
    assert read_state(tmp_path / "cut", 12)[0] != read_state(tmp_path / "whole", 12)[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_before_leaving(
    tiny_text: Path, tmp_path: Path, number: int, code: int
) -> None:
    argv = [
        sys.executable,
        str(ROOT / "main.py"),
        "--train",
        *TINY_FLAGS,
        "--no-compile-model",  # without a trial of it
        "--max-steps",
        "100000",
        "--text-file",
        str(tiny_text),
        "--log-every",
        "5",
    ]
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("step 10/"):
                break
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code
    newest = store.find_newest(tmp_path / "training_output")
    assert newest is not None
    assert f"stopped at step {newest.step}" in rest
    assert newest.step >= 10


def test_a_diverging_run_stops_and_saves_nothing_bad(run: Run, tmp_path: Path) -> None:
    assert run(output_dir="out", max_steps=4) == 0
    with pytest.raises(PreflightError) as caught:
        run(output_dir="out", max_steps=60, learning_rate=1e28, checkpoint_every=1)
    assert caught.value.code == ExitCode.DIVERGED
    assert "--learning-rate" in str(caught.value)
    for kept in store.list_checkpoints(tmp_path / "out"):
        for tensor in checkpoint_format.load_weights(kept, None).values():
            assert torch.isfinite(tensor).all()
    skipped = [row for row in read_rows(tmp_path / "out") if row.get("skipped")]
    assert len(skipped) == divergence.MAX_SKIPPED_IN_A_ROW


def test_every_change_of_a_resumed_run_is_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=4) == 0
    assert run(max_steps=8) == 0
    told = capsys.readouterr().err
    rates = [row["learning_rate"] for row in read_rows(tmp_path / "training_output")]
    assert rates[4] > 2 * rates[3]
    changes = [line for line in told.splitlines() if line.startswith("changed since")]
    assert changes == [
        "changed since the checkpoint: max_steps 4 -> 8",
        f"changed since the checkpoint: the learning rate was {rates[3]:.2e} in step 4 and is "
        f"{rates[4]:.2e} in the next; cosine ends at step 8 (to keep it low: --scheduler none "
        f"--warmup-steps 0 --learning-rate {rates[3]:.2e})",
    ]
    flags = {"scheduler": "none", "learning_rate": rates[7], "dropout": 0.1}
    assert run(max_steps=9, mixed_precision=True, gradient_checkpointing=True, **flags) == 0
    told = capsys.readouterr().err
    for words in (
        "precision float32 -> bfloat16",
        "gradient_checkpointing False -> True",
        "dropout 0.0 -> 0.1",
        "scheduler cosine -> none",
    ):
        assert f"changed since the checkpoint: {words}\n" in told
    rates = [row["learning_rate"] for row in read_rows(tmp_path / "training_output")]
    assert rates[8] == rates[7]
    assert run(max_steps=10, mixed_precision=True, gradient_checkpointing=True) == 0
    assert "to keep it low" not in capsys.readouterr().err


def test_a_finished_run_says_so_and_a_longer_one_goes_on(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(output_dir="out", max_steps=4) == 0
    capfd.readouterr()
    assert run(output_dir="out", max_steps=4) == 0
    assert "--max-steps 8" in capfd.readouterr().err
    assert run(output_dir="out", max_steps=6) == 0
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def expect(run: Run, code: ExitCode, *words: str, **flags: Any) -> None:
    with pytest.raises(PreflightError) as caught:
        run(**flags)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)
    assert len(caught.value.lines) <= 5


def test_what_disagrees_with_the_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    assert run(max_steps=2) == 0
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    longer = {"max_steps": 4}
    expect(run, ExitCode.FLAGS, "--no-auto-resume", auto_resume=False, **longer)
    expect(run, ExitCode.CHECKPOINT, "n_layers: checkpoint 2, flags 3", n_layers=3, **longer)
    expect(
        run,
        ExitCode.CHECKPOINT,
        "n_embeddings: checkpoint 32, flags 128",
        **longer,
        model_size="nano",
        n_layers=2,
        n_heads=2,
        n_embeddings=128,
    )
    expect(run, ExitCode.CHECKPOINT, "256", "128", batch_size=4, **longer)
    expect(run, ExitCode.CHECKPOINT, "optimizer", optimizer="sgd", **longer)
    expect(run, ExitCode.FLAGS, "--vocab-size", vocab_size=100, output_dir="new")
    names = {p for p, _ in before}
    after = sorted((p, p.read_bytes()) for p in names)
    assert [(p, b) for p, b in after if p.name != ".lock"] == [
        (p, b) for p, b in before if p.name != ".lock"
    ]
    assert run(batch_size=4, allow_batch_change=True, **longer) == 0
    assert run(batch_size=2, gradient_accumulation_steps=2, max_steps=6) == 0


def hash_tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_other_data_is_refused_before_it_replaces_the_old(run: Run, tmp_path: Path) -> None:
    assert run(max_steps=2) == 0
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, again and again and again\n" * 900)
    before = hash_tree(tmp_path)
    flags = {"text_file": [str(other)], "max_steps": 4}
    newest = store.find_newest(tmp_path / "training_output")
    assert newest is not None
    expect(run, ExitCode.DATA, "the text changed", "--resume-from", "--data-dir", **flags)
    flags["resume_from"] = str(newest.path)
    expect(run, ExitCode.CHECKPOINT, "--allow-batch-change", **flags, batch_size=4)
    assert hash_tree(tmp_path) == before
    assert run(max_steps=3) == 0  # the old run goes on
    flags["resume_from"] = str(tmp_path / "training_output" / "milestones" / "checkpoint-3")
    assert run(**flags) == 0


def test_a_data_folder_that_another_run_has_replaced_is_built_again(
    run: Run, tmp_path: Path
) -> None:
    assert run(max_steps=2) == 0
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, again and again and again\n" * 900)
    assert run(text_file=[str(other)], max_steps=2, output_dir="other run") == 0
    before = hash_tree(tmp_path / "data")
    third = tmp_path / "third.txt"
    third.write_text("a third text that neither of the runs has seen so far\n" * 900)
    expect(run, ExitCode.DATA, "--resume-from", text_file=[str(third)], max_steps=4)
    assert hash_tree(tmp_path / "data") == before
    assert run(max_steps=4) == 0  # with its own text
    assert read_rows(tmp_path / "training_output")[-1]["step"] == 4


def test_a_run_that_does_not_fit_replaces_no_data(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(max_steps=2) == 0
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, again and again and again\n" * 900)
    before = hash_tree(tmp_path)
    monkeypatch.setattr(fits, "reachable_host_bytes", lambda: 2**20)
    expect(run, ExitCode.OUT_OF_MEMORY, "out of memory", text_file=[str(other)], output_dir="new")
    assert hash_tree(tmp_path / "data") == {k: v for k, v in before.items() if "/data/" in k}


def test_three_sentences_are_trained_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("The cat sat. The dog slept. Nobody said a word.\n")
    assert run(text_file=[str(tmp_path / "sample.txt")], context_length=64, max_steps=3) == 0
    rows = read_rows(tmp_path / "training_output")
    per_step = rows[0]["tokens"]
    assert 0 < per_step < 8 * 64
    assert [row["tokens"] for row in rows] == [per_step, 2 * per_step, 3 * per_step]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_found_before_anything_is_trained(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=2) == 0
    milestones = tmp_path / "training_output" / "milestones"
    flip_a_bit(milestones / "checkpoint-2" / "model.safetensors")
    capfd.readouterr()
    assert run(max_steps=3) == 0  # from the one before, and said so
    told = capfd.readouterr().err
    assert "checkpoint-2" in told
    assert "continuing from training_output/milestones/checkpoint-1" in told
    for path in milestones.glob("*/checkpoint.pt"):
        flip_a_bit(path)
    expect(run, ExitCode.CHECKPOINT, "checkpoint-", max_steps=4)  # never silently from step 0
    shard = next((tmp_path / "data" / "train").glob("*.npy"))
    flip_a_bit(shard)
    expect(run, ExitCode.DATA, shard.name, output_dir="new", text_file=[])


def test_branching_off_needs_a_folder_of_its_own(run: Run, tmp_path: Path) -> None:
    assert run(max_steps=3) == 0
    first = "training_output/milestones/checkpoint-1"
    expect(run, ExitCode.FLAGS, "--output-dir", resume_from=first, max_steps=4)
    assert run(resume_from=first, output_dir="branch", max_steps=4) == 0
    assert [row["step"] for row in read_rows(tmp_path / "branch")] == [2, 3, 4]


def test_out_of_memory_names_the_way_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def failing(self: Trainer, number: int, batches: Any) -> StepResult:
        if number == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(self, number, batches)

    monkeypatch.setattr(Trainer, "train_step", failing)
    expect(
        run,
        ExitCode.OUT_OF_MEMORY,
        "--batch-size 4 --gradient-accumulation-steps 2",
        "--gradient-checkpointing",
        "checkpoint-3",
        checkpoint_every=3,
    )


@pytest.mark.cuda
def test_out_of_memory_on_a_card(run: Run) -> None:
    """2,048 x 50,304 logits in fp32 are 412 MB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(400e6 / total)
    try:
        expect(
            run,
            ExitCode.OUT_OF_MEMORY,
            "--gradient-accumulation-steps",
            device="cuda",
            batch_size=128,
            tokenizer="gpt2",
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_cannot_fit_is_refused_before_it_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    monkeypatch.setattr(Trainer, "train", lambda *unused: began.append(1))
    monkeypatch.setattr(fits, "reachable_host_bytes", lambda: 8 * 2**30)
    expect(
        run,
        ExitCode.OUT_OF_MEMORY,
        "8.0 GiB are available",
        "--gradient-accumulation-steps",
        batch_size=100_000,
    )
    assert not began


def test_what_fits_is_not_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "reachable_host_bytes", lambda: 2**30)  # tight, and traced
    assert run(max_steps=1) == 0


def test_settings_of_a_forged_checkpoint_are_judged(run: Run, tmp_path: Path) -> None:
    assert run(max_steps=2) == 0
    newest = store.find_newest(tmp_path / "training_output")
    assert newest is not None
    for name, value in (("learning_rate", "fast"), ("batch_size", -4), ("optimizer", "magic")):
        newest.config["training"] |= {name: value}
        with pytest.raises(PreflightError) as caught:
            resume.adopt_settings(build_config({}, {}), newest)
        assert caught.value.code == ExitCode.CHECKPOINT
        assert name.replace("_", "-") in str(caught.value)
        newest.config["training"] |= {"learning_rate": 1e-3, "batch_size": 4, "optimizer": "adamw"}


def test_two_runs_do_not_share_an_output_folder(
    run: Run, tmp_path: Path, preflight: CommandRunner, tiny_text: Path
) -> None:
    from preflight.core.locks import FolderLock

    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"):
        result = preflight(
            "--train", *TINY_FLAGS, "--text-file", str(tiny_text), "--output-dir", "out"
        )
    assert result.returncode == 7
    assert "in use" in result.stderr


@pytest.mark.slow
def test_no_compiler_gives_one_warning_and_eager_goes_on(tiny_text: Path, tmp_path: Path) -> None:
    argv = [
        sys.executable,
        str(ROOT / "main.py"),
        "--train",
        *TINY_FLAGS,
        "--max-steps",
        "3",
        "--text-file",
        str(tiny_text),
        "--compile-model",
    ]
    environment = os.environ | {
        "CC": "/bin/false",
        "CXX": "/bin/false",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        argv,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0
    assert result.stderr.count("torch.compile failed") == 1


@pytest.mark.slow
def test_every_setting_that_is_not_default_is_told(
    preflight: CommandRunner, tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"learning_rate": 0.005}')
    result = preflight(
        "--train",
        *TINY_FLAGS,
        "--text-file",
        str(tiny_text),
        "--max-steps",
        "2",
        "--config",
        "run.json",
    )
    assert result.returncode == 0
    assert result.stdout == ""
    assert "--learning-rate 0.005 (from run.json)" in result.stderr
    assert "--batch-size 4 (from the command line)" in result.stderr
