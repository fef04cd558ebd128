"""What several test files share: a tiny text, a command-line runner, a tiny configuration, and
``--full``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from preflight.core.errors import ExitCode
from preflight.core.log import configure_logging
from preflight.device.remembered import FOLDER_VARIABLE
from preflight.settings import RunConfig, build_config

# Files that tests write need not outlast the machine: in memory, saves wait for no disk.
_SHARED_MEMORY, _ROOM = Path("/dev/shm"), 6 * 2**30
if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_SHARED_MEMORY))
# The tests run in one process per core, on shapes too small for a second thread to help.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Machines are noisy: a slow draw is no fault of the code under test.
settings.register_profile("preflight", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("preflight")
configure_logging("info")  # as main.py does

ROOT = Path(__file__).parent.parent
# A model small enough that a step takes milliseconds, with GPT-2's real vocabulary.
TINY_FLAGS = [
    "--model-size",
    "custom",
    "--n-layers",
    "2",
    "--n-heads",
    "2",
    "--n-embeddings",
    "32",
    "--context-length",
    "32",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--no-mixed-precision",
    "--tokenizer",
    "gpt2",
]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "quietly",
    "mix",
    "jade",
    "boxes",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flag of `make test-faults`."""
    parser.addoption("--full", action="store_true", help="every point, not a sample of them")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether everything is tried, or a sample."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder of measurements, which no test may depend on or write to."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        yield folder


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """A text of about 9,000 tokens with some structure to learn."""
    lines = [
        " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) + ".\n"
        for i in range(700)
    ]
    path = tmp_path / "tiny.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


TINY = {
    "model_size": "custom",
    "n_layers": 2,
    "n_heads": 2,
    "n_embeddings": 32,
    "context_length": 32,
    "batch_size": 4,
    "device": "cpu",
    "mixed_precision": False,
    "max_steps": 20,
    "num_workers": 1,
    "tokenizer": "gpt2",
    "measure": False,
}
MakeConfig = Callable[..., RunConfig]


def build(values: dict[str, Any]) -> RunConfig:
    """The configuration of these flags, as if typed."""
    return build_config(values, dict.fromkeys(values, "the command line"))


@pytest.fixture
def make_config(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """A tiny run in a folder of its own; keywords are flags."""
    monkeypatch.chdir(tmp_path)
    return lambda **flags: build(TINY | {"text_file": [str(tiny_text)]} | flags)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that the same test has to pass on."""
    return str(request.param)


_CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright; for tests marked `browser`."""
    from playwright.sync_api import sync_playwright  # other tests need no browser

    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(_CHROMIUM_FLAGS))
        yield chromium
        chromium.close()


CommandRunner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def preflight(tmp_path: Path) -> CommandRunner:
    """Run main.py as a user would, in a folder of its own."""

    def run(*argv: str, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": "", "COLUMNS": "100"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *argv],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
        if done.returncode == ExitCode.INTERNAL:  # what is lost with the folder says why
            done.stderr += "".join(log.read_text() for log in tmp_path.rglob("crash.log"))
        return done

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are left out, and pytest's last line counts them as deselected."""
    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
