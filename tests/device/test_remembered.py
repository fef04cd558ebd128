"""The user's folder of measurements: what is kept is found again, and a bad file harms nothing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from preflight.core.log import log
from preflight.core.schema import Schema
from preflight.device import remembered
from preflight.device.remembered import (
    FOLDER_VARIABLE,
    describe_hardware,
    find_cache_folder,
    recall,
    remember,
)


class Found(Schema):
    """What the tests measure."""

    seconds: float
    name: str


KEY: dict[str, Any] = {"of": "a test", "shape": (1, 2)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_what_is_kept_is_found_again(folder: Path, told: pytest.LogCaptureFixture) -> None:
    assert recall(KEY, Found) is None
    remember(KEY, Found(seconds=0.1, name="é"))
    assert recall(KEY, Found) == Found(seconds=0.1, name="é")
    assert recall(KEY | {"shape": (1, 3)}, Found) is None
    remember(KEY, Found(seconds=0.2, name="newer"))
    assert recall(KEY, Found) == Found(seconds=0.2, name="newer")
    assert len(list(folder.rglob("*.json"))) == len([p for p in folder.rglob("*") if p.is_file()])
    assert told.messages == []


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"\x00\xff",
    b'{"format": "other"}',
    b'{"format": "preflight measurement", "version": 9, "key": {}, "found": {}}',
    b'{"format": "preflight measurement", "version": 1, "key": {}, "found": {}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_a_bad_file_is_told_and_replaced(
    folder: Path, told: pytest.LogCaptureFixture, content: bytes
) -> None:
    remember(KEY, Found(seconds=0.1, name="x"))
    [path] = folder.rglob("*.json")
    path.write_bytes(content)
    assert recall(KEY, Found) is None
    assert len(told.messages) == 1
    assert str(path) in told.messages[0]
    assert "\n" not in told.messages[0]
    remember(KEY, Found(seconds=0.1, name="x"))
    assert recall(KEY, Found) is not None


def test_every_cut_and_every_flipped_byte_is_harmless(folder: Path) -> None:
    remember(KEY, Found(seconds=0.125, name="x"))
    [path] = folder.rglob("*.json")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        found = recall(KEY, Found)
        assert found is None or place == len(whole) - 1  # the last byte is a line's end
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        recall(KEY, Found)  # another value, or none; never an error


def test_a_file_of_another_measurement_is_not_taken(
    folder: Path, told: pytest.LogCaptureFixture
) -> None:
    remember(KEY, Found(seconds=0.1, name="x"))
    [path] = folder.rglob("*.json")
    remember(KEY | {"of": "another"}, Found(seconds=9.0, name="y"))
    [other] = set(folder.rglob("*.json")) - {path}
    other.replace(path)
    assert recall(KEY, Found) is None
    assert "about something else" in told.messages[0]


def test_figures_of_another_shape_are_not_taken(
    folder: Path, told: pytest.LogCaptureFixture
) -> None:
    class Other(Schema):
        steps: int

    remember(KEY, Other(steps=3))
    assert recall(KEY, Found) is None
    assert len(told.messages) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_a_link_in_a_file_s_place_is_not_followed(
    folder: Path, told: pytest.LogCaptureFixture
) -> None:
    remember(KEY, Found(seconds=0.1, name="x"))
    [path] = folder.rglob("*.json")
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert recall(KEY, Found) is None
    assert len(told.messages) == 1


def test_a_folder_that_cannot_be_written_is_told(
    folder: Path, told: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")  # root may write anywhere else
    remember(KEY, Found(seconds=0.1, name="x"))
    assert len(told.messages) == 1
    assert "cannot be kept" in told.messages[0]
    assert recall(KEY, Found) is None
    assert folder.read_text() == "a file where the folder should be"


def test_a_full_disk_leaves_no_part(
    folder: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered.os, "replace", fail)
    remember(KEY, Found(seconds=0.1, name="x"))
    assert "No space left" in told.messages[0]
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def _write_and_read(number: int, n_times: int) -> None:
    for _ in range(n_times):
        remember(KEY, Found(seconds=float(number), name="x" * 20_000 * number))
        found = recall(KEY, Found)
        if found is None or len(found.name) != 20_000 * int(found.seconds):
            os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_two_processes_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_and_read, args=(n, 200)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 1


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache_folder() == tmp_path / "xdg" / "preflight"
    for useless in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert find_cache_folder() == tmp_path / ".cache" / "preflight"


def test_the_machine_is_part_of_the_key() -> None:
    facts = describe_hardware(torch.device("cpu"))
    assert facts["cpu"]
    assert facts["torch"] == torch.__version__
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert describe_hardware(torch.device("cpu")) == facts | {"threads": threads + 1}
    finally:
        torch.set_num_threads(threads)
