"""Locks on folders: one writer or many readers. The kernel frees them when a process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path

import filelock  # comes with torch; the same locks on Linux, macOS and Windows

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import foreign_error, open_regular, refuse_other_kind, storage_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


LOCK_NAME = ".lock"


class FolderLock:
    """A lock on a folder, held until it is released or the process ends.

    Writers take it exclusively, readers share it. The kernel frees it even after SIGKILL, so there
    are no stale locks. The text in the lock file only names the owner.

    Raises:
        PreflightError: code LOCKED at once when another process holds it, naming that process;
            code STORAGE when the lock file cannot be made.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self._path = folder / LOCK_NAME
        _refuse_foreign(self._path)
        self._shared_descriptor = -1
        self._lock = filelock.FileLock(self._path, timeout=0)
        try:
            if shared and fcntl is not None:
                self._shared_descriptor = _open_shared(self._path)
            else:  # without flock a reader locks like a writer: stricter, but correct
                self._lock.acquire()
        except (filelock.Timeout, BlockingIOError):
            raise PreflightError(
                ExitCode.LOCKED,
                f"{folder} is in use by another run ({self._read_owner()})",
                "wait until it ends, stop it, or choose another folder",
            ) from None
        except OSError as error:
            raise storage_error(self._path, error) from error
        if not shared:
            with contextlib.suppress(OSError):  # the lock holds without its text
                started = time.strftime("%Y-%m-%d %H:%M:%S")
                self._path.write_text(
                    f"pid {os.getpid()} on {socket.gethostname()} since {started}\n",
                    encoding="utf-8",
                )

    def _read_owner(self) -> str:
        try:
            with open(self._path, "rb") as file:
                text = file.read(200).decode("utf-8", "replace")
        except OSError:
            text = ""
        return "".join(c for c in text if c.isprintable()) or "a reader"

    def release(self) -> None:
        """Free the lock."""
        if self._shared_descriptor >= 0:
            os.close(self._shared_descriptor)
            self._shared_descriptor = -1
        self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()


def _refuse_foreign(path: Path) -> None:
    """PreflightError (STORAGE) for a link or another program's file in the lock's place."""
    if refuse_other_kind(path):
        try:
            with open_regular(path) as file:
                content = file.read(4)
        except OSError as error:
            raise storage_error(path, error) from error
        if content not in (b"", b"pid "):
            raise foreign_error(path, "is another program's file")


def _open_shared(path: Path) -> int:
    """A descriptor that holds a shared flock on `path`; BlockingIOError while a writer has it.

    -1 where the folder is read-only and no writer has ever locked it: then nobody can.
    """
    while True:
        descriptor = _open_to_share(path)
        if descriptor < 0:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # A writer that finished may have deleted the file just opened: then open the new one.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open_to_share(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    try:
        return os.open(path, flags | os.O_RDONLY)
    except FileNotFoundError:
        return -1
