"""Flights: the chunks that are being fetched or wait for it, and the order in which they start."""

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import trio

from trimsfs.errors import CacheFullError, StoreError, TrimsError
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Generation

HEAD_START_S, LONGEST_HEAD_START_S = 0.02, 0.25
"""How long the first bytes that a reader waits for have the store for themselves, at least and, until they come, at
most: no prefetch starts meanwhile. Whoever reads a header alone has closed the file by then."""


class Flight:
    """One chunk that is being made readable, for all readers that wait for it.

    ``demanded`` tells that there are such readers, ``data`` holds the bytes when the blob had no room for them.
    """

    def __init__(self, blob: Blob, chunk: int, *, demanded: bool) -> None:
        self.blob = blob
        self.chunk = chunk
        self.demanded = demanded
        self.enqueued = trio.current_time()
        self._arrived = self._resizes = 0
        self._more = trio.Event()
        self.done = trio.Event()
        self.error: StoreError | None = None
        self.data: memoryview | None = None

    def has_arrived(self, count: int) -> None:
        """The first *count* bytes are readable; the rest is still coming."""
        self._arrived, self._resizes = count, self.blob.resizes
        self._tell()

    def land(self) -> None:
        """The flight has ended, well or not."""
        self.done.set()
        self._tell()

    def has_head_start(self, now: float) -> bool:
        """Whether its first bytes have not come yet, or only a moment ago."""
        return now - self.enqueued < (HEAD_START_S if self._arrived else LONGEST_HEAD_START_S)

    def can_be_read(self, count: int) -> bool:
        """Whether the first *count* bytes are readable before the flight has landed: the file still has them."""
        return self._arrived >= count and self._resizes == self.blob.resizes

    async def until(self, count: int) -> None:
        """Wait until the first *count* bytes are readable or the flight has ended."""
        while not self.can_be_read(count) and not self.done.is_set():
            await self._more.wait()

    def _tell(self) -> None:
        self._more.set()
        self._more = trio.Event()


class Urgency(enum.IntEnum):
    """Why the rest of a blob is fetched, the most urgent first."""

    WANTED = 0
    """A caller waits for all of it."""
    READ = 1
    """A reader has it open."""
    AHEAD = 2
    """A program may open it soon."""


