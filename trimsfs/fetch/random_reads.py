"""Random reads: of a big file that is read at random only what is read is fetched, past the disk."""

import trio

from trimsfs.fetch.access_pattern import AccessPattern
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer

LEAST_CHUNKS = 8
"""A file of fewer chunks is fetched whole, however it is read."""


class RandomReads:
    """Serves random reads from the store, at most *limit* at once. The kernel keeps what they give."""

    def __init__(self, batches: BatchFetcher, scheduler: FlightScheduler, *, limit: int) -> None:
        self._batches = batches
        self._scheduler = scheduler
        self._slots = trio.Semaphore(limit)

    def record(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> bool:
        """A program reads the bytes ``[start, stop)``, in a file with this pattern: whether it may do so at random."""
        if len(blob.states) < LEAST_CHUNKS:
            return False
        pattern.record(start, stop)
        return pattern.random or pattern.jumped

    def are_wise(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> bool:
        """Whether nothing of the bytes ``[start, stop)`` is here or comes, and no more should come than these."""
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
