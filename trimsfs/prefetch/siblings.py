"""Prefetches the small files beside one that is opened, so that they do not cost a round trip each."""

import logging

import trio
from cachetools import FIFOCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import TrimsError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.passthrough import Passthrough
from trimsfs.prefetch.directory_readahead import SMALL, DirectoryReadahead
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FILES_AT_ONCE = 16
DIRECTORIES = 256
"""How many directories are remembered."""


class Siblings:
    """Watches which small files are opened, and prefetches those beside them."""

    def __init__(self, namespace: Namespace, disk: DiskTier, fetcher: Fetcher, passthrough: Passthrough) -> None:
        self._namespace = namespace
        self._disk = disk
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._small = min(SMALL, disk.chunk_size // 8)
        self._directories = FIFOCache[str, DirectoryReadahead](maxsize=DIRECTORIES)
        self._slots = trio.Semaphore(FILES_AT_ONCE)
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background, for as long as the server runs."""
        await self._background.run(task_status)

    def record_open(self, inode: Inode, *, here: bool) -> None:
        """A file is opened; *here*: all of it is on disk."""
        assert inode.generation is not None
        if inode.generation.size > self._small:
            return
        prefix, slash, name = inode.path.rpartition("/")
        prefix += slash
        readahead = self._directories.get(prefix)
        if readahead is None:
            if here:
                return
            readahead = self._directories[prefix] = DirectoryReadahead(small=self._small)
        wanted = readahead.record_open(
            name.encode(errors="surrogateescape"), inode.generation, self._namespace.known_entries(prefix)
        )
        if wanted and self._background.running:
            self._background.start(self._fetch, wanted)

    async def _fetch(self, wanted: list[Generation]) -> None:
        async with trio.open_nursery() as nursery:
            for generation in wanted:
                await self._slots.acquire()
                if self._disk.full(generation):
                    self._slots.release()
                    return
                nursery.start_soon(self._fetch_one, generation)

    async def _fetch_one(self, generation: Generation) -> None:
        try:
            async with self._disk.using(generation) as blob:
                await self._fetcher.fetch_all(blob)
                await self._passthrough.register(blob)
        except TrimsError as error:
            log.debug("%s: not prefetched: %s", generation.key, error)
        finally:
            self._slots.release()
