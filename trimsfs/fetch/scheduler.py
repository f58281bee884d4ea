"""Flights: the chunks that are being fetched or wait for it, and the order in which flights start."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import trio

from trimsfs.fetch.flights import Flight, Lane, no_room
from trimsfs.fetch.prefetch import Prefetch, Urgency
from trimsfs.fetch.priority import Priority
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation


class FlightScheduler:
    """Knows all flights and decides which start next: demanded ones, those for other hosts, then prefetched ones.

    A batch has at most *batch_limit* consecutive chunks, and fewer while more requests may start, but not fewer than
    *least* says for a caller who waits for a whole blob. *lane* tells where a chunk most likely comes from; each lane
    has queues of its own, and one chunk of peers is a batch. ``head_start`` says that the last `next_prefetched` held
    prefetches back, so that demanded first bytes come sooner.
    Invariant: a flight is listed from its demand or start until `landed`.
    """

    def __init__(
        self,
        *,
        batch_limit: int,
        least: Callable[[], int] = lambda: 1,
        lane: Callable[[Blob, int], Lane] | None = None,
    ) -> None:
        self._batch_limit = batch_limit
        self._least = least
        self._lane = lane
        self._flights: dict[tuple[str, int], Flight] = {}
        self._demanded: tuple[deque[Flight], ...] = tuple(deque() for _ in Lane)
        self._for_others: tuple[deque[Flight], ...] = tuple(deque() for _ in Lane)
        self._prefetches: OrderedDict[str, Prefetch] = OrderedDict()
        self.head_start = False

    @property
    def waiting(self) -> int:
        """The number of demanded flights that have not started."""
        return sum(not flight.started for queue in self._demanded for flight in queue)

    @property
    def idle(self) -> bool:
        """Whether there is no flight and no caller waits for a whole blob."""
        return not self._flights and not any(prefetch.waited_for for prefetch in self._prefetches.values())

    def demand(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk that a reader waits for, and whether it is new."""
        flight, new = self._flight(blob, chunk)
        if new or not (flight.demanded or flight.started):
            self._demanded[flight.lane].append(flight)
        flight.demanded = True
        flight.priority.lift()
        return flight, new

    def demand_for_others(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk that another host waits for, and whether it is new.

        A demanded flight that has not started is in both queues: it must not wait for peers that wait for it.
        """
        flight, new = self._flight(blob, chunk)
        if not (flight.for_others or flight.started):
            self._for_others[flight.lane].append(flight)
        flight.for_others = True
        flight.priority.lift()
        return flight, new

    def _flight(self, blob: Blob, chunk: int) -> tuple[Flight, bool]:
        """The flight of a chunk, and whether it is new."""
        flight = self._flights.get((blob.token, chunk))
        if flight is not None:
            return flight, False
        flight = self._flights[blob.token, chunk] = Flight(blob, chunk, demanded=False, lane=self._lane_of(blob, chunk))
        return flight, True

    def _lane_of(self, blob: Blob, chunk: int) -> Lane:
        return Lane.STORE if self._lane is None else self._lane(blob, chunk)

    def landed(self, flight: Flight) -> None:
        """Remove a flight that has succeeded or failed."""
        del self._flights[flight.blob.token, flight.chunk]
        prefetch = self._prefetches.get(flight.blob.token)
        if prefetch is not None:
            prefetch.tell()

    def impatient(self, since: float) -> list[Flight]:
        """Take from their queues the flights that have waited there at least since a time."""
        found = []
        for queue in (*self._demanded, *self._for_others):
            while queue and (queue[0].started or queue[0].enqueued <= since):
                flight = queue.popleft()
                if not flight.started:
                    flight.started = True
                    found.append(flight)
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
        prefetch.left_by_readers()
        if prefetch.holders == 0:
            del self._prefetches[blob.token]

    def prefetch(self, blob: Blob) -> Prefetch | None:
        """The prefetch of a blob; None if nobody holds it."""
        return self._prefetches.get(blob.token)

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
        for lane in Lane:
            if batch := self._next_of(self._demanded[lane], lane, idle[lane]):
                return batch
        return []

    def next_for_others(self, idle: Sequence[int]) -> list[Flight]:
        """As `next_demanded`, for other hosts."""
        for lane in Lane:
            if batch := self._next_of(self._for_others[lane], lane, idle[lane]):
                return batch
        return []

    def _next_of(self, queue: deque[Flight], lane: Lane, idle: int) -> list[Flight]:
        while queue and queue[0].started:
            queue.popleft()  # by the other queue
        if not queue or idle <= 0:
            return []
        batch = [queue.popleft()]
        most = self._share(len(queue) + 1, idle) if lane is Lane.STORE else 1
        while len(batch) < most and queue and _follows(batch[-1], queue[0].blob, queue[0].chunk):
            if queue[0].started:
                break
            batch.append(queue.popleft())
        for flight in batch:
            flight.started = True
        return batch

    def next_prefetched(self, idle: Sequence[int], *, full: Callable[[Generation], bool]) -> list[Flight]:
        """The next batch of prefetched flights, if *idle* more requests of its lane may start; else empty.

        *full* says whether the disk has no room for a generation.
        """
        self.head_start = False
        if idle[Lane.STORE] <= 0 and (self._lane is None or idle[Lane.PEERS] <= 0):
            return []
        for urgency, prefetch in self._by_urgency():
            if not prefetch.blob.attached:
                continue
            if not prefetch.waited_for and full(prefetch.blob.generation):
                if prefetch.callers[Urgency.AHEAD]:
                    prefetch.stop(no_room(prefetch.blob))  # else its callers would wait for ever
                continue
            if self._first_is_demanded(prefetch, urgency):
                self.head_start = True
                continue
            # Many small requests serve a waiting caller sooner; few large ones cost less processor time.
            most = self._batch_limit
            if urgency <= Urgency.READ:
                most = min(most, max(self._least(), self._share(prefetch.left, idle[Lane.STORE])))
            batch = self._take(prefetch, most, idle)
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
            flight = Flight(blob, chunk, demanded=False, lane=lane, priority=priority)
            self._flights[blob.token, chunk] = flight
            flight.started = True
            batch.append(flight)
            if lane is Lane.PEERS:
                break
        return batch


def _follows(flight: Flight, blob: Blob, chunk: int) -> bool:
    """Whether a chunk can join a flight in one request."""
    states = blob.states
    return flight.blob is blob and chunk == flight.chunk + 1 and states[chunk] == states[flight.chunk]
