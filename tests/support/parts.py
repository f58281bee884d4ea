"""The components under test, put together for the length of a block."""

import errno
import hashlib
import json
import os
import random
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import pytest
import trio

from tests.support.chunks import REQUESTS_PER_CHUNK, SMALL_CHUNK
from tests.support.stores import MemoryStore, as_store
from trimsfs.errors import TrimsError
from trimsfs.eviction_policies import Policy, lru
from trimsfs.fetch.copier import Arrived, Copier, Extent, Landed
from trimsfs.fetch.flights import Priority
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.processes.thread_copier import ThreadCopier
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.fetch.store_requests import StoreSpeed, max_requests
from trimsfs.origins import Origins
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.model_counters import ModelCounters
from trimsfs.telemetry.open_trace import Spent
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.budget import DiskLimits
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.quotas import Quotas
from trimsfs.tiers.ranges import chunk_span
from trimsfs.types import ChunkRecord, Generation

T = TypeVar("T")

STORE_URL = "memory://test"


def content_of(key: str, size: int) -> bytes:
    """Bytes that look random and are always the same for a key."""
    return random.Random(key).randbytes(size)


def generation_of(key: str, content: bytes, *, version_id: str | None = None) -> Generation:
    return Generation(
        key=key,
        etag=hashlib.md5(content).hexdigest(),
        size=len(content),
        modified_ns=1_700_000_000_000_000_000,
        version_id=version_id,
    )


def piece(content: bytes, chunk: int, chunk_size: int = SMALL_CHUNK) -> memoryview:
    """One chunk of a content."""
    start, stop = chunk_span(chunk, len(content), chunk_size)
    return memoryview(content)[start:stop]


def unheard(*_arguments: object) -> None:
    """Nobody wants to know."""


def disk_tier(
    directory: Path,
    *,
    budget: int | None = None,
    min_free: int = 0,
    store: str | Origins = STORE_URL,
    policy: Policy = lru,
    quotas: Quotas | None = None,
    load_cost: Callable[[str, int], float] = lambda _key, _size: 0.0,
    compares: bool = False,
    removed: Callable[[Blob], None] = unheard,
    suspected: Callable[[Blob, TrimsError], None] = unheard,
    lock: int | None = None,
    chunk_size: int = SMALL_CHUNK,
) -> DiskTier:
    """A disk tier by itself: nobody hears of its blobs but the test, if it wants to."""
    return DiskTier(
        directory,
        store=store,
        limits=DiskLimits(budget=budget, min_free=min_free, quotas=quotas or Quotas(), policy=policy),
        load_cost=load_cost,
        compares=compares,
        removed=removed,
        suspected=suspected,
        lock=lock,
        chunk_size=chunk_size,
    )


@asynccontextmanager
async def opened(directory: Path, **settings: Any) -> AsyncIterator[DiskTier]:
    """As `disk_tier`, recorded and closed at the end."""
    tier = disk_tier(directory, **settings)
    try:
        yield tier
    finally:
        with trio.CancelScope(shield=True):
            await tier.aclose()


def written(blob: Blob, chunk: int, data: memoryview | bytes) -> ChunkRecord:
    """Write a chunk to a blob's file; nobody is told of it."""
    start, _ = blob.span_of(chunk)
    assert os.pwrite(blob.fileno(), data, start) == len(data)
    return ChunkRecord(chunk=chunk, length=len(data), crc=crc32c.crc32c(data))


async def store_chunk(tier: DiskTier, blob: Blob, chunk: int, data: memoryview) -> bool:
    """Keep a chunk as the fetcher does, if there is room."""
    for last in (False, True):
        if not await tier.space.reserve(blob, len(data)):
            break
        try:
            record = await trio.to_thread.run_sync(written, blob, chunk, data)
        except OSError as error:
            await tier.space.write_failed(blob, len(data), error, last=last)
        else:
            tier.space.wrote(blob, record)
            return True
    tier.space.refused(blob)
    return False


async def verify_chunk(tier: DiskTier, blob: Blob, chunk: int) -> bool:
    """Check a chunk that an earlier server left as the fetcher does; whether it is right."""
    try:
        crc = await copier(MemoryStore()).checksum(blob.fileno(), *blob.span_of(chunk))
    except OSError:
        crc = None
    return await tier.damage.check_chunk(blob, chunk, crc)


async def fill(tier: DiskTier, key: str, content: bytes) -> Generation:
    """Store a whole object, as if it had been read once."""
    generation = generation_of(key, content)
    async with tier.blobs.using(generation) as blob:
        for chunk in range(len(blob.states)):
            assert await store_chunk(tier, blob, chunk, piece(content, chunk, blob.chunk_size))
    return generation


