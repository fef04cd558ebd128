"""The machine of a run: device, precision, compilation, memory. Decided once, then printed."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.memory_lack import lacks_memory
from preflight.device.host_memory import peak_resident_bytes, release_freed_memory
from preflight.device.matmul_rate import is_bf16_faster
from preflight.device.ranks import Ranks, local_ranks
from preflight.device.ways import ChosenWay
from preflight.settings import SystemSettings

# A compilation takes about a minute; a shorter run does not regain that time.
MIN_STEPS_TO_COMPILE = 300
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>


@dataclass(frozen=True)
class Runtime:
    """What was chosen for this machine, and why.

    Attributes:
        device: where the model is.
        dtype: what the matmuls compute in; the weights are kept in fp32 for training.
        compile_model: whether the training step goes through torch.compile.
        notes: one line per choice, for the log.
    """

    device: torch.device
    dtype: torch.dtype
    compile_model: bool
    notes: tuple[str, ...]

    @property
    def needs_scaler(self) -> bool:
        """fp16 gradients underflow without a scaler (Micikevicius et al. 2018, section 3.2)."""
        return self.dtype == torch.float16

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for a forward pass; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self) -> None:
        """Wait until the device has finished its work, as before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_bytes(self) -> int:
        """The peak of memory since the start, or since `reset_peak_memory`.

        It is allocated memory on CUDA, and the resident memory of the process elsewhere.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()

    def reset_peak_memory(self) -> None:
        """Start a new peak; it has no effect on a CPU without Linux."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        release_freed_memory()  # what malloc keeps is not in use
        with contextlib.suppress(OSError):  # proc_pid_clear_refs(5)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def build_runtime(
    settings: SystemSettings,
    planned_steps: int | None = None,
    chosen: ChosenWay | None = None,
    ranks: Ranks | None = None,
) -> Runtime:
    """Choose device, precision and compilation where the flags leave them unset.

    Args:
        settings: the system flags.
        planned_steps: updates to come; ``None`` where nothing is trained.
        chosen: what is taken where no flag is given; unset: a simple rule, which may measure.
        ranks: that take precision and compilation from rank 0, and all call this; unset: one.

    Raises:
        PreflightError: code FLAGS, when the device that the flags name is not there.
    """
    device = choose_device(settings.device)

    def choose() -> tuple[tuple[torch.dtype, str], tuple[bool, str]]:
        precision = _choose_dtype(device, settings.mixed_precision)
        compilation = _choose_compilation(device, settings.compile_model, planned_steps)
        if chosen is not None and settings.mixed_precision is None:
            precision = chosen.way.dtype, chosen.why
        if chosen is not None and settings.compile_model is None:
            compilation = chosen.way.compiled, chosen.why
        return precision, compilation

    # Each rank may measure otherwise, or lack a compiler; all must compute the same.
    (dtype, why_dtype), (compile_model, why_compile) = (ranks or local_ranks()).decide(choose)
    if device.type == "cuda":
        # TF32 for matmuls that stay in fp32: eight times the rate, ten bits of mantissa.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu":
        _keep_freed_memory()
    notes = (
        f"device: {describe_device(device)}",
        f"precision: {str(dtype).removeprefix('torch.')} ({why_dtype})",
        f"compilation: {'on' if compile_model else 'off'} ({why_compile})",
        *(chosen.notes if chosen else ()),
    )
    return Runtime(device, dtype, compile_model, notes)


def build_exact_runtime(settings: SystemSettings) -> Runtime:
    """As `build_runtime`, in fp32 unless a flag says otherwise, for figures that are compared.

    Raises:
        PreflightError: code FLAGS, when the device that the flags name is not there.
    """
    if settings.mixed_precision is None:
        settings = dataclasses.replace(settings, mixed_precision=False)
    runtime = build_runtime(settings)
    if runtime.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # TF32 rounds nearly as coarsely as bf16
    return runtime


def _keep_freed_memory() -> None:
    """Make glibc's malloc keep the memory that a step frees for the next step.

    By default it returns large blocks to the system, which hands them out again page by page, each
    filled with zeros. That took a quarter of a small model's step (benchmarks/LOG.md). Source:
    mallopt(3). No block is mapped by itself, and the heap is never trimmed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def choose_device(name: str) -> torch.device:
    """The device of `--device`.

    Raises:
        PreflightError: code FLAGS, when it is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"found {count} CUDA devices" if count else "found no CUDA device"
            raise PreflightError(
                ExitCode.FLAGS,
                f"--device {name}: {found} (torch {torch.__version__})",
                "use --device cpu, or --device auto to take what is there",
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not has_mps:
        raise PreflightError(ExitCode.FLAGS, "--device mps: not on this machine; use --device auto")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 matmuls; their emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def _choose_dtype(device: torch.device, asked: bool | None) -> tuple[torch.dtype, str]:
    fast = has_fast_bf16(device)
    if asked is False:
        return torch.float32, "--no-mixed-precision"
    if fast and asked is None and device.type == "cpu" and not is_bf16_faster():
        return torch.float32, "matrix products in bf16 are measured slower here"
    if fast:
        return torch.bfloat16, "in hardware here"
    if device.type == "cuda":
        return torch.float16, "this card has no bf16; with a gradient scaler"
    if asked:
        return torch.bfloat16, "as asked; emulated on this device, slower than float32"
    return torch.float32, f"no bf16 in this {device.type}"


def _choose_compilation(
    device: torch.device, asked: bool | None, planned_steps: int | None
) -> tuple[bool, str]:
    if planned_steps is None:
        return False, "nothing to train"
    if asked is not None:
        return asked, "as asked"
    if device.type != "cuda":
        return False, f"not measured on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if planned_steps < MIN_STEPS_TO_COMPILE:
        return False, f"takes longer than it saves in {planned_steps} steps"
    return True, f"saves more time than it takes in {planned_steps:,} steps"


def find_missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on this device, in words; empty where nothing is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        # torch compiles for the CPU with this C++ compiler (torch/_inductor/cpp_builder.py).
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}"
    return ""


def describe_device(device: torch.device) -> str:
    """The device in words, with its memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    total = psutil.virtual_memory().total / 2**30
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {total:.0f} GiB)"
    return f"{device} ({total:.0f} GiB shared with the system)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device (on the CPU: the machine) has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or lacks_memory(error)
