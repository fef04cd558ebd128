"""Token ids in the memory of a device: how they are stored, gathered, and when that is worth it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preflight.core.units import format_bytes
from preflight.device.host_memory import available_host_bytes

# Of a device's free memory, at most, for data that nobody asked to keep there.
STORED_SHARE = 0.1
_START_BYTES = 8  # where a window begins: int64


class TokenStore:
    """The ids of one split, from which windows are gathered.

    Ids below 65,536 are stored in 16 bits. torch 2.13 has no `index_select`, `take` or `gather` of
    uint16, so that they are stored as int16: the upper half wraps around, and is masked back.
    """

    def __init__(self, n_tokens: int, vocab_size: int, device: torch.device) -> None:
        dtype = torch.int16 if _count_id_bytes(vocab_size) == 2 else torch.int32
        self._ids = torch.empty(n_tokens, dtype=dtype, device=device)

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self._ids.device

    def fill(self, first: int, ids: torch.Tensor) -> None:
        """Write `ids`, int64 on the host, from token `first` on."""
        # The conversion of what is out of an int16's range is not defined for every device.
        if self._ids.dtype == torch.int16:
            ids = ids - 2**16 * (ids >= 2**15)
        self._ids[first : first + len(ids)] = ids.to(self._ids.dtype).to(self.device)

    def gather(self, starts: torch.Tensor, length: int) -> torch.Tensor:
        """(B, length) int64: `length` tokens from each of the `starts`, which are on the device."""
        windows = self._ids.unfold(0, length, 1)  # (n_tokens - length + 1, length): a view
        rows = windows[starts].to(torch.int64)
        return rows.bitwise_and_(2**16 - 1) if self._ids.dtype == torch.int16 else rows


def _count_id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 2**16 else 4


def count_stored_bytes(n_tokens: int, vocab_size: int, n_windows: int) -> int:
    """Bytes on the device of a split's ids, and of where the windows of one epoch begin."""
    return n_tokens * _count_id_bytes(vocab_size) + n_windows * _START_BYTES


@dataclass(frozen=True)
class DataPlace:
    """Where the training tokens are kept.

    Attributes:
        on_device: in the device's memory, and not in memory-mapped files.
        n_bytes: that they take of the device's memory.
        why: the choice and its reason, in words.
    """

    on_device: bool
    n_bytes: int
    why: str

    @property
    def note(self) -> str:
        """A line for the log, as those of a `Runtime`."""
        return f"training data: {self.why}"


def measure_free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device. 0 elsewhere, where `choose_place` does not ask for it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def measure_model_room(device: torch.device) -> int:
    """Memory that is free where a model on this device goes."""
    return measure_free_bytes(device) if device.type == "cuda" else available_host_bytes()


def choose_place(asked: str, device_type: str, n_bytes: int, free_bytes: int) -> DataPlace:
    """Where to keep the training tokens.

    Args:
        asked: ``auto``, ``yes`` or ``no``.
        device_type: ``cuda``, ``cpu`` or ``mps``.
        n_bytes: what they would take on the device.
        free_bytes: free on the device before anything of the run is there.
    """
    size = format_bytes(n_bytes)
    if asked == "yes":
        return DataPlace(True, n_bytes, f"in the memory of the device ({size}, as asked)")
    if asked == "no":
        return DataPlace(False, 0, "read from disk (as asked)")
    if device_type != "cuda":
        why = f"read from disk (a copy in memory gains nothing on {device_type})"
        return DataPlace(False, 0, why)
    share = f"a tenth of the {format_bytes(free_bytes)} that are free"
    if n_bytes < STORED_SHARE * free_bytes:
        return DataPlace(True, n_bytes, f"in the memory of the device ({size}, less than {share})")
    return DataPlace(False, 0, f"read from disk ({size} are more than {share} on the device)")
