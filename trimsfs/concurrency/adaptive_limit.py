"""An adaptive limit of concurrent requests: as many as the store serves without queueing them."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(slots=True)
class AdaptiveLimit:
    """A limit that follows the store's latency (as TCP Vegas does) and halves when it is throttled.

    With ``n`` requests under way, each taking ``latency`` where the best of its size ever seen took ``best``, about
    ``n * (1 - best / latency)`` of them wait in a queue somewhere. Few waiting: there is room for one more. Many: one
    less. Some queue is wanted: it keeps the store busy while the next request is on its way.
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
        """The number of requests that may be under way now."""
        return int(self.value)

    def succeeded(self, latency_s: float, under_way: int, *, size: int) -> None:
        """A request for *size* bytes took *latency_s* seconds while *under_way* (itself included) were running."""
        self._samples += 1
        if self._samples % self.PROBE_EVERY == 0:
            # The store may have become slower for good: learn its best latency anew, with a shorter queue.
            self._best.clear()
            self._set(self.value * self.PROBE_SHARE)
        best = self._best[size] = min(self._best.get(size, latency_s), latency_s)
        queued = under_way * (1 - best / latency_s) if latency_s > 0 else 0.0
        if queued > self.HIGH_QUEUE:
            self._set(self.value - 1)
        elif queued < self.LOW_QUEUE and under_way >= self.limit:
            self._set(self.value + 1)

    def throttled(self, now_s: float) -> None:
        """The store refused a request for load, or stalled: halve, at most once a second."""
        if now_s - self._last_cut >= self.CUT_INTERVAL_S:
            self._last_cut = now_s
            self._set(self.value / 2)

    def _set(self, value: float) -> None:
        self.value = max(float(self.minimum), min(float(self.maximum), value))
