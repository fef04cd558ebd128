"""How far a preparation has come."""

from __future__ import annotations

import time

from tqdm import tqdm

from preflight.core.log import is_progress_shown, log
from preflight.core.units import format_bytes


class Progress:
    """A bar in bytes with the time left on a terminal; elsewhere a plain line now and then."""

    EVERY_SECONDS = 5.0

    def __init__(
        self, total: int, done: int = 0, *, doing: str = "preparing", items: str = "documents"
    ) -> None:
        """`total`: bytes of the work; `done`: those that an earlier run finished."""
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=doing,
            disable=not is_progress_shown(),
        )
        self._doing, self._items = doing, items
        self._total, self._first, self._done = total, done, done
        self._began = self._said = time.monotonic()

    def add(self, n_bytes: int, n_items: int) -> None:
        """So many bytes more are done, and so many items in all."""
        self._bar.set_postfix_str(f"{n_items:,} {self._items}", refresh=False)
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self.EVERY_SECONDS:
            self._said = now
            rate = max(self._done - self._first, 1) / (now - self._began)
            log.info(
                f"{self._doing}: {format_bytes(self._done)} of {format_bytes(self._total)}, "
                f"{format_bytes(rate)}/s, {n_items:,} {self._items}, "
                f"{max(0, self._total - self._done) / rate:.0f} s left"
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
