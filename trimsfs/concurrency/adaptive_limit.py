"""Adaptive limit: how many requests may be in flight, so that few of them queue."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(slots=True)
class AdaptiveLimit:
    """A limit that follows the store's latency, as TCP Vegas does, and halves when the store throttles.

    Of ``n`` requests in flight, about ``n * (1 - best / latency)`` wait in a queue; ``best`` is the lowest latency seen
    for their size. While few wait, the limit grows by one; when many wait, it shrinks by one. A short queue keeps the
    store busy until the next request arrives.
    """

    maximum: int
    minimum: int = 2
    value: float = 16.0
    _best: dict[int, float] = field(default_factory=dict, init=False)
    _samples: int = field(default=0, init=False)
    _last_cut: float = field(default=float("-inf"), init=False)

    LOW_QUEUE: ClassVar[float] = 4.0
    HIGH_QUEUE: ClassVar[float] = 8.0
    CUT_INTERVAL_S: ClassVar[float] = 1.0
    PROBE_EVERY: ClassVar[int] = 240
    PROBE_SHARE: ClassVar[float] = 0.75

    def __post_init__(self) -> None:
        self.minimum = min(self.minimum, self.maximum)
        self.value = min(self.value, float(self.maximum))

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return int(self.value)

    def best_s(self, size: int) -> float | None:
        """The lowest latency seen of late for requests of *size* bytes; None if there was none."""
        return self._best.get(size)

    def succeeded(self, latency_s: float, under_way: int, *, size: int) -> None:
        """Adjust to a request for *size* bytes that took *latency_s* seconds, one of *under_way* in flight."""
        self._samples += 1
        if self._samples % self.PROBE_EVERY == 0:
            # The store may have become slower for good: measure the best latency again, with a shorter queue.
            self._best.clear()
            self._set(self.value * self.PROBE_SHARE)
        best = self._best[size] = min(self._best.get(size, latency_s), latency_s)
        queued = under_way * (1 - best / latency_s) if latency_s > 0 else 0.0
        if queued > self.HIGH_QUEUE:
            self._set(self.value - 1)
        elif queued < self.LOW_QUEUE and under_way >= self.limit:
            self._set(self.value + 1)

    def throttled(self, now_s: float) -> None:
        """Halve the limit, at most once a second: the store throttled a request, or stalled."""
        if now_s - self._last_cut >= self.CUT_INTERVAL_S:
            self._last_cut = now_s
            self._set(self.value / 2)

    def _set(self, value: float) -> None:
        self.value = max(float(self.minimum), min(float(self.maximum), value))
