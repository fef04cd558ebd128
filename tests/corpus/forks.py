"""A build in a fork of this process, to be killed: it does not import everything anew."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preflight.corpus import collector
from preflight.corpus.build import prepare_data
from preflight.settings import DataSettings
from preflight.tokenization import Tokenizer


class Fork:
    """A process that runs `work` and ends; what it says goes to the file `said`."""

    def __init__(self, work: Callable[[], object], said: Path) -> None:
        self._said = said
        self._pid = os.fork()
        if self._pid == 0:
            _run(work, said)

    def end(self, after_seconds: float | None = None) -> bool:
        """Wait for its end, or kill it after so many seconds; whether it came to its own end.

        Raises:
            AssertionError: it failed.
        """
        if after_seconds is not None:
            time.sleep(after_seconds)
            os.kill(self._pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        assert code in (0, -signal.SIGKILL), self._said.read_text()[-2000:]
        return code == 0


def _run(work: Callable[[], object], said: Path) -> None:
    """In the child, which leaves without the parent's own end."""
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout = sys.stderr = open(2, "w", encoding="utf-8")  # noqa: SIM115  # not pytest's
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def fork_build(
    settings: DataSettings, tokenizer: Tokenizer, said: Path, save_seconds: float, **more: Any
) -> Fork:
    """Begin `prepare_data` in a fork, which notes where it is every `save_seconds`."""

    def work() -> None:
        collector.SAVE_SECONDS = save_seconds
        prepare_data(settings, tokenizer, n_workers=0, **more)

    return Fork(work, said)
