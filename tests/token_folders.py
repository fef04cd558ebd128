"""Data folders of given tokens, without a text and a tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from preflight.corpus.shards import DataFolder, Shard, Split


def make_split(folder: Path, ids: np.ndarray, sizes: list[int]) -> Split:
    """Shards of these sizes."""
    folder.mkdir(parents=True)
    shards = []
    for index, part in enumerate(np.split(ids, np.cumsum(sizes)[:-1])):
        path = folder / f"shard_{index:05}.npy"
        np.save(path, part)
        status = path.stat()
        shards.append(Shard(path, len(part), (status.st_size, status.st_mtime_ns)))
    return Split(tuple(shards), len(ids), 1, 3 * len(ids))


def make_folder(
    path: Path, sizes: list[int], dtype: str = "u2", vocab_size: int = 50_257
) -> DataFolder:
    """A training part of shards of these sizes, and one of validation; no id comes twice."""
    n_val = 200
    drawn = np.random.default_rng(sum(sizes)).permutation(vocab_size)[: sum(sizes) + n_val]
    ids = drawn.astype(dtype)
    return DataFolder(
        path,
        cast(Any, None),
        hashlib.sha256(ids.tobytes()).hexdigest(),
        make_split(path / "train", ids[n_val:], sizes),
        make_split(path / "val", ids[:n_val], [n_val]),
        vocab_size,
        np.dtype(dtype),
    )


def read_all(data: DataFolder, split: str = "train") -> np.ndarray:
    """All ids of a part, as int64."""
    return np.concatenate(list(getattr(data, split).open())).astype(np.int64)
