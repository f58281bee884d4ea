"""Flights: the chunks that are being fetched or wait for it, and the order in which flights start."""

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import trio

from trimsfs.errors import CacheFullError, StoreError, TrimsError
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Generation

HEAD_START_S, LONGEST_HEAD_START_S = 0.02, 0.25
"""The head start: once a reader waits for the first bytes, no prefetch starts for HEAD_START_S. It lasts until they
arrive, at most LONGEST_HEAD_START_S. A program that reads only a header has closed the file by then."""


class Flight:
    """One chunk that is being made readable, for all readers that wait for it.

    ``demanded`` says that there are such readers, ``for_others`` that other hosts wait. ``data`` holds the bytes if the
    disk had no room for them.
    """

    def __init__(self, blob: Blob, chunk: int, *, demanded: bool) -> None:
        self.blob = blob
        self.chunk = chunk
        self.demanded = demanded
        self.for_others = False
        self.enqueued = trio.current_time()
        self._arrived = self._resizes = 0
        self._more = trio.Event()
        self.done = trio.Event()
        self.error: StoreError | None = None
        self.data: memoryview | None = None

    def has_arrived(self, count: int) -> None:
        """Make the first *count* bytes readable, while the rest is in flight."""
        self._arrived, self._resizes = count, self.blob.resizes
        self._tell()

    def land(self) -> None:
        """End the flight, whether it has succeeded or failed."""
        self.done.set()
        self._tell()

    def has_head_start(self, now: float) -> bool:
        """Whether prefetches still wait for its first bytes."""
        return now - self.enqueued < (HEAD_START_S if self._arrived else LONGEST_HEAD_START_S)

    def can_be_read(self, count: int) -> bool:
        """Whether the first *count* bytes have arrived, and no truncation since has lost them."""
        return self._arrived >= count and self._resizes == self.blob.resizes

    async def until(self, count: int) -> None:
        """Wait until the first *count* bytes are readable or the flight has ended."""
        while not self.can_be_read(count) and not self.done.is_set():
            await self._more.wait()

    def _tell(self) -> None:
        self._more.set()
        self._more = trio.Event()


class Urgency(enum.IntEnum):
    """Why the rest of a blob is fetched; the most urgent reason comes first."""

    WANTED = 0
    """A caller waits for the whole blob."""
    READ = 1
    """A reader has it open."""
    AHEAD = 2
    """A program may open it soon."""


class Prefetch:
    """The chunks of one blob still to prefetch: those after the last demanded one, then those before it.

    ``holders`` counts the handles and commands that keep it going. ``touched`` says that a reader wanted bytes.
    ``wanted`` counts the callers that wait for the whole blob; ``error`` tells them why the prefetch stopped.
    ``ahead`` counts the callers that prefetch a blob before anybody asks for it, at the lowest urgency. ``paused`` says
    that readers want only what they ask for.
    """

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.holders = 0
        self.wanted = 0
        self.ahead = 0
        self.touched = self.paused = False
        self.error: TrimsError | None = None
        self._changed = trio.Event()
        self._cursor = 0
        self._left = len(blob.states)

    @property
    def left(self) -> int:
        """The number of chunks not considered yet."""
        return self._left

    def next_chunk(self) -> int | None:
        """The next chunk that is not verified; None if none is left."""
        states = self.blob.states
        while self._left > 0:
            chunk = self._cursor
            self._cursor = (chunk + 1) % len(states)
            self._left -= 1
            if states[chunk] != ChunkState.VERIFIED:
                return chunk
        return None

    @property
    def urgency(self) -> Urgency | None:
        """How soon the next chunk should start; None if it should not."""
        if self.wanted:
            return Urgency.WANTED
        if self.touched:
            return Urgency.READ
        return Urgency.AHEAD if self.ahead and self.error is None else None

    def put_back(self) -> None:
        """Undo the last `next_chunk`."""
        self._cursor = (self._cursor - 1) % len(self.blob.states)
        self._left += 1

    def demand(self, chunk: int) -> None:
        """Continue after *chunk*, where a reader is: it most likely wants the following chunks next."""
        self.touched, self.paused = True, False
        self._go_to(chunk + 1)

    def pause(self) -> None:
        """Stop prefetching for a reader that reads at random."""
        self.touched, self.paused = False, not self.wanted and not self.ahead

    def restart(self) -> None:
        """Consider all chunks again, from the first."""
        self._go_to(0)

    def _go_to(self, chunk: int) -> None:
        self._cursor = chunk % max(1, len(self.blob.states))
        self._left = len(self.blob.states)

    def stop(self, error: TrimsError) -> None:
        """Stop with an *error*: the rest cannot be fetched for now."""
        self.touched = False
        self.error = error
        self.tell()

    def tell(self) -> None:
        """Wake the callers that wait for the whole blob: something has changed."""
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()


