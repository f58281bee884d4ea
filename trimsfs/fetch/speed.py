"""The recent speed of the store: how many requests it serves at once, and what a fetch costs."""

import math

import trio

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit
from trimsfs.errors import TransientStoreError

MAX_REQUESTS = 32
REQUEST_MEMORY = 2 << 20
"""Bytes that a request's buffer takes in the process that makes the request."""
LOAD_LATENCY_S = 0.03
LOAD_RATE = 1e8
"""Bytes a second that are assumed before anything was measured."""


class Throughput:
    """The recent rate, in bytes a second, while requests are under way. ``rate`` is None before a measurement."""

    WINDOW_S = 0.25
    LEAST_BYTES = 4 << 20
    WEIGHT = 0.5

    def __init__(self) -> None:
        self.rate: float | None = None
        self._began = math.inf
        self._bytes = 0

    def busy(self) -> None:
        """Begin to measure: the first request is under way."""
        self._began = trio.current_time()
        self._bytes = 0

    def add(self, count: int) -> None:
        """Count bytes that have arrived."""
        self._bytes += count
        elapsed = trio.current_time() - self._began
        if elapsed >= self.WINDOW_S:
            self._measure(elapsed)
            self.busy()

    def idle(self) -> None:
        """End the measurement: no request is under way."""
        if self._bytes >= self.LEAST_BYTES:
            self._measure(trio.current_time() - self._began)
        self._bytes = 0

    def _measure(self, elapsed_s: float) -> None:
        if elapsed_s > 0:
            now = self._bytes / elapsed_s
            self.rate = now if self.rate is None else self.rate + self.WEIGHT * (now - self.rate)


class StoreSpeed:
    """The adaptive ``limit`` of requests to one store, and its ``throughput``."""

    def __init__(self, *, max_requests: int) -> None:
        self.limit = AdaptiveLimit(maximum=max_requests)
        self.throughput = Throughput()

    def request_failed(self, _error: TransientStoreError) -> None:
        """Lower the limit: a request failed and will be retried."""
        self.limit.throttled(trio.current_time())

    def seconds_for(self, size: int) -> float | None:
        """An estimate of the time to fetch *size* bytes; None before anything was fetched."""
        rate = self.throughput.rate
        return None if rate is None else size / rate

    def load_cost(self, size: int) -> float:
        """An estimate of the seconds to refetch *size* bytes, including the latency of a request."""
        return LOAD_LATENCY_S + size / (self.throughput.rate or LOAD_RATE)


def max_requests(memory_limit: int, *, request_memory: int = REQUEST_MEMORY) -> int:
    """The most requests under way at once within *memory_limit* bytes."""
    return max(1, min(MAX_REQUESTS, memory_limit // 2 // request_memory))
