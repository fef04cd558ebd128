"""Fine-tuning runs: what is learned, what stays, and that a cut run equals the unbroken one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_training_run import assert_equal_states, read_rows, stop_after
from torch import Tensor

import train_utils
from conftest import ROOT, build
from generate import load_model, stream_ids
from preflight.checkpoints.store import find_best
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag
from preflight.corpus.chats.data import ChatData
from preflight.modes import finetune, train
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.settings import SamplingConfig
from preflight.tokenization.chats import Message
from train_utils import ChatLoader

SHAPE = {
    "model_size": "custom",
    "n_layers": 2,
    "n_heads": 2,
    "n_embeddings": 32,
    "context_length": 96,
    "device": "cpu",
    "mixed_precision": False,
    "tokenizer": "byte",
}
WORDS = "ash bay cod dew elm fig gum hen ivy jay kit log map nut oak pod rye sap tin yew".split()
Run = Callable[..., int]


def make_chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of one or two exchanges: a word, and its echo."""
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.choice((1, 1, 2)))]
        turns = [
            turn
            for word in words
            for turn in (
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": word},
            )
        ]
        chats.append({"messages": turns})
    return chats


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained base, the text of it, and chats; it is copied, never changed."""
    place = tmp_path_factory.mktemp("world")
    (place / "text.txt").write_text(" ".join(random.Random(1).choices(WORDS, k=6000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        values = SHAPE | {"text_file": ["text.txt"], "output_dir": "base", "max_steps": 40}
        assert train.run(build(values | {"learning_rate": 3e-3, "num_workers": 1})) == 0
    lines = (json.dumps(chat) for chat in make_chats(60))
    (place / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Fine-tune the base in this process; keywords are flags."""
    for name in ("base", "data"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copy(world / "chats.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run_flags(**flags: Any) -> int:
        values = {"finetune": ["chats.jsonl"], "from_checkpoint": "base", "output_dir": "out"}
        own = {"device": "cpu", "mixed_precision": False}
        return finetune.run(build(values | own | flags))

    return run_flags


def open_setup(**flags: Any) -> FinetuneSetup:
    values = {"finetune": ["chats.jsonl"], "from_checkpoint": "base", "output_dir": "out"}
    own = {"device": "cpu", "mixed_precision": False}
    return FinetuneSetup(build(values | own | flags), StopFlag())


def read_weights(folder: Path) -> dict[str, Tensor]:
    [path] = folder.glob("*model.safetensors")
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_a_cut_run_equals_the_unbroken_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, int], device: str
) -> None:
    error = 0.0 if device == "cpu" else 1e-3  # CUDA's attention adds up its gradients in any order
    flags: dict[str, Any] = {"max_steps": 12, "batch_size": 4, "device": device}
    flags |= {"gradient_accumulation_steps": 2} | adapter
    flags |= {"checkpoint_every": 5, "eval_every": 6, "num_epochs": 99}
    assert run(output_dir="whole", **flags) == 0
    whole = tmp_path / "whole/milestones/checkpoint-12"
    for cuts in ((5,), (8, 9)):  # an epoch of 57 chats ends within step 8
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        for cut in cuts:
            with monkeypatch.context() as patch:
                stop_after(patch, cut)
                assert run(output_dir="cut", **flags) == ExitCode.SIGTERM
        assert run(output_dir="cut", **flags) == 0
        cut_folder = tmp_path / "cut/milestones/checkpoint-12"
        assert_equal_states(read_weights(cut_folder), read_weights(whole), error)
        states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (cut_folder, whole)]
        assert_equal_states(*states, error)
        places = [p / "optimizer.safetensors" for p in (cut_folder, whole)]
        assert_equal_states(*map(safetensors.torch.load_file, places), error)
        logged = ("step", "loss", "learning_rate", "grad_norm", "tokens")
        logs = [
            [[row[name] for name in logged] for row in read_rows(tmp_path / name)]
            for name in ("cut", "whole")
        ]
        for one, other in zip(*logs, strict=True):
            assert one == (other if device == "cpu" else pytest.approx(other, abs=1e-2))


