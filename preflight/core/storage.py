"""Durable files and folders: write, publish, hash, delete.

Whatever is written and later read again goes through `publish_file` or `publish_folder`: a
temporary name in the same folder, fsync, rename, fsync of the folder. A reader therefore finds the
old content or the new one, even after a crash or a power cut in between.

A name in a folder of ours may have been taken by somebody else. Nothing is written or deleted
through a symbolic link there, and nothing is deleted that this program does not make.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.units import format_bytes

Item = TypeVar("Item")
Found = TypeVar("Found")
TEMPORARY_PREFIX = ".tmp-"
PROBE_NAME, _PROBE = "probe", b"probe"
_BLOCK_BYTES = 4 * 2**20
# Raised only by a failing or full disk, never by a bug of this program.
DISK_ERRNOS = {errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# Raised there, or at a wrong path.
_STORAGE_ERRNOS = DISK_ERRNOS | {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
    errno.ELOOP,
    errno.EBUSY,
    errno.EEXIST,
    errno.ENOTEMPTY,
}


def storage_error(path: Path, error: OSError, needed_bytes: int = 0) -> PreflightError:
    """The error for a failed write: what, where, how many bytes are missing."""
    lines = [f"cannot write {path}: {error.strerror or error}"]
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = free_bytes(path)
            needed = f"{format_bytes(needed_bytes)} needed, " if needed_bytes else ""
            missing = max(needed_bytes - free, 1)
            lines.append(f"{needed}{format_bytes(free)} free, at least {missing:,} bytes missing")
    lines.append(
        "what was there before is unchanged; free space or choose another folder, "
        "then run the same command again"
    )
    return PreflightError(ExitCode.STORAGE, *lines)


def free_bytes(path: Path) -> int:
    """Bytes that can still be written at `path`, or at its nearest existing parent."""
    return shutil.disk_usage(_find_nearest(path)).free


def _find_nearest(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    return place


def fsync_folder(folder: Path) -> None:
    """Make names in `folder` durable. Windows has no such call; its renames are journaled."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(folder)  # so that the error message can name it
        raise
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make a closed file's content durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def refuse_other_kind(path: Path, *, folder: bool = False) -> bool:
    """Whether `path` exists. What is there must be a regular file, or with `folder` a folder.

    A symbolic link is never followed.

    Raises:
        PreflightError: code STORAGE, when it is a link or anything else.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise storage_error(path, error) from error
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"))
        kind = next((name for is_kind, name in kinds if is_kind(mode)), "no regular file")
        raise foreign_error(path, f"is {kind}")
    return True


def foreign_error(path: Path, what: str) -> PreflightError:
    """The error for something at `path` that this program has not made and would replace."""
    return PreflightError(
        ExitCode.STORAGE,
        f"{path} {what}, not what Preflight writes there",
        "nothing was changed; move it away, or choose another folder",
    )


def make_own_folder(folder: Path) -> None:
    """Make `folder` within a folder that exists. A link in its place is refused.

    Raises:
        PreflightError: code STORAGE.
    """
    if not refuse_other_kind(folder, folder=True):
        make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each durable in its own parent.

    Raises:
        PreflightError: code STORAGE.
    """
    if os.path.isdir(folder):
        return
    try:
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(folder, error) from error


@contextlib.contextmanager
def publish_file(path: Path, size_bytes: int = 0) -> Iterator[IO[bytes]]:
    """Open a file to write that appears at `path`, whole and durable, or not at all.

    Args:
        path: where it appears; an older file there is replaced in one step.
        size_bytes: its size where it is known, so that a full disk shows before the first write.

    Raises:
        PreflightError: code STORAGE, when the disk is full, failing or read-only, or when there is
            a link or a folder in the file's place.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    refuse_other_kind(path)
    if refuse_other_kind(temporary):  # what a killed writer left
        _remove_scratch(temporary)
    try:
        with open(temporary, "xb") as file:
            reserve_bytes(file, size_bytes)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
            raise storage_error(path, error, size_bytes) from error
        raise


def reserve_bytes(file: IO[bytes], size_bytes: int) -> None:
    """Allocate the space first, so that a full disk fails here, before the first write.

    Raises:
        OSError: there is no room.
    """
    if size_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as error:
            # Some file systems lack this call; there the write itself fails.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


@contextlib.contextmanager
def explain_errors(path: Path, size_bytes: int = 0) -> Iterator[None]:
    """Turn the error of a failing, full or read-only disk into a PreflightError, code STORAGE."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE_ERRNOS:
            raise storage_error(path, error, size_bytes) from error
        raise


