"""Memory of the host: what this process has used, and what it could have."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_resident_bytes() -> int:
    """The peak of this process's resident memory."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    # On Linux, getrusage starts with the parent's peak; proc_pid_status(5) does not.
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory that programs can still have: the machine's, or a container's where that is less.

    A control group's usage includes cached files. The system drops those that are inactive when a
    program needs memory, so that they count as available (Linux kernel documentation,
    admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
    """
    available = psutil.virtual_memory().available
    for folder, limit_name, usage_name in _find_control_groups(root):
        try:
            limit = int((folder / limit_name).read_text())  # or "max": no number, no limit
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        idle = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        available = min(available, max(0, limit - usage + idle))
    return available


def _find_control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folders of this process's memory groups, each with the names of its limit and usage."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mount = root / "sys/fs/cgroup"
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            names = (
                ("memory.max", "memory.current")
                if not controllers
                else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            base = mount / controllers
            # The limits of the groups above bind a group too. Within a container, the path of its
            # group is not there, and the root of the mount is the group.
            for place in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield base / str(place).lstrip("/"), *names


def release_freed_memory() -> None:
    """Return the memory that malloc keeps after a free to the system, where it is glibc's.

    Afterwards the resident memory is what is in use. Source: malloc_trim(3).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def reachable_host_bytes() -> int:
    """Memory that this process could have: what it holds, and what is available."""
    return available_host_bytes() + psutil.Process().memory_info().rss
