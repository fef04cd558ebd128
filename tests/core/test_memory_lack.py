"""A lack of memory is told as such, in whatever words it comes."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator

import pytest

import main
from preflight.core.memory_lack import address_limit_bytes, explain_lack_of_memory, lacks_memory

PARTIAL = ImportError("cannot import name 'a' from partially initialized module 'b'")


@pytest.fixture
def limited() -> Iterator[int]:
    """A limit of the address space, far from what is used."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**46, before[1]))
    yield 2**46
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=repr,
)
def test_lack_of_memory_ends_with_its_code(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(mode: str, config: object) -> int:
        raise error

    monkeypatch.setattr(main, "run_mode", fail)
    assert main.main(["--train"]) == 8
    assert "out of memory" in capsys.readouterr().err


def test_a_library_that_fails_within_a_limit(limited: int) -> None:
    assert address_limit_bytes() == limited
    assert lacks_memory(PARTIAL)
    assert not lacks_memory(ModuleNotFoundError("No module named 'a'"))
    assert "may address 64.0 TiB" in explain_lack_of_memory()[0]


def test_other_errors_are_not_taken_for_it() -> None:
    assert address_limit_bytes() is None
    for error in (PARTIAL, OSError(errno.ENOSPC, "x"), RuntimeError("shapes"), ValueError("x")):
        assert not lacks_memory(error)
