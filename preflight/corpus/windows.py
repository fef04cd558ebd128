"""Windows of tokens: their length and stride, how many there are, and the order of an epoch.

A window is T + 1 tokens: the inputs, and the same shifted by one. T is the context length or
`--window`, or less where the whole split is shorter. Windows of an epoch begin a stride apart,
which is T unless `--overlap` makes it shorter; each epoch shifts them by another offset, so that
the model does not see the same cuts again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.settings import TrainingSettings


def choose_window(n_tokens: int, context_length: int) -> int:
    """Tokens of a window: `context_length`, or all but one of a split that is shorter."""
    return max(1, min(context_length, n_tokens - 1))


def choose_stride(window_tokens: int, overlap: float) -> int:
    """Tokens from the beginning of a window to that of the next."""
    return max(1, round(window_tokens * (1 - overlap)))


def count_windows(n_tokens: int, context_length: int, overlap: float = 0.0) -> int:
    """Windows in one epoch of `n_tokens`, at least one.

    Every offset below the stride leaves room for all of them, where there are more.
    """
    window = choose_window(n_tokens, context_length)
    return max(1, (n_tokens - window) // choose_stride(window, overlap))


@dataclass(frozen=True)
class RunWindows:
    """The windows of a run's data: tokens, stride, and how many there are in each part."""

    window_tokens: int
    stride_tokens: int
    n_train: int
    n_val: int
    mean_tokens: float | None = None  # of chats, which differ in length


def count_run_windows(
    data: DataFolder, training: TrainingSettings, context_length: int
) -> RunWindows:
    """What `build_plan` needs to know. Windows of the validation part never overlap.

    Chats are windows of different lengths; the longest one counts.
    """
    if isinstance(data, ChatData):
        longest = data.longest_tokens
        return RunWindows(
            longest, longest, data.n_rows, data.facts.counts.n_rows - data.n_rows, data.mean_tokens
        )
    longest = training.choose_window(context_length)
    window = choose_window(data.train.n_tokens, longest)
    return RunWindows(
        window,
        choose_stride(window, training.overlap),
        count_windows(data.train.n_tokens, longest, training.overlap),
        count_windows(data.val.n_tokens, longest),
    )


@dataclass(frozen=True)
class Epoch:
    """One pass over the windows."""

    number: int
    offset: int  # tokens left out before the first window
    order: np.ndarray  # (n_windows,) which window comes when


def build_epoch(
    n_tokens: int,
    context_length: int,
    seed: int,
    fingerprint: str,
    number: int,
    overlap: float = 0.0,
) -> Epoch:
    """Order and offset of one epoch: a function of the arguments only.

    They come from Philox's raw 64-bit draws: NumPy keeps those for ever, unlike its permutations
    (NEP 19), so that a run can be continued under another NumPy.
    """
    window = choose_window(n_tokens, context_length)
    stride = choose_stride(window, overlap)
    n_windows = count_windows(n_tokens, context_length, overlap)
    digest = hashlib.sha256(f"{seed} {fingerprint} {number}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(n_windows + 1)
    room = min(stride - 1, n_tokens - 1 - window - (n_windows - 1) * stride)
    return Epoch(number, int(draws[0] % (room + 1)), np.argsort(draws[1:], kind="stable"))


class WindowOrder:
    """Where the windows of a split begin, by the global index of the sample."""

    def __init__(
        self, n_tokens: int, context_length: int, overlap: float, seed: int, fingerprint: str
    ) -> None:
        self.window = choose_window(n_tokens, context_length)
        self.stride = choose_stride(self.window, overlap)
        self.n_windows = count_windows(n_tokens, context_length, overlap)
        self._source = (n_tokens, context_length, seed, fingerprint)
        self._overlap = overlap

    def list_starts(self, number: int) -> np.ndarray:
        """(n_windows,) int64: the first token of each window of an epoch, in the epoch's order."""
        epoch = build_epoch(*self._source, number, self._overlap)
        return epoch.order * self.stride + epoch.offset
