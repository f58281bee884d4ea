"""What is wanted: a flight is one chunk that is being made readable; a prefetch is the rest of a blob.

All readers that need a chunk wait for the same flight: it is fetched once. The priority of a flight follows who waits
for it. A flight that nobody waits for leaves the processor to programs that compute.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from trimsfs.errors import CacheFullError, StoreError, StoreUnavailableError, TrimsError
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer

HEAD_START_S, LONGEST_HEAD_START_S = 0.02, 0.25
"""The head start: once a reader waits for the first bytes, no prefetch starts for HEAD_START_S. It lasts until they
arrive, at most LONGEST_HEAD_START_S. A program that reads only a header has closed the file by then."""


class Lane(enum.IntEnum):
    """Where a chunk most likely comes from. Requests to the store, and those to peers, do not wait for each other."""

    STORE = 0
    PEERS = 1


class Priority:
    """The priority of some flights: that of ordinary programs or, in the *background*, a low one until it is lifted."""

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self._raise: list[Callable[[], None]] = []

    def on_lift(self, function: Callable[[], None]) -> None:
        """Have a function called when a program begins to wait."""
        self._raise.append(function)

    def lift(self) -> None:
        """A program waits from now on."""
        if self.background:
            self.background = False
            for function in self._raise:
                function()


class Flight:
    """One chunk that is being made readable, for all readers that wait for it.

    ``demanded`` says that there are such readers, ``for_others`` that other hosts wait. ``data`` holds the bytes if the
    disk had no room for them. Flights of one batch share their ``priority``.
    """

    def __init__(
        self, blob: Blob, chunk: int, *, demanded: bool, lane: Lane = Lane.STORE, priority: Priority | None = None
    ) -> None:
        self.blob = blob
        self.chunk = chunk
        self.demanded = demanded
        self.lane = lane
        self.priority = priority or Priority()
        self.for_others = self.started = False
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

    @property
    def has_bytes(self) -> bool:
        """Whether the first of its bytes have arrived."""
        return self._arrived > 0

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


def is_there(blob: Blob, chunk: int, flight: Flight | None, stop: int) -> bool:
    """Whether the bytes of a chunk before *stop* can be read: from the blob, from memory or from a flight."""
    if flight is None or flight.done.is_set():
        return blob.states[chunk] == ChunkState.VERIFIED or (flight is not None and flight.data is not None)
    first, last = blob.span_of(chunk)
    return flight.can_be_read(min(stop, last) - first)


def piece_of(blob: Blob, chunk: int, start: int, stop: int, flight: Flight | None) -> Buffer:
    """The part of the bytes ``[start, stop)`` in a chunk that is there."""
    first, last = blob.span_of(chunk)
    low, high = max(start, first), min(stop, last)
    if flight is not None and flight.data is not None:
        return flight.data[low - first : high - first]
    return blob.view(low, high)


def no_room(blob: Blob, tenant_full: str | None = None) -> CacheFullError:
    """The error of a blob for which the disk, or its tenant's share, has no room."""
    if not blob.attached:
        return CacheFullError(f"{blob.generation.key}: cannot be kept in the cache: see the log of the mount")
    remedy = tenant_full or "evict or unpin models, raise --cache-size or lower --min-free"
    return CacheFullError(f"{blob.generation.key}: no room in the cache: {remedy}")


def lost_repeatedly(blob: Blob) -> StoreUnavailableError:
    """The error of a read that started over too often."""
    return StoreUnavailableError(f"{blob.generation.key}: the cache keeps losing its fetched bytes: see the log")


def stopping(blob: Blob) -> StoreUnavailableError:
    """The error of a flight that the end of the server cuts short."""
    return StoreUnavailableError(f"{blob.generation.key}: server stopping")


class Urgency(enum.IntEnum):
    """Why the rest of a blob is fetched; the most urgent reason comes first."""

    WANTED = 0
    """A caller waits for the whole blob."""
    READ = 1
    """A reader has it open."""
    AHEAD = 2
    """A program may open it soon."""
    COMMAND = 3
    """A command wants it on the disk: no program waits."""


class Prefetch:
    """The chunks of one blob still to prefetch: those after the last demanded one, then those before it.

    ``holders`` counts the handles and commands that keep it going. ``touched`` says that a reader wanted bytes.
    ``callers`` counts by urgency those that wait for the whole blob, or prefetch it; ``error`` tells them why the
    prefetch stopped. ``paused`` says that readers want only what they ask for.
    """

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.holders = 0
        self.callers = Counter[Urgency]()
        self._guesses = 0
        self.touched = self.paused = False
        self.error: TrimsError | None = None
        self._changed = trio.Event()
        self._cursor = 0
        self._left = len(blob.states)

    @property
    def left(self) -> int:
        """The number of chunks not considered yet."""
        return self._left

    @contextmanager
    def asked_for(self, urgency: Urgency, *, guessed: bool = False) -> Iterator[None]:
        """Count a caller for the length of the block. It waits for the whole blob or, if it is AHEAD, prefetches it: if
        *guessed*, perhaps only because a program has listed it."""
        self.callers[urgency] += 1
        self._guesses += guessed
        self.error, self.paused = None, False
        if urgency is Urgency.WANTED:
            self.touched = True  # if the caller gives up, the file may still be open
        if urgency is not Urgency.AHEAD or self._left == 0:
            self.restart()
        try:
            yield
        finally:
            self.callers[urgency] -= 1
            self._guesses -= guessed

    @property
    def waited_for(self) -> bool:
        """Whether a caller waits for the whole blob."""
        return bool(self.callers[Urgency.WANTED] or self.callers[Urgency.COMMAND])

    @property
    def in_background(self) -> bool:
        """Whether no program waits for it, nor loads a model that it is a part of."""
        return not (self.touched or self.callers[Urgency.WANTED] or self.callers[Urgency.AHEAD] > self._guesses)

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
        if self.callers[Urgency.WANTED]:
            return Urgency.WANTED
        if self.touched:
            return Urgency.READ
        if self.callers[Urgency.AHEAD] and self.error is None:
            return Urgency.AHEAD
        return Urgency.COMMAND if self.callers[Urgency.COMMAND] else None

    def left_by_readers(self) -> None:
        """If only commands and prefetches hold it by now, no reader wants it any more."""
        if self.holders == self.callers.total() and not self.callers[Urgency.WANTED]:
            self.touched = False

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
        self.touched, self.paused = False, not self.callers.total()

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
