"""A flight: one chunk that is being made readable, for all who wait for it."""

import enum

import trio

from trimsfs.errors import CacheFullError, StoreError, StoreUnavailableError
from trimsfs.fetch.priority import Priority
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.types import Buffer

HEAD_START_S, LONGEST_HEAD_START_S = 0.02, 0.25
"""The head start: once a reader waits for the first bytes, no prefetch starts for HEAD_START_S. It lasts until they
arrive, at most LONGEST_HEAD_START_S. A program that reads only a header has closed the file by then."""


class Lane(enum.IntEnum):
    """Where a chunk most likely comes from. Requests to the store, and those to peers, do not wait for each other."""

    STORE = 0
    PEERS = 1


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