def test_what_a_run_leaves(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in (tmp_path / "base").rglob("*") if p.is_file()}
    assert run(learning_rate=1e-3, num_epochs=2.0) == 0
    rows = read_rows(tmp_path / "out", "eval")
    steps = [row["step"] for row in rows]
    assert steps == [2, 4, 6, 8, 10, 12, 14]  # five in each epoch of seven steps, or fewer
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    samples = read_rows(tmp_path / "out", "sample")
    assert [row["step"] for row in samples] == steps
    best = find_best(tmp_path / "out")
    assert "chat_template.jinja" in best.manifest.files
    said = best.config["finetuning"]
    base = find_best(tmp_path / "base")
    assert said["base"]["weights_sha256"] == base.manifest.files["model.safetensors"].sha256
    assert said["base"]["text_bits_per_byte"] > 0
    told = capsys.readouterr().err + caplog.text
    assert "forgetting:" in told
    assert "bits per byte on the text of the base before" in told
    assert {p: p.read_bytes() for p in before} == before


def test_adapters_share_the_base_and_leave_it(run: Run, tmp_path: Path) -> None:
    assert run(lora_rank=4, max_steps=4, learning_rate=1e-2) == 0
    base, out = find_best(tmp_path / "base"), find_best(tmp_path / "out")
    kept = tmp_path / "out/base/model.safetensors"
    assert kept.samefile(base.path / "model.safetensors")
    size = sum(p.stat().st_size for p in (out.path).glob("*.safetensors"))
    assert size < 0.5 * kept.stat().st_size
    model, _ = load_model(out, torch.device("cpu"), torch.float32)
    original, _ = load_model(base, torch.device("cpu"), torch.float32)
    changed = {
        name
        for (name, new), old in zip(model.named_parameters(), original.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {
        f"layers.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_adapters_are_fine_tuned_again(run: Run, tmp_path: Path) -> None:
    """The first ones are merged into the base of the second ones."""
    assert run(lora_rank=4, max_steps=4, learning_rate=1e-2) == 0
    assert run(from_checkpoint="out", output_dir="twice", lora_rank=2, max_steps=2) == 0
    first, _ = load_model(find_best(tmp_path / "out"), torch.device("cpu"), torch.float32)
    kept = safetensors.torch.load_file(tmp_path / "twice/base/model.safetensors")
    for name, tensor in first.state_dict().items():
        assert torch.equal(kept[name], tensor), name
    load_model(find_best(tmp_path / "twice"), torch.device("cpu"), torch.float32)
    assert run(from_checkpoint="out", output_dir="twice", max_steps=3) == 0


@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_a_run_begins_with_the_base(run: Run, tmp_path: Path, adapter: dict[str, int]) -> None:
    setup = open_setup(**adapter)
    base = read_weights(find_best(tmp_path / "base").path)
    found = setup.build_trainer().model.state_dict()
    for name, tensor in base.items():
        wrapped = name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(found[name] if name in found else found[wrapped], tensor), name


def test_a_sample_answers_a_question(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []
    stream = finetune.stream_ids

    def note(model: Any, tokenizer: Any, ids: list[int], *rest: Any, **more: Any) -> Any:
        prompts.append(ids)
        return stream(model, tokenizer, ids, *rest, **more)

    monkeypatch.setattr(finetune, "stream_ids", note)
    assert run(max_steps=1, learn_from="all") == 0
    assert run(output_dir="answers", max_steps=1) == 0
    assert bytes(prompts[-1]).endswith(b"Assistant:")
    with pytest.raises(PreflightError) as caught:
        run(max_steps=2, learn_from="answers")
    assert "--learn-from was all, now answers" in caught.value.lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_two_ranks_learn_what_one_process_learns(
    run: Run, tmp_path: Path, adapter: dict[str, int]
) -> None:
    """Without a limit, so that the rounding of the norm has no part in the weights."""
    flags: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "eval_every": 3, "num_epochs": 99}
    flags |= {"max_grad_norm": 0.0, "learning_rate": 1e-2, "checkpoint_every": 3} | adapter
    assert run(output_dir="one", gradient_accumulation_steps=2, **flags) == 0
    words = ["--finetune", "chats.jsonl", "--from", "base", "--output-dir", "two"]
    words += ["--device", "cpu", "--no-mixed-precision", "--ranks", "2"]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("forgetting:") == 1
    one, two = (tmp_path / name for name in ("one", "two"))
    for step in (3, 6):
        folders = [out / f"milestones/checkpoint-{step}" for out in (one, two)]
        assert_equal_states(*map(read_weights, folders))
        assert_equal_states(
            *(safetensors.torch.load_file(f / "optimizer.safetensors") for f in folders)
        )
    evaluated = [[row["val_loss"] for row in read_rows(out, "eval")] for out in (one, two)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)
    answers = [[row["text"] for row in read_rows(out, "sample")] for out in (one, two)]
    assert answers[0] == answers[1]
    before = [
        find_best(out).config["finetuning"]["base"]["text_bits_per_byte"] for out in (one, two)
    ]
    assert before[0] == pytest.approx(before[1], rel=1e-6)


# ---- batches ------------------------------------------------------------------------------------


@pytest.fixture
def chats(run: Run) -> ChatData:
    return open_setup().data


def test_a_batch_holds_each_chat_with_its_targets_alone(chats: ChatData) -> None:
    order = chats.order(7, 0)
    with (
        chats.open_rows("train") as rows,
        ChatLoader(chats, batch_size=5, seed=7, device="cpu") as loader,
    ):
        for first in range(0, 50, 5):
            inputs, targets = loader.next_batch()
            read = rows.read(order[first : first + 5])
            dense = torch.full(inputs.shape, -100)
            dense.view(-1)[targets.rows] = targets.ids
            for row, (ids, mask) in enumerate(read):
                n = len(ids) - 1
                assert inputs[row, :n].tolist() == ids[:-1].tolist()
                expected = np.where(mask[1:], ids[1:], -100)
                assert dense[row, :n].tolist() == expected.tolist()
                assert (dense[row, n:] == -100).all()
            assert targets.n_tokens == sum(len(ids) - 1 for ids, _ in read)


def test_the_order_is_that_of_any_batch_size(chats: ChatData) -> None:
    def read(batch_size: int, cursor: int, count: int) -> list[list[int]]:
        found: list[list[int]] = []
        with ChatLoader(
            chats, batch_size=batch_size, seed=1, device="cpu", cursor=cursor
        ) as loader:
            while len(found) < count:
                inputs, _ = loader.next_batch()
                found += [row[: int((row != 0).sum())].tolist() for row in inputs]
            assert loader.cursor == cursor + len(found)
        return found[:count]

    n_rows = chats.n_rows
    whole = read(1, 0, 2 * n_rows)
    assert sorted(whole[:n_rows]) == sorted(whole[n_rows:])
    assert whole[:n_rows] != whole[n_rows:]
    assert read(8, 0, 2 * n_rows) == whole
    assert read(3, 7, n_rows) == whole[7 : 7 + n_rows]


def build_step(chats: ChatData, batch_size: int, accumulation: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one update."""
    setup = open_setup(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    trainer = setup.build_trainer()
    gradients: list[Tensor] = []

    def keep(*_: Any) -> None:
        gradients.extend(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)

    trainer.optimizer.register_step_pre_hook(keep)
    with setup.open_loader() as loader:
        batches = [loader.next_batch() for _ in range(accumulation)]
    result = trainer.train_step(0, batches)
    return result.loss, gradients


def test_a_batch_equals_its_chats_one_by_one(chats: ChatData) -> None:
    """Whatever the padding, the loss is the mean over the targets of the update."""
    loss, gradients = build_step(chats, 8, 1)
    for batch_size in (1, 2, 4):
        other_loss, others = build_step(chats, batch_size, 8 // batch_size)
        torch.testing.assert_close(loss, other_loss, rtol=0, atol=1e-6)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_what_is_masked_teaches_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other labels where the mask is zero change no bit of the weights."""
    flags = {"max_steps": 3, "learning_rate": 1e-2, "eval_every": 3}
    assert run(output_dir="plain", **flags) == 0
    select, n_poisoned = train_utils.select_targets, []

    def poison(labels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_poisoned.append(int((~mask).sum()))
        return select(np.where(mask, labels, (labels + 1) % 256), mask)

    monkeypatch.setattr(train_utils, "select_targets", poison)
    assert run(output_dir="poisoned", **flags) == 0
    assert sum(n_poisoned) > 100
    folders = [tmp_path / name / "milestones/checkpoint-3" for name in ("plain", "poisoned")]
    plain, poisoned = (read_weights(folder) for folder in folders)
    assert_equal_states(plain, poisoned)


# ---- what it is for -----------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_stop(run: Run, tmp_path: Path) -> None:
    """95 of 100 answers end by themselves, before the limit; of the base none has to."""
    flags = {"num_epochs": 30.0, "learning_rate": 3e-3, "eval_every": 10**6, "batch_size": 16}
    lines = (json.dumps(chat) for chat in make_chats(300))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    assert run(**flags) == 0
    setup = open_setup()
    model, tokenizer = load_model(find_best(tmp_path / "out"), torch.device("cpu"), torch.float32)
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.0)
    n_ended = n_right = 0
    for number in range(100):
        word = WORDS[number % len(WORDS)]
        prompt = setup.encoder.encode_prompt([Message("user", f"say {word}")], max_tokens=60)
        ended: list[str] = []
        text = "".join(
            stream_ids(
                model,
                tokenizer,
                prompt,
                sampling,
                stop_ids=setup.encoder.stop_ids,
                on_step=lambda done, _, ended=ended: ended.extend(g.finish_reason for _, g in done),
            )
        )
        n_ended += ended == ["end"]
        n_right += text.strip() == word
    assert n_ended >= 95
    assert n_right >= 80


# ---- what is refused ----------------------------------------------------------------------------


def test_a_run_keeps_how_it_learns(run: Run) -> None:
    assert run(lora_rank=4, max_steps=2) == 0
    for flags in ({"lora_rank": 8}, {"learn_from": "all"}, {"lora_targets": ["o_proj"]}):
        with pytest.raises(PreflightError) as caught:
            run(**flags)
        assert caught.value.code == ExitCode.CHECKPOINT
        assert "cannot change within a run" in caught.value.lines[0]
    assert run(max_steps=3) == 0  # without the flags it goes on


def test_another_base_is_refused(run: Run, tmp_path: Path) -> None:
    assert run(max_steps=2) == 0
    assert run(output_dir="other", max_steps=2, learning_rate=1e-2) == 0
    with pytest.raises(PreflightError) as caught:
        run(from_checkpoint="other", max_steps=4)
    assert caught.value.code == ExitCode.CHECKPOINT
    assert "--from names other weights" in caught.value.lines[0]


def test_a_run_never_writes_into_its_base(run: Run) -> None:
    with pytest.raises(PreflightError) as caught:
        run(output_dir="base")
    assert caught.value.code in (ExitCode.FLAGS, ExitCode.CHECKPOINT)


def test_a_plain_run_is_no_fine_tuning(run: Run) -> None:
    with pytest.raises(PreflightError) as caught:
        run(output_dir="base", from_checkpoint=None)
    assert caught.value.code == ExitCode.CHECKPOINT
    assert "does not come from --finetune" in caught.value.lines[0]
