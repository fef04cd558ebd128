"""What says that this process gets no more memory, however it is spelled. No torch."""

from __future__ import annotations

import errno

from preflight.core.units import format_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PHRASES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, for data, a library or a thread.

    Where the address space is limited, any library that fails to load is taken for a lack of it:
    a failure in its middle is told in many ways.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):
        is_there = not isinstance(error, ModuleNotFoundError)
        return is_there and (_has_phrase(error) or address_limit_bytes() is not None)
    return isinstance(error, RuntimeError) and _has_phrase(error)


def _has_phrase(error: BaseException) -> bool:
    return any(phrase in str(error).lower() for phrase in _PHRASES)


def address_limit_bytes() -> int | None:
    """The limit of this process's address space (``ulimit -v``), if there is one."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def explain_lack_of_memory() -> list[str]:
    """The lines for a person whose process got no more memory."""
    limit = address_limit_bytes()
    if limit is None:
        return ["out of memory (RAM); lower --batch-size, --context-length or --model-size"]
    return [
        f"out of memory: this process may address {format_bytes(limit)}",
        "raise that limit (ulimit -v unlimited), or lower --batch-size, --context-length or "
        "--model-size",
    ]
