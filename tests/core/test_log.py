"""Messages on stderr, and that a stderr without a reader harms nothing."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from preflight.core import log as log_module
from preflight.core.log import configure_logging, is_progress_shown, log, log_once


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[0], before[1]
    log.setLevel(before[2])


def test_messages_of_the_level_and_above_go_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("info")
    log.debug("too much")
    log.info("loss 3.2")
    log.warning("slow disk")
    configure_logging("error")  # a second call replaces the first
    log.warning("too little")
    log.error("broken")
    said = capsys.readouterr()
    assert said.err == "loss 3.2\nwarning: slow disk\nerror: broken\n"
    assert said.out == ""


def test_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    log_once.cache_clear()
    for _ in range(3):
        log_once("only the first time")
    assert capsys.readouterr().err == "only the first time\n"


class Unread(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def build_closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, build_closed(), Unread()], ids=["None", "closed", "pipe"])
def test_a_stderr_that_is_gone_loses_only_the_message(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging("info")
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(sys, "stderr", stream)
    log.info("nobody reads this")
    assert not is_progress_shown()


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging("info")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    assert is_progress_shown()
    monkeypatch.setenv("COLUMNS", "39")
    assert not is_progress_shown()
    monkeypatch.setenv("COLUMNS", "80")
    configure_logging("warning")
    assert not is_progress_shown()
    configure_logging("info")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_progress_shown()


def test_a_program_that_uses_the_package_configures_it_as_any_logger(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module.log, "handlers", [])
    monkeypatch.setattr(log_module.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="preflight"):
        logging.getLogger("preflight").info("seen")
    assert caplog.messages == ["seen"]
