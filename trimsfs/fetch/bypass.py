"""Bytes that readers get past the disk, as that is sooner or cheaper than by their chunk.

A read that must wait takes the first way that serves it:

- `RandomReads`: if the program reads a big file at random, nothing but these bytes is fetched.
- `FirstBytes`: else the chunk is fetched, and the bytes that the program waits for may come before it. Those of a
  file's head may have been asked for before its open: `EarlyHeads`.
- `UncachedChunks`: the chunk itself, in memory, if the disk has no room for it.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError
from trimsfs.fetch.flights import Flight, Lane, is_there
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.fetch.store_requests import StoreRequests
from trimsfs.stores.base import Head, Peekable
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer, Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

STREAMS = 32
"""Ends of recent reads that are remembered: another read may continue there."""
LEAST_GAP, GAP_SIZES = 128 << 10, 2
"""The gap, in bytes or in multiples of a read's size, within which a read still continues another: the kernel's
readahead requests overtake each other."""
WINDOW = 8
"""Recent reads that decide."""
RANDOM, IN_ORDER = 1, 4
"""Of these, how many continue another one: at most RANDOM means random reads, at least IN_ORDER reads in order."""
DENSE_SHARE = 2
"""A chunk is fetched whole once random reads have covered this fraction (1/N) of it."""
LEAST_CHUNKS = 8
"""A file of fewer chunks is fetched whole, with any access pattern."""
HEAD_BYTES = 128 << 10
"""What comes of a file before its chunks: the kernel's first read asks for no more."""
MOST_HEADS = 32
"""How many heads are kept in memory, of those asked for early and of those that readers wait for."""
MOST_AT_ONCE = 2
"""Listings need the same threads, and others wait for those."""
EARLY_PATIENCE_S = 0.5
"""How long a reader waits for a head that is on its way, before it asks for one itself."""
MOST_BYTES, MOST_SHARE = 1 << 20, 0.01
"""Most bytes that a host fetches of a file besides its chunks, while none of these is here. MOST_SHARE limits all hosts
together, as a share of the file."""
MOST_BLOBS = 1024
"""How many blobs there are of which the bytes are counted."""
LEAST_SIZE = 4 << 20
"""The first bytes of a smaller file are not there much sooner than its last."""
PATIENCE_S = 0.1
"""How long a reader waits for more bytes of a file whose chunks come from the store: they mostly come in order."""


class AccessPattern:
    """The reads of one open file: in order, perhaps as several streams at once, or at random.

    If ``random``, fetch only what the program reads. ``jumped`` says that the last read neither continued another one
    nor began the file.

    *others* are the ends of recent reads of the same file by any program, and get those of this one. A read may
    continue one of them: of programs that map a file, the kernel reads each page for one.
    """

    def __init__(self, others: deque[int] | None = None) -> None:
        self.random = self.jumped = False
        self._ends = new_ends()
        self._others = new_ends() if others is None else others
        self._went_on: deque[bool] = deque(maxlen=WINDOW)
        self._read: dict[int, int] = {}

    def record(self, start: int, stop: int) -> None:
        """Record a read of the bytes ``[start, stop)`` that has to wait for them."""
        goes_on = self.passed(start, stop)
        self._went_on.append(goes_on)
        self.jumped = not goes_on and start > 0
        if len(self._went_on) < WINDOW:
            return
        together = sum(self._went_on)
        if together <= RANDOM:
            self.random = True
        elif together >= IN_ORDER:
            self.random = False

    def passed(self, start: int, stop: int) -> bool:
        """Note a read of the bytes ``[start, stop)``, which may be here; whether it continues another one."""
        gap = max(LEAST_GAP, GAP_SIZES * (stop - start))
        own, others = _continue(self._ends, start, stop, gap), _continue(self._others, start, stop, gap)
        return own or others

    def dense(self, chunk: int, size: int, *, chunk_size: int) -> bool:
        """Whether a chunk is worth fetching whole, now that *size* more bytes of it are read."""
        self._read[chunk] = self._read.get(chunk, 0) + size
        return self._read[chunk] * DENSE_SHARE >= chunk_size


def new_ends() -> deque[int]:
    """The ends of recent reads, of which there are none yet."""
    return deque(maxlen=STREAMS)


def _continue(ends: deque[int], start: int, stop: int, gap: int) -> bool:
    before = next((end for end in ends if abs(start - end) <= gap), None)
    if before is not None:
        ends.remove(before)
    ends.append(stop)
    return before is not None


class RandomReads:
    """Serves random reads of big files from the store, at most *limit* at once. Only the kernel caches the result."""

    def __init__(self, requests: StoreRequests, scheduler: FlightScheduler, *, limit: int) -> None:
        self._requests = requests
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
            return await self._requests.fetch_range(blob, start, stop)


@dataclass(slots=True, eq=False)
class _Awaited(Generic[T]):
    """First bytes that have been asked for: their ``value`` once they have come; ``done`` also if they will not."""

    value: T | None = None
    done: trio.Event = field(default_factory=trio.Event)


