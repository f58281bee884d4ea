"""Requests to a store: how fast they are of late, how many may be under way, and how each is made."""

import math
import mmap
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import trio

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit
from trimsfs.concurrency.descriptors import patiently
from trimsfs.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.fetch.copier import Arrived, Copier, Extent, Landed
from trimsfs.fetch.flights import Priority
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.model_counters import ModelCounters
from trimsfs.telemetry.open_trace import REQUEST, Spent, spanning
from trimsfs.tiers.blob import Blob
from trimsfs.types import Buffer, ChunkRecord, Generation

MAX_REQUESTS = 32
REQUEST_MEMORY = 2 << 20
"""Bytes that a request's buffer takes in the process that makes the request."""
LOAD_LATENCY_S = 0.03
LOAD_RATE = 1e8
"""Bytes a second that are assumed before anything was measured."""
WORTH_S = 0.08
"""How long a request for a caller who waits should take at least on its own. More and smaller requests are hardly
sooner, and each costs processor time."""
MISSING_FOR_S = (0.1, 0.5)
"""How long after each other a store is asked for an object that it has not found, before that counts as deleted."""


class Throughput:
    """The recent rate, in bytes a second, while requests are under way. ``rate`` is None before a measurement."""

    WINDOW_S = 0.25
    LEAST_BYTES = 4 << 20
    WEIGHT = 0.5

    def __init__(self) -> None:
        self.rate: float | None = None
        self._began = math.inf
        self._bytes = 0

    def busy(self) -> None:
        """Begin to measure: the first request is under way."""
        self._began = trio.current_time()
        self._bytes = 0

    def add(self, count: int) -> None:
        """Count bytes that have arrived."""
        self._bytes += count
        elapsed = trio.current_time() - self._began
        if elapsed >= self.WINDOW_S:
            self._measure(elapsed)
            self.busy()

    def idle(self) -> None:
        """End the measurement: no request is under way."""
        if self._bytes >= self.LEAST_BYTES:
            self._measure(trio.current_time() - self._began)
        self._bytes, self._began = 0, math.inf

    def _measure(self, elapsed_s: float) -> None:
        if elapsed_s > 0:
            now = self._bytes / elapsed_s
            self.rate = now if self.rate is None else self.rate + self.WEIGHT * (now - self.rate)


class StoreSpeed:
    """The adaptive ``limit`` of requests to one store, and its ``throughput``."""

    def __init__(self, *, max_requests: int) -> None:
        self.limit = AdaptiveLimit(maximum=max_requests)
        self.throughput = Throughput()

    def request_failed(self, _error: TransientStoreError) -> None:
        """Lower the limit: a request failed and will be retried."""
        self.limit.throttled(trio.current_time())

    def seconds_for(self, size: int) -> float | None:
        """An estimate of the time to fetch *size* bytes; None before anything was fetched."""
        rate = self.throughput.rate
        return None if rate is None else size / rate

    def least_batch(self, chunk_size: int) -> int:
        """The chunks of a request that take WORTH_S, by the quickest request for one of late."""
        best_s = self.limit.best_s(chunk_size)
        return int(WORTH_S / best_s) if best_s else 1

    def load_cost(self, size: int) -> float:
        """An estimate of the seconds to refetch *size* bytes, including the latency of a request."""
        return LOAD_LATENCY_S + size / (self.throughput.rate or LOAD_RATE)


