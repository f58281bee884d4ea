"""Uncached chunks: those that have no room on disk, of which the few last read are kept in memory."""

import mmap
import os
from collections.abc import Awaitable, Callable

import trio
from cachetools import LRUCache

from trimsfs.errors import StoreUnavailableError
from trimsfs.tiers.blob import Blob


class UncachedChunks:
    """At most *limit* chunks that have come, and as many that are being fetched."""

    def __init__(self, *, limit: int) -> None:
        self._slots = trio.Semaphore(limit)
        self._kept: LRUCache[tuple[str, int], memoryview] = LRUCache(limit)
        self.count = 0
        """Chunks that have come since the server started."""

    def get(self, blob: Blob, chunk: int) -> memoryview | None:
        """The bytes of a chunk, if they are kept."""
        return self._kept.get((blob.token, chunk))

    def forget(self, blob: Blob) -> None:
        """Drop what is kept of a blob: there may be room for it on the disk by now."""
        for key in [key for key in self._kept if key[0] == blob.token]:
            del self._kept[key]

    async def fetch(self, blob: Blob, chunk: int, fill: Callable[[int], Awaitable[None]]) -> memoryview:
        """The bytes of a chunk, which *fill* writes to the file of a descriptor, from its beginning.

        Raises StoreUnavailableError when there is no memory for it.
        """
        async with self._slots:
            data = await in_memory(blob, blob.length_of(chunk), fill)
        self.count += 1
        self._kept[blob.token, chunk] = data
        return data


async def in_memory(blob: Blob, length: int, fill: Callable[[int], Awaitable[object]]) -> memoryview:
    """The *length* bytes of a blob that *fill* writes to the file of a descriptor, from its beginning.

    Raises StoreUnavailableError when there is no memory for them.
    """
    try:
        descriptor = os.memfd_create("trimsfs-chunk")
        try:
            os.truncate(descriptor, length)
            await fill(descriptor)
            # The mapping lives for as long as a view of it is used.
            return memoryview(mmap.mmap(descriptor, length, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreUnavailableError(f"{blob.generation.key}: no memory for it: {error.strerror}") from error
