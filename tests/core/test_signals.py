"""Signals become flags, and a missing stderr loses only the message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.signals import StopFlag


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", ExitCode.SIGINT), ("SIGTERM", ExitCode.SIGTERM), ("SIGHUP", ExitCode.SIGTERM)],
)
def test_a_signal_is_recorded_and_the_old_handler_returns(
    name: str, code: ExitCode, capfd: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    if signal.getsignal(number) is signal.SIG_IGN:  # below nohup, whose wish the flag respects
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with StopFlag() as flag:
        assert (flag.stopping, flag.exit_code) == (False, ExitCode.DONE)
        flag.leave_if_stopping("not raised")
        os.kill(os.getpid(), number)
        assert flag.stopping
        assert flag.exit_code == code
        with pytest.raises(PreflightError) as caught:
            flag.leave_if_stopping("saved", "continue with")
        assert (caught.value.code, caught.value.lines) == (code, ["saved", "continue with"])
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert said == "\npreflight: stopping (press Ctrl-C again to stop at once)\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_an_ignored_signal_stays_ignored(name: str) -> None:
    """As ``nohup`` sets SIGHUP, and a shell SIGINT for what it starts in the background."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), number)
            assert (flag.stopping, flag.save_requested) == (False, False)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_request_to_save_does_not_stop() -> None:
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.save_requested
        assert not flag.stopping


def test_without_stderr_the_message_does_not_reach_a_file(tmp_path: Path) -> None:
    """With stderr closed, the next file that is opened has descriptor 2."""
    code = (
        "import os, signal\nfrom preflight.core.signals import StopFlag\n"
        "file = open('victim', 'wb', 0)\nassert file.fileno() == 2\n"
        "with StopFlag() as flag:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert flag.stopping\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    os._exit(1)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 130
    assert (tmp_path / "victim").read_bytes() == b""


_INTERRUPTED = """
import os, signal, sys
from preflight.core.signals import leave_on_interrupt
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
with leave_on_interrupt():
    os.kill(os.getpid(), signal.SIGINT)
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
print("went on")
"""


@pytest.mark.parametrize(("how", "code"), [("default", 130), ("ignored", 0)])
def test_ctrl_c_while_libraries_load(how: str, code: int) -> None:
    """Torch's own start-up aborts the process when Python's exception comes in its middle."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    said = "" if how == "ignored" else "\npreflight: stopped\n"
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout == ("went on\n" if how == "ignored" else "")
