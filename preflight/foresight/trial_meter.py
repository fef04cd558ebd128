"""The peak of memory in each phase of a trial."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import psutil
import torch

from preflight.device.host_memory import release_freed_memory
from preflight.device.runtime import Runtime


class Meter:
    """Measures the phases of one process.

    Attributes:
        name: the phase that is under way.
        phases: peak of each phase: allocated memory (CUDA), or resident memory beyond what the
            process held when the meter was made.
        reserved_bytes, needed_bytes: as in `TrialResult`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.on_cuda = runtime.device.type == "cuda"
        self.name = "set-up"
        self.phases: dict[str, int] = {}
        self.reserved_bytes = self.needed_bytes = 0
        self._base = 0
        if not self.on_cuda:
            # Memory that was freed and kept would be used again, and a model that grows into it
            # would seem to need nothing.
            gc.collect()
            release_freed_memory()
            self._base = psutil.Process().memory_info().rss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the peak of the block, also when it fails."""
        self.name = name
        gc.collect()
        self.runtime.reset_peak_memory()
        try:
            yield
        finally:
            self._read()

    def _read(self) -> None:
        peak = self.runtime.peak_memory_bytes()
        if self.on_cuda:
            device = self.runtime.device
            reserved = torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            # What is used beside the allocator's memory: the context, and other processes.
            needed = reserved + total - free - torch.cuda.memory_reserved(device)
        else:
            needed, reserved = peak, 0
            peak = max(0, peak - self._base)
        self.phases[self.name] = peak
        self.reserved_bytes = max(self.reserved_bytes, reserved)
        self.needed_bytes = max(self.needed_bytes, needed)