class Prefetch:
    """The chunks of one blob still to prefetch, from the last demanded one onward and round.

    ``holders`` counts the handles and commands that want it to go on; ``touched`` tells that a reader wanted bytes;
    ``wanted`` counts the callers that wait for all of the blob, for whom ``error`` says why the prefetch stopped;
    ``ahead`` counts those that want it before anybody asks for it, and so after all else. ``paused`` tells that
    readers want only what they ask for.
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
        """How many chunks have not been considered yet."""
        return self._left

    def next_chunk(self) -> int | None:
        """The next chunk that is not verified; None when there is none left."""
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
        """How soon the next chunk should start; None: not at all."""
        if self.wanted:
            return Urgency.WANTED
        if self.touched:
            return Urgency.READ
        return Urgency.AHEAD if self.ahead and self.error is None else None

    def put_back(self) -> None:
        """The chunk that `next_chunk` gave is not taken after all."""
        self._cursor = (self._cursor - 1) % len(self.blob.states)
        self._left += 1

    def demand(self, chunk: int) -> None:
        """A reader is at *chunk*: what follows it is the most likely to be wanted next."""
        self.touched, self.paused = True, False
        self._go_to(chunk + 1)

    def pause(self) -> None:
        """A reader reads at random: what it does not ask for is not worth fetching for it."""
        self.touched, self.paused = False, not self.wanted and not self.ahead

    def restart(self) -> None:
        """Consider all chunks again, the first one first."""
        self._go_to(0)

    def _go_to(self, chunk: int) -> None:
        self._cursor = chunk % max(1, len(self.blob.states))
        self._left = len(self.blob.states)

    def stop(self, error: TrimsError) -> None:
        """The rest cannot be fetched for now."""
        self.touched = False
        self.error = error
        self.tell()

    def tell(self) -> None:
        """Something has changed for the callers that wait for all of the blob."""
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()


class FlightScheduler:
    """Knows all flights, and decides which start next: demanded ones before prefetched ones.

    A *batch* is what one request carries: at most *batch_limit* chunks that follow each other, fewer while requests are
    idle. ``head_start`` tells that the last look held prefetches back so that demanded first bytes come sooner.
    Invariant: a flight is listed from its demand or start until `landed`.
    """

    def __init__(self, *, batch_limit: int) -> None:
        self._batch_limit = batch_limit
        self._flights: dict[tuple[str, int], Flight] = {}
        self._demanded: deque[Flight] = deque()
        self._prefetches: OrderedDict[str, Prefetch] = OrderedDict()
        self.head_start = False

    @property
    def waiting(self) -> int:
        """Demanded flights that have not started."""
        return len(self._demanded)

    @property
    def idle(self) -> bool:
        """Whether there is no flight, and no caller waits for all of a blob."""
        return not self._flights and not any(prefetch.wanted for prefetch in self._prefetches.values())

    def demand(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk that a reader waits for, and whether it is a new one."""
        flight = self._flights.get((blob.token, chunk))
        if flight is not None:
            flight.demanded = True
            return flight, False
        flight = self._flights[blob.token, chunk] = Flight(blob, chunk, demanded=True)
        self._demanded.append(flight)
        return flight, True

    def landed(self, flight: Flight) -> None:
        """A flight has ended, well or not."""
        del self._flights[flight.blob.token, flight.chunk]
        prefetch = self._prefetches.get(flight.blob.token)
        if prefetch is not None:
            prefetch.tell()

    def impatient(self, since: float) -> list[Flight]:
        """Take from the queue the demanded flights that have waited in it since a time or longer."""
        found = []
        while self._demanded and self._demanded[0].enqueued <= since:
            found.append(self._demanded.popleft())
        return found

    def unwanted(self, batch: Sequence[Flight]) -> bool:
        """Whether nobody wants a batch that has started: no reader waits for it, and no holder wants the rest."""
        prefetch = self._prefetches.get(batch[0].blob.token)
        return (prefetch is None or prefetch.paused) and not any(flight.demanded for flight in batch)

    def flight(self, blob: Blob, chunk: int) -> Flight | None:
        """The flight of a chunk, if there is one."""
        return self._flights.get((blob.token, chunk))

    def flying(self, blob: Blob) -> bool:
        """Whether there is any flight of a blob."""
        return any(token == blob.token for token, _ in self._flights)

    # Blobs of which the rest is wanted

    def hold(self, blob: Blob) -> Prefetch:
        """One more holder of a blob's prefetch."""
        prefetch = self._prefetches.get(blob.token)
        if prefetch is None:
            prefetch = self._prefetches[blob.token] = Prefetch(blob)
        prefetch.holders += 1
        return prefetch

    def unhold(self, blob: Blob) -> None:
        """One holder less; after the last one, what has not been started is not fetched."""
        prefetch = self._prefetches[blob.token]
        prefetch.holders -= 1
        if prefetch.holders == 0:
            del self._prefetches[blob.token]

    def prefetch(self, blob: Blob) -> Prefetch | None:
        """The prefetch of a blob that somebody holds."""
        return self._prefetches.get(blob.token)

    def expected(self, blob: Blob) -> bool:
        """Whether somebody waits for all of a blob, or has it fetched ahead."""
        prefetch = self._prefetches.get(blob.token)
        return prefetch is not None and (prefetch.wanted > 0 or prefetch.ahead > 0)

    # What starts next

    def next_demanded(self, idle: int) -> list[Flight]:
        """A batch of demanded flights, while *idle* requests may start."""
        if not self._demanded or idle <= 0:
            return []
        batch = [self._demanded.popleft()]
        most = self._share(len(self._demanded) + 1, idle)
        while len(batch) < most and self._demanded:
            following = self._demanded[0]
            if not _follows(batch[-1], following.blob, following.chunk):
                break
            batch.append(self._demanded.popleft())
        return batch

    def next_prefetched(self, idle: int, *, full: Callable[[Generation], bool]) -> list[Flight]:
        """A batch of prefetched flights, while *idle* requests may start. *full* tells where the disk has no room."""
        self.head_start = False
        if idle <= 0:
            return []
        for urgency, prefetch in self._by_urgency():
            if not prefetch.blob.attached:
                continue
            if urgency > Urgency.WANTED and full(prefetch.blob.generation):
                if urgency is Urgency.AHEAD:
                    prefetch.stop(no_room(prefetch.blob))  # whoever waits would wait for ever
                continue
            if self._first_is_demanded(prefetch, urgency):
                self.head_start = True
                continue
            # Whoever waits has what it waits for sooner by many requests; few cost the processors less.
            most = self._batch_limit if urgency is Urgency.AHEAD else self._share(prefetch.left, idle)
            batch = self._take(prefetch, most)
            if batch:
                if urgency < Urgency.AHEAD:  # what comes ahead comes in order
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
        """Whether a reader has just begun to wait for the first bytes of a blob, or of any before what comes ahead:
        they have a head start."""
        blob = prefetch.blob
        if urgency is Urgency.WANTED or (urgency is Urgency.READ and blob.verified_bytes):
            return False
        now = trio.current_time()
        return any(
            flight.demanded and flight.has_head_start(now) and (flight.blob is blob or urgency is Urgency.AHEAD)
            for flight in self._flights.values()
        )

    def _share(self, pending: int, idle: int) -> int:
        """How many of *pending* chunks one of the requests that may still start should take."""
        return max(1, min(self._batch_limit, pending // idle))

    def _take(self, prefetch: Prefetch, most: int) -> list[Flight]:
        """Flights for the next chunks of a blob that come in one request."""
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
    """Whether a chunk can come in one request with the flight of another."""
    states = blob.states
    return flight.blob is blob and chunk == flight.chunk + 1 and states[chunk] == states[flight.chunk]


def no_room(blob: Blob, tenant_full: str | None = None) -> CacheFullError:
    """The error of a blob for which there is no room on disk, be it in the share of its tenant."""
    if not blob.attached:
        return CacheFullError(f"{blob.generation.key}: cannot be kept in the cache: see the log of the mount")
    remedy = tenant_full or "evict or unpin models, raise --cache-size or lower --min-free"
    return CacheFullError(f"{blob.generation.key}: no room in the cache: {remedy}")
