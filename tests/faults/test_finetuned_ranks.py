"""Fine-tuning on several processes: cut and continued, and started by torch's launcher."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from preflight.checkpoints.store import list_checkpoints
from preflight.core.errors import ExitCode

from .rank_runs import RankedRun

pytestmark = pytest.mark.slow
WORDS = "ash bay cod dew elm fig gum hen ivy jay".split()
STEPS, CUT = 30, 10  # 57 chats of 60 are learned from: an epoch has 7 updates and a rest
FLAGS = [
    *("--finetune", "chats.jsonl", "--from", "base", "--device", "cpu", "--no-mixed-precision"),
    *("--batch-size", "2", "--gradient-accumulation-steps", "2", "--dropout", "0.1"),
    *("--max-steps", str(STEPS), "--num-epochs", "99", "--learning-rate", "1e-2"),
    *("--checkpoint-every", str(CUT), "--eval-every", "15", "--max-checkpoints", "9"),
]
ADAPTERS = {"all weights": (), "adapters": ("--lora-rank", "4")}
LAUNCHER = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "main.py")),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained base, its text, and chats; it is copied, never changed."""
    place = tmp_path_factory.mktemp("world")
    (place / "text.txt").write_text(" ".join(random.Random(1).choices(WORDS, k=6000)))
    words = ["--train", "--text-file", "text.txt", "--model-size", "custom", "--n-layers", "2"]
    words += ["--n-heads", "2", "--n-embeddings", "32", "--context-length", "64"]
    words += ["--tokenizer", "byte", "--device", "cpu", "--no-mixed-precision"]
    words += ["--num-workers", "1", "--max-steps", "5", "--batch-size", "4"]
    base = RankedRun(place, words, "base")
    assert base.finish() == ExitCode.DONE, base.read_log()
    draw = random.Random(2)
    chats = []
    for _ in range(60):
        said = " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        chats.append(json.dumps({"messages": turns}))
    (place / "chats.jsonl").write_text("\n".join(chats) + "\n")
    return place


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module", params=ADAPTERS)
def flags(request: pytest.FixtureRequest) -> list[str]:
    return [*FLAGS, *ADAPTERS[request.param]]


@pytest.fixture(scope="module")
def unbroken(world: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the tensors that two ranks reach undisturbed."""
    place = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(world, place, dirs_exist_ok=True)
    run = RankedRun(place, flags)
    assert run.finish() == ExitCode.DONE, run.read_log()
    return run.hash_end()


def test_a_run_that_is_cut_and_continued_is_the_unbroken_one(
    folder: Path, flags: list[str], unbroken: str
) -> None:
    number = signal.SIGKILL if "--lora-rank" in flags else signal.SIGTERM
    run = RankedRun(folder, flags)
    run.wait_for_save(CUT)
    run.parent.send_signal(number)
    code = run.process.wait(240)
    assert code == (ExitCode.SIGTERM if number == signal.SIGTERM else -number), run.read_log()
    assert list_checkpoints(run.output_dir)[0].step < STEPS
    again = RankedRun(folder, flags)
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.read_log().count("continuing from") == 1
    assert again.hash_end() == unbroken


def test_a_killed_rank_costs_nothing(folder: Path, flags: list[str], unbroken: str) -> None:
    run = RankedRun(folder, flags)
    run.wait_for_save(CUT)
    run.ranks()[1].kill()
    assert run.finish() == ExitCode.DONE, run.read_log()
    assert run.read_log().count("a rank was lost") == 1
    assert run.hash_end() == unbroken


def test_torchs_launcher_does_what_the_flag_does(
    folder: Path, flags: list[str], unbroken: str
) -> None:
    """Adapters to the end; all weights cut, then continued with the flag."""
    if "--lora-rank" in flags:
        run = RankedRun(folder, flags, "launched", launcher=LAUNCHER)
        assert run.finish() == ExitCode.DONE, run.read_log()
        assert run.hash_end() == unbroken
        return
    cut = RankedRun(folder, flags, "cut", launcher=LAUNCHER)
    cut.wait_for_save(CUT)
    cut.ranks()[1].send_signal(signal.SIGTERM)
    cut.finish()
    assert CUT <= list_checkpoints(cut.output_dir)[0].step < STEPS
    again = RankedRun(folder, flags, "cut")
    assert again.finish() == ExitCode.DONE, again.read_log()
    assert again.hash_end() == unbroken
