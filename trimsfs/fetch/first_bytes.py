"""First bytes: in a fleet, those that a reader waits for first come from the store, if that is sooner.

A peer gives whole chunks, once it has them. A program that begins to read does not wait for one.
"""

from collections.abc import Mapping
from contextlib import suppress

import trio
from cachetools import LRUCache

from trimsfs.errors import StoreError
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.flights import Flight, Lane
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob
from trimsfs.types import Buffer

MOST_BYTES = 1 << 20
"""Of a file, as long as none of its chunks is here."""
MOST_BLOBS = 1024
"""Blobs of which the bytes are counted."""


class FirstBytes:
    """Fetches the first bytes of files past the disk, while their chunks are on the way."""

    def __init__(self, batches: BatchFetcher, retrying: Retrying) -> None:
        self._batches = batches
        self._retrying = retrying
        self._counts: LRUCache[str, int] = LRUCache(MOST_BLOBS)

    async def read(self, blob: Blob, start: int, stop: int, flights: Mapping[int, Flight]) -> Buffer | None:
        """The bytes ``[start, stop)`` from the store, None if their flights are as soon or there were enough."""
        count = self._counts.get(blob.token, 0) + stop - start
        if blob.verified_bytes or count > MOST_BYTES or self._retrying.problem(blob.token) is not None:
            return None
        if all(flight.lane is Lane.STORE for flight in flights.values()):
            return None
        self._counts[blob.token] = count
        found: list[Buffer] = []
        async with trio.open_nursery() as nursery:

            async def fetch() -> None:
                with suppress(StoreError):
                    found.append(await self._batches.fetch_range(blob, start, stop))
                    nursery.cancel_scope.cancel()

            nursery.start_soon(fetch)
            for chunk, flight in flights.items():
                first, last = blob.span_of(chunk)
                await flight.until(min(stop, last) - first)
            nursery.cancel_scope.cancel()
        return found[0] if found else None
