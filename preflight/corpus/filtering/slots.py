"""A hash table in one numpy array: from keys of 64 bits to numbers of documents, several a key."""

from __future__ import annotations

import numpy as np

_MAX_LOAD = 2 / 3  # of linear probing: about five slots are read for a key that is not there
_FIRST_SLOTS = 4096


class SlotTable:
    """Open addressing with linear probing; nothing is ever deleted.

    A slot holds a number plus one in its low bits, and the low bits of the key above them: it may
    propose a number for a key by chance, so that the caller compares what it finds.

    Args:
        slot: uint32 or uint64.
        number_bits: of a slot, for the number.
        max_bytes: of the array.
    """

    def __init__(self, slot: type[np.unsignedinteger], number_bits: int, max_bytes: int) -> None:
        self._slot, self._bits, self._max_bytes = slot, number_bits, max_bytes
        self._slots = np.zeros(min(_FIRST_SLOTS, self._max_slots), slot)
        self._n_used = 0

    @property
    def n_bytes(self) -> int:
        """Memory of the array."""
        return self._slots.nbytes

    @property
    def max_number(self) -> int:
        """The largest number that a slot can hold."""
        return 2**self._bits - 2

    @property
    def _max_slots(self) -> int:
        return self._max_bytes // np.dtype(self._slot).itemsize

    def has_room(self, n_keys: int) -> bool:
        """Whether so many keys fit into the present array."""
        return self._n_used + n_keys <= self._slots.size * _MAX_LOAD

    def grow(self, n_keys: int) -> bool:
        """Empty the table, twice as large or more, for so many keys beside those it had.

        Returns: whether `max_bytes` allows it; otherwise nothing is changed.
        """
        n_needed = count_slots(self._n_used + n_keys)
        if n_needed > self._max_slots:
            return False
        size = min(max(n_needed, 2 * self._slots.size), self._max_slots)
        self._slots, self._n_used = np.zeros(0, self._slot), 0  # the old one goes before
        self._slots = np.zeros(size, self._slot)
        return True

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the table proposes for uint64 keys: places in `keys`, and for each a number."""
        places, marks = self._locate(keys)
        waiting = np.arange(len(keys))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        while len(waiting):
            slots = self._slots[places[waiting]]
            is_hit = (slots >> self._bits == marks[waiting]) & (slots != 0)
            if is_hit.any():
                numbers = slots[is_hit] & self._slot(2**self._bits - 1)
                found.append((waiting[is_hit], numbers.astype(np.int64) - 1))
            waiting = waiting[slots != 0]
            places[waiting] = (places[waiting] + 1) % self._slots.size
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate([row[0] for row in found]), np.concatenate([row[1] for row in found])

    def insert(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """File each number under its key. There is room: see `has_room`."""
        places, marks = self._locate(keys)
        values = (marks << self._slot(self._bits)) | (numbers + 1).astype(self._slot)
        waiting = np.arange(len(keys))
        while len(waiting):
            wanted = places[waiting]
            is_free = self._slots[wanted] == 0
            # Of several that want one slot, the last that is written has it.
            self._slots[wanted[is_free]] = values[waiting[is_free]]
            has_it = is_free & (self._slots[wanted] == values[waiting])
            waiting = waiting[~has_it]
            places[waiting] = (places[waiting] + 1) % self._slots.size
        self._n_used += len(keys)

    def _locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first slot of each key, and its low bits as a slot has them."""
        high = keys >> np.uint64(32)
        places = (high * np.uint64(self._slots.size) >> np.uint64(32)).astype(np.int64)
        n_mark_bits = 8 * np.dtype(self._slot).itemsize - self._bits
        return places, (keys & np.uint64(2**n_mark_bits - 1)).astype(self._slot)


def count_slots(n_keys: int) -> int:
    """Slots that so many keys need."""
    return int(n_keys / _MAX_LOAD) + 1
