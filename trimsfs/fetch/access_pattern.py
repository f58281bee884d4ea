"""Access patterns: whether programs read an open file in order (perhaps several streams at once) or at random."""

from collections import deque

STREAMS = 32
"""Ends of recent reads that are remembered: another read may continue there."""
LEAST_GAP, GAP_SIZES = 128 << 10, 2
"""The gap, in bytes or in multiples of a read's size, within which a read still continues another: the kernel's
readahead requests overtake each other."""
WINDOW = 8
"""Recent reads that decide."""
RANDOM, IN_ORDER = 1, 4
"""Of these, how many continue another one: at most RANDOM means random reads, at least IN_ORDER reads in order."""
DENSE_SHARE = 2
"""A chunk is fetched whole once random reads have covered this fraction (1/N) of it."""


class AccessPattern:
    """The reads of one file, by all programs. If ``random``, fetch only what they read. ``jumped`` says that the last
    read neither continued another one nor began the file."""

    def __init__(self) -> None:
        self.random = self.jumped = False
        self._ends: deque[int] = deque(maxlen=STREAMS)
        self._went_on: deque[bool] = deque(maxlen=WINDOW)
        self._read: dict[int, int] = {}

    def record(self, start: int, stop: int) -> None:
        """Record a read of the bytes ``[start, stop)``."""
        gap = max(LEAST_GAP, GAP_SIZES * (stop - start))
        before = next((end for end in self._ends if abs(start - end) <= gap), None)
        if before is not None:
            self._ends.remove(before)
        self._ends.append(stop)
        self._went_on.append(before is not None)
        self.jumped = before is None and start > 0
        if len(self._went_on) < WINDOW:
            return
        together = sum(self._went_on)
        if together <= RANDOM:
            self.random = True
        elif together >= IN_ORDER:
            self.random = False

    def dense(self, chunk: int, size: int, *, chunk_size: int) -> bool:
        """Whether a chunk is worth fetching whole, now that *size* more bytes of it are read."""
        self._read[chunk] = self._read.get(chunk, 0) + size
        return self._read[chunk] * DENSE_SHARE >= chunk_size
