"""What several processes save that train in fp16: one scale of the loss, as of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from device.test_ranks import (
    MODEL,
    Case,
    OneProcess,
    assert_same,
    build,
    draw_share,
    list_state,
    run_ranks,
)
from torch import Tensor

from preflight.checkpoints.format import (
    load_optimizer,
    load_training_state,
    load_weights,
    read_checkpoint,
)
from preflight.checkpoints.rows import list_rows
from preflight.checkpoints.saving import save_checkpoint
from preflight.device.ranks import Ranks
from trainer import Trainer

# The scale is halved by the second step, and grows two steps after it.
CASE = Case(torch.float16, overflowing_step=1)
SAVED_STEP, LAST_STEP = 3, 4


def make_steps(trainer: Trainer, first: int, last: int, n_micro_steps: int) -> None:
    for step in range(first, last):
        trainer.train_step(step, draw_share(step, n_micro_steps, CASE, trainer))


def end(trainer: Trainer) -> tuple[list[Tensor], dict[str, Any]]:
    return list_state(trainer), trainer.scaler.state_dict()


def train_unbroken(
    folder: Path, ranks: Ranks, n_micro_steps: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Save on the way."""
    trainer = build(CASE, ranks, n_micro_steps)
    make_steps(trainer, 0, SAVED_STEP, n_micro_steps)
    save_checkpoint(
        folder,
        SAVED_STEP,
        trainer.list_weights(),
        {"trainer": trainer.state_dict()},
        {"model": dataclasses.asdict(MODEL)},
        {"val_loss": None},
        optimizer=trainer.list_optimizer_tensors(),
        ranks=ranks,
    )
    make_steps(trainer, SAVED_STEP, LAST_STEP, n_micro_steps)
    return end(trainer)


def train_continued(
    folder: Path, ranks: Ranks, n_micro_steps: int
) -> tuple[list[Tensor], dict[str, Any]]:
    trainer = build(CASE, ranks, n_micro_steps)
    saved = read_checkpoint(folder / "milestones" / f"checkpoint-{SAVED_STEP}")
    weights = trainer.list_weights()
    rows = list_rows(weights)
    moments = {f"{n}.{key}": own for n, own in rows.items() for key in ("exp_avg", "exp_avg_sq")}
    trainer.load_state_dict(
        load_weights(saved, {n: tuple(w.shape) for n, w in weights.items()}, rows),
        load_optimizer(saved, moments),
        load_training_state(saved)["trainer"],
    )
    make_steps(trainer, SAVED_STEP, LAST_STEP, n_micro_steps)
    return end(trainer)


def test_a_checkpoint_is_that_of_one_process_and_continues_as_one(tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
    expected = train_unbroken(folders[0], OneProcess(), 2)
    assert (expected[1]["scale"], expected[1]["_growth_tracker"]) == (2.0**16, 0)
    ends = run_ranks(2, lambda ranks: train_unbroken(folders[1], ranks, 1))
    one, two = (
        {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert one == two
    assert {"model.safetensors", "optimizer.safetensors", "checkpoint.pt"} < {*one}
    ends += run_ranks(2, lambda ranks: train_continued(folders[0], ranks, 1))
    ends.append(train_continued(folders[1], OneProcess(), 2))
    for state, scaler in ends:
        assert scaler == expected[1]
        assert_same(state, expected[0])
