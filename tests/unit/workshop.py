"""What the tests of the fetcher share: a store, a disk tier and a fetcher between them."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import content_of, disk_tier, fetcher_of, fetching, opened
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreError
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier

DEADLINE_S = 15.0


class Bench:
    """A store, a disk tier and a fetcher between them."""

    def __init__(self, store: MemoryStore, tier: DiskTier, fetcher: StoreFetcher) -> None:
        self.store = store
        self.tier = tier
        self.fetcher = fetcher

    async def acquire(self, key: str) -> Blob:
        return await self.tier.blobs.acquire(self.store.generation(key))

    async def read(self, blob: Blob, start: int, stop: int) -> bytes:
        return bytes(await self.fetcher.read(blob, start, stop))

    def idle(self) -> bool:
        statistics = self.fetcher.statistics()
        return statistics.in_flight == 0 and statistics.waiting == 0


class Workshop:
    """Makes the bench of a test, once its store is filled."""

    def __init__(self, nursery: trio.Nursery, directory: Path, chunk_size: int, store: MemoryStore) -> None:
        self._nursery = nursery
        self.directory = directory
        self.chunk_size = chunk_size
        self.store = store
        self.tier: DiskTier | None = None

    def put(self, key: str, chunks: float, *, version_id: str | None = None) -> bytes:
        content = content_of(key, int(chunks * self.chunk_size))
        self.store.put(key, content, version_id=version_id)
        return content

    def memory_for(self, requests: int) -> int:
        """A memory limit that allows so many requests at once; chunks in half a chunk's memory each."""
        return requests * self.chunk_size // 2

    async def opened(
        self, chunks: float, *, version_id: str | None = None, **settings: Any
    ) -> tuple[Bench, Blob, bytes]:
        """A `bench`, the blob of an object ``a`` of so many chunks that is not here yet, and the object's content."""
        content = self.put("a", chunks, version_id=version_id)
        bench = await self.bench(**settings)
        return bench, await bench.acquire("a"), content

    async def bench(
        self,
        *,
        requests: int = 12,
        budget: float | None = None,
        deadline_s: float = DEADLINE_S,
        transfer: Copier | None = None,
        direct: MemoryStore | None = None,
    ) -> Bench:
        """A bench with memory for so many requests and room on disk for *budget* chunks.

        *transfer* and *direct* are as of `fetcher_of`.
        """
        limit = None if budget is None else int(budget * self.chunk_size)
        self.tier = disk_tier(self.directory, store=self.store.identity, budget=limit, chunk_size=self.chunk_size)
        fetcher = fetcher_of(
            self.store,
            self.tier,
            memory_limit=self.memory_for(requests),
            deadline_s=deadline_s,
            transfer=transfer,
            direct=direct,
        )
        await self._nursery.start(fetcher.run)
        return Bench(self.store, self.tier, fetcher)


async def fill_from(workshop: Workshop, key: str) -> None:
    """Have an earlier server cache an object of the store."""
    async with (
        opened(workshop.directory) as tier,
        fetching(workshop.store, tier, memory_limit=workshop.memory_for(12)) as fetcher,
        tier.blobs.using(workshop.store.generation(key)) as blob,
    ):
        await fetcher.fetch_all(blob)
    workshop.store.requests.clear()


async def failure(bench: Bench, blob: Blob, start: int, stop: int, errors: list[StoreError]) -> None:
    """A read that fails; its error is added to *errors*."""
    with pytest.raises(StoreError) as caught:
        await bench.read(blob, start, stop)
    errors.append(caught.value)


def kind_of(descriptor: int) -> str:
    """What a descriptor is of: ``memory``, or ``disk``."""
    return "memory" if "memfd:" in os.readlink(f"/proc/self/fd/{descriptor}") else "disk"


def break_writes(
    monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOSPC, *, begin: int = 0, times: float = float("inf")
) -> Counter[str]:
    """Fail writes to the disk, not to memory, from offset *begin* of a file on; counts those that failed."""
    pwrite = os.pwrite
    failed: Counter[str] = Counter()

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if kind_of(descriptor) == "disk" and offset >= begin and failed["disk"] < times:
            failed["disk"] += 1
            raise OSError(error, os.strerror(error))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    return failed
