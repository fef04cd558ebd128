"""Processes without stdout or stderr."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from preflight.core.streams import (
    is_missing,
    print_error,
    replace_missing_streams,
    silence_stdout,
)


@pytest.mark.parametrize("closing", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_missing_stream(tmp_path: Path, closing: str) -> None:
    """Nor does a file of a child process, which inherits the descriptors."""
    child = "file = open('inner', 'w'); file.write(str(file.fileno()))"
    code = (
        "import os, subprocess, sys\n"
        "from preflight.core.streams import replace_missing_streams\n"
        "with replace_missing_streams():\n"
        "    print('product'); print('message', file=sys.stderr)\n"
        "    file = open('outer', 'w', buffering=1)\n"
        "    file.write(str(file.fileno()))\n"
        "    os.write(1, b'x'); os.write(2, b'x')\n"
        f"    subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    for name in ("outer", "inner"):
        assert int((tmp_path / name).read_text()) > 2


def test_missing_streams_are_replaced_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed)
    assert is_missing(sys.stdout)
    assert is_missing(sys.stderr)
    with replace_missing_streams():
        sys.stdout.write("nowhere")
        print_error("nowhere")
        assert is_missing(sys.stdout)
        assert is_missing(sys.stderr)
    assert sys.stdout is None
    assert sys.stderr is closed


def test_streams_that_are_there_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with replace_missing_streams():
        assert (sys.stdout, sys.stderr) == before
        assert not is_missing(sys.stdout)
    print_error("first", "second")
    assert capsys.readouterr().err == "preflight: first\npreflight: second\n"


_LONG_TEXT = """
import sys, resource
from preflight.core.streams import replace_missing_streams, silence_stdout
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
with replace_missing_streams():
    try:
        sys.stdout.write("x" * int(sys.argv[1]))
        sys.stdout.flush()
    except OSError as error:
        silence_stdout()
        sys.exit(error.errno)
print("after", flush=True)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("size", "code"), [(100, 0), (1000, errno.EFBIG), (9000, errno.EFBIG)])
def test_what_a_full_disk_does_not_take_is_told(
    tmp_path: Path, unbuffered: str, size: int, code: int
) -> None:
    """The kernel takes a part first: unbuffered, Python forgets the rest."""
    with open(tmp_path / "out", "wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", _LONG_TEXT, str(size)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            check=False,
            stdout=file,
        )
    assert done.returncode == code
    expected = b"x" * 100 + b"after\n" if size == 100 else b"x" * 512
    assert (tmp_path / "out").read_bytes() == expected


class Unread(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_an_error_that_nobody_reads_is_no_second_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Unread())
    print_error("lost")


def test_stdout_without_a_descriptor_is_silenced_without_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    silence_stdout()
    assert len(os.listdir("/proc/self/fd")) == n_open
