"""The fork server, and a quick place to work in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from preflight.core.errors import ExitCode

from .harness import ForkServer
from .rank_runs import Run

TOOLS = ("strace", "unshare", "prlimit", "mount")


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"these tests need {', '.join(missing)}: apt-get install strace util-linux"


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """In memory where the system has such a place: thousands of fsyncs cost nothing there."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 2**30
    with tempfile.TemporaryDirectory(dir=shm if roomy else None, prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server(scratch: Path) -> Iterator[ForkServer]:
    (scratch / "server").mkdir()
    fork_server = ForkServer(scratch / "server")
    yield fork_server
    fork_server.close()


@pytest.fixture
def place(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder of the test's own."""
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="case-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train on."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 800, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """The hash of the weights that two ranks reach undisturbed."""
    run = Run(tmp_path_factory.mktemp("unbroken"), text)
    assert run.finish() == ExitCode.DONE, run.read_log()
    return run.hash_end()
