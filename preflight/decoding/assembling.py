"""Text from the bytes of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Text from the bytes of tokens: whole characters, up to the first stop text.

    Where the borders between tokens lie makes no difference: the stop text that is complete
    first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes, *, final: bool = False, cut: bool = False) -> str:
        """Text that is certain by now. Bytes that are not UTF-8 become U+FFFD.

        Args:
            data: the bytes of one more token.
            final: nothing follows, so nothing is held back.
            cut: the text would have gone on: a character that has only begun is left out.
        """
        self._held += self._decoder.decode(data, final and not cut)
        places = [(self._held.find(stop), len(stop)) for stop in self.stops]
        ends = [(start + length, start) for start, length in places if start >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)[1]]
        n_held = 0 if final else max(map(self._count_held, self.stops), default=0)
        n_ready = len(self._held) - n_held
        ready, self._held = self._held[:n_ready], self._held[n_ready:]
        return ready

    def _count_held(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
