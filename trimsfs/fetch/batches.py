"""Batches: consecutive chunks, which are verified if they are here, else fetched in one request, and published."""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import trio

from trimsfs.checksums import combine_crc32c
from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.fetch.bypass import UncachedChunks
from trimsfs.fetch.copier import Copier, Extent
from trimsfs.fetch.equal_chunks import EqualChunkCopier
from trimsfs.fetch.flights import Flight, no_room
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.fetch.store_requests import StoreRequests
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.open_trace import VERIFY, spanning
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.interfaces import ChunkChecks, ChunkWrites
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)


class BatchFetcher:
    """Makes the chunks of batches readable: on the disk if there is room, else in memory.

    Without *equal* and *peers*, all bytes come from the store. *completed* gets each blob that becomes whole.
    """

    def __init__(
        self,
        copier: Copier,
        writes: ChunkWrites,
        checks: ChunkChecks,
        retrying: Retrying,
        requests: StoreRequests,
        scheduler: FlightScheduler,
        uncached: UncachedChunks,
        background: Background,
        *,
        equal: EqualChunkCopier | None,
        peers: Peers | None,
        completed: Callable[[Blob], Awaitable[object]],
    ) -> None:
        self._copier = copier
        self._writes = writes
        self._checks = checks
        self._retrying = retrying
        self._requests = requests
        self._scheduler = scheduler
        self._uncached = uncached
        self._background = background
        self._equal = equal
        self._peers = peers
        self._completed = completed
        self._verifying = WeakValueDictionary[tuple[str, int], trio.Lock]()
        self.verified = self.failed = 0
        """Since this server started: chunks of earlier servers that have passed their checksum; those not fetched."""

    async def make_readable(self, batch: Sequence[Flight]) -> None:
        """Land all flights of a batch, each as soon as its chunk is readable, or with an error."""
        missing: list[Sequence[Flight]] = []
        with self._failing(batch):
            missing = await self._missing(batch)
        for flights in missing:
            with self._failing(flights):
                await self._fetch(flights)

    @contextmanager
    def _failing(self, batch: Sequence[Flight]) -> Iterator[None]:
        """Fail the flights of the batch, and so the reads that wait for them, if the block raises an error."""
        key, token = batch[0].blob.generation.key, batch[0].blob.token
        logged = self._retrying.problem(token) is not None
        try:
            yield
        except StoreError as error:
            if not logged:
                log.error("%s: chunk %d not fetched: %s", key, batch[0].chunk, error)
            self._fail(batch, error)
        except Exception:
            log.exception("%s: chunk %d not fetched: internal error", key, batch[0].chunk)
            self._fail(batch, StoreUnavailableError(f"{key}: internal error"))

    def _fail(self, batch: Sequence[Flight], error: StoreError) -> None:
        self.failed += sum(not flight.done.is_set() for flight in batch)
        self._scheduler.land_unfinished(batch, error)
        self._scheduler.stop_prefetch(batch[0].blob, error)
        if not isinstance(error, StoreUnavailableError):
            return
        # Readers that have queued for the whole retry deadline need not wait for a failure of their own.
        patience = trio.current_time() - self._retrying.deadline_s
        if self._requests.succeeded_at > patience:
            return  # the store serves other objects
        for waiting in self._scheduler.impatient(patience):
            self._scheduler.land(waiting, error)

    # What is here, or near

    async def _missing(self, batch: Sequence[Flight]) -> list[Sequence[Flight]]:
        """The missing flights of a batch, in batches to fetch from the store.

        Those land whose chunks are here, in another blob or on another host.
        """
        states = batch[0].blob.states
        missing: list[Sequence[Flight]] = [batch]
        if not all(states[flight.chunk] == ChunkState.MISSING for flight in batch):
            # Verify all of them first: chunks that are here must not wait for a store that may fail.
            missing = [[flight] for flight in batch if not await self._is_here(flight)]
        if missing and self._equal is not None and self._retrying.problem(batch[0].blob.token) is None:
            copied = partial(self._equal.copy, await self._equal.of(batch[0].blob))
            missing = [left for flights in missing for left in await self._not_from(copied, flights)]
        return [left for flights in missing for left in await self._not_on_peers(flights)]

    async def _not_on_peers(self, batch: Sequence[Flight]) -> list[Sequence[Flight]]:
        """The flights of a batch whose chunks no peer has sent, in batches of consecutive chunks."""
        return [batch] if self._peers is None else await self._not_from(partial(self._sent, self._peers), batch)

    async def _not_from(
        self, source: Callable[[Flight], Awaitable[bool]], batch: Sequence[Flight]
    ) -> list[Sequence[Flight]]:
        """The flights of a batch whose chunks a source has not written, in batches of consecutive chunks."""
        left: list[list[Flight]] = []
        for flight in batch:
            if flight.done.is_set():
                continue
            if await source(flight):
                self._publish(flight)
            elif left and left[-1][-1].chunk + 1 == flight.chunk:
                left[-1].append(flight)
            else:
                left.append([flight])
        return list(left)

    async def _sent(self, peers: Peers, flight: Flight) -> bool:
        """Whether a peer has sent a chunk, which is written."""
        deadline = trio.current_time() + self._retrying.deadline_s
        return await peers.fetch(
            flight, deadline=deadline, away=lambda: self._retrying.problem(flight.blob.token) is not None
        )

    async def _is_here(self, flight: Flight) -> bool:
        """Whether a chunk is here, perhaps fetched or verified since it was demanded; then it has landed."""
        match flight.blob.states[flight.chunk]:
            case ChunkState.MISSING:
                return False
            case ChunkState.UNVERIFIED:
                if not await self._verify(flight.blob, flight.chunk):
                    return False
        self._publish(flight)
        return True

    async def are_here(self, blob: Blob, chunks: range) -> bool:
        """Whether chunks are readable from disk, once those that an earlier server left are verified."""
        for chunk in chunks:
            if blob.states[chunk] == ChunkState.UNVERIFIED:
                await self._verify(blob, chunk)
        return all(blob.states[chunk] == ChunkState.VERIFIED for chunk in chunks)

    async def _verify(self, blob: Blob, chunk: int) -> bool:
        """Whether a chunk that an earlier server left passes its checksum."""
        async with self._verifying.setdefault((blob.token, chunk), trio.Lock()):
            if blob.states[chunk] != ChunkState.UNVERIFIED:
                return blob.states[chunk] == ChunkState.VERIFIED  # somebody else has verified it
            start, stop = blob.span_of(chunk)
            try:
                with spanning(blob, VERIFY, offset=start):
                    crc = await self._retrying.call_locally(
                        blob.generation.key, lambda: self._copier.checksum(blob.fileno(), start, stop)
                    )
            except OSError as error:
                log.error("%s: cannot read chunk %d: %s", blob.generation.key, chunk, error)
                crc = None
            if not await self._checks.check_chunk(blob, chunk, crc):
                return False
            self.verified += 1
            return True

    # What the store has

    async def _fetch(self, batch: Sequence[Flight]) -> None:
        """Fetch consecutive chunks from the store, into the blob if the disk has room.

        Peers are asked again if only this shows that the store is away: they may have been slow.
        """
        known = self._retrying.problem(batch[0].blob.token) is not None
        try:
            await self._fetch_from_store(batch)
        except StoreUnavailableError:
            left = [flight for flight in batch if not flight.done.is_set()]
            if left and (known or await self._not_on_peers(left)):
                raise

    async def _fetch_from_store(self, batch: Sequence[Flight]) -> None:
        blob = batch[0].blob
        self._retrying.check(f"{blob.generation.key} at {_start(batch)}", blob.token)  # before evicting for it
        for last in (False, True):
            left = [flight for flight in batch if not flight.done.is_set()]
            if not left:
                return  # cancelled while the disk made space
            if not await self._writes.reserve(blob, _stop(left) - _start(left)):
                break
            if await self._fetch_into_blob(left, last=last):
                return
        for flight in batch:
            if flight.done.is_set():
                continue
            self._scheduler.stop_prefetch(blob, no_room(blob, self._writes.refused(blob)))
            if flight.demanded:
                flight.data = await self._uncached.fetch(blob, flight.chunk)
                self._publish(flight)
            else:
                self._scheduler.land(flight)  # nobody waits for it

    async def _fetch_into_blob(self, batch: Sequence[Flight], *, last: bool) -> bool:
        """Fetch chunks into the blob, whose space is reserved.

        Returns False when it cannot be written, and makes space unless it was the *last* try; chunks written before
        have landed.
        """
        blob = batch[0].blob
        flights = {flight.chunk: flight for flight in batch}
        position, stop = _start(batch), _stop(batch)
        resizes, heard = blob.resizes, trio.current_time()
        part: ChunkRecord | None = None  # what the last attempt has left of the chunk at the position

        def landed(record: ChunkRecord) -> None:
            nonlocal position, heard, part
            if blob.resizes != resizes or flights[record.chunk].done.is_set():
                return  # the file was truncated since, so bytes may be lost; or the flight was cancelled
            heard = trio.current_time()
            self._retrying.breaker.answered()
            self._requests.came(blob, record.length)
            if part is not None and part.chunk == record.chunk:
                record = _joined(part, record)
            start, end = blob.span_of(record.chunk)
            part = record if record.length < end - start else None
            if part is None:
                position += record.length
                self._writes.wrote(blob, record)
                self._publish(flights[record.chunk])

        def arrived(offset: int) -> None:
            if blob.resizes == resizes:
                flights[offset // blob.chunk_size].has_arrived(offset % blob.chunk_size)

        async def attempt() -> None:
            nonlocal resizes, part
            if position == stop:
                return  # the last request failed only after its last chunk
            if blob.resizes != resizes:
                part = None  # it may be lost
            resizes = blob.resizes
            wanted = any(flight.demanded for flight in batch)
            start = position + (part.length if part is not None else 0)
            extent = Extent(start, stop, blob.fileno(), start, blob.chunk_size)
            await self._requests.once(blob, extent, landed, arrived, batch[0].priority, eager=wanted)
            if position < stop:
                raise TransientStoreError("its file in the cache was truncated meanwhile")

        try:
            await self._requests.retried(blob, position, attempt, heard=lambda: heard)
        except OSError as error:
            await self._writes.write_failed(blob, stop - position, error, last=last)
            return False
        except BaseException:
            self._writes.unreserve(blob, stop - position)
            raise
        return True

    def _publish(self, flight: Flight) -> None:
        """A chunk is readable: wake its readers. Once the blob is whole, the kernel may read it by itself."""
        if flight.done.is_set():
            return  # it was given up meanwhile
        blob = flight.blob
        self._scheduler.land(flight)
        if blob.complete and self._equal is not None:
            self._equal.forget(blob)
        if blob.complete and self._background.running:
            self._background.start(self._completed, blob)


def _joined(part: ChunkRecord, rest: ChunkRecord) -> ChunkRecord:
    """A chunk of which two requests have brought a part each."""
    crc = combine_crc32c(part.crc, rest.crc, rest.length)
    return ChunkRecord(chunk=part.chunk, length=part.length + rest.length, crc=crc)


def _start(batch: Sequence[Flight]) -> int:
    return batch[0].blob.span_of(batch[0].chunk)[0]


def _stop(batch: Sequence[Flight]) -> int:
    return batch[-1].blob.span_of(batch[-1].chunk)[1]
