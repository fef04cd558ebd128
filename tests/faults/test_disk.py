"""A disk that is full, failing, or not there: exit 6, a message that helps, nothing harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .harness import ROOT, ForkServer, Point, find_message_faults, hash_tree, read_message
from .scenarios import (
    Scenario,
    build_preparation,
    build_training,
    is_same_outcome,
    sample,
)

ERRORS = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}
# What may fail without ending the run: the log warns and goes on, the lock's text only informs,
# and filelock probes the folder with O_TMPFILE: a failing probe writes nothing and harms nothing.
TOLERATED = ("metrics.jsonl", ".lock", ".tmp-retired-", "O_TMPFILE")


def find_faults(scenario: Scenario, points: list[Point], error: str, expected: Any) -> list[str]:
    """The points at which `error` was not met as it should be, with reasons."""
    faults = []
    for point in points:
        scenario.reset()
        code, said, lines = scenario.trace(point.inject(f"error={error}"))
        where = f"{point.call} {point.number} {point.paths}: "
        assert any("INJECTED" in line and point.paths[0] in line for line in lines), where
        in_log = any("metrics.jsonl" in path and ".tmp" not in path for path in point.paths)
        tolerated = code == 0 and (
            any(name in point.text for name in TOLERATED) or "EEXIST" in point.text
        )
        if not tolerated:
            words = ["bytes"] if error == "ENOSPC" and "delete" not in said else []
            fault = find_message_faults(said, ERRORS[error], *words)
            named = any(
                str(folder) in line
                for folder in scenario.watched
                for line in read_message(said)[:1]
            )
            if code != 6 or fault or not named:
                faults.append(f"{where}exit {code}, path named: {named}, {fault or said[-300:]}")
        elif in_log and "warning:" not in said:
            faults.append(f"{where}no warning")
        code, said = scenario.run()
        try:
            found = scenario.outcome()
            if in_log:  # the row that could not be written is missing, and only that
                assert len(expected[-1]) - len(found[-1]) <= 1
                found, wanted = found[:-1], expected[:-1]
            else:
                wanted = expected
            if code != 0 or not is_same_outcome(found, wanted):
                faults.append(f"{where}rerun: exit {code}, {said[-300:]}")
        except (AssertionError, OSError, KeyError, ValueError) as trouble:
            faults.append(f"{where}rerun: exit {code}, {trouble}, {said[-300:]}")
    return faults


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "name", ["preparation", "rebuild", pytest.param("training", marks=pytest.mark.slow)]
)
def test_every_call_may_fail(
    server: ForkServer, place: Path, full: bool, name: str, error: str
) -> None:
    if name == "training":
        scenario = build_training(server, place)
    else:
        scenario = build_preparation(server, place, older=name == "rebuild")
    points, expected = scenario.record(opening=True)
    chosen = sample(points, full, seed=len(error))
    if not full:  # the two errors share the kinds of calls out between them
        chosen = chosen[list(ERRORS).index(error) :: 2]
    assert find_faults(scenario, chosen, error, expected) == []
    print(f"{error} in {name}: {len(chosen)} of {len(points)} calls")


def find_ignorant(scenario: Scenario, points: list[Point]) -> list[str]:
    """What a product that swallows errors is caught with."""
    return find_faults(scenario, points, "ENOSPC", scenario.record()[1])


def test_a_writer_that_hides_errors_is_found(server: ForkServer, place: Path) -> None:
    """The check of the check: written in place, a full disk leaves half a checkpoint."""
    scenario = build_training(server, place)
    scenario.breaks = ("publishing",)
    points, _ = scenario.record()
    inside = [p for p in points if "checkpoint-" in p.text and p.call == "write"]
    assert find_ignorant(scenario, inside[:: len(inside) // 4])


# ---- real disks ---------------------------------------------------------------------------------


def test_disks_of_many_sizes(server: ForkServer, place: Path, full: bool) -> None:
    """A tmpfs from far too small to just right; when it grows, the same command goes on."""
    scenario = build_training(server, place)
    _, expected = scenario.record()
    disk = place / "disk"
    disk.mkdir()
    sizes = range(16, 4016, 200) if full else (16, 1500, 4000)
    codes = []
    flags = [flag.replace(str(place), str(disk)) for flag in scenario.flags]
    for size in sizes:
        result = place / f"result{size}"
        code, said = server.run("small disk", flags, str(disk), size, str(result), cwd=place)
        assert code == 0, (size, said)
        first, _, rest = said.partition("first exit code ")
        codes.append(int(rest.split()[0]))
        assert codes[-1] in (0, 6), (size, said)
        if codes[-1] == 6:
            assert find_message_faults(first, str(disk), "No space left on device", "bytes") == ""
        (place / "out").rename(place / f"before{size}")
        os.rename(result / "out", place / "out")
        assert is_same_outcome(scenario.outcome()[:4], expected[:4]), size
    assert codes[0] == 6
    assert codes[-1] == 0
    print(f"{len(codes)} sizes of disk, {codes.count(6)} too small")


@pytest.mark.parametrize("limit", [5_000, 100_000, 200_000])
def test_file_size_limit(server: ForkServer, place: Path, limit: int) -> None:
    """A short write and then EFBIG."""
    scenario = build_training(server, place)
    _, expected = scenario.record()
    scenario.reset()
    code, said = server.run("limited", scenario.flags, limit, cwd=place)
    assert code == 6, said
    assert find_message_faults(said, str(place), "File too large") == ""
    assert scenario.run()[0] == 0
    assert is_same_outcome(scenario.outcome(), expected)


def test_prlimit_on_the_real_command(place: Path) -> None:
    (place / "text.txt").write_text("some words to learn from\n" * 2000)
    done = subprocess.run(
        [
            "prlimit",
            "--fsize=2000",
            sys.executable,
            str(ROOT / "main.py"),
            "--train",
            "--text-file",
            "text.txt",
            "--device",
            "cpu",
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert find_message_faults(done.stderr, "data", "File too large") == ""


def test_read_only_disk(server: ForkServer, place: Path) -> None:
    scenario = build_training(server, place)
    disk = place / "disk"
    disk.mkdir()
    flags = [flag.replace(str(place), str(disk)) for flag in scenario.flags]
    code, said = server.run("read-only disk", flags, str(disk), cwd=place)
    assert code == 6
    assert find_message_faults(said, str(disk), "read-only") == ""


def test_output_that_takes_nothing(server: ForkServer, place: Path) -> None:
    """stdout is /dev/full: 6 for what would be read from there; training does not use it."""
    scenario = build_training(server, place)
    scenario.reset()
    full_device = Path("/dev/full")
    code, _ = server.run("main", scenario.flags, cwd=place, stdout=full_device)
    assert code == 0
    flags = [
        "--generate",
        "--output-dir",
        str(place / "out"),
        "--prompts",
        "x",
        "--device",
        "cpu",
        "--max-new-tokens",
        "5",
    ]
    code, said = server.run("main", flags, cwd=place, stdout=full_device)
    assert code == 6, said
    assert find_message_faults(said, "No space left on device") == ""
    answers = place / "answers.json"
    assert server.run("main", [*flags, "--output-file", str(answers)], cwd=place)[0] == 0
    assert json.loads(answers.read_text())


def test_nobody_may_write_there(place: Path) -> None:
    """A folder of another user's: root is above permissions, so the command runs as nobody."""
    os.chmod(place, 0o755)
    (place / "text.txt").write_text("some words to learn from\n" * 2000)
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "--train",
        "--text-file",
        "text.txt",
        "--device",
        "cpu",
    ]
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    else:
        os.chmod(place, 0o555)
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    os.chmod(place, 0o755)
    assert done.returncode == 6, done.stderr
    assert find_message_faults(done.stderr, "training_output", "Permission denied") == ""
    assert hash_tree(place).keys() == {"text.txt"}
