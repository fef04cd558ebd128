"""`--get-optimal-bs --target-gpu`: what is found for a card that is not here."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.process
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.device.cards import CARDS
from preflight.foresight.trial_spec import TrialSpec
from preflight.modes import batch_trials, find_batch_size
from preflight.modes.batch_absent import AbsentTrials
from preflight.modes.check import build_report
from preflight.settings import RunConfig

# A small card: the border is among sizes that the text has.
CARD = {"target_gpu": "H100 SXM", "gpu_memory": 0.75, "tokenizer": "byte", "compile_model": False}
SHAPE = {"n_layers": 1, "n_embeddings": 64, "context_length": 512, "max_steps": 5000}
PATH = Path("training_output/batch_size_report.json")


def find(config: RunConfig, code: int = ExitCode.DONE) -> dict[str, Any]:
    """The report of a search."""
    assert find_batch_size.run(config) == code
    return json.loads(PATH.read_text())


def search_on(config: RunConfig) -> int:
    """The largest size on a card, with random tokens."""
    model = config.model.resolve(257)
    spec = TrialSpec(config, model, None, Path("unused"), config.processes.ranks or 1)
    with StopFlag() as stop:
        return AbsentTrials(spec, stop).search().largest or 0


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gpu_safety_margin": 0.0, "gradient_accumulation_steps": 5},
        {"ranks": 2, "hosts": 2, "gpu_memory": 1.2, "network_gbits": 1.0},
        pytest.param({"compile_model": True}, marks=pytest.mark.slow),
        pytest.param({"ranks": 4, "gpu_memory": 1.16, "dropout": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_check_says_the_same_of_the_border(make_config: MakeConfig, flags: dict[str, Any]) -> None:
    given = CARD | SHAPE | flags
    build_report(make_config(**given))  # prepares the data
    found = find(make_config(**given))
    largest = found["largest"]
    assert found["is_predicted"]
    assert found["bound"] == "memory"
    assert {largest, largest + 1} <= {trial["batch_size"] for trial in found["trials"]}
    fitting = ("fits", "tight") if "gpu_safety_margin" in flags else ("fits",)
    for trial in found["trials"]:
        size = trial["batch_size"]
        if size not in (found["recommended"], largest, largest + 1):
            continue
        if given["compile_model"] and size > largest:  # each takes many seconds
            continue
        sections = build_report(make_config(**given | {"batch_size": size})).sections
        memory, time = sections["memory analysis"], sections["performance estimation"]
        assert trial["fits"] == (memory["verdict"] in fitting) == (size <= largest)
        exact = size >= largest or not given["compile_model"]
        rel = 1e-9 if exact else 0.01
        assert trial["needed_bytes"] == pytest.approx(memory["needed_bytes"], rel=rel)
        assert trial["step_seconds"] == pytest.approx(time["step_seconds"])
        assert trial["tokens_per_second"] == pytest.approx(time["tokens_per_second"], rel=1e-3)
        assert found["time_basis"] == time["basis"].removeprefix("estimate, not measured: ")
        assert trial["steps"] == 0
        assert trial["is_predicted"]


def test_more_memory_never_gives_a_smaller_batch(make_config: MakeConfig) -> None:
    sizes = []
    for memory in (0.5, 0.62, 0.7, 0.9, 3.0, 24.0, 1000.0):
        sizes.append(search_on(make_config(**CARD | SHAPE | {"gpu_memory": memory})))
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[2] < sizes[-1]


@pytest.mark.slow
def test_a_larger_card_never_has_a_smaller_batch(make_config: MakeConfig) -> None:
    config = make_config(**CARD | SHAPE | {"gpu_memory": None, "mixed_precision": None})
    cards = {card.usable_bytes: card for card in CARDS if card.bf16_tflops}
    sizes = []
    for _, card in sorted(cards.items()):
        check = dataclasses.replace(config.check, target_gpu=card.name)
        sizes.append(search_on(dataclasses.replace(config, check=check)))
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < sizes[-1]


def test_nothing_is_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**CARD | SHAPE)
    build_report(config)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(batch_trials, "run_trial", run)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", run)
    monkeypatch.setattr(subprocess, "Popen", run)
    assert find(config)["largest"] > 0
    assert sorted(path.name for path in PATH.parent.iterdir()) == [".lock", PATH.name]


def test_an_update_that_is_kept(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    given = CARD | SHAPE | {"gpu_memory": 0.67, "tokens_per_step": 512 * 60}
    config = make_config(**given)
    build_report(config)
    capsys.readouterr()
    found = find(config)
    assert found["chosen"] * found["accumulation"] == 60
    trials = {trial["batch_size"]: trial for trial in found["trials"]}
    chosen = trials[found["chosen"]]
    assert chosen["micro_steps"] == found["accumulation"] > 2
    # The run's tokens, 5,000 steps of four windows, in updates of sixty.
    assert {trial["updates"] for trial in found["trials"]} == {round(5000 * 4 / 60)}
    batch = {
        "batch_size": found["chosen"],
        "gradient_accumulation_steps": found["accumulation"],
    }
    report = build_report(make_config(**given | batch))
    assert chosen["needed_bytes"] == report.sections["memory analysis"]["needed_bytes"]
    target = 8 * found["largest"]
    given["tokens_per_step"] = None
    config = make_config(**given, target_batch_size=target)
    assert find(config, ExitCode.CHECK_FAILED)["chosen"] < target
    assert f"batch size {target:,} does not fit" in capsys.readouterr().out


def test_the_words_and_the_commands(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    given = CARD | SHAPE | {"gpu_memory": 1.5, "ranks": 4, "hosts": 2}
    config = make_config(**given, test_batch_sizes=[2, 4])
    build_report(config)
    capsys.readouterr()
    found = find(config)
    told = capsys.readouterr().out
    assert "all figures are predicted: the card is not here, and nothing was run" in told
    assert "assumes 60% of the float32 rate" in told
    assert "ranks: 4, 2 on each of 2 hosts" in told
    assert "largest that fits: 4 (of the sizes given)" in told
    check, train = (
        line for line in told.splitlines() if line.startswith("  ") and "main.py" in line
    )
    size = f"--batch-size {found['chosen']} --gradient-accumulation-steps 1"
    assert "--check" in check
    assert "--target-gpu 'H100 SXM' --gpu-memory 1.5" in check
    assert "--ranks 4 --hosts 2" in check
    assert check.endswith(size)
    assert train.startswith("  torchrun --nnodes 2 --nproc-per-node 2 ")
    assert "main.py --train" in train
    assert "--ranks" not in train
    assert train.endswith(size)


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ({"target_gpu": "Voodoo 2"}, ExitCode.FLAGS, "not in the table"),
        ({"target_gpu": None}, ExitCode.FLAGS, "implies no speed"),
        ({"gpu_memory": 0.3}, ExitCode.OUT_OF_MEMORY, "no batch size fits"),
        ({"target_batch_size": 4, "test_batch_sizes": [4]}, ExitCode.FLAGS, "one of them"),
    ],
)
def test_mistakes_are_told(
    make_config: MakeConfig, flags: dict[str, Any], code: ExitCode, told: str
) -> None:
    with pytest.raises(PreflightError, match=told) as caught:
        find_batch_size.run(make_config(**CARD | SHAPE | flags))
    assert caught.value.code == code
    assert len(caught.value.lines) <= 5
    if code == ExitCode.OUT_OF_MEMORY:
        assert "nothing was run" in caught.value.lines[-1]
        assert json.loads(PATH.read_text())["chosen"] is None
    else:
        assert not PATH.exists()
