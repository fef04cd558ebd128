"""Who may use the server: the key in a file, and addresses of this machine alone."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.storage import storage_error

_MAX_BYTES = 4096
_KEY = re.compile(r"[\x21-\x7e]{16,512}")


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def load_key(host: str, file_name: str | None) -> str | None:
    """The key in the file, which is made where it is not there; None: nobody needs one.

    Raises:
        PreflightError: code FLAGS, for an address of others without a key, or a file that holds
            none; code STORAGE, when it cannot be read or made.
    """
    if file_name is None:
        if not is_loopback(host):
            raise PreflightError(
                ExitCode.FLAGS,
                f"--host {host}: others could reach the server, and no key is asked for",
                "give --api-key-file FILE (it is made where it is not there), or leave --host out",
            )
        return None
    path = Path(file_name)
    try:
        key = _make_key(path) or _read_key(path)
    except OSError as error:
        raise storage_error(path, error) from None
    if not _KEY.fullmatch(key):
        raise PreflightError(
            ExitCode.FLAGS,
            f"--api-key-file {path}: expected one line of 16 to 512 letters, digits and signs",
            "name a file that is not there, and a key is made",
        )
    return key


def _make_key(path: Path) -> str:
    """A new key in a new file for its owner alone; empty where there is a file already."""
    key = secrets.token_urlsafe(32)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return ""
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")
    log.info(f"a new key is in {path}: clients send it as their API key")
    return key


def _read_key(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(_MAX_BYTES + 1)
        mode = os.fstat(file.fileno()).st_mode
    if os.name == "posix" and mode & 0o077:
        log.warning(f"{path} can be read by others on this machine: chmod 600 {path}")
    return content.decode("ascii", errors="replace").strip()