@contextlib.contextmanager
def publish_folder(folder: Path, size_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` in one rename when the block ends.

    Every file in it is fsynced first. `folder` must not exist. `size_bytes`, where it is known,
    lets the message about a full disk say how much is missing.

    Raises:
        PreflightError: code STORAGE, when the disk is full, failing or read-only, or when there is
            something else in the place of the temporary folder.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    if refuse_other_kind(temporary, folder=True):
        _remove_scratch(temporary)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                fsync_file(path)
            else:
                fsync_folder(path)
        fsync_folder(temporary)
        os.rename(temporary, folder)
        fsync_folder(folder.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
            raise storage_error(folder, error, size_bytes) from error
        raise


def remove_tree(path: Path) -> None:
    """Delete a folder or a file if it is there; a symbolic link is unlinked, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            error.filename = str(path)  # rmtree names only the entry inside
            raise


def _remove_scratch(path: Path) -> None:
    try:
        remove_tree(path)
    except OSError as error:
        raise _removal_error(path, error) from error


def retire_folder(folder: Path) -> None:
    """Delete a folder so that an interruption never leaves part of it under its own name.

    Raises:
        PreflightError: code STORAGE.
    """
    retired = folder.with_name(f"{TEMPORARY_PREFIX}retired-{folder.name}")
    if refuse_other_kind(retired, folder=True):
        _remove_scratch(retired)
    try:
        os.rename(folder, retired)
        fsync_folder(
            folder.parent
        )  # before the first file is deleted: a power cut must not reorder them
        remove_tree(retired)
    except OSError as error:
        raise _removal_error(folder, error) from error


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete what a killed writer left behind; the caller holds the folder's exclusive lock.

    Args:
        folder: where it was written.
        names: a regular expression for the names that the writer uses, without the prefix.
            Other files stay, whatever they are called, and so do links.

    Raises:
        PreflightError: code STORAGE.
    """
    ours = re.compile(re.escape(TEMPORARY_PREFIX) + f"(?:{names})")
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if ours.fullmatch(path.name) and not path.is_symlink():
            _remove_scratch(path)


def _removal_error(path: Path, error: OSError) -> PreflightError:
    return PreflightError(
        ExitCode.STORAGE,
        f"cannot delete {path}: {error.strerror or error}",
        "delete it by hand or fix its permissions, then run the same command again",
    )


def open_regular(path: Path) -> IO[bytes]:
    """Open an existing regular file to read; never a symbolic link, a pipe or a device.

    Raises:
        OSError: there is none, it is something else, or it cannot be read.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # Windows lacks some
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file")
    return os.fdopen(descriptor, "rb")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_all(verify: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """The results of `verify` for all items, in threads, since hashing releases the GIL.

    Raises:
        what `verify` raised for the first item at fault, in the order of the items.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(verify, items))


def has_format(path: Path, name: str) -> bool:
    """Whether a JSON file begins with the key ``format`` and this value, as `write_json` writes it.

    Raises:
        OSError: it cannot be read.
    """
    expected = f'{{\n  "format": "{name}"'.encode()
    with open_regular(path) as file:
        return file.read(len(expected)) == expected


def refuse_foreign_json(path: Path, name: str) -> None:
    """Refuse to replace a file that is not JSON of the format called `name`.

    Raises:
        PreflightError: code STORAGE.
    """
    if refuse_other_kind(path) and not has_format(path, name):
        raise foreign_error(path, "is another program's file")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Publish `content`, whose first key is ``format``, as readable JSON.

    Raises:
        PreflightError: code STORAGE, also when it would replace a file of another format.
    """
    refuse_foreign_json(path, content["format"])
    with publish_file(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def check_access(folder: Path) -> None:
    """Refuse a folder without write permission. Writes nothing; `check_writable` tests more.

    Raises:
        PreflightError: code STORAGE.
    """
    place = _find_nearest(folder)
    if os.path.isdir(place) and not os.access(place, os.W_OK | os.X_OK):
        raise storage_error(folder, OSError(errno.EACCES, "Permission denied, or read-only"))


def check_writable(folder: Path) -> None:
    """Write, fsync, rename and delete a small file in `folder`, which is made if missing.

    The caller holds the folder's lock, since two probes at once would disturb each other.

    Raises:
        PreflightError: code STORAGE.
    """
    make_folder(folder)
    probe = folder / f"{TEMPORARY_PREFIX}{PROBE_NAME}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    for path in (probe, renamed):
        _remove_probe(path)
    try:
        with open(probe, "xb") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
        os.rename(probe, renamed)
        fsync_folder(folder)
        renamed.unlink()
    except OSError as error:
        for path in (probe, renamed):
            with contextlib.suppress(OSError):
                path.unlink()
        raise storage_error(probe, error) from error


def _remove_probe(path: Path) -> None:
    """Delete what a probe that was killed left; refuse anything else: PreflightError (STORAGE)."""
    if refuse_other_kind(path):
        try:
            with open_regular(path) as file:
                content = file.read(len(_PROBE) + 1)
        except OSError as error:
            raise storage_error(path, error) from error
        if content not in (b"", _PROBE):
            raise foreign_error(path, "is another program's file")
        _remove_scratch(path)
