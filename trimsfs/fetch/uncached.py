"""Uncached chunks: they have no room on disk, so the server keeps the few last read in memory."""

import mmap
import os
from collections.abc import Awaitable, Callable
from functools import partial

import trio
from cachetools import LRUCache

from trimsfs.concurrency.descriptors import patiently
from trimsfs.errors import StoreUnavailableError
from trimsfs.tiers.blob import Blob


class UncachedChunks:
    """At most *limit* chunks in memory, and as many in flight."""

    def __init__(self, *, limit: int) -> None:
        self._slots = trio.Semaphore(limit)
        self._kept: LRUCache[tuple[str, int], memoryview] = LRUCache(limit)
        self.count = 0
        """Chunks fetched since the server started."""

    def get(self, blob: Blob, chunk: int) -> memoryview | None:
        """The bytes of a chunk if they are in memory."""
        return self._kept.get((blob.token, chunk))

    def forget(self, blob: Blob) -> None:
        """Drop the chunks of a blob: the disk may have room for them now."""
        for key in [key for key in self._kept if key[0] == blob.token]:
            del self._kept[key]

    async def fetch(self, blob: Blob, chunk: int, fill: Callable[[int], Awaitable[None]]) -> memoryview:
        """The bytes of a chunk, which *fill* writes to a descriptor's file from offset 0.

        Raises StoreUnavailableError when there is no memory for them.
        """
        async with self._slots:
            data = await in_memory(blob, blob.length_of(chunk), fill)
        self.count += 1
        self._kept[blob.token, chunk] = data
        return data


async def in_memory(blob: Blob, length: int, fill: Callable[[int], Awaitable[object]]) -> memoryview:
    """The *length* bytes of a blob that *fill* writes to a descriptor's file from offset 0.

    Raises StoreUnavailableError when there is no memory for them.
    """
    try:
        descriptor = await patiently(partial(os.memfd_create, "trimsfs-chunk"))
        try:
            os.truncate(descriptor, length)
            await fill(descriptor)
            # The mapping outlives the descriptor, until no view of it is left.
            return memoryview(mmap.mmap(descriptor, length, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreUnavailableError(f"{blob.generation.key}: no memory to fetch it: {error.strerror}") from error
