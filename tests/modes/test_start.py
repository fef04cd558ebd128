"""What can be known at the start is told at the start: no text is read, nothing is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import MakeConfig
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.locks import FolderLock
from preflight.corpus import build
from preflight.foresight import fits
from preflight.modes import find_batch_size, start, train
from preflight.settings import SystemSettings


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(build, "scan_sources", fail)


def list_tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refuse(config: Any, code: ExitCode, *words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        train.run(config)
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ({"device": "cuda:99"}, ExitCode.FLAGS, "--device cuda:99"),
        ({"resume_from": "nowhere"}, ExitCode.CHECKPOINT, "nowhere"),
        ({"text_file": ["missing.txt"]}, ExitCode.TEXT, "missing.txt"),
    ],
)
def test_nothing_is_made(
    make_config: MakeConfig, tmp_path: Path, flags: dict[str, Any], code: ExitCode, words: str
) -> None:
    before = list_tree(tmp_path)
    refuse(make_config(**flags), code, words)
    assert list_tree(tmp_path) == before


def test_the_search_asks_for_the_device_first(make_config: MakeConfig, tmp_path: Path) -> None:
    before = list_tree(tmp_path)
    with pytest.raises(PreflightError) as caught:
        find_batch_size.run(make_config(device="cuda:99", model_size="nano"))
    assert caught.value.code == ExitCode.FLAGS
    assert list_tree(tmp_path) == before


@pytest.mark.parametrize("variable", ["", "no-such-compiler"])
def test_compilation_without_a_compiler(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("CXX", variable)
    monkeypatch.setenv("PATH", "/nothing")
    refuse(make_config(compile_model=True), ExitCode.FLAGS, "no C++ compiler", "--compile-model")
    start.check_machine(SystemSettings(device="cpu", compile_model=False))  # needs none


def test_a_disk_without_room(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "free_bytes", lambda path: 10**6)
    refuse(make_config(), ExitCode.STORAGE, "No space left on device", "milestones")


def test_a_disk_with_room_for_some_checkpoints(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fits, "free_bytes", lambda path: 60 * 10**6)
    with pytest.raises(AssertionError, match="the text was read"):
        train.run(make_config())
    assert "warning: disk: " in capsys.readouterr().err


def test_a_data_folder_that_another_run_is_building(make_config: MakeConfig) -> None:
    folder = Path("data")
    folder.mkdir()
    with FolderLock(folder):
        refuse(make_config(), ExitCode.LOCKED, "data is in use")
