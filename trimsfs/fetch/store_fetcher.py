"""The fetcher of one store: fetches each chunk once, however many readers wait, and demanded chunks first.

A *flight* makes one chunk readable: it verifies the bytes that an earlier server left, or fetches them.
All readers that need the chunk wait for the same flight. When no reader waits, the fetcher prefetches the rest of the
blobs being read. A *batch* of flights carries neighbouring chunks in one request. Each flight *lands* by itself: its
chunk becomes readable, or the flight fails.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import CacheFullError, StoreError, StoreUnavailableError
from trimsfs.fetch.access_pattern import AccessPattern
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.early_heads import EarlyHeads
from trimsfs.fetch.equal_chunks import EqualChunkCopier
from trimsfs.fetch.first_bytes import FirstBytes
from trimsfs.fetch.flights import HEAD_START_S, Flight, is_there, lost_repeatedly, no_room, piece_of, stopping
from trimsfs.fetch.for_others import fetch_for_others
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.prefetch import Urgency
from trimsfs.fetch.random_reads import RandomReads
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.fetch.slots import Slots
from trimsfs.fetch.speed import StoreSpeed
from trimsfs.fetch.statistics import FetchStatistics
from trimsfs.fetch.uncached import UncachedChunks
from trimsfs.fetch.under_way import BatchesUnderWay
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.model_counters import ModelCounters
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Buffer, ChunkRecord, Generation

log = logging.getLogger(__name__)

WORTH_S = 0.08
"""How long a request for a caller who waits should take at least on its own: more and smaller ones are hardly sooner,
and each costs processor time."""
BATCH_LIMIT = 4
"""Most chunks in one request: at 32 MiB, its own cost is small."""
MOST_LOSSES = 8
"""How often a read starts over because chunks were lost or found damaged while it waited for others."""


class StoreFetcher:
    """Makes bytes of blobs readable. *copier* moves them, *models* counts them. Calls *completed* with each blob that
    becomes whole. *names* and *store* are as of `BatchFetcher`. Without *equal* and *peers*, all bytes come from the
    store.

    Invariants: a flight is a user of its blob from its demand or start until it has landed. ``_slots`` counts
    started batches; prefetched ones start within the adaptive limit, demanded ones within its maximum. Half of the
    memory limit is for uncached chunks in flight, half for those that have landed.
    """

    def __init__(
        self,
        copier: Copier,
        disk: DiskTier,
        retrying: Retrying,
        speed: StoreSpeed,
        *,
        memory_limit: int,
        streaming: bool,
        models: ModelCounters,
        completed: Callable[[Blob], Awaitable[object]],
        names: Callable[[Blob], Iterable[Generation]] = lambda _: (),
        equal: EqualChunkCopier | None = None,
        peers: Peers | None = None,
        store: Store | None = None,
        early: EarlyHeads | None = None,
    ) -> None:
        self._disk = disk
        self._speed = speed
        self._limit = speed.limit
        self._throughput = speed.throughput
        self._retrying = retrying
        self._models = models
        self._equal = equal
        self._completed = completed
        self._scheduler = FlightScheduler(
            batch_limit=BATCH_LIMIT if streaming else 1,
            least=self._least_batch,
            lane=None if peers is None else peers.lane,
        )
        self._uncached = UncachedChunks(limit=max(1, memory_limit // disk.chunk_size // 2))
        self._batches = BatchFetcher(
            copier,
            disk,
            retrying,
            uncached=self._uncached,
            equal=equal,
            peers=peers,
            limit=self._limit,
            names=names,
            landed=self._land,
            came=self._came,
            refused=self._refused,
            store=store,
        )
        self._background = Background()
        hosts = (lambda: 1) if peers is None else peers.hosts
        self._first_bytes = None
        if peers is not None or store is not None:
            self._first_bytes = FirstBytes(self._batches, retrying, self._background, hosts, early, self._count)
        self._random_reads = RandomReads(self._batches, self._scheduler, limit=self._limit.maximum)
        self._slots = Slots(speed.limit, hosts)
        self._batches_under_way = BatchesUnderWay(self._scheduler, self._background, land=self._land_unfinished)
        self._pump_is_due = False
        self._succeeded_at = self._wanted_at = float("-inf")
        self._fetched_bytes = self._fetched = self._failed = 0

    def statistics(self) -> FetchStatistics:
        return FetchStatistics(
            fetched_bytes=self._fetched_bytes,
            fetched_chunks=self._fetched,
            copied_bytes=0 if self._equal is None else self._equal.copied_bytes,
            failed_chunks=self._failed,
            verified_chunks=self._batches.verified,
            uncached_chunks=self._uncached.count,
            in_flight=self._slots.in_use,
            waiting=self._scheduler.waiting,
            request_limit=self._limit.limit,
            rate=self._throughput.rate,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the flights until the server stops."""
        self._wanted_at = trio.current_time()  # programs that the last server served may still be loading
        try:
            await self._background.run(task_status)
        finally:
            for waiting in self._scheduler.impatient(math.inf):
                waiting.error = stopping(waiting.blob)
                self._land(waiting)

    def seconds_for(self, blob: Blob, size: int) -> float | None:
        """An estimate of the time to fetch *size* bytes of a blob; None before anything was fetched."""
        del blob  # it matters only where there are several stores
        return self._speed.seconds_for(size)

    def quiet_s(self) -> float:
        """Seconds since the last fetch or read; 0 while a flight or a caller of `fetch_all` is under way."""
        return trio.current_time() - self._wanted_at if self._scheduler.idle else 0.0

    async def read(self, blob: Blob, start: int, stop: int) -> Buffer:
        """The bytes ``[start, stop)`` of a blob that the caller holds, once they are here and verified.

        Raises ObjectChangedError when the store has replaced the object, StoreUnavailableError or StoreAccessError
        when the store does not give the bytes.
        """
        for _ in range(MOST_LOSSES):
            data = await self.read_once(blob, start, stop)
            if data is not None:
                return data
        raise lost_repeatedly(blob)

    async def read_once(self, blob: Blob, start: int, stop: int, pattern: AccessPattern | None = None) -> Buffer | None:
        """As `read`; None when fetched bytes were lost, or found damaged, while it waited for others.

        By the reader's *pattern*, random reads of a big file are fetched alone, past the disk. After a jump, the
        prefetch pauses until reads continue there.
        """
        self._wanted_at = trio.current_time()
        blob.health.check()
        if blob.readable(start, stop):
            if pattern is not None and not blob.complete:
                pattern.passed(start, stop)  # else the next read, which has to wait, would look like a jump
            return blob.view(start, stop)
        at_random = False
        if pattern is not None and (at_random := self._random_reads.record(blob, start, stop, pattern)):
            self._pause(blob)
            if self._random_reads.are_wise(blob, start, stop, pattern):
                await self._check_running(blob)
                return await self._random_reads.read(blob, start, stop)
        pieces = await self._pieces(blob, start, stop, at_random=at_random, alone=pattern is not None)
        if pieces is None:
            return None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _pause(self, blob: Blob) -> None:
        """Pause the prefetch of a blob: a reader wants only what it asks for."""
        prefetch = self._scheduler.prefetch(blob)
        if prefetch is not None and prefetch.touched:
            prefetch.pause()
            self._batches_under_way.unwanted(blob)

    async def _pieces(self, blob: Blob, start: int, stop: int, *, at_random: bool, alone: bool) -> list[Buffer] | None:
        """The bytes ``[start, stop)``, chunk by chunk, once they are here; None if some were lost meanwhile.

        They may come *alone*, past the disk, if that is sooner.
        """
        await self._check_running(blob)
        chunks = blob.chunks_of(start, stop)
        prefetch = self._scheduler.prefetch(blob)
        if prefetch is not None and not at_random:
            prefetch.demand(chunks[-1])
            self._scheduler.lift(blob)
        flights = {chunk: self._demand(blob, chunk) for chunk in chunks if blob.states[chunk] != ChunkState.VERIFIED}
        self._pump()
        if self._first_bytes is not None:
            data = await self._first_bytes.read(blob, start, stop, flights, alone=alone)
            if data is not None:
                return [data]
        for chunk, flight in flights.items():
            first, last = blob.span_of(chunk)
            await flight.until(min(stop, last) - first)
            if flight.error is not None:
                raise flight.error.with_traceback(None)
        if not all(is_there(blob, chunk, flights.get(chunk), stop) for chunk in chunks):
            return None
        # Only now: an error would keep the views alive, and they keep the file even of an evicted blob.
        return [piece_of(blob, chunk, start, stop, flights.get(chunk)) for chunk in chunks]

    def expected(self, blob: Blob) -> bool:
        """Whether a caller waits for all of a blob or prefetches it."""
        return self._scheduler.expected(blob)

    def hold(self, blob: Blob) -> None:
        """Register an open blob: once a reader wants bytes of it, prefetch the rest."""
        self._scheduler.hold(blob)

    def unhold(self, blob: Blob) -> None:
        """Undo one `hold`. After the last one, only what readers wait for is fetched."""
        self._scheduler.unhold(blob)
        if self._scheduler.prefetch(blob) is None:
            self._batches_under_way.unwanted(blob)

    async def fetch_all(self, blob: Blob, urgency: Urgency = Urgency.WANTED, *, guessed: bool = False) -> None:
        """Make a whole blob readable from disk. Raises as `read` does, and CacheFullError.

        By its *urgency*, it yields to blobs that others wait for. What is for a COMMAND or only *guessed* gives way to
        all programs of the host.
        """
        blob.health.check()
        if blob.complete:
            return
        await trio.lowlevel.checkpoint_if_cancelled()  # a cancelled caller starts nothing
        prefetch = self._scheduler.hold(blob)
        self._uncached.forget(blob)
        try:
            with prefetch.asked_for(urgency, guessed=guessed):
                self._scheduler.lift(blob)
                self._pump()
                if urgency is Urgency.WANTED:
                    self._begin_at_once(blob)
                while not blob.complete:
                    if not blob.attached:
                        raise no_room(blob)
                    if prefetch.error is not None:
                        raise prefetch.error.with_traceback(None)
                    await self._check_running(blob)
                    if prefetch.left == 0 and not self._scheduler.flying(blob):
                        prefetch.restart()
                        self._pump()
                        if prefetch.error is not None:
                            continue  # set by that, so nothing else will change
                    await prefetch.changed()
        finally:
            self.unhold(blob)

    def _least_batch(self) -> int:
        """The chunks of a request that take WORTH_S, by the quickest request for one of late."""
        best_s = self._limit.best_s(self._disk.chunk_size)
        return int(WORTH_S / best_s) if best_s else 1

    def _begin_at_once(self, blob: Blob) -> None:
        """Begin to fetch a blob that a program waits for, even while prefetches take all slots."""
        if blob.attached and not self._scheduler.flying(blob):
            left = (chunk for chunk, state in enumerate(blob.states) if state != ChunkState.VERIFIED)
            self._demand(blob, next(left))
            self._pump()

    async def refetch(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord:
        """Fetch a chunk, even if it is here, into a descriptor's file at offset 0.

        Raises as `read` does, and OSError.
        """
        record = await self._batches.fetch_into(blob, chunk, descriptor)
        self._came(blob, record.length)
        return record

    async def fetch_for_others(self, blob: Blob, chunks: range) -> None:
        """Make chunks readable from disk for other hosts: after what readers of this host wait for, before any
        prefetch. Raises as `fetch_all`."""
        blob.health.check()
        await self._check_running(blob)
        await fetch_for_others(self._scheduler, self._pump, blob, chunks)

    async def are_here(self, blob: Blob, chunks: range) -> bool:
        """Whether chunks are readable from disk; verifies what an earlier server left, and fetches nothing."""
        blob.health.check()
        return await self._batches.are_here(blob, chunks)

    async def _check_running(self, blob: Blob) -> None:
        """Raises StoreUnavailableError while the server stops, or Cancelled if the caller is cancelled."""
        if not self._background.running:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise stopping(blob)

    def _demand(self, blob: Blob, chunk: int) -> Flight:
        """The flight of a chunk that a reader waits for; one that has landed if the chunk is in memory."""
        kept = self._uncached.get(blob, chunk)
        if kept is not None:
            flight = Flight(blob, chunk, demanded=True)
            flight.data = kept
            flight.done.set()
            return flight
        flight, new = self._scheduler.demand(blob, chunk)
        blob.users += new
        return flight

    def _pump(self) -> None:
        """Start flights while the slots allow it. Called whenever there is more work or more room."""
        while self._background.running:
            batch = self._scheduler.next_demanded(self._slots.for_demanded)
            for_others = not batch
            batch = batch or self._scheduler.next_for_others(self._slots.for_others)
            if not batch:
                for_others = False
                batch = self._scheduler.next_prefetched(self._slots.for_prefetched, full=self._disk.space.full)
                if not batch:
                    self._pump_later()
                    return
                batch[0].blob.users += len(batch)
            if self._slots.in_use == 0:
                self._throughput.busy()
            self._slots.take(batch[0].lane, for_others=for_others)
            if self._first_bytes is not None and not for_others:
                self._first_bytes.expect(batch[0])
            self._background.start(partial(self._fly, batch, for_others=for_others))

    def _pump_later(self) -> None:
        """Call `_pump` again when the head start of demanded first bytes is over."""
        if self._scheduler.head_start and not self._pump_is_due:
            self._pump_is_due = True
            self._background.start(self._pump_after_head_start)

    async def _pump_after_head_start(self) -> None:
        await trio.sleep(HEAD_START_S)
        self._pump_is_due = False
        self._pump()

    # What a flight does

    async def _fly(self, batch: Sequence[Flight], *, for_others: bool) -> None:
        blob = batch[0].blob
        blob.users += 1  # the thread of a cancelled batch may still use the file
        try:
            with self._batches_under_way.going_on(batch):
                missing: list[Sequence[Flight]] = []
                with self._failing(batch):
                    missing = await self._batches.missing(batch)
                for flights in missing:
                    with self._failing(flights):
                        await self._batches.fetch(flights)
        finally:
            self._land_unfinished(batch, stopping(blob))
            self._disk.release(blob)
            self._slots.give_back(batch[0].lane, for_others=for_others)
            self._wanted_at = trio.current_time()
            if self._slots.in_use == 0:
                self._throughput.idle()
            self._pump()

    def _land_unfinished(self, batch: Sequence[Flight], error: StoreError) -> None:
        for flight in batch:
            if not flight.done.is_set():
                flight.error = error
                self._land(flight)

    @contextmanager
    def _failing(self, batch: Sequence[Flight]) -> Iterator[None]:
        """Fail the flights of the batch, and so the reads that wait for them, if the block raises an error."""
        key, token = batch[0].blob.generation.key, batch[0].blob.token
        told = self._retrying.problem(token) is not None  # it is in the log already
        try:
            yield
        except StoreError as error:
            if not told:
                log.error("%s: chunk %d not fetched: %s", key, batch[0].chunk, error)
            self._fail(batch, error)
        except Exception:
            log.exception("%s: chunk %d not fetched: internal error", key, batch[0].chunk)
            self._fail(batch, StoreUnavailableError(f"{key}: internal error"))

    def _came(self, blob: Blob, size: int) -> None:
        self._succeeded_at = trio.current_time()
        self._throughput.add(size)
        self._count(blob, size)

    def _count(self, blob: Blob, size: int) -> None:
        self._fetched_bytes += size
        self._fetched += 1
        self._models.fetched(blob.generation.key, size)

    def _fail(self, batch: Sequence[Flight], error: StoreError) -> None:
        self._failed += sum(not flight.done.is_set() for flight in batch)
        self._land_unfinished(batch, error)
        self._stop_prefetch(batch[0].blob, error)
        if not isinstance(error, StoreUnavailableError):
            return
        # Readers that have queued for the whole retry deadline need not wait for a failure of their own.
        patience = trio.current_time() - self._retrying.deadline_s
        if self._succeeded_at > patience:
            return  # the store serves other objects
        for waiting in self._scheduler.impatient(patience):
            waiting.error = error
            self._land(waiting)

    def _refused(self, blob: Blob) -> None:
        """Stop the prefetch of a blob for which the disk has no room."""
        self._stop_prefetch(blob, no_room(blob, self._disk.space.tenant_full(blob)))

    def _stop_prefetch(self, blob: Blob, error: StoreError | CacheFullError) -> None:
        prefetch = self._scheduler.prefetch(blob)
        if prefetch is not None:
            prefetch.stop(error)

    def _land(self, flight: Flight) -> None:
        """Wake the readers of a flight that has succeeded or failed."""
        blob = flight.blob
        self._scheduler.landed(flight)
        flight.land()
        if self._first_bytes is not None:
            self._first_bytes.landed(flight)
        if blob.complete and self._equal is not None:
            self._equal.forget(blob)
        if blob.complete and self._background.running:
            self._background.start(self._completed, blob)
        self._disk.release(blob)
