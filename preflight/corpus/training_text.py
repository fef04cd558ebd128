"""The text of the sources, as tokenizers are made from it."""

from __future__ import annotations

from collections.abc import Iterator

from preflight.core.signals import StopFlag
from preflight.corpus.blocks import read_blocks
from preflight.corpus.sources import ScannedSource
from preflight.corpus.split import split_documents
from preflight.tokenization.tiktoken_cutting import find_last_cut

PIECE_BYTES = 2**20  # never changed: a sample is made of such pieces, and vocabularies of samples


class ScannedText:
    """The two parts of scanned sources; see `preflight.tokenization.TrainingText`."""

    def __init__(
        self, scanned: list[ScannedSource], val_split: float, stop: StopFlag | None
    ) -> None:
        self._parts, _ = split_documents(scanned, val_split)
        self._stop = stop

    def count_bytes(self, *splits: str) -> int:
        """Bytes of UTF-8 in these parts."""
        return sum(part.n_bytes for split in splits for part in self._parts[split])

    def read(self, *splits: str) -> Iterator[str]:
        """These parts in pieces that end where words end, where they can.

        Raises:
            PreflightError: code TEXT, when a source has changed; SIGINT or SIGTERM when the stop
                flag says so.
        """
        for split in splits:
            for block in read_blocks(self._parts[split], 0, 0, PIECE_BYTES, find_last_cut):
                if self._stop is not None:
                    self._stop.leave_if_stopping(
                        "stopped while reading the text; nothing was changed"
                    )
                for data, _ in block.texts:
                    text = data if isinstance(data, str) else data.decode()
                    for begin in range(0, len(text), PIECE_BYTES):
                        yield text[begin : begin + PIECE_BYTES]
