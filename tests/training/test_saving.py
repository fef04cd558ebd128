"""A run whose checkpoints someone else deletes is told so, and goes on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints.samples import CONFIG, make_state, make_weights

from preflight.checkpoints import store
from preflight.core.errors import ExitCode, PreflightError
from preflight.settings import ControlSettings
from preflight.training.saving import CheckpointSaver
from preflight.training.state import TrainState


def build_saver(output_dir: Path, state: TrainState, scheduler: str = "none") -> CheckpointSaver:
    def snapshot() -> dict[str, Any]:
        return {
            "weights": make_weights(state.step),
            "training_state": make_state(state.step),
            "config": CONFIG,
            "losses": {"val_loss": None},
        }

    recorder: Any = SimpleNamespace(
        flush=lambda: None,
        paused=lambda kind, every: contextlib.nullcontext(),
        guard=SimpleNamespace(skipped_in_a_row=0),
    )
    stop: Any = SimpleNamespace(save_requested=False)
    plan: Any = SimpleNamespace(checkpoint_every=1, total_steps=99, scheduler=scheduler)
    control = ControlSettings(max_checkpoints=2)
    return CheckpointSaver(output_dir, plan, control, state, recorder, stop, None, snapshot)


def test_a_folder_that_is_gone_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"cannot write .*gone: No such file") as caught:
        build_saver(tmp_path / "gone", TrainState())
    assert caught.value.code == ExitCode.STORAGE


@pytest.mark.parametrize("remove", ["newest", "all", "milestones"])
def test_a_deleted_checkpoint_is_saved_again(
    tmp_path: Path, remove: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TrainState(step=1, tokens=1)
    saver = build_saver(tmp_path, state)
    saver.save()
    state.step = 2
    saver.save()
    milestones = tmp_path / "milestones"
    gone = {
        "newest": [milestones / "checkpoint-2"],
        "all": list(milestones.iterdir()),
        "milestones": [milestones],
    }
    for folder in gone[remove]:
        shutil.rmtree(folder)
    saver.record_validation(2.5)
    assert "checkpoint-2 was deleted by someone else" in capsys.readouterr().err
    best = store.find_best(tmp_path)
    assert (best.step, best.val_loss) == (2, 2.5)
    state.step = 3
    saver.save()
    assert [c.step for c in store.list_checkpoints(tmp_path)][:2] == [3, 2]


def test_rotation_goes_on_where_someone_else_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TrainState()
    saver = build_saver(tmp_path, state)
    listed: Callable[[Path], list[store.Checkpoint]] = store.list_checkpoints

    def list_and_delete(output_dir: Path) -> list[store.Checkpoint]:
        """Someone deletes the oldest right after a run has listed it."""
        found = listed(output_dir)
        if len(found) == 4:
            shutil.rmtree(found[-1].path)
        return found

    monkeypatch.setattr(store, "list_checkpoints", list_and_delete)
    saver.control = ControlSettings(max_checkpoints=3)
    for state.step in (1, 2, 3, 4, 5):
        saver.save()
    assert "checkpoint-1 was deleted by someone else" in capsys.readouterr().err
    assert [c.step for c in listed(tmp_path)] == [5, 4, 3]


def test_where_a_wsd_run_can_be_made_longer_is_kept(tmp_path: Path) -> None:
    state = TrainState()
    saver = build_saver(tmp_path, state, "wsd")
    saver.plan.checkpoint_every = 50  # type: ignore[misc]
    for state.step in range(1, 100):
        saver.save_if_due()
    assert [c.step for c in store.list_checkpoints(tmp_path)] == [79, 50]
    for state.step in (90, 95, 99):
        saver.save()
    assert [c.step for c in store.list_checkpoints(tmp_path)] == [99, 95, 79]
