"""Text from a pipe, copied to a file first, since every source is read twice."""

from __future__ import annotations

import hashlib
import os
import select
import stat
import time
from pathlib import Path

from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.storage import publish_file
from preflight.corpus.shards import BUILDING_NAME
from preflight.corpus.sources.protocol import SourceFacts, text_error
from preflight.corpus.sources.text import TextFile
from preflight.settings import DataSettings

_READ_BYTES = 2**18
_NOTICE_SECONDS, _GIVE_UP_SECONDS = 5, 60


def find(given: str | None, settings: DataSettings) -> list[Pipe] | None:
    """The pipe of that name; None for anything else."""
    if given is None or not os.path.exists(given) or not stat.S_ISFIFO(os.stat(given).st_mode):
        return None
    copy = f"pipe-{hashlib.sha256(os.fsencode(given)).hexdigest()[:8]}"
    folder = Path(settings.data_dir) / BUILDING_NAME
    return [Pipe(Path(given), folder / copy, settings.document_separator)]


class Pipe(TextFile):
    """The text file into which a scan copies a pipe."""

    is_copied = True

    def __init__(self, pipe: Path, copy: Path, separator: str | None) -> None:
        super().__init__(copy, separator, name=pipe.name)
        self._pipe = pipe

    def scan(self, stop: StopFlag | None) -> SourceFacts:
        """Copy the pipe, then scan the copy.

        Raises:
            PreflightError: code TEXT when nobody writes to it for a minute; STORAGE; as `TextFile`.
        """
        self._copy(stop)
        return super().scan(stop)

    def _copy(self, stop: StopFlag | None) -> None:
        path = self._pipe
        log.info(f"{path} is a pipe: it is copied first, and cannot be read again to resume")
        began, waited = time.monotonic(), False
        try:  # a plain open may block for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise text_error(path, error.strerror or str(error)) from None
        with open(descriptor, "rb", buffering=0) as pipe, publish_file(self.path) as file:
            while True:
                if stop is not None:
                    stop.leave_if_stopping("stopped while reading a pipe; nothing was changed")
                select.select([pipe], [], [], 0.5)
                data = pipe.read(_READ_BYTES)  # None: nothing yet; empty: no writer, or no more
                if data:
                    file.write(data)
                elif data is not None and file.tell():
                    return
                elif not file.tell():
                    seconds = time.monotonic() - began
                    if seconds > _NOTICE_SECONDS and not waited:
                        waited = True
                        log.info(f"{path}: nothing has been written to this pipe yet; waiting")
                    if seconds > _GIVE_UP_SECONDS:
                        raise text_error(path, "nothing was written to this pipe for a minute")
                    time.sleep(0.05)
