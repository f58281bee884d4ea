"""Random reads: if a program reads a big file at random, only the bytes that it reads are fetched, past the disk."""

import trio

from trimsfs.fetch.access_pattern import AccessPattern
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer

LEAST_CHUNKS = 8
"""A file of fewer chunks is fetched whole, with any access pattern."""


class RandomReads:
    """Serves random reads from the store, at most *limit* at once. Only the kernel caches the result."""

    def __init__(self, batches: BatchFetcher, scheduler: FlightScheduler, *, limit: int) -> None:
        self._batches = batches
        self._scheduler = scheduler
        self._slots = trio.Semaphore(limit)

    def record(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> bool:
        """Record a read of the bytes ``[start, stop)`` in its *pattern*; whether the read may be a random one."""
        if len(blob.states) < LEAST_CHUNKS:
            return False
        pattern.record(start, stop)
        return pattern.random or pattern.jumped

    def are_wise(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> bool:
        """Whether to fetch only the bytes ``[start, stop)``: none of their chunks is here, in flight or worth fetching
        whole."""
        return pattern.random and all(
            blob.states[chunk] == ChunkState.MISSING
            and self._scheduler.flight(blob, chunk) is None
            and not pattern.dense(chunk, stop - start, chunk_size=blob.chunk_size)
            for chunk in blob.chunks_of(start, stop)
        )

    async def read(self, blob: Blob, start: int, stop: int) -> Buffer:
        """The bytes ``[start, stop)`` from the store. Raises as ``Fetcher.read``."""
        async with self._slots:
            return await self._batches.fetch_range(blob, start, stop)
