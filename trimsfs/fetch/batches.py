"""Batches: consecutive chunks, which are verified if they are here, else fetched in one request."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

import trio

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit
from trimsfs.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.fetch.copier import Arrived, Copier, Extent, Landed
from trimsfs.fetch.equal_chunks import EqualChunkCopier
from trimsfs.fetch.flights import Flight
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.priority import Priority
from trimsfs.fetch.uncached import UncachedChunks, in_memory
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.trace import REQUEST, VERIFY, Spent, spanning
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Buffer, ChunkRecord, Generation

log = logging.getLogger(__name__)

MISSING_FOR_S = (0.1, 0.5)
"""How long after each other a store is asked for an object that it has not found, before that counts as deleted."""


class BatchFetcher:
    """Makes the chunks of batches readable: on the disk if there is room, else in memory.

    *names* tells the generations by which programs have a blob open, each with the key that they used. What is small
    and urgent comes right from the *store*.
    Calls *landed* with each flight that succeeds, and *came* with the blob and size of what the store sent. Calls
    *refused* with a blob for which the disk has no room: its demanded chunks stay in memory, its others are not
    fetched.
    """

    def __init__(
        self,
        copier: Copier,
        disk: DiskTier,
        retrying: Retrying,
        *,
        uncached: UncachedChunks,
        equal: EqualChunkCopier | None,
        peers: Peers | None,
        limit: AdaptiveLimit,
        names: Callable[[Blob], Iterable[Generation]],
        landed: Callable[[Flight], None],
        came: Callable[[Blob, int], None],
        refused: Callable[[Blob], None],
        store: Store | None = None,
    ) -> None:
        self._copier = copier
        self._disk = disk
        self._retrying = retrying
        self._uncached = uncached
        self._equal = equal
        self._peers = peers
        self._limit = limit
        self._names = names
        self._landed = landed
        self._came = came
        self._refused = refused
        self._store = store
        self._requests = 0
        self._verifying = WeakValueDictionary[tuple[str, int], trio.Lock]()
        self.verified = 0
        """Chunks of earlier servers that have passed their checksum since this server started."""

    async def missing(self, batch: Sequence[Flight]) -> list[Sequence[Flight]]:
        """The missing flights of a batch, in batches to fetch from the store.

        Those land whose chunks are here, in another blob or on another host.
        """
        states = batch[0].blob.states
        missing: list[Sequence[Flight]] = [batch]
        if not all(states[flight.chunk] == ChunkState.MISSING for flight in batch):
            # Verify all of them first: chunks that are here must not wait for a store that may fail.
            missing = [[flight] for flight in batch if not await self._is_here(flight)]
        if self._equal is not None and self._retrying.problem(batch[0].blob.token) is None:
            missing = [left for flights in missing for left in await self._equal.copy(flights, self._landed)]
        if self._peers is not None:
            missing = [left for flights in missing for left in await self._not_on_peers(self._peers, flights)]
        return missing

    async def _not_on_peers(self, peers: Peers, batch: Sequence[Flight]) -> list[Sequence[Flight]]:
        """The flights of a batch that no peer has given, in batches of consecutive chunks."""
        left: list[list[Flight]] = []
        token = batch[0].blob.token

        def away() -> bool:
            return self._retrying.problem(token) is not None

        for flight in batch:
            deadline = trio.current_time() + self._retrying.deadline_s
            if flight.done.is_set() or await peers.fetch(flight, self._landed, deadline=deadline, away=away):
                continue
            if left and left[-1][-1].chunk + 1 == flight.chunk:
                left[-1].append(flight)
            else:
                left.append([flight])
        return list(left)

    async def _is_here(self, flight: Flight) -> bool:
        """Whether a chunk is here, perhaps fetched or verified since it was demanded; then it has landed."""
        match flight.blob.states[flight.chunk]:
            case ChunkState.MISSING:
                return False
            case ChunkState.UNVERIFIED:
                if not await self._verify(flight.blob, flight.chunk):
                    return False
        if not flight.done.is_set():  # else it was given up meanwhile
            self._landed(flight)
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
            if not await self._disk.damage.check_chunk(blob, chunk, crc):
                return False
            self.verified += 1
            return True

    async def fetch(self, batch: Sequence[Flight]) -> None:
        """Fetch consecutive chunks from the store, into the blob if the disk has room.

        Peers are asked again if only this shows that the store is away: they may have been slow.
        """
        known = self._retrying.problem(batch[0].blob.token) is not None
        try:
            await self._fetch_from_store(batch)
        except StoreUnavailableError:
            left = [flight for flight in batch if not flight.done.is_set()]
            if left and (known or self._peers is None or await self._not_on_peers(self._peers, left)):
                raise

    async def _fetch_from_store(self, batch: Sequence[Flight]) -> None:
        blob = batch[0].blob
        self._retrying.check(f"{blob.generation.key} at {_start(batch)}", blob.token)  # before evicting for it
        for last in (False, True):
            left = [flight for flight in batch if not flight.done.is_set()]
            if not left:
                return  # cancelled while the disk made space
            if not await self._disk.space.reserve(blob, _stop(left) - _start(left)):
                break
            if await self._fetch_into_blob(left, last=last):
                return
        for flight in batch:
            if flight.done.is_set():
                continue
            self._disk.space.refused()
            self._refused(blob)
            if flight.demanded:
                await self._fetch_uncached(flight)
            else:
                self._landed(flight)

    async def _fetch_into_blob(self, batch: Sequence[Flight], *, last: bool) -> bool:
        """Fetch chunks into the blob, whose space is reserved.

        Returns False when it cannot be written, and makes space unless it was the *last* try; chunks written before
        have landed.
        """
        blob = batch[0].blob
        flights = {flight.chunk: flight for flight in batch}
        position, stop = _start(batch), _stop(batch)
        resizes, heard = blob.resizes, trio.current_time()

        def landed(record: ChunkRecord) -> None:
            nonlocal position, heard
            if blob.resizes != resizes or flights[record.chunk].done.is_set():
                return  # the file was truncated since, so bytes may be lost; or the flight was cancelled
            position += record.length
            heard = trio.current_time()
            self._retrying.breaker.answered()
            self._disk.wrote(blob, record)
            self._came(blob, record.length)
            self._landed(flights[record.chunk])

        def arrived(offset: int) -> None:
            if blob.resizes == resizes:
                flights[offset // blob.chunk_size].has_arrived(offset % blob.chunk_size)

        async def attempt() -> None:
            nonlocal resizes
            if position == stop:
                return  # the last request failed only after its last chunk
            resizes = blob.resizes
            wanted = any(flight.demanded for flight in batch)
            extent = Extent(position, stop, blob.fileno(), position, blob.chunk_size)
            await self._request(blob, extent, landed, arrived, batch[0].priority, eager=wanted)
            if position < stop:
                raise TransientStoreError("its file in the cache was truncated meanwhile")

        try:
            subject = f"{blob.generation.key} at {position}"
            await self._retrying.call(subject, attempt, heard=lambda: heard, token=blob.token)
        except OSError as error:
            await self._disk.space.write_failed(blob, stop - position, error, last=last)
            return False
        except BaseException:
            self._disk.space.unreserve(blob, stop - position)
            raise
        return True

    async def _fetch_uncached(self, flight: Flight) -> None:
        """Fetch a chunk into memory: the disk has no room for it."""
        blob = flight.blob
        start, stop = blob.span_of(flight.chunk)

        async def fill(descriptor: int) -> None:
            await self.fetch_into(blob, flight.chunk, descriptor)

        flight.data = await self._uncached.fetch(blob, flight.chunk, fill)
        self._came(blob, stop - start)
        self._landed(flight)

    async def fetch_into(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord:
        """Fetch a chunk into a descriptor's file at offset 0. Raises StoreError and OSError."""
        start, stop = blob.span_of(chunk)
        return await self._get_into(blob, start, stop, descriptor)

    async def fetch_range(self, blob: Blob, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` from the store, not cached anywhere. Raises StoreError."""
        data = await in_memory(blob, stop - start, partial(self._get_into, blob, start, stop))
        self._came(blob, stop - start)
        return data

    async def fetch_directly(self, blob: Blob, start: int, stop: int) -> Buffer:
        """As `fetch_range`, by this process, where that works: once, and only for a few bytes."""
        if self._store is None:
            return await self.fetch_range(blob, start, stop)
        data = bytearray()
        await self._store.read(blob.generation, start, stop - start, data.extend)
        self._came(blob, len(data))
        return memoryview(data)

    async def _get_into(self, blob: Blob, start: int, stop: int, descriptor: int) -> ChunkRecord:
        came: list[ChunkRecord] = []
        await self._retrying.call(
            f"{blob.generation.key} at {start}",
            lambda: self._request(blob, Extent(start, stop, descriptor, 0, blob.chunk_size), came.append),
            token=blob.token,
        )
        return came[-1]

    async def _request(
        self,
        blob: Blob,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        priority: Priority | None = None,
        *,
        eager: bool = False,
    ) -> None:
        """Try once to copy bytes of the object to a file."""
        began, generation, refused = trio.current_time(), blob.generation, set[str]()
        self._requests += 1
        under_way, spent = self._requests, Spent()
        try:
            with spanning(blob, REQUEST, offset=extent.start, bytes=extent.size) as span:
                copy = partial(
                    self._copier.fetch,
                    extent=extent,
                    landed=landed,
                    arrived=arrived,
                    eager=eager,
                    spent=spent,
                    priority=priority,
                )
                while True:
                    try:
                        version = await _copied(copy, generation)
                        break
                    except StoreAccessError:
                        # Perhaps one tenant of several may no more: go on with the credentials of another open.
                        refused.add(generation.key)
                        names = (blob.generation, *self._names(blob))
                        other = next((each for each in names if each.key not in refused), None)
                        if other is None:
                            raise
                        generation = other
                if spent.first_byte:
                    span.spent = spent
        except ObjectNotFoundError as error:
            raise await self._missing(generation) from error
        finally:
            self._requests -= 1
        if extent.size % blob.chunk_size == 0:
            self._limit.succeeded(trio.current_time() - began, under_way, size=extent.size)
        if blob.generation.key in refused:
            blob.generation = generation
        if version is not None:
            blob.generation = replace(blob.generation, version_id=version)

    async def _missing(self, generation: Generation) -> ObjectChangedError | TransientStoreError:
        """The error of a read of an object that the store does not find: a read that may succeed, if it finds it when
        asked for it again. Raises StoreError."""
        for wait_s in MISSING_FOR_S:
            if self._store is None:
                break  # of files, the host itself knows
            await trio.sleep(wait_s)
            with suppress(ObjectNotFoundError):
                await self._store.stat(generation.key)
                return TransientStoreError(f"{generation.key}: not found, though the store has it")
        return ObjectChangedError(f"{generation.key} has been deleted")


async def _copied(copy: Callable[[Generation], Awaitable[str | None]], generation: Generation) -> str | None:
    """*copy* bytes of an object, with the credentials of the generation's path; the version, if told."""
    try:
        return await copy(generation)
    except (ObjectChangedError, ObjectNotFoundError):
        if generation.version_id is None:
            raise
    # This version is gone, but the newest one may have the same content.
    return await copy(replace(generation, version_id=None))


def _start(batch: Sequence[Flight]) -> int:
    return batch[0].blob.span_of(batch[0].chunk)[0]


def _stop(batch: Sequence[Flight]) -> int:
    return batch[-1].blob.span_of(batch[-1].chunk)[1]
