"""How fast the store gives bytes, as measured of late: how many requests it serves at once, and what a fetch costs."""

import math

import trio

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit
from trimsfs.errors import TransientStoreError

MAX_REQUESTS = 32
REQUEST_MEMORY = 2 << 20
"""Bytes that a request takes in the process that makes it: its buffer."""
LOAD_LATENCY_S = 0.03
LOAD_RATE = 1e8
"""Bytes a second: a guess that stands until something was measured."""


class Throughput:
    """How many bytes a second come while something is under way, of late; None before anything was measured."""

    WINDOW_S = 0.25
    LEAST_BYTES = 4 << 20
    WEIGHT = 0.5

    def __init__(self) -> None:
        self.rate: float | None = None
        self._began = math.inf
        self._bytes = 0

    def busy(self) -> None:
        """Something is under way, after nothing was."""
        self._began = trio.current_time()
        self._bytes = 0

    def add(self, count: int) -> None:
        """*count* bytes have come."""
        self._bytes += count
        elapsed = trio.current_time() - self._began
        if elapsed >= self.WINDOW_S:
            self._measure(elapsed)
            self.busy()

    def idle(self) -> None:
        """Nothing is under way any more."""
        if self._bytes >= self.LEAST_BYTES:
            self._measure(trio.current_time() - self._began)
        self._bytes = 0

    def _measure(self, elapsed_s: float) -> None:
        if elapsed_s > 0:
            now = self._bytes / elapsed_s
            self.rate = now if self.rate is None else self.rate + self.WEIGHT * (now - self.rate)


class StoreSpeed:
    """The ``limit`` of requests and the ``throughput`` of one store, for whoever fetches or weighs a fetch."""

    def __init__(self, *, max_requests: int) -> None:
        self.limit = AdaptiveLimit(maximum=max_requests)
        self.throughput = Throughput()

    def request_failed(self, _error: TransientStoreError) -> None:
        """A request failed and will be tried again: ask for less."""
        self.limit.throttled(trio.current_time())

    def seconds_for(self, size: int) -> float | None:
        """About how long fetching *size* bytes takes; None before anything was fetched."""
        rate = self.throughput.rate
        return None if rate is None else size / rate

    def load_cost(self, size: int) -> float:
        """About how many seconds it takes to fetch *size* bytes again, a request's own time included."""
        return LOAD_LATENCY_S + size / (self.throughput.rate or LOAD_RATE)


def max_requests(memory_limit: int, *, request_memory: int = REQUEST_MEMORY) -> int:
    """How many requests may be under way at once within a limit of memory."""
    return max(1, min(MAX_REQUESTS, memory_limit // 2 // request_memory))