async def recorded_bytes(tier: DiskTier) -> int:
    """Bytes on disk as the index has them."""
    return sum(here.disk_bytes for here in await tier.residencies.all())


def recorded_loads(cache: Path) -> list[list[str]]:
    """The names of the files that are recorded of each load."""
    with closing(sqlite3.connect(cache / "index.sqlite")) as index:
        return [[name for name, _ in json.loads(files)] for (files,) in index.execute("SELECT files FROM loads")]


def recorded_names(cache: Path) -> set[str]:
    """The names in all listings that are recorded."""
    with closing(sqlite3.connect(cache / "index.sqlite")) as index:
        records = [zlib.decompress(names) for (names,) in index.execute("SELECT names FROM listings")]
    return {name for record in records for line in record.splitlines() for name, *_ in json.loads(line)}


async def until(condition: Callable[[], bool]) -> None:
    """Wait, in real time whatever trio's clock does, until something has happened."""
    for _ in range(10_000):
        if condition():
            return
        await trio.to_thread.run_sync(time.sleep, 0.002)
    raise AssertionError("did not happen in 20 s")


def states(blob: Blob) -> list[ChunkState]:
    return [ChunkState(state) for state in blob.states]


def blob_files(directory: Path) -> list[Path]:
    """The files of all blobs in a cache directory."""
    return sorted(path for path in (directory / "blobs").rglob("*") if path.is_file())


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


class InLoop(ThreadCopier):
    """Tells of what has come in the event loop, as one that works in another process does."""

    async def fetch(
        self,
        generation: Generation,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        *,
        eager: bool = False,
        spent: Spent | None = None,
        priority: Priority | None = None,
    ) -> str | None:
        loop = trio.lowlevel.current_trio_token()

        def told(function: Callable[[T], None]) -> Callable[[T], None]:
            def tell(value: T) -> None:
                if trio.lowlevel.in_trio_run():
                    function(value)
                else:
                    trio.from_thread.run_sync(function, value, trio_token=loop)

            return tell

        wanted = None if arrived is None else told(arrived)
        return await super().fetch(
            generation, extent, told(landed), wanted, eager=eager, spent=spent, priority=priority
        )


def copier(store: MemoryStore) -> ThreadCopier:
    """Moves bytes of a store in this process."""
    return InLoop(as_store(store), threads=8)


async def nothing(*_arguments: object) -> None:
    """What is to happen does not."""


def fetcher_of(
    store: MemoryStore,
    tier: DiskTier,
    *,
    memory_limit: int,
    deadline_s: float = 15.0,
    transfer: Copier | None = None,
    peers: Peers | None = None,
    direct: MemoryStore | None = None,
) -> StoreFetcher:
    """A fetcher by itself: nobody hears of the blobs that are whole. First bytes come from *direct*, if it is given."""
    speed = StoreSpeed(max_requests=max_requests(memory_limit, request_memory=tier.chunk_size // REQUESTS_PER_CHUNK))
    return StoreFetcher(
        transfer or copier(store),
        tier.blobs,
        tier.space,
        tier.damage,
        Retrying(deadline_s=deadline_s, on_failure=speed.request_failed),
        speed,
        memory_limit=memory_limit,
        chunk_size=tier.chunk_size,
        streaming=store.streaming,
        models=ModelCounters(),
        completed=nothing,
        peers=peers,
        store=None if direct is None else as_store(direct),
    )


@asynccontextmanager
async def fetching(
    store: MemoryStore, tier: DiskTier, *, memory_limit: int, deadline_s: float = 15.0
) -> AsyncIterator[StoreFetcher]:
    fetcher = fetcher_of(store, tier, memory_limit=memory_limit, deadline_s=deadline_s)
    async with trio.open_nursery() as nursery:
        await nursery.start(fetcher.run)
        try:
            yield fetcher
        finally:
            nursery.cancel_scope.cancel()


def blob_of(disk: DiskTier, store: MemoryStore, key: str) -> Blob:
    """The blob of what the store has under a key, which is open or was of late."""
    blob = disk.blobs.known(store.generation(key).token(store.identity))
    assert blob is not None
    return blob


def failing(code: int) -> object:
    """A method of the index that fails as SQLite does."""

    def method(*_arguments: object) -> None:
        error = sqlite3.OperationalError("as told")
        error.sqlite_errorcode = code
        raise error

    return method


async def fail_to_sync(disk: DiskTier, blob: Blob) -> None:
    """What was written to a blob does not reach the disk, and that is found out."""

    sync = Blob.sync

    def fail(synced: Blob) -> None:
        if synced is blob:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(synced)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Blob, "sync", fail)
        await disk.journal.flush()
        await disk.journal.sync()
