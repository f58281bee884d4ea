"""Read moderation: bytes of a slow stream gather before they are read, as packets do in a network card."""

import time

WORTHWHILE = 1 << 15
"""Bytes for which a thread wakes: half of what a socket holds at least, so that the sender need not wait."""
WAITED_S = 0.0005
"""A read that takes longer found nothing there."""
SETTLED_S = 0.25
"""How long a stream comes before its rate is known: until then, its sender may still find out how fast the link is."""
FORGOTTEN_S = 1.0
"""After how long half of what came counts no more: links become faster."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05


class ReadModeration:
    """Pauses between the reads of a stream of *length* bytes, each until enough is there at the rate of late.

    Without it, a slow link wakes the reader for each packet, which takes several times the processor time.
    """

    def __init__(self, length: int) -> None:
        self._left = length
        self._count = 0
        self._first_at: float | None = None
        self._since = 0.0

    def pause(self, count: int, *, waited: bool) -> None:
        """Count the bytes that came since the last call, and pause if the last read had to *wait* for them."""
        now = time.monotonic()
        self._left -= count
        if self._first_at is None:  # what it waited for does not tell the rate
            self._first_at = self._since = now
            return
        self._count += count
        if not waited or now - self._first_at < SETTLED_S or self._count == 0:
            return
        elapsed_s = now - self._since
        pause_s = min(WORTHWHILE, self._left) * elapsed_s / self._count
        if elapsed_s > FORGOTTEN_S:
            self._since += elapsed_s / 2
            self._count //= 2
        if pause_s >= SHORTEST_PAUSE_S:
            time.sleep(min(pause_s, LONGEST_PAUSE_S))
