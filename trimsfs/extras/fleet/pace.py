"""The pace of the bodies that members send at the same time: one that lags behind those of the others is too slow."""

import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

JUDGED_AFTER_S = 2.5
"""How long a body comes before its rate tells something. After one second, one in ten of many that share full links has
lagged behind the others."""
LASTS_S = 15.0
"""How long the rate of a body counts that has come."""
MOST_KNOWN, LEAST_KNOWN = 64, 1 << 18
"""How many bodies are remembered that have come, and the bytes of the smallest: others tell no rate."""


class Body:
    """A body of *length* bytes that a member sends, of which ``received`` are here."""

    def __init__(self, member: str, length: int) -> None:
        self.member = member
        self.length = length
        self.received = 0
        self.began = time.monotonic()

    def rate(self, now: float) -> float:
        """Its bytes a second so far."""
        return self.received / max(now - self.began, 0.001)


class Pace:
    """Compares the bodies that a process receives in its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming = set[Body]()
        self._came = deque[tuple[float, str, float]](maxlen=MOST_KNOWN)

    @contextmanager
    def body(self, member: str, length: int) -> Iterator[Body]:
        """A body that comes during the block."""
        body = Body(member, length)
        with self._lock:
            self._coming.add(body)
        try:
            yield body
        finally:
            now = time.monotonic()
            with self._lock:
                self._coming.discard(body)
                if body.received >= LEAST_KNOWN:
                    self._came.append((now, member, body.rate(now)))

    def lags(self, body: Body, lag: float) -> bool:
        """Whether the rest of a body will take more than *lag* times as long as all of it does from others."""
        now = time.monotonic()
        if now - body.began < JUDGED_AFTER_S:
            return False
        usual = self._usual_rate(now, body.member)
        return usual is not None and (body.length - body.received) * usual > lag * body.length * body.rate(now)

    def _usual_rate(self, now: float, without: str) -> float | None:
        """The rate of a body of other members: the median of these, of each its mean of late."""
        rates = defaultdict[str, list[float]](list)
        with self._lock:
            for ended, member, rate in self._came:
                if ended > now - LASTS_S:
                    rates[member].append(rate)
            for body in self._coming:
                if now - body.began >= JUDGED_AFTER_S:
                    rates[body.member].append(body.rate(now))
        rates.pop(without, None)
        return statistics.median(map(statistics.fmean, rates.values())) if rates else None