class EarlyHeads:
    """Asks a store once for the head of each name that leads to a listing, and gives it to a reader of that content.

    While the server lists a directory for a name, it also fetches the first bytes of what may be the object. A program
    that opens a large file there has them a round trip sooner.
    """

    def __init__(self, store: Peekable, breaker: CircuitBreaker) -> None:
        self._store = store
        self._breaker = breaker
        self._background = Background()
        self._under_way = 0
        self._heads: LRUCache[str, _Awaited[Head]] = LRUCache(MOST_HEADS)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch in the background until the server stops."""
        await self._background.run(task_status)

    def expect(self, key: str) -> None:
        """Start to fetch the head of what may be an object."""
        if not self._background.running or self._under_way >= MOST_AT_ONCE or key in self._heads:
            return
        if self._breaker.failing or self._breaker.refusal is not None:
            return
        early = self._heads[key] = _Awaited[Head]()
        self._under_way += 1
        self._background.start(partial(self._fill, key, early))

    async def of(self, generation: Generation) -> Buffer | None:
        """The head of a generation, once; None if it was not asked for, is late, or is of another content."""
        early = self._heads.pop(generation.key, None)
        if early is None:
            return None
        with trio.move_on_after(EARLY_PATIENCE_S):
            await early.done.wait()
        head = early.value
        same = head is not None and (head.etag, head.size) == (generation.etag, generation.size)
        return head.data if head is not None and same else None

    async def _fill(self, key: str, early: _Awaited[Head]) -> None:
        try:
            with suppress(StoreError):  # it may be a directory, or absent: the listing tells
                early.value = await self._store.peek(key, HEAD_BYTES)
        except Exception:  # a defect: it ends this request, not the server
            log.exception("%s: first bytes not fetched: internal error", key)
        finally:
            self._under_way -= 1
            early.done.set()
            if early.value is None and self._heads.get(key) is early:
                del self._heads[key]


class FirstBytes:
    """Fetches the bytes of a file that a reader waits for first, past the disk, while their chunks are on the way.

    The server asks for them itself: its connections to the store are open, where a fetch process may have to start. The
    chunk may share a slow link with others, and a peer gives whole chunks, once it has them.
    """

    def __init__(
        self,
        requests: StoreRequests,
        retrying: Retrying,
        background: Background,
        peers: Peers | None,
        early: EarlyHeads | None,
    ) -> None:
        self._requests = requests
        self._retrying = retrying
        self._background = background
        self._peers = peers
        self._early = early
        self._heads: LRUCache[str, _Awaited[Buffer]] = LRUCache(MOST_HEADS)
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
        head = self._heads[blob.token] = _Awaited[Buffer]()
        self._background.start(self._fill, head, blob)

    async def _fill(self, head: _Awaited[Buffer], blob: Blob) -> None:
        try:
            with suppress(StoreError):
                early = None if self._early is None else await self._early.of(blob.generation)
                if early is None:
                    early = await self._requests.fetch_directly(blob, 0, min(HEAD_BYTES, blob.generation.size))
                else:
                    self._requests.count(blob, len(early))
                head.value = early
        except Exception:  # a defect: it ends this request, not the server
            log.exception("%s: first bytes not fetched: internal error", blob.generation.key)
        finally:
            head.done.set()
            if head.value is None:
                self._heads.pop(blob.token, None)

    def ended(self, batch: Sequence[Flight]) -> None:
        """Forget the head of a blob whose first chunk is here: what is checked is read from now on."""
        if batch[0].chunk == 0:
            self._heads.pop(batch[0].blob.token, None)

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
        alone_bytes: list[Buffer] = []
        async with trio.open_nursery() as nursery:

            async def fetch() -> None:
                await trio.sleep(patience_s)
                data = await self._fetched(blob, start, stop)
                if data is not None:
                    alone_bytes.append(data)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(fetch)
            for chunk, flight in flights.items():
                first, last = blob.span_of(chunk)
                await flight.until(min(stop, last) - first)
            nursery.cancel_scope.cancel()
        return alone_bytes[0] if alone_bytes else None

    async def _fetched(self, blob: Blob, start: int, stop: int) -> Buffer | None:
        head = self._heads.get(blob.token) if stop <= HEAD_BYTES else None
        if head is not None:
            await head.done.wait()
            if head.value is not None:
                return memoryview(head.value)[start:stop]
        count = self._counts.get(blob.token, 0) + stop - start
        hosts = 1 if self._peers is None else self._peers.hosts()
        most = min(MOST_BYTES, int(MOST_SHARE * blob.generation.size / hosts))
        if count > most or self._retrying.problem(blob.token) is not None:
            return None
        self._counts[blob.token] = count
        with suppress(StoreError):
            return await self._requests.fetch_directly(blob, start, stop)
        return None


class UncachedChunks:
    """Chunks that have no room on disk: the server keeps those last read in memory. At most *limit*, and as many in
    flight."""

    def __init__(self, requests: StoreRequests, *, limit: int) -> None:
        self._requests = requests
        self._slots = trio.Semaphore(limit)
        self._kept: LRUCache[tuple[str, int], memoryview] = LRUCache(limit)
        self.count = 0
        """Chunks fetched since the server started."""

    def get(self, blob: Blob, chunk: int) -> memoryview | None:
        """The bytes of a chunk if they are in memory."""
        return self._kept.get((blob.token, chunk))

    def forget(self, blob: Blob) -> None:
        """Drop the chunks of a blob: the disk may have room for them now."""
        for key in [key for key in self._kept if key[0] == blob.token]:
            del self._kept[key]

    async def fetch(self, blob: Blob, chunk: int) -> memoryview:
        """The bytes of a chunk from the store. Raises as `StoreRequests.fetch_range`."""
        async with self._slots:
            data = await self._requests.fetch_range(blob, *blob.span_of(chunk))
        self.count += 1
        self._kept[blob.token, chunk] = data
        return data
