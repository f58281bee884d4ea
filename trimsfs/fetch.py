"""Fetching: what is missing, one flight for whoever waits, demanded chunks before prefetched ones.

A *flight* makes one chunk readable: it checks the bytes an earlier server left, or gets them from the store.
Every reader that needs the chunk waits for the same flight. When nobody waits, the rest of the objects being
read is prefetched.
"""

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

import trio

from trimsfs.concurrency import AdaptiveLimit
from trimsfs.errors import (
    CacheFullError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.ranges import chunk_length, chunk_span, chunks_of
from trimsfs.stores.base import Store
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk import DiskTier
from trimsfs.types import CHUNK_SIZE

log = logging.getLogger(__name__)

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStatistics:
    """Counts since the server started, and what is under way now."""

    fetched_bytes: int
    fetched_chunks: int
    failed_chunks: int
    verified_chunks: int
    uncached_chunks: int
    in_flight: int
    waiting: int
    request_limit: int


class _Flight:
    """One chunk on its way. ``data`` is set when the chunk could not be kept in the blob."""

    def __init__(self, blob: Blob, chunk: int, enqueued: float) -> None:
        self.blob = blob
        self.chunk = chunk
        self.enqueued = enqueued
        self.done = trio.Event()
        self.error: StoreError | None = None
        self.data: memoryview | None = None


class _Prefetch:
    """The chunks of one blob still to prefetch, from the last demanded one onward and round.

    ``holders`` counts the handles and commands that want it to go on; ``touched`` tells that bytes were asked for.
    """

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.holders = 0
        self.touched = False
        self.cursor = 0
        self.left = len(blob.states)

    def next_chunk(self) -> int | None:
        """The next chunk that is not verified; None when there is none left."""
        states = self.blob.states
        while self.left > 0:
            chunk = self.cursor
            self.cursor = (chunk + 1) % len(states)
            self.left -= 1
            if states[chunk] != ChunkState.VERIFIED:
                return chunk
        return None

    def demand(self, chunk: int) -> None:
        """A reader is at *chunk*: what follows it is the most likely to be wanted next."""
        self.touched = True
        self.cursor = (chunk + 1) % len(self.blob.states)
        self.left = len(self.blob.states)


class Fetcher:
    """Makes bytes of blobs readable. All memory for chunks on their way comes from one bounded pool.

    Invariants: ``_flights`` holds a flight from its demand or start until it is done; a started flight holds a user of
    its blob and one buffer; ``_under_way`` counts started flights and never exceeds the pool.
    """

    def __init__(self, store: Store, disk: DiskTier, *, memory_limit: int, retry_deadline_s: float) -> None:
        self._store = store
        self._disk = disk
        self._retry_deadline_s = retry_deadline_s
        buffers = max_requests(memory_limit)
        self._kept_limit = memory_limit // CHUNK_SIZE - buffers
        self._limit = AdaptiveLimit(maximum=buffers)
        self._buffers: list[memoryview] = []
        self._flights: dict[tuple[str, int], _Flight] = {}
        self._demanded: deque[_Flight] = deque()
        self._prefetches: OrderedDict[str, _Prefetch] = OrderedDict()
        self._kept: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._under_way = 0
        self._succeeded_at = float("-inf")
        self._fetched_bytes = self._fetched = self._failed = self._verified = self._uncached = 0

    def statistics(self) -> FetchStatistics:
        return FetchStatistics(
            fetched_bytes=self._fetched_bytes,
            fetched_chunks=self._fetched,
            failed_chunks=self._failed,
            verified_chunks=self._verified,
            uncached_chunks=self._uncached,
            in_flight=self._under_way,
            waiting=len(self._demanded),
            request_limit=self._limit.limit,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry the flights, for as long as the server runs."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def store_failed(self, error: TransientStoreError) -> None:
        """A request failed and will be tried again: ask for less."""
        del error
        self._limit.throttled(trio.current_time())

    async def read(self, blob: Blob, start: int, stop: int) -> Buffer:
        """The bytes ``[start, stop)`` of a blob that the caller uses; waits until they are here and verified.

        Raises ObjectChangedError when the store has replaced the object, StoreUnavailableError or
        StoreAccessError when it cannot give the bytes.
        """
        if blob.readable(start, stop):
            return blob.view(start, stop)
        chunks = chunks_of(start, stop)
        prefetch = self._prefetches.get(blob.token)
        if prefetch is not None:
            prefetch.demand(chunks[-1])
        flights = {chunk: self._demand(blob, chunk) for chunk in chunks if blob.states[chunk] != ChunkState.VERIFIED}
        self._pump()
        pieces: list[Buffer] = []
        for chunk in chunks:
            first, last = chunk_span(chunk, blob.generation.size)
            low, high = max(start, first), min(stop, last)
            flight = flights.get(chunk)
            if flight is not None:
                await flight.done.wait()
                if flight.error is not None:
                    raise flight.error.with_traceback(None)
                if flight.data is not None:
                    pieces.append(flight.data[low - first : high - first])
                    continue
            pieces.append(blob.view(low, high))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def hold(self, blob: Blob) -> None:
        """The blob is open: once bytes of it are asked for, prefetch the rest."""
        prefetch = self._prefetches.get(blob.token)
        if prefetch is None:
            prefetch = self._prefetches[blob.token] = _Prefetch(blob)
        prefetch.holders += 1

    def unhold(self, blob: Blob) -> None:
        """The opposite of `hold`: after the last one, what has not been started is not fetched."""
        prefetch = self._prefetches[blob.token]
        prefetch.holders -= 1
        if prefetch.holders == 0:
            del self._prefetches[blob.token]

    async def fetch_all(self, blob: Blob) -> None:
        """Make a whole blob readable from disk. Raises as `read` does, and CacheFullError."""
        window = deque[_Flight]()
        for chunk in range(len(blob.states)):
            if blob.states[chunk] == ChunkState.VERIFIED:
                continue
            # What is kept in memory is fetched again: there may be room on the disk by now.
            self._kept.pop((blob.token, chunk), None)
            window.append(self._demand(blob, chunk))
            self._pump()
            if len(window) >= self._limit.limit:
                await self._landed(window.popleft())
        while window:
            await self._landed(window.popleft())

    async def _landed(self, flight: _Flight) -> None:
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error.with_traceback(None)
        if flight.data is not None:
            raise CacheFullError(
                f"{flight.blob.generation.key}: no room in the cache: "
                "evict or unpin models, raise --cache-size or lower --min-free"
            )

    def _demand(self, blob: Blob, chunk: int) -> _Flight:
        """The flight of a chunk, queued as wanted by somebody; done already if its bytes are kept in memory."""
        key = (blob.token, chunk)
        flight = self._flights.get(key)
        if flight is None:
            if key in self._kept:
                self._kept.move_to_end(key)
                flight = _Flight(blob, chunk, trio.current_time())
                flight.data = self._kept[key]
                flight.done.set()
                return flight
            flight = self._new_flight(blob, chunk)
            self._demanded.append(flight)
        return flight

    def _new_flight(self, blob: Blob, chunk: int) -> _Flight:
        flight = self._flights[blob.token, chunk] = _Flight(blob, chunk, trio.current_time())
        blob.users += 1
        return flight

    def _pump(self) -> None:
        """Start flights while there is room for them; called whenever there is more work or more room."""
        while self._nursery is not None and self._under_way < self._limit.limit:
            flight = self._next_flight()
            if flight is None:
                return
            self._under_way += 1
            self._nursery.start_soon(self._fly, flight)

    def _next_flight(self) -> _Flight | None:
        if self._demanded:
            return self._demanded.popleft()
        for token, prefetch in list(self._prefetches.items()):
            if not prefetch.touched or not prefetch.blob.attached or self._disk.full:
                continue
            while (chunk := prefetch.next_chunk()) is not None:
                if (token, chunk) not in self._flights:
                    self._prefetches.move_to_end(token)
                    return self._new_flight(prefetch.blob, chunk)
        return None

    async def _fly(self, flight: _Flight) -> None:
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(CHUNK_SIZE))
        blob, chunk = flight.blob, flight.chunk
        try:
            if not await self._verify(blob, chunk, buffer):
                data = buffer[: chunk_length(chunk, blob.generation.size)]
                await self._get(blob, chunk, data)
                if not await self._disk.store_chunk(blob, chunk, data):
                    flight.data = data
                    self._keep((blob.token, chunk), data)
        except StoreError as error:
            log.error("%s: chunk %d: %s", blob.generation.key, chunk, error)
            self._fail(flight, error)
        except Exception:
            log.exception("%s: chunk %d", blob.generation.key, chunk)
            self._fail(flight, StoreUnavailableError(f"{blob.generation.key}: internal error"))
        finally:
            if flight.data is None:
                self._buffers.append(buffer)
                if flight.error is None and blob.states[chunk] != ChunkState.VERIFIED:
                    flight.error = StoreUnavailableError(f"{blob.generation.key}: server stopping")
            self._land(flight)
            self._under_way -= 1
            self._pump()

    async def _verify(self, blob: Blob, chunk: int, buffer: memoryview) -> bool:
        """Whether the bytes an earlier server left are here and right."""
        if blob.states[chunk] != ChunkState.UNVERIFIED:
            return False
        verified = await self._disk.verify_chunk(blob, chunk, buffer)
        self._verified += verified
        return verified

    async def _get(self, blob: Blob, chunk: int, data: memoryview) -> None:
        """Fill *data* with the chunk from the store."""
        began, under_way = trio.current_time(), self._under_way
        offset, _ = chunk_span(chunk, blob.generation.size)
        try:
            version = await self._read(blob, offset, data)
        except ObjectNotFoundError as error:
            raise ObjectChangedError(f"{blob.generation.key} has been deleted") from error
        self._succeeded_at = trio.current_time()
        if len(data) == CHUNK_SIZE:
            self._limit.succeeded(trio.current_time() - began, under_way)
        if version is not None:
            blob.generation = replace(blob.generation, version_id=version)
        self._fetched_bytes += len(data)
        self._fetched += 1

    async def _read(self, blob: Blob, offset: int, data: memoryview) -> str | None:
        generation = blob.generation
        try:
            return await self._store.read_into(generation, offset, data)
        except (ObjectChangedError, ObjectNotFoundError):
            if generation.version_id is None:
                raise
        # The version is gone, but the newest may have the same content.
        return await self._store.read_into(replace(generation, version_id=None), offset, data)

    def _keep(self, key: tuple[str, int], data: memoryview) -> None:
        """Keep a chunk that is not in its blob in memory, in place of the least recently used such one."""
        self._uncached += 1
        self._kept[key] = data
        while len(self._kept) > self._kept_limit:
            self._kept.popitem(last=False)

    def _fail(self, flight: _Flight, error: StoreError) -> None:
        self._failed += 1
        flight.error = error
        prefetch = self._prefetches.get(flight.blob.token)
        if prefetch is not None:
            prefetch.touched = False
        if not isinstance(error, StoreUnavailableError):
            return
        # Whoever has queued for as long as the store has failed is not made to wait for a failure of his own.
        patience = trio.current_time() - self._retry_deadline_s
        if self._succeeded_at > patience:
            return  # the store serves other objects: it is this one that fails
        while self._demanded and self._demanded[0].enqueued <= patience:
            waiting = self._demanded.popleft()
            waiting.error = error
            self._land(waiting)

    def _land(self, flight: _Flight) -> None:
        del self._flights[flight.blob.token, flight.chunk]
        flight.done.set()
        self._disk.release(flight.blob)


def max_requests(memory_limit: int) -> int:
    """How many chunks may be on their way at once; the rest of the memory keeps chunks the disk has no room for."""
    return max(1, memory_limit // CHUNK_SIZE * 3 // 4)