def max_requests(memory_limit: int, *, request_memory: int = REQUEST_MEMORY) -> int:
    """The most requests under way at once within *memory_limit* bytes."""
    return max(1, min(MAX_REQUESTS, memory_limit // 2 // request_memory))


class StoreRequests:
    """Makes requests to a store for bytes of blobs, and counts what comes.

    *names* returns the generations by which programs have a blob open, each with the key that they used. If one may no
    longer be read, another may. What is small and urgent comes right from *store*, if it is given.
    """

    def __init__(
        self,
        copier: Copier,
        retrying: Retrying,
        speed: StoreSpeed,
        *,
        models: ModelCounters,
        names: Callable[[Blob], Iterable[Generation]],
        store: Store | None,
    ) -> None:
        self._copier = copier
        self._retrying = retrying
        self._speed = speed
        self._models = models
        self._names = names
        self._store = store
        self._under_way = 0
        self._ended = trio.Event()
        self.fetched = self.fetched_bytes = 0
        """Answers since this server started, and their bytes."""
        self.succeeded_at = float("-inf")
        """When the last of them came."""

    async def retried(
        self,
        blob: Blob,
        start: int,
        attempt: Callable[[], Awaitable[None]],
        *,
        heard: Callable[[], float] = lambda: -math.inf,
    ) -> None:
        """Make an *attempt* at a blob's bytes from *start* on, and again when its turn comes, as `Retrying.call`."""
        await self._retrying.call(
            f"{blob.generation.key} at {start}",
            attempt,
            heard=heard,
            others=lambda: self.succeeded_at,
            turn=self._turn,
            token=blob.token,
        )

    async def _turn(self) -> None:
        """Wait until so few requests are under way that one that has failed may be made again.

        All of them at once would be as slow as before, and fail again.
        """
        while self._under_way >= self._speed.limit.limit:
            await self._ended.wait()

    def came(self, blob: Blob, size: int) -> None:
        """Bytes of a blob have come from the store."""
        self.succeeded_at = trio.current_time()
        self._speed.throughput.add(size)
        self.count(blob, size)

    def count(self, blob: Blob, size: int) -> None:
        """Count bytes from the store that were asked for before their blob was known: they tell nothing of its rate."""
        self.fetched_bytes += size
        self.fetched += 1
        self._models.fetched(blob.generation.key, size)

    async def fetch_range(self, blob: Blob, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` from the store, in memory. Raises StoreError."""
        try:
            descriptor = await patiently(partial(os.memfd_create, "trimsfs-chunk"))
            try:
                os.truncate(descriptor, stop - start)
                await self._get_into(blob, start, stop, descriptor)
                # The mapping outlives the descriptor, until no view of it is left.
                data = memoryview(mmap.mmap(descriptor, stop - start, prot=mmap.PROT_READ))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreUnavailableError(f"{blob.generation.key}: no memory to fetch it: {error.strerror}") from error
        self.came(blob, stop - start)
        return data

    async def fetch_directly(self, blob: Blob, start: int, stop: int) -> Buffer:
        """As `fetch_range`, by this process, where that works: once, and only for a few bytes."""
        if self._store is None:
            return await self.fetch_range(blob, start, stop)
        data = bytearray()
        await self._store.read(blob.generation, start, stop - start, data.extend)
        self.came(blob, len(data))
        return memoryview(data)

    async def refetch(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord:
        """Fetch a chunk, even if it is here, into a descriptor's file at offset 0. Raises StoreError and OSError."""
        record = await self._get_into(blob, *blob.span_of(chunk), descriptor)
        self.came(blob, record.length)
        return record

    async def _get_into(self, blob: Blob, start: int, stop: int, descriptor: int) -> ChunkRecord:
        came: list[ChunkRecord] = []
        extent = Extent(start, stop, descriptor, 0, blob.chunk_size)
        await self.retried(blob, start, lambda: self.once(blob, extent, came.append))
        return came[-1]

    async def once(
        self,
        blob: Blob,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        priority: Priority | None = None,
        *,
        eager: bool = False,
    ) -> None:
        """Try once to copy bytes of the object to a file, as `Copier.fetch`."""
        began, generation, refused = trio.current_time(), blob.generation, set[str]()
        self._under_way += 1
        under_way, spent = self._under_way, Spent()
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
            self._under_way -= 1
            self._ended.set()
            self._ended = trio.Event()
        if extent.size % blob.chunk_size == 0:
            self._speed.limit.succeeded(trio.current_time() - began, under_way, size=extent.size)
        if blob.generation.key in refused:
            blob.generation = generation
        if version is not None:
            blob.generation = replace(blob.generation, version_id=version)

    async def _missing(self, generation: Generation) -> ObjectChangedError | TransientStoreError:
        """The error of a read of an object that the store does not find. If the store finds it when asked again,
        another read may succeed. Raises StoreError."""
        for wait_s in MISSING_FOR_S:
            if self._store is None:
                break  # of files, the host itself knows
            await trio.sleep(wait_s)
            with suppress(ObjectNotFoundError):
                await self._store.stat(generation.key)
                return TransientStoreError(f"{generation.key}: not found, though the store has it")
        return ObjectChangedError(f"{generation.key} has been deleted")


async def _copied(copy: Callable[[Generation], Awaitable[str | None]], generation: Generation) -> str | None:
    """*copy* bytes of an object, with the credentials of the generation's path; the version, if the store names it."""
    try:
        return await copy(generation)
    except (ObjectChangedError, ObjectNotFoundError):
        if generation.version_id is None:
            raise
    # This version is gone, but the newest one may have the same content.
    return await copy(replace(generation, version_id=None))
