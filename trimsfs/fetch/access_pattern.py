"""Access patterns: whether a program reads an open file in order (perhaps several streams at once) or at random."""

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
    """The reads of one open file. If ``random``, fetch only what the program reads. ``jumped`` says that the last read
    neither continued another one nor began the file.

    *others* are the ends of recent reads of the same file by any program, and get those of this one. A read may
    continue one of them: of programs that map a file, the kernel reads each page for one.
    """

    def __init__(self, others: deque[int] | None = None) -> None:
        self.random = self.jumped = False
        self._ends = new_ends()
        self._others = new_ends() if others is None else others
        self._went_on: deque[bool] = deque(maxlen=WINDOW)
        self._read: dict[int, int] = {}

    def record(self, start: int, stop: int) -> None:
        """Record a read of the bytes ``[start, stop)`` that has to wait for them."""
        goes_on = self.passed(start, stop)
        self._went_on.append(goes_on)
        self.jumped = not goes_on and start > 0
        if len(self._went_on) < WINDOW:
            return
        together = sum(self._went_on)
        if together <= RANDOM:
            self.random = True
        elif together >= IN_ORDER:
            self.random = False

    def passed(self, start: int, stop: int) -> bool:
        """Note a read of the bytes ``[start, stop)``, which may be here; whether it continues another one."""
        gap = max(LEAST_GAP, GAP_SIZES * (stop - start))
        own, others = _continue(self._ends, start, stop, gap), _continue(self._others, start, stop, gap)
        return own or others

    def dense(self, chunk: int, size: int, *, chunk_size: int) -> bool:
        """Whether a chunk is worth fetching whole, now that *size* more bytes of it are read."""
        self._read[chunk] = self._read.get(chunk, 0) + size
        return self._read[chunk] * DENSE_SHARE >= chunk_size


def new_ends() -> deque[int]:
    """The ends of recent reads, of which there are none yet."""
    return deque(maxlen=STREAMS)


def _continue(ends: deque[int], start: int, stop: int, gap: int) -> bool:
    before = next((end for end in ends if abs(start - end) <= gap), None)
    if before is not None:
        ends.remove(before)
    ends.append(stop)
    return before is not None
