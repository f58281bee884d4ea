"""How a program reads an open file: in order, perhaps in several places at once, or at random."""

from collections import deque

STREAMS = 32
"""Places in a file that are remembered, at which reads may go on."""
LEAST_GAP, GAP_SIZES = 128 << 10, 2
"""Bytes that a read may skip and still go on, or so many times its own size: the kernel's reads ahead overtake each
other."""
WINDOW = 8
"""Reads that are looked at."""
RANDOM, IN_ORDER = 1, 4
"""Of these, those that go on where another ended: at most so many mean random reads, so many mean reads in order."""
DENSE_SHARE = 2
"""A chunk of which one byte in so many was read by itself is fetched whole."""


class AccessPattern:
    """The reads of one open file. ``random`` tells that it should be fetched by what is read of it, not whole.
    ``jumped`` tells that the last read neither went on where another ended nor began the file."""

    def __init__(self) -> None:
        self.random = self.jumped = False
        self._ends: deque[int] = deque(maxlen=STREAMS)
        self._went_on: deque[bool] = deque(maxlen=WINDOW)
        self._read: dict[int, int] = {}

    def record(self, start: int, stop: int) -> None:
        """The program reads the bytes ``[start, stop)``."""
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
        """Whether so much of a chunk is read, with *size* bytes more, that the rest of it may as well come."""
        self._read[chunk] = self._read.get(chunk, 0) + size
        return self._read[chunk] * DENSE_SHARE >= chunk_size
