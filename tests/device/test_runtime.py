"""Choices for the machine: precision, compilation, and how much memory there is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import main
from conftest import ROOT
from preflight.core.errors import ExitCode, PreflightError
from preflight.device import host_memory
from preflight.device.host_memory import available_host_bytes
from preflight.device.runtime import build_runtime, is_out_of_memory
from preflight.settings import RunConfig, SystemSettings


def make_group(folder: Path, names: tuple[str, str], limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {idle}\n")


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("line", "own", "above", "names"),
    [
        ("0::/box/inner", "box/inner", "box", V2),
        ("4:memory:/box/inner", "memory/box/inner", "memory/box", V1),
    ],
)
def test_a_container_counts(
    tmp_path: Path, line: str, own: str, above: str, names: tuple[str, str]
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/x\n{line}\n")
    mount = tmp_path / "sys/fs/cgroup"
    free = psutil.virtual_memory().available
    assert available_host_bytes(tmp_path) == pytest.approx(free, rel=0.1)
    make_group(mount / own, names, "max", 0, 0)
    assert available_host_bytes(tmp_path) == pytest.approx(free, rel=0.1)
    make_group(mount / above, names, "1000", 700, 100)  # a limit above binds what is below
    assert available_host_bytes(tmp_path) == 400
    make_group(mount / own, names, "500", 450, 50)
    assert available_host_bytes(tmp_path) == 100
    make_group(mount / own, names, "500", 900, 0)
    assert available_host_bytes(tmp_path) == 0


def test_the_real_machine_has_memory() -> None:
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total
    assert host_memory.reachable_host_bytes() > available_host_bytes() - 2**28


def test_choices_on_the_cpu() -> None:
    plain = build_runtime(SystemSettings(device="cpu", mixed_precision=False), 10**6)
    assert (plain.dtype, plain.compile_model, plain.needs_scaler) == (torch.float32, False, False)
    mixed = build_runtime(SystemSettings(device="cpu", mixed_precision=True, compile_model=True), 1)
    assert (mixed.dtype, mixed.compile_model) == (torch.bfloat16, True)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(PreflightError) as caught:
        build_runtime(SystemSettings(device="cuda:77"))
    assert caught.value.code == ExitCode.FLAGS


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def run_script(script: str, *words: str) -> str:
    """What Python code prints in a process of its own."""
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


_COUNT_FAULTS = """
import resource, sys, torch
from preflight.device.runtime import build_runtime
from preflight.settings import SystemSettings
if sys.argv[1] == "keep":
    build_runtime(SystemSettings(device="cpu"))
blocks = [torch.ones(1_000_000) for _ in range(32)]
del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """A block of 24,000 pages fits where small ones were freed: nothing is faulted in again."""
    faults = {}
    for how in ("keep", "default"):
        faults[how] = int(run_script(_COUNT_FAULTS, how))
    assert faults["keep"] < 1000
    assert faults["default"] > 20_000  # else the test shows nothing


_RELEASE = """
import psutil, torch
from preflight.device import host_memory
from preflight.device.runtime import build_runtime
from preflight.settings import SystemSettings
build_runtime(SystemSettings(device="cpu"))
blocks = [torch.ones(1_000_000) for _ in range(64)]
del blocks
kept = psutil.Process().memory_info().rss
host_memory.release_freed_memory()
print(kept - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_system() -> None:
    """256 MB were freed and kept, as a training step frees them."""
    assert int(run_script(_RELEASE)) > 240e6


def test_the_peak_is_this_process_s_own() -> None:
    """A large parent's memory is not ours: Linux's getrusage counts it."""
    child = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from preflight.device import host_memory; "
        "held = b'x' * 100_000_000; del held; print(host_memory.peak_resident_bytes())"
    )
    parent = (
        f"held = b'x' * 1_500_000_000; import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    result = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True)
    assert 100e6 < int(result.stdout) < 1e9


# In a process of its own: another test's freed memory would be used again.
_COUNT_PEAKS = """
from preflight.device.runtime import build_runtime
from preflight.settings import SystemSettings
machine = build_runtime(SystemSettings(device="cpu"))
held = b"x" * 300_000_000
print(machine.peak_memory_bytes())
del held
machine.reset_peak_memory()
print(machine.peak_memory_bytes())
held = b"x" * 300_000_000
print(machine.peak_memory_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's")
def test_the_peak_can_be_counted_anew() -> None:
    first, anew, second = map(int, run_script(_COUNT_PEAKS).split())
    assert anew < first - 250_000_000
    assert second > anew + 250_000_000


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.MODES, "load", lambda name: lambda config: 0)
    monkeypatch.setattr(os, "environ", dict(given))
    assert main.run_mode("check", RunConfig()) == 0
    assert os.environ == expected
