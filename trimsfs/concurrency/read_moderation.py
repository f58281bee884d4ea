"""Read moderation: bytes of a slow stream gather before they are read, as packets do in a network card."""

import time

WORTHWHILE = 1 << 16
"""Bytes for which a thread wakes: for fewer, waking takes longer than copying."""
WAITED_S = 0.0005
"""A read that takes longer found nothing there."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.1


class ReadModeration:
    """Pauses between the reads of a stream of *length* bytes, each until enough is there at the rate so far.

    Without it, a slow link wakes the reader for each packet, which takes several times the processor time.
    """

    def __init__(self, length: int) -> None:
        self._left = length
        self._count = 0
        self._since = self._began = time.monotonic()

    def begins(self) -> None:
        """Note that a read begins."""
        self._began = time.monotonic()

    def received(self, count: int) -> None:
        """Note that the read has returned *count* bytes; pause if it had to wait for them."""
        now = time.monotonic()
        self._left -= count
        self._count += count
        if now - self._began < WAITED_S or self._count == 0 or self._left <= 0:
            return
        pause_s = min(WORTHWHILE, self._left) * (now - self._since) / self._count
        self._count, self._since = 0, now
        if pause_s >= SHORTEST_PAUSE_S:
            time.sleep(min(pause_s, LONGEST_PAUSE_S))
