"""The read path: how a program gets bytes that are not on this host. Here is the story of one read, as the code goes.

*Lookup.* The namespace finds what a name is: one generation, a content of an object (`trimsfs.namespace.tree`).

*Open.* The server finds the blob of that generation: this host's copy, whole or in part (`trimsfs.filesystem.files`).
If it is resident (whole, verified, recorded and in memory), the reply names its file. By passthrough, the kernel reads
that file without the server, and the story ends (`trimsfs.opening.passthrough`). Else the open waits for the whole
file, by `fetch_all`, or it streams: each read comes here (`trimsfs.opening.cold_open`).

*Read.* `read_once` gives the bytes in the first way that has them:

1. from the blob, if these bytes have been verified since this server started;
2. alone from the store, past the disk, if the program reads at random (`trimsfs.fetch.bypass`);
3. by flights, one for each chunk, which all readers of the chunk share. A reader waits only until its bytes are there.
   The first bytes of a file may come alone meanwhile.

*Start.* `_pump` starts flights in batches of neighbouring chunks. First come those that readers wait for, then those
that other hosts wait for, then the rest of what is open (`trimsfs.fetch.scheduler`).

*Verify or fetch.* `_fly` makes the chunks of a batch readable (`trimsfs.fetch.batches`). What an earlier server left is
verified. What other files or hosts have is copied, and compared. All else comes from the store by one request, bound to
the generation. A fetch process writes it into the blob's file, and reports the checksum of each chunk.

*Publish.* Each chunk lands by itself, whole and written: its readers wake, and later ones need no flight. The index
records it after that. When the last chunk has landed, the blob is registered for passthrough.

*Give back.* A flight that has landed, or failed, uses its blob no more. The batch gives its slot back, and the next one
starts. A batch that nobody wants any more is cancelled.

Twelve modules pass a read on: `fuse.operations`, `filesystem.files`, `filesystem.trust`, this one, `bypass`,
`scheduler`, `flights`, `batches`, `store_requests`, `processes.worker_pool`, `processes.workers` and
`processes.thread_copier`. Three callbacks come back: a chunk has ``landed``, bytes of it have ``arrived``, a file is
``completed``. The store's client, its retries and what counts bytes are called on the way, and pass nothing on.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

import trio

from trimsfs.concurrency.background import Background
from trimsfs.fetch.batches import BatchFetcher
from trimsfs.fetch.bypass import AccessPattern, EarlyHeads, FirstBytes, RandomReads, UncachedChunks
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.equal_chunks import EqualChunkCopier
from trimsfs.fetch.fetcher import FetchStatistics
from trimsfs.fetch.flights import HEAD_START_S, Flight, Urgency, is_there, lost_repeatedly, no_room, piece_of, stopping
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.scheduler import BatchesUnderWay, FlightScheduler, Slots
from trimsfs.fetch.store_requests import StoreRequests, StoreSpeed
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.model_counters import ModelCounters
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.interfaces import BlobUse, ChunkChecks
from trimsfs.tiers.disk.space import DiskSpace
from trimsfs.types import Buffer, ChunkRecord, Generation

BATCH_LIMIT = 4
"""Most chunks in one request: at 32 MiB, its own cost is small."""
MOST_LOSSES = 8
"""How often a read starts over because chunks were lost or found damaged while it waited for others."""


class StoreFetcher:
    """Makes bytes of blobs readable: of one store, by its *speed* and with *retrying*. *copier* moves them, *models*
    counts them.

    *completed* gets each blob that becomes whole. *names* tells the generations by which programs have a blob open,
    each with the key that they used. Without *equal* and *peers*, all bytes come from the store. What is small and
    urgent comes right from *store*, if it is given, or has come by *early*.

    Invariants: ``_slots`` counts started batches; prefetched ones start within the adaptive limit, demanded ones within
    its maximum. Half of the memory limit is for uncached chunks in flight, half for those that have landed.
    """

    def __init__(
        self,
        copier: Copier,
        blobs: BlobUse,
        space: DiskSpace,
        checks: ChunkChecks,
        retrying: Retrying,
        speed: StoreSpeed,
        *,
        memory_limit: int,
        chunk_size: int,
        streaming: bool,
        models: ModelCounters,
        completed: Callable[[Blob], Awaitable[object]],
        names: Callable[[Blob], Iterable[Generation]] = lambda _: (),
        equal: EqualChunkCopier | None = None,
        peers: Peers | None = None,
        store: Store | None = None,
        early: EarlyHeads | None = None,
    ) -> None:
        self._blobs = blobs
        self._chunk_size = chunk_size
        self._speed = speed
        self._retrying = retrying
        self._equal = equal
        self._background = Background()
        self._requests = StoreRequests(copier, retrying, speed, models=models, names=names, store=store)
        self._scheduler = FlightScheduler(blobs, space, peers, batch_limit=BATCH_LIMIT if streaming else 1)
        self._random_reads = RandomReads(self._requests, self._scheduler, limit=speed.limit.maximum)
        self._first_bytes = None
        if peers is not None or store is not None:
            self._first_bytes = FirstBytes(self._requests, retrying, self._background, peers, early)
        self._uncached = UncachedChunks(self._requests, limit=max(1, memory_limit // chunk_size // 2))
        self._slots = Slots(speed, peers)
        self._under_way = BatchesUnderWay(self._scheduler, self._background)
        self._batches = BatchFetcher(
            copier,
            space,
            checks,
            retrying,
            self._requests,
            self._scheduler,
            self._uncached,
            self._background,
            equal=equal,
            peers=peers,
            completed=completed,
        )
        self._pump_is_due = False
        self._wanted_at = float("-inf")

    # A read

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
        return await self._by_flights(blob, start, stop, at_random=at_random, alone=pattern is not None)

    def _pause(self, blob: Blob) -> None:
        """Pause the prefetch of a blob: a reader wants only what it asks for."""
        prefetch = self._scheduler.prefetch(blob)
        if prefetch is not None and prefetch.touched:
            prefetch.pause()
            self._under_way.unwanted(blob)

    async def _by_flights(self, blob: Blob, start: int, stop: int, *, at_random: bool, alone: bool) -> Buffer | None:
        """The bytes ``[start, stop)``, once the flights of their chunks have brought them; None if some were lost
        meanwhile.

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
                return data
        for chunk, flight in flights.items():
            first, last = blob.span_of(chunk)
            await flight.until(min(stop, last) - first)
            if flight.error is not None:
                raise flight.error.with_traceback(None)
        if not all(is_there(blob, chunk, flights.get(chunk), stop) for chunk in chunks):
            return None
        # Only now: an error would keep the views alive, and they keep the file even of an evicted blob.
        pieces = [piece_of(blob, chunk, start, stop, flights.get(chunk)) for chunk in chunks]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _demand(self, blob: Blob, chunk: int) -> Flight:
        """The flight of a chunk that a reader waits for; one that has landed if the chunk is in memory."""
        kept = self._uncached.get(blob, chunk)
        if kept is not None:
            flight = Flight(blob, chunk, demanded=True)
            flight.data = kept
            flight.done.set()
            return flight
        return self._scheduler.demand(blob, chunk)

    async def _check_running(self, blob: Blob) -> None:
        """Raises StoreUnavailableError while the server stops, or Cancelled if the caller is cancelled."""
        if not self._background.running:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise stopping(blob)

    # What starts next

    def _pump(self) -> None:
        """Start flights while the slots allow it. Called whenever there is more work or more room."""
        while self._background.running:
            batch = self._scheduler.next_demanded(self._slots.for_demanded)
            for_others = not batch
            batch = batch or self._scheduler.next_for_others(self._slots.for_others)
            if not batch:
                for_others = False
                least = self._speed.least_batch(self._chunk_size)
                batch, held_back = self._scheduler.next_prefetched(self._slots.for_prefetched, least=least)
                if not batch:
                    if held_back:
                        self._pump_later()
                    return
            self._slots.take(batch[0].lane, for_others=for_others)
            if self._first_bytes is not None and not for_others:
                self._first_bytes.expect(batch[0])
            self._background.start(partial(self._fly, batch, for_others=for_others))

    def _pump_later(self) -> None:
        """Call `_pump` again when the head start of demanded first bytes is over."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._background.start(self._pump_after_head_start)

    async def _pump_after_head_start(self) -> None:
        await trio.sleep(HEAD_START_S)
        self._pump_is_due = False
        self._pump()

    async def _fly(self, batch: Sequence[Flight], *, for_others: bool) -> None:
        """Make the chunks of a batch readable, then give back what it has taken."""
        blob = batch[0].blob
        blob.users += 1  # the thread of a cancelled batch may still use the file
        try:
            with self._under_way.going_on(batch):
                await self._batches.make_readable(batch)
        finally:
            self._scheduler.land_unfinished(batch, stopping(blob))
            if self._first_bytes is not None:
                self._first_bytes.ended(batch)
            self._blobs.release(blob)
            self._slots.give_back(batch[0].lane, for_others=for_others)
            self._wanted_at = trio.current_time()
            self._pump()

    # Whole files, and what is open

    def hold(self, blob: Blob) -> None:
        """Register an open blob: once a reader wants bytes of it, prefetch the rest."""
        self._scheduler.hold(blob)

    def unhold(self, blob: Blob) -> None:
        """Undo one `hold`. After the last one, only what readers wait for is fetched."""
        self._scheduler.unhold(blob)
        if self._scheduler.prefetch(blob) is None:
            self._under_way.unwanted(blob)

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

    def _begin_at_once(self, blob: Blob) -> None:
        """Begin to fetch a blob that a program waits for, even while prefetches take all slots."""
        if blob.attached and not self._scheduler.flying(blob):
            left = (chunk for chunk, state in enumerate(blob.states) if state != ChunkState.VERIFIED)
            self._demand(blob, next(left))
            self._pump()

    def expected(self, blob: Blob) -> bool:
        """Whether a caller waits for all of a blob or prefetches it."""
        return self._scheduler.expected(blob)

    # For other parts of the server

    async def fetch_for_others(self, blob: Blob, chunks: range) -> None:
        """Make chunks readable from disk for other hosts: after what readers of this host wait for, before any
        prefetch. Raises as `fetch_all`.

        The flights go on if the caller is cancelled: another host may ask next.
        """
        blob.health.check()
        await self._check_running(blob)
        missing = (chunk for chunk in chunks if blob.states[chunk] != ChunkState.VERIFIED)
        flights = [self._scheduler.demand_for_others(blob, chunk) for chunk in missing]
        self._pump()
        for flight in flights:
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error.with_traceback(None)
        if not all(blob.states[chunk] == ChunkState.VERIFIED for chunk in chunks):
            raise no_room(blob)

    async def are_here(self, blob: Blob, chunks: range) -> bool:
        """Whether chunks are readable from disk; verifies what an earlier server left, and fetches nothing."""
        blob.health.check()
        return await self._batches.are_here(blob, chunks)

    async def refetch(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord:
        """Fetch a chunk, even if it is here, into a descriptor's file at offset 0.

        Raises as `read` does, and OSError.
        """
        return await self._requests.refetch(blob, chunk, descriptor)

    def seconds_for(self, blob: Blob, size: int) -> float | None:
        """An estimate of the time to fetch *size* bytes of a blob; None before anything was fetched."""
        del blob  # it matters only where there are several stores
        return self._speed.seconds_for(size)

    def quiet_s(self) -> float:
        """Seconds since the last fetch or read; 0 while a flight or a caller of `fetch_all` is under way."""
        return trio.current_time() - self._wanted_at if self._scheduler.idle else 0.0

    def statistics(self) -> FetchStatistics:
        return FetchStatistics(
            fetched_bytes=self._requests.fetched_bytes,
            fetched_chunks=self._requests.fetched,
            copied_bytes=0 if self._equal is None else self._equal.copied_bytes,
            failed_chunks=self._batches.failed,
            verified_chunks=self._batches.verified,
            uncached_chunks=self._uncached.count,
            in_flight=self._slots.in_use,
            waiting=self._scheduler.waiting,
            request_limit=self._speed.limit.limit,
            rate=self._speed.throughput.rate,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the flights until the server stops."""
        self._wanted_at = trio.current_time()  # programs that the last server served may still be loading
        try:
            await self._background.run(task_status)
        finally:
            for waiting in self._scheduler.impatient(math.inf):
                self._scheduler.land(waiting, stopping(waiting.blob))