class FlightScheduler:
    """Knows all flights and decides which start next: demanded ones, those for other hosts, then prefetched ones.

    A batch has at most *batch_limit* consecutive chunks, and fewer while more requests may start. ``head_start`` says
    that the last `next_prefetched` held prefetches back, so that demanded first bytes come sooner.
    Invariant: a flight is listed from its demand or start until `landed`.
    """

    def __init__(self, *, batch_limit: int) -> None:
        self._batch_limit = batch_limit
        self._flights: dict[tuple[str, int], Flight] = {}
        self._demanded: deque[Flight] = deque()
        self._for_others: deque[Flight] = deque()
        self._started_for_others: set[Flight] = set()
        self._prefetches: OrderedDict[str, Prefetch] = OrderedDict()
        self.head_start = False

    @property
    def waiting(self) -> int:
        """The number of demanded flights that have not started."""
        return len(self._demanded)

    @property
    def idle(self) -> bool:
        """Whether there is no flight and no caller waits for a whole blob."""
        return not self._flights and not any(prefetch.wanted for prefetch in self._prefetches.values())

    def demand(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk that a reader waits for, and whether it is new."""
        flight = self._flights.get((blob.token, chunk))
        if flight is not None:
            flight.demanded = True
            if flight in self._for_others:
                self._for_others.remove(flight)
                self._demanded.append(flight)
            return flight, False
        flight = self._flights[blob.token, chunk] = Flight(blob, chunk, demanded=True)
        self._demanded.append(flight)
        return flight, True

    def demand_for_others(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk that another host waits for, and whether it is new."""
        flight = self._flights.get((blob.token, chunk))
        new = flight is None
        if flight is None:
            flight = self._flights[blob.token, chunk] = Flight(blob, chunk, demanded=False)
            self._for_others.append(flight)
        flight.for_others = True
        return flight, new

    def landed(self, flight: Flight) -> None:
        """Remove a flight that has succeeded or failed."""
        del self._flights[flight.blob.token, flight.chunk]
        self._started_for_others.discard(flight)
        prefetch = self._prefetches.get(flight.blob.token)
        if prefetch is not None:
            prefetch.tell()

    def impatient(self, since: float) -> list[Flight]:
        """Take from their queues the flights that have waited there at least since a time."""
        found = []
        for queue in (self._demanded, self._for_others):
            while queue and queue[0].enqueued <= since:
                found.append(queue.popleft())
        return found

    def unwanted(self, batch: Sequence[Flight]) -> bool:
        """Whether nobody wants a batch under way: no reader or other host waits for it, and no holder wants the rest of
        the blob."""
        prefetch = self._prefetches.get(batch[0].blob.token)
        return (prefetch is None or prefetch.paused) and not any(f.demanded or f.for_others for f in batch)

    def flight(self, blob: Blob, chunk: int) -> Flight | None:
        """The flight of a chunk, or None."""
        return self._flights.get((blob.token, chunk))

    def flying(self, blob: Blob) -> bool:
        """Whether a blob has any flight."""
        return any(token == blob.token for token, _ in self._flights)

    # Blobs of which the rest is wanted

    def hold(self, blob: Blob) -> Prefetch:
        """Add a holder to a blob's prefetch."""
        prefetch = self._prefetches.get(blob.token)
        if prefetch is None:
            prefetch = self._prefetches[blob.token] = Prefetch(blob)
        prefetch.holders += 1
        return prefetch

    def unhold(self, blob: Blob) -> None:
        """Remove a holder; after the last one, no further chunk is prefetched."""
        prefetch = self._prefetches[blob.token]
        prefetch.holders -= 1
        if prefetch.holders == 0:
            del self._prefetches[blob.token]

    def prefetch(self, blob: Blob) -> Prefetch | None:
        """The prefetch of a blob; None if nobody holds it."""
        return self._prefetches.get(blob.token)

    def expected(self, blob: Blob) -> bool:
        """Whether a caller waits for all of a blob or prefetches it."""
        prefetch = self._prefetches.get(blob.token)
        return prefetch is not None and (prefetch.wanted > 0 or prefetch.ahead > 0)

    # What starts next

    def next_demanded(self, idle: int) -> list[Flight]:
        """The next batch of demanded flights, if *idle* more requests may start; else empty."""
        return self._next_of(self._demanded, idle)

    def next_for_others(self, idle: int, *, most: int) -> list[Flight]:
        """As `next_demanded`, for other hosts, whose chunks under way are *most* and a batch at most."""
        batch = self._next_of(self._for_others, min(idle, most - len(self._started_for_others)))
        self._started_for_others.update(batch)
        return batch

    def _next_of(self, queue: deque[Flight], idle: int) -> list[Flight]:
        if not queue or idle <= 0:
            return []
        batch = [queue.popleft()]
        most = self._share(len(queue) + 1, idle)
        while len(batch) < most and queue and _follows(batch[-1], queue[0].blob, queue[0].chunk):
            batch.append(queue.popleft())
        return batch

    def next_prefetched(self, idle: int, *, full: Callable[[Generation], bool]) -> list[Flight]:
        """The next batch of prefetched flights, if *idle* more requests may start; else empty.

        *full* says whether the disk has no room for a generation.
        """
        self.head_start = False
        if idle <= 0:
            return []
        for urgency, prefetch in self._by_urgency():
            if not prefetch.blob.attached:
                continue
            if urgency > Urgency.WANTED and full(prefetch.blob.generation):
                if urgency is Urgency.AHEAD:
                    prefetch.stop(no_room(prefetch.blob))  # else its callers would wait for ever
                continue
            if self._first_is_demanded(prefetch, urgency):
                self.head_start = True
                continue
            # Many small requests serve a waiting caller sooner; few large ones cost less processor time.
            most = self._batch_limit if urgency is Urgency.AHEAD else self._share(prefetch.left, idle)
            batch = self._take(prefetch, most)
            if batch:
                if urgency < Urgency.AHEAD:  # prefetches ahead of any open go in order
                    self._prefetches.move_to_end(prefetch.blob.token)
                return batch
        return []

    def _by_urgency(self) -> list[tuple[Urgency, Prefetch]]:
        found = [
            (urgency, prefetch)
            for prefetch in self._prefetches.values()
            if (urgency := prefetch.urgency) is not None and prefetch.left
        ]
        return sorted(found, key=lambda each: each[0])

    def _first_is_demanded(self, prefetch: Prefetch, urgency: Urgency) -> bool:
        """Whether a prefetch yields to the first bytes that a reader waits for: those of its own blob, or of any blob
        if nobody has asked for this one yet."""
        blob = prefetch.blob
        if urgency is Urgency.WANTED or (urgency is Urgency.READ and blob.verified_bytes):
            return False
        now = trio.current_time()
        return any(
            flight.demanded and flight.has_head_start(now) and (flight.blob is blob or urgency is Urgency.AHEAD)
            for flight in self._flights.values()
        )

    def _share(self, pending: int, idle: int) -> int:
        """How many of *pending* chunks the next request should take if *idle* ones may start."""
        return max(1, min(self._batch_limit, pending // idle))

    def _take(self, prefetch: Prefetch, most: int) -> list[Flight]:
        """New flights for the next chunks of a blob, as many as fit in one request."""
        blob = prefetch.blob
        batch: list[Flight] = []
        while len(batch) < most and (chunk := prefetch.next_chunk()) is not None:
            if (blob.token, chunk) in self._flights:
                if batch:
                    break
                continue
            if batch and not _follows(batch[-1], blob, chunk):
                prefetch.put_back()
                break
            flight = self._flights[blob.token, chunk] = Flight(blob, chunk, demanded=False)
            batch.append(flight)
        return batch


def _follows(flight: Flight, blob: Blob, chunk: int) -> bool:
    """Whether a chunk can join a flight in one request."""
    states = blob.states
    return flight.blob is blob and chunk == flight.chunk + 1 and states[chunk] == states[flight.chunk]


def is_there(blob: Blob, chunk: int, flight: Flight | None, stop: int) -> bool:
    """Whether the bytes of a chunk before *stop* can be read: from the blob, from memory or from a flight."""
    if flight is None or flight.done.is_set():
        return blob.states[chunk] == ChunkState.VERIFIED or (flight is not None and flight.data is not None)
    first, last = blob.span_of(chunk)
    return flight.can_be_read(min(stop, last) - first)


def no_room(blob: Blob, tenant_full: str | None = None) -> CacheFullError:
    """The error of a blob for which the disk, or its tenant's share, has no room."""
    if not blob.attached:
        return CacheFullError(f"{blob.generation.key}: cannot be kept in the cache: see the log of the mount")
    remedy = tenant_full or "evict or unpin models, raise --cache-size or lower --min-free"
    return CacheFullError(f"{blob.generation.key}: no room in the cache: {remedy}")
