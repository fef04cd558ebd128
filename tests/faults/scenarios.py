"""What is killed and starved: a preparation, a rebuild, and three saves with rotation."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.checkpoints import format as checkpoint_format
from preflight.checkpoints import store

from .harness import (
    PREPARE_FLAGS,
    TRAIN_FLAGS,
    ForkServer,
    Point,
    find_points,
    find_temporaries,
    hash_tree,
    is_equal,
    make_text,
    read_rows,
    read_state,
)

LAST_STEP = 3


@dataclass
class Scenario:
    """A command, where it begins, and how to see that it came to its right end."""

    server: ForkServer
    place: Path
    driver: str
    flags: list[str]
    watched: list[Path]  # folders whose calls count
    reset: Callable[[], None]
    outcome: Callable[[], Any]  # what must be equal to the unbroken run's
    breaks: tuple[str, ...] = ()

    def run(self) -> tuple[int, str]:
        """The command, undisturbed."""
        return self.server.run(self.driver, self.flags, cwd=self.place, breaks=self.breaks)

    def trace(self, inject: str = "") -> tuple[int, str, list[str]]:
        """The command under strace."""
        return self.server.trace(
            self.driver, self.flags, cwd=self.place, inject=inject, breaks=self.breaks
        )

    def record(self, opening: bool = False) -> tuple[list[Point], Any]:
        """Every point of an unbroken run, and its outcome."""
        self.reset()
        code, said, lines = self.trace()
        assert code == 0, said
        return find_points(lines, self.watched, opening), self.outcome()


def build_preparation(server: ForkServer, place: Path, older: bool = False) -> Scenario:
    """Two training shards and one to validate; over an `older` data folder if asked."""
    data, old = place / "data", place / "old"
    (place / "text.txt").write_text(make_text(2500, seed=1))
    flags = [*PREPARE_FLAGS, "--data-dir", str(data)]
    if older:
        new = (place / "text.txt").read_text()
        (place / "text.txt").write_text(make_text(2500, seed=2))
        assert server.run("preparation", flags, cwd=place)[0] == 0
        (place / "text.txt").write_text(new)
        data.rename(old)

    def reset() -> None:
        shutil.rmtree(data, ignore_errors=True)
        if older:
            shutil.copytree(old, data)

    def outcome() -> Any:
        assert not find_temporaries(data)
        return hash_tree(data)

    return Scenario(server, place, "preparation", flags, [data], reset, outcome)


def build_training(server: ForkServer, place: Path) -> Scenario:
    """Three steps, a checkpoint after each, two of them kept; the data folder is there before."""
    out = place / "out"
    (place / "text.txt").write_text(make_text(6000))
    flags = [
        *TRAIN_FLAGS,
        "--data-dir",
        str(place / "data"),
        "--output-dir",
        str(out),
        "--max-steps",
        str(LAST_STEP),
        "--checkpoint-every",
        "1",
        "--eval-every",
        str(LAST_STEP),
        "--max-checkpoints",
        "2",
    ]
    assert server.run("main", flags, cwd=place)[0] == 0
    older = hash_tree(place / "data")

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def outcome() -> Any:
        assert not find_temporaries(out)
        assert hash_tree(place / "data") == older
        checkpoint_format.forget_verified()
        found, damaged = store.scan_checkpoints(out)
        assert not damaged
        for each in found:
            checkpoint_format.verify_checkpoint(each)
        steps = [each.step for each in found]
        losses = found[0].manifest.losses
        return steps, losses, *read_state(out, LAST_STEP), read_rows(out)

    return Scenario(server, place, "main", flags, [out, place / "data"], reset, outcome)


def sample(points: list[Point], full: bool, seed: int = 0) -> list[Point]:
    """All points, or of those alike in call and file name one each."""
    if full:
        return points
    kinds: dict[str, list[Point]] = {}
    for point in points:
        names = [Path(path).name for path in point.paths]
        key = f"{point.call} {names}"
        kinds.setdefault(re.sub(r"\d+", "N", key), []).append(point)
    draw = random.Random(seed)
    return [draw.choice(group) for group in kinds.values()]


def is_same_outcome(found: Any, expected: Any) -> bool:
    """Bit for bit."""
    return is_equal(found, expected)
