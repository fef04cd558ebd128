"""A shard is cut short under the map of a run: a clear error, never SIGBUS, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store

from .harness import ForkServer, find_message_faults, wait_until
from .test_run import build_flags


def check_newest(place: Path) -> int:
    """The step of the newest checkpoint, whose weights are whole."""
    newest = store.find_newest(place / "out")
    assert newest is not None
    checkpoint_format.verify_checkpoint(newest)
    for tensor in checkpoint_format.load_weights(newest).values():
        assert tensor.isfinite().all()
    return newest.step


@pytest.mark.parametrize("n_bytes", [0, 1000, 5000])
def test_shard_is_cut_short_in_the_middle(server: ForkServer, place: Path, n_bytes: int) -> None:
    # Some hundred steps are made of what is read already.
    flags = build_flags(place, steps=1_000_000, checkpoint_every=10)
    process = server.start("main", flags, cwd=place)
    wait_until(lambda: "\nstep 3/" in process.said(), 30)
    shard = next((place / "data" / "train").glob("*.npy"))
    assert shard.stat().st_size > 2 * 4096  # so that pages of the map lie behind the cut
    os.truncate(shard, n_bytes)
    assert process.wait(30) == 4, process.said()
    assert find_message_faults(process.said(), shard.name) == ""
    step = check_newest(place)
    code, said = server.run("main", build_flags(place, steps=step + 2), cwd=place)
    assert code == 0, said
    assert check_newest(place) == step + 2


def test_shard_is_cut_short_between_the_check_and_the_copy(server: ForkServer, place: Path) -> None:
    flags = build_flags(place, steps=1_000_000)
    code, said = server.run("main", flags, cwd=place, breaks=["shard"])
    assert code == 4, said
    assert find_message_faults(said, "shard_00000.npy was cut short while it was in use") == ""
    check_newest(place)
