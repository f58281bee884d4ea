"""The scheduler: which chunks are being fetched or wait for it, and the order in which flights start."""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import CacheFullError, StoreError, StoreUnavailableError
from trimsfs.fetch.flights import Flight, Lane, Prefetch, Priority, Urgency, no_room
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, Room

LINGER_S = 0.1
"""How long an unwanted batch goes on: programs open a file twice in a row, and again after each signal."""
PEER_REQUESTS, DEMANDED_PEER_REQUESTS = 16, 32
"""Most requests to peers at once, for what is prefetched and for what readers wait for."""
LEAST_SHARE = 1
"""Requests to the store that a host may have under way, however many hosts share them."""


class FlightScheduler:
    """Knows all flights and decides which start next: demanded ones, those for other hosts, then prefetched ones.

    A batch has at most *batch_limit* consecutive chunks, and fewer while more requests may start. *peers* tell where a
    chunk most likely comes from; each lane has queues of its own, and one chunk of peers is a batch.
    Invariant: a flight is listed, and a user of its blob, from its demand or start until it lands.
    """

    def __init__(self, blobs: BlobUse, room: Room, peers: Peers | None = None, *, batch_limit: int) -> None:
        self._blobs = blobs
        self._room = room
        self._peers = peers
        self._batch_limit = batch_limit
        self._flights: dict[tuple[str, int], Flight] = {}
        self._demanded: tuple[deque[Flight], ...] = tuple(deque() for _ in Lane)
        self._for_others: tuple[deque[Flight], ...] = tuple(deque() for _ in Lane)
        self._prefetches: OrderedDict[str, Prefetch] = OrderedDict()

    @property
    def waiting(self) -> int:
        """The number of demanded flights that have not started."""
        return sum(not flight.started for queue in self._demanded for flight in queue)

    @property
    def idle(self) -> bool:
        """Whether there is no flight and no caller waits for a whole blob."""
        return not self._flights and not any(prefetch.waited_for for prefetch in self._prefetches.values())

    def demand(self, blob: Blob, chunk: int) -> Flight:
        """The flight of a chunk that a reader waits for."""
        flight = self._flight(blob, chunk)
        if not (flight.demanded or flight.started):
            self._demanded[flight.lane].append(flight)
        flight.demanded = True
        flight.priority.lift()
        return flight

    def demand_for_others(self, blob: Blob, chunk: int) -> Flight:
        """The flight of a chunk that another host waits for.

        A demanded flight that has not started is in both queues: it must not wait for peers that wait for it.
        """
        flight = self._flight(blob, chunk)
        if not (flight.for_others or flight.started):
            self._for_others[flight.lane].append(flight)
        flight.for_others = True
        flight.priority.lift()
        return flight

    def _flight(self, blob: Blob, chunk: int) -> Flight:
        """The flight of a chunk: the one that is listed, else a new one."""
        flight = self._flights.get((blob.token, chunk))
        return flight or self._new(Flight(blob, chunk, demanded=False, lane=self._lane_of(blob, chunk)))

    def _new(self, flight: Flight) -> Flight:
        self._flights[flight.blob.token, flight.chunk] = flight
        flight.blob.users += 1
        return flight

    def _lane_of(self, blob: Blob, chunk: int) -> Lane:
        return Lane.STORE if self._peers is None else self._peers.lane(blob, chunk)

    def land(self, flight: Flight, error: StoreError | None = None) -> None:
        """Wake the readers of a flight that has succeeded, or failed with an *error*."""
        flight.error = error
        del self._flights[flight.blob.token, flight.chunk]
        prefetch = self._prefetches.get(flight.blob.token)
        if prefetch is not None:
            prefetch.tell()
        flight.land()
        self._blobs.release(flight.blob)

    def land_unfinished(self, batch: Sequence[Flight], error: StoreError) -> None:
        """Land those flights of a batch that have not landed, with an error."""
        for flight in batch:
            if not flight.done.is_set():
                self.land(flight, error)

    def impatient(self, since: float) -> list[Flight]:
        """Take from their queues the flights that have waited there at least since a time."""
        impatient = []
        for queue in (*self._demanded, *self._for_others):
            while queue and (queue[0].started or queue[0].enqueued <= since):
                flight = queue.popleft()
                if not flight.started:
                    flight.started = True
                    impatient.append(flight)
        return impatient

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
        prefetch.left_by_readers()
        if prefetch.holders == 0:
            del self._prefetches[blob.token]

    def prefetch(self, blob: Blob) -> Prefetch | None:
        """The prefetch of a blob; None if nobody holds it."""
        return self._prefetches.get(blob.token)

    def stop_prefetch(self, blob: Blob, error: StoreError | CacheFullError) -> None:
        """Stop the prefetch of a blob with an error: the rest cannot be fetched for now."""
        prefetch = self._prefetches.get(blob.token)
        if prefetch is not None:
            prefetch.stop(error)

    def expected(self, blob: Blob) -> bool:
        """Whether a caller waits for all of a blob or prefetches it."""
        prefetch = self._prefetches.get(blob.token)
        return prefetch is not None and prefetch.callers.total() > 0

    def lift(self, blob: Blob) -> None:
        """Lift the priority of what is under way of a blob, if a program waits for it."""
        prefetch = self._prefetches.get(blob.token)
        if prefetch is not None and not prefetch.in_background:
            for flight in self._flights.values():
                if flight.blob is blob:
                    flight.priority.lift()

    # What starts next

    def next_demanded(self, idle: Sequence[int]) -> list[Flight]:
        """The next batch of demanded flights, if *idle* more requests of its lane may start; else empty."""
        return self._next_of(self._demanded, idle)

    def next_for_others(self, idle: Sequence[int]) -> list[Flight]:
        """As `next_demanded`, for other hosts."""
        return self._next_of(self._for_others, idle)

    def _next_of(self, queues: Sequence[deque[Flight]], idle: Sequence[int]) -> list[Flight]:
        batch: list[Flight] = []
        for lane, queue in zip(Lane, queues, strict=True):
            while queue and queue[0].started:
                queue.popleft()  # by the other queue
            if not queue or idle[lane] <= 0:
                continue
            most = self._share(len(queue), idle[lane]) if lane is Lane.STORE else 1
            while queue and not queue[0].started and len(batch) < most:
                if batch and not _follows(batch[-1], queue[0].blob, queue[0].chunk):
                    break
                queue[0].started = True
                batch.append(queue.popleft())
            break
        return batch

    def next_prefetched(self, idle: Sequence[int], *, least: int = 1) -> tuple[list[Flight], bool]:
        """The next batch of prefetched flights, if *idle* more requests of its lane may start; else empty.

        It has not fewer chunks than *least* for a caller who waits for a whole blob. Also whether another prefetch was
        held back, so that demanded first bytes come sooner.
        """
        held_back = False
        if idle[Lane.STORE] <= 0 and (self._peers is None or idle[Lane.PEERS] <= 0):
            return [], held_back
        for urgency, prefetch in self._by_urgency():
            if not prefetch.blob.attached:
                continue
            if not prefetch.waited_for and self._room.full(prefetch.blob.generation):
                if prefetch.callers[Urgency.AHEAD]:
                    prefetch.stop(no_room(prefetch.blob))  # else its callers would wait for ever
                continue
            if self._first_is_demanded(prefetch, urgency):
                held_back = True
                continue
            # Many small requests serve a waiting caller sooner; few large ones cost less processor time.
            most = self._batch_limit
            if urgency <= Urgency.READ:
                most = min(most, max(least, self._share(prefetch.left, idle[Lane.STORE])))
            batch = self._take(prefetch, most, idle)
            if batch:
                if urgency < Urgency.AHEAD:  # prefetches ahead of any open go in order
                    self._prefetches.move_to_end(prefetch.blob.token)
                return batch, held_back
        return [], held_back

    def _by_urgency(self) -> list[tuple[Urgency, Prefetch]]:
        urgent = [
            (urgency, prefetch)
            for prefetch in self._prefetches.values()
            if (urgency := prefetch.urgency) is not None and prefetch.left
        ]
        return sorted(urgent, key=lambda each: each[0])

    def _first_is_demanded(self, prefetch: Prefetch, urgency: Urgency) -> bool:
        """Whether a prefetch yields to the first bytes that a reader waits for. These are of its own blob, or of any
        blob if nobody has asked for its own yet."""
        blob = prefetch.blob
        if urgency is Urgency.WANTED or (urgency is Urgency.READ and blob.verified_bytes):
            return False
        now = trio.current_time()
        return any(
            flight.demanded and flight.has_head_start(now) and (flight.blob is blob or urgency > Urgency.READ)
            for flight in self._flights.values()
        )

    def _share(self, pending: int, idle: int) -> int:
        """How many of *pending* chunks the next request should take if *idle* ones may start."""
        return max(1, min(self._batch_limit, pending // max(1, idle)))

    def _take(self, prefetch: Prefetch, most: int, idle: Sequence[int]) -> list[Flight]:
        """New flights for the next chunks of a blob, as many as fit in one request; none if their lane is busy."""
        blob, priority = prefetch.blob, Priority(background=prefetch.in_background)
        batch: list[Flight] = []
        while len(batch) < most and (chunk := prefetch.next_chunk()) is not None:
            if (blob.token, chunk) in self._flights:
                if batch:
                    break
                continue
            lane = self._lane_of(blob, chunk)
            if idle[lane] <= 0 or (batch and (lane is Lane.PEERS or not _follows(batch[-1], blob, chunk))):
                prefetch.put_back()
                break
            flight = self._new(Flight(blob, chunk, demanded=False, lane=lane, priority=priority))
            flight.started = True
            batch.append(flight)
            if lane is Lane.PEERS:
                break
        return batch


class Slots:
    """Counts the batches under way of each lane. Prefetched ones of the store stay within its adaptive limit, demanded
    ones within its maximum.

    What other hosts wait for has slots of its own in each lane. A host that waits for a peer can then still serve that
    peer, so that no two wait for each other.

    Hosts that fetch together, with their *peers*, share the requests that one of them would have under way. Their
    chunks then land one after the other, and are passed on meanwhile; all at once, they would land at the end.
    """

    def __init__(self, speed: StoreSpeed, peers: Peers | None) -> None:
        self._throughput = speed.throughput
        self._limit = speed.limit
        self._peers = peers
        self._under_way = [0 for _ in Lane]
        self._for_others = [0 for _ in Lane]

    @property
    def in_use(self) -> int:
        """The number of batches under way."""
        return sum(self._under_way) + sum(self._for_others)

    @property
    def for_demanded(self) -> list[int]:
        """How many demanded batches may start, by lane."""
        return [self._limit.maximum - self._in_store, DEMANDED_PEER_REQUESTS - self._under_way[Lane.PEERS]]

    @property
    def for_prefetched(self) -> list[int]:
        """How many prefetched batches may start, by lane."""
        return [self._share - self._in_store, PEER_REQUESTS - self._under_way[Lane.PEERS]]

    @property
    def for_others(self) -> list[int]:
        """How many batches may start for other hosts, by lane."""
        return [
            max(self._share - self._in_store, 1 - self._for_others[Lane.STORE]),
            PEER_REQUESTS - self._for_others[Lane.PEERS],
        ]

    @property
    def _share(self) -> int:
        """How many requests to the store this host may have under way. What its readers wait for does not count, nor
        does one request that others wait for."""
        hosts = 1 if self._peers is None else self._peers.hosts()
        return self._limit.limit if hosts == 1 else max(LEAST_SHARE, self._limit.limit // hosts - 1)

    @property
    def _in_store(self) -> int:
        return self._under_way[Lane.STORE] + self._for_others[Lane.STORE]

    def take(self, lane: Lane, *, for_others: bool) -> None:
        """Count a batch that starts."""
        if self.in_use == 0:
            self._throughput.busy()
        (self._for_others if for_others else self._under_way)[lane] += 1

    def give_back(self, lane: Lane, *, for_others: bool) -> None:
        """Undo one `take`."""
        (self._for_others if for_others else self._under_way)[lane] -= 1
        if self.in_use == 0:
            self._throughput.idle()


class BatchesUnderWay:
    """The batches that have started and not ended: cancels those that nobody wants any more."""

    def __init__(self, scheduler: FlightScheduler, background: Background) -> None:
        self._scheduler = scheduler
        self._background = background
        self._scopes: dict[trio.CancelScope, Sequence[Flight]] = {}
        self._left: dict[Blob, float] = {}

    @contextmanager
    def going_on(self, batch: Sequence[Flight]) -> Iterator[None]:
        """Register a batch for the length of the block, and cancel the block once nobody wants the batch."""
        with trio.CancelScope() as scope:
            self._scopes[scope] = batch
            try:
                yield
            finally:
                del self._scopes[scope]

    def unwanted(self, blob: Blob) -> None:
        """Note that a reader has left a blob: cancel its batches once nobody has wanted them for LINGER_S."""
        if self._background.running and any(_is_of(blob, batch) for batch in self._scopes.values()):
            if blob not in self._left:
                self._background.start(self._stop, blob)
            self._left[blob] = trio.current_time()

    async def _stop(self, blob: Blob) -> None:
        try:
            while trio.current_time() < self._left[blob] + LINGER_S:  # noqa: ASYNC110 - until nothing has happened
                await trio.sleep_until(self._left[blob] + LINGER_S)
        finally:
            del self._left[blob]
        for scope, batch in list(self._scopes.items()):
            if _is_of(blob, batch) and self._scheduler.unwanted(batch):
                # Land them first: a later demand for these chunks then starts a new flight.
                self._scheduler.land_unfinished(
                    batch, StoreUnavailableError(f"{blob.generation.key}: no longer wanted")
                )
                scope.cancel()


def _follows(flight: Flight, blob: Blob, chunk: int) -> bool:
    """Whether a chunk can join a flight in one request."""
    states = blob.states
    return flight.blob is blob and chunk == flight.chunk + 1 and states[chunk] == states[flight.chunk]


def _is_of(blob: Blob, batch: Sequence[Flight]) -> bool:
    """Whether a batch belongs to a blob and has not landed."""
    return batch[0].blob is blob and not all(flight.done.is_set() for flight in batch)
