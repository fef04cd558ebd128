"""The processes of a run: what is checked before they join, and what their parent passes on."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from device.test_ranks import run_ranks

from conftest import ROOT, TINY_FLAGS, MakeConfig
from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device import runtime
from preflight.device.ranks import Ranks
from preflight.foresight import fits
from preflight.foresight.absent_ranks import Sharing
from preflight.foresight.memory import estimate_memory
from preflight.modes import ranked, train
from preflight.modes.check import build_report
from preflight.modes.setup import RunSetup
from preflight.modes.train import TrainingRun
from preflight.training.metrics import METRICS_NAME, read_metrics


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_run_is_refused_by_the_memory_that_check_prints(
    ranks: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"ranks": ranks, "tokenizer": "byte", "max_steps": 1}
    config = make_config(**flags)
    rows = build_report(config).sections["memory analysis"]
    estimates: list[int] = []

    def estimate(*case: Any) -> Any:
        found = estimate_memory(*case)
        estimates.append(found.required_bytes)
        return found

    monkeypatch.setattr(fits, "estimate_memory", estimate)
    monkeypatch.setattr(ranked, "launch_ranks", lambda *_: 0)
    monkeypatch.setattr(fits, "estimate_least_bytes", lambda *_: 2**50)  # or nothing is traced
    # What is reachable is of the host, which all ranks share.
    monkeypatch.setattr(fits, "measure_reachable_bytes", lambda _: ranks * rows["needed_bytes"])
    assert train.run(config) == 0
    assert estimates[-1] == rows["needed_bytes"] > 0
    monkeypatch.setattr(fits, "measure_reachable_bytes", lambda _: ranks * rows["needed_bytes"] - 1)
    with pytest.raises(PreflightError) as caught:
        train.run(make_config(**flags, output_dir="other"))
    assert caught.value.code == ExitCode.OUT_OF_MEMORY


def test_hosts_are_part_of_the_prediction(make_config: MakeConfig) -> None:
    """Two hosts keep two copies of the model, one among the ranks of each."""
    flags = {"ranks": 4, "target_gpu": "H100 SXM", "tokenizer": "byte"}
    one, two = (
        build_report(make_config(**flags, hosts=hosts)).sections["memory analysis"]
        for hosts in (1, 2)
    )
    assert two["weights_bytes"] > one["weights_bytes"]
    assert Sharing(4, 2).ranks_per_host == 2


@pytest.mark.slow
def test_a_run_in_fp16_that_was_cut_goes_on_as_if_unbroken(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is too large for the first updates, and grows after that."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**22, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(runtime, "_choose_dtype", lambda *_: (torch.float16, "a card without bf16"))
    monkeypatch.setattr(TrainingRun, "_sample", lambda _: "")
    monkeypatch.setattr(TrainingRun, "_draw_curve", lambda _: None)
    flags: dict[str, Any] = {"tokenizer": "byte", "compile_model": False, "mixed_precision": None}
    flags |= {"max_steps": 10, "checkpoint_every": 5, "dropout": 0.1}

    def run(output_dir: Path) -> tuple[list[bytes], list[float]]:
        """What the checkpoint at the end holds, and the losses of the steps before it."""
        config = make_config(**flags, output_dir=str(output_dir))

        def work(ranks: Ranks) -> int:
            with StopFlag() as stop:
                return TrainingRun(RunSetup(config, stop, resumes=True, ranks=ranks)).run()

        with StopFlag() as stop:
            RunSetup(config, stop).data  # noqa: B018
        output_dir.mkdir(exist_ok=True)
        assert run_ranks(2, work) == [0, 0]
        names = "model.safetensors", "optimizer.safetensors", "checkpoint.pt"
        end = [(output_dir / "milestones/checkpoint-10" / name).read_bytes() for name in names]
        rows = read_metrics(output_dir / METRICS_NAME)
        return end, [r["loss"] for r in rows if r["event"] == "step" and r["step"] > 5]

    whole, cut = Path("whole"), Path("cut")
    expected = run(whole)
    shutil.copytree(whole / "milestones/checkpoint-5", cut / "milestones/checkpoint-5")
    assert run(cut) == expected
    assert len(expected[1]) == 5


@pytest.mark.slow
def test_the_parent_passes_a_wish_to_save_on_once(tmp_path: Path, tiny_text: Path) -> None:
    argv = [sys.executable, str(ROOT / "main.py"), "--train", "--text-file", str(tiny_text)]
    argv += [*TINY_FLAGS, "--ranks", "2", "--max-steps", "100000", "--checkpoint-every", "100000"]
    argv += ["--eval-every", "100000", "--num-workers", "1"]
    log_path, output_dir = tmp_path / "log", tmp_path / "training_output"
    with open(log_path, "wb") as log:
        run = subprocess.Popen(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 240

    def wait_for(there: Any) -> None:
        while not there():
            assert run.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.05)

    wait_for(lambda: "step 1/" in log_path.read_text())
    os.kill(run.pid, signal.SIGUSR1)
    wait_for(lambda: list_checkpoints(output_dir))
    first = [checkpoint.step for checkpoint in list_checkpoints(output_dir)]
    plan = json.loads((output_dir / "run_plan.json").read_text())
    assert plan["ranks"] == {"world": 2, "hosts": 1}
    assert plan["commands"][0].endswith("--ranks 2")
    time.sleep(2)  # many steps
    assert [checkpoint.step for checkpoint in list_checkpoints(output_dir)] == first
    assert len(first) == 1
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == ExitCode.SIGTERM, log_path.read_text()
    assert len(list_checkpoints(output_dir)) == 2
