"""First bytes: those that a reader waits for come alone from the store, if that is sooner than their chunk.

The server asks for them itself: its connections to the store are open, where a fetch process may have to start. The
chunk may share a slow link with others, and a peer gives whole chunks, once it has them.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.early_heads import HEAD_BYTES, EarlyHeads
from trimsfs.fetch.flights import Flight, Lane, is_there
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer

log = logging.getLogger(__name__)

MOST_BYTES, MOST_SHARE = 1 << 20, 0.01
"""Fetched of a file besides, as long as none of its chunks is here: by one host at most so many bytes, by all hosts
together such a share of the file."""
MOST_HEADS, MOST_BLOBS = 32, 1024
"""How many heads are kept in memory, and blobs of which the bytes are counted."""
LEAST_SIZE = 4 << 20
"""The first bytes of a smaller file are not there much sooner than its last."""
PATIENCE_S = 0.1
"""How long a reader waits for more bytes of a file whose chunks come from the store: they mostly come in order."""


class _Head:
    """The first bytes of a blob, once they have come; ``done`` also if they will not."""

    def __init__(self) -> None:
        self.data: Buffer | None = None
        self.done = trio.Event()


class FirstBytes:
    """Fetches the first bytes of files past the disk, while their chunks are on the way to *hosts*, which it counts.

    Calls *count* with the blob and size of what was asked for before anything was known of the file.
    """

    def __init__(
        self,
        batches: BatchFetcher,
        retrying: Retrying,
        background: Background,
        hosts: Callable[[], int],
        early: EarlyHeads | None,
        count: Callable[[Blob, int], None],
    ) -> None:
        self._batches = batches
        self._retrying = retrying
        self._background = background
        self._hosts = hosts
        self._early = early
        self._count = count
        self._heads: LRUCache[str, _Head] = LRUCache(MOST_HEADS)
        self._counts: LRUCache[str, int] = LRUCache(MOST_BLOBS)

    def expect(self, flight: Flight) -> None:
        """Start to fetch the head of a blob for whoever waits for its first chunk, which a peer is to give."""
        large = flight.blob.generation.size >= LEAST_SIZE
        if flight.chunk == 0 and flight.lane is not Lane.STORE and flight.demanded and large:
            self._begin_head(flight.blob)

    def _begin_head(self, blob: Blob) -> None:
        """Start to fetch the head of a blob of which no byte is here.

        Readers wait for the head from now on: they must not ask for the same bytes.
        """
        if blob.token in self._heads or blob.verified_bytes or self._retrying.problem(blob.token) is not None:
            return
        head = self._heads[blob.token] = _Head()
        self._background.start(self._fill, head, blob)

    async def _fill(self, head: _Head, blob: Blob) -> None:
        try:
            with suppress(StoreError):
                early = None if self._early is None else await self._early.of(blob.generation)
                if early is None:
                    early = await self._batches.fetch_directly(blob, 0, min(HEAD_BYTES, blob.generation.size))
                else:
                    self._count(blob, len(early))
                head.data = early
        except Exception:  # a defect: it ends this request, not the server
            log.exception("%s: first bytes not fetched: internal error", blob.generation.key)
        finally:
            head.done.set()
            if head.data is None:
                self._heads.pop(blob.token, None)

    def landed(self, flight: Flight) -> None:
        """Forget the head of a blob whose first chunk is here: what is checked is read from now on."""
        if flight.chunk == 0:
            self._heads.pop(flight.blob.token, None)

    async def read(
        self, blob: Blob, start: int, stop: int, flights: Mapping[int, Flight], *, alone: bool
    ) -> Buffer | None:
        """The bytes ``[start, stop)`` from the store, None if their flights are as soon or there were enough.

        Those of chunks that come from the store, only if they may come *alone*.
        """
        from_store = all(flight.lane is Lane.STORE for flight in flights.values())
        if (not from_store and blob.verified_bytes) or all(is_there(blob, *each, stop) for each in flights.items()):
            return None
        patience_s = 0.0
        if from_store:
            elsewhere = all(blob.states[chunk] == ChunkState.MISSING for chunk in flights)
            if not (alone and elsewhere) or stop - start > MOST_BYTES or blob.generation.size < LEAST_SIZE:
                return None
            if blob.verified_bytes or any(flight.has_bytes for flight in flights.values()):
                patience_s = PATIENCE_S
            elif stop <= HEAD_BYTES:
                self._begin_head(blob)
        found: list[Buffer] = []
        async with trio.open_nursery() as nursery:

            async def fetch() -> None:
                await trio.sleep(patience_s)
                data = await self._fetched(blob, start, stop)
                if data is not None:
                    found.append(data)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(fetch)
            for chunk, flight in flights.items():
                first, last = blob.span_of(chunk)
                await flight.until(min(stop, last) - first)
            nursery.cancel_scope.cancel()
        return found[0] if found else None

    async def _fetched(self, blob: Blob, start: int, stop: int) -> Buffer | None:
        head = self._heads.get(blob.token) if stop <= HEAD_BYTES else None
        if head is not None:
            await head.done.wait()
            if head.data is not None:
                return memoryview(head.data)[start:stop]
        count = self._counts.get(blob.token, 0) + stop - start
        most = min(MOST_BYTES, int(MOST_SHARE * blob.generation.size / self._hosts()))
        if count > most or self._retrying.problem(blob.token) is not None:
            return None
        self._counts[blob.token] = count
        with suppress(StoreError):
            return await self._batches.fetch_directly(blob, start, stop)
        return None
