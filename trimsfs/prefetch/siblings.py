"""Siblings: prefetches the small files beside an opened one, so that they do not cost a round trip each."""

import logging
import resource
from collections.abc import Sequence
from functools import partial

import trio
from cachetools import FIFOCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import TrimsError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.flights import Urgency
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.passthrough import Passthrough
from trimsfs.prefetch.account import Account
from trimsfs.prefetch.directory_readahead import SMALL, DirectoryReadahead, Readable
from trimsfs.tiers.disk.interfaces import BlobUse, Room
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FILES_AT_ONCE = 32
DESCRIPTORS_PER_FILE = 16
"""With few descriptors, at most 1/N as many files at once: programs open others meanwhile."""
FILES_MADE_AT_ONCE = 16
"""Local files to find or make in one switch to a thread; opens wait meanwhile."""
DIRECTORIES = 256
"""Most directories to remember."""
LISTINGS_IN_VAIN = 4
"""After so many listings whose files nobody opened, listings prefetch nothing until a program opens one."""


class Siblings:
    """Watches opens and listings of small files, and prefetches their siblings."""

    def __init__(
        self,
        namespace: Namespace,
        blobs: BlobUse,
        room: Room,
        fetcher: Fetcher,
        passthrough: Passthrough,
        account: Account,
        *,
        chunk_size: int,
    ) -> None:
        self._namespace = namespace
        self._blobs = blobs
        self._room = room
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._account = account
        self.small = min(SMALL, chunk_size // 8)
        self._directories = FIFOCache[str, DirectoryReadahead](maxsize=DIRECTORIES)
        self._listed = FIFOCache[str, None](maxsize=DIRECTORIES)
        """Directories listed, none of whose files was opened since."""
        self._in_vain = 0
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._slots = trio.Semaphore(min(FILES_AT_ONCE, descriptors // DESCRIPTORS_PER_FILE))
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background until the server stops."""
        await self._background.run(task_status)

    def record_open(self, generation: Generation, readable: Readable, *, here: bool) -> None:
        """Record an open of a small file, *here* if whole, by a user who may read the *readable* files."""
        prefix, name = _split(generation.key)
        if self._listed.pop(prefix, self) is not self:
            self._in_vain = 0
        readahead = self._directories.get(prefix)
        if readahead is None:
            if here:
                return
            readahead = self._directories[prefix] = DirectoryReadahead(small=self.small)
        entries = self._namespace.known_entries(prefix)
        self._start(readahead.record_open(name, generation, entries.names, entries, here=here), readable)

    def record_listing(self, prefix: str, readable: Readable) -> None:
        """Record a listing, after which a program may read the files."""
        if prefix in self._listed:
            return
        if self._in_vain >= LISTINGS_IN_VAIN:
            self._listed[prefix] = None
            return
        readahead = self._directories.get(prefix) or DirectoryReadahead(small=self.small)
        entries = self._namespace.known_entries(prefix)
        wanted = readahead.record_listing(entries.names, entries)
        if wanted:
            self._directories[prefix] = readahead
            self._listed[prefix] = None
            self._in_vain += 1
            self._start(wanted, readable, guessed=True)

    def forget(self, generation: Generation) -> None:
        """Forget a file that has left the disk, is closed or was not fetched."""
        prefix, name = _split(generation.key)
        readahead = self._directories.get(prefix)
        if readahead is not None:
            readahead.forget(name)

    def _start(self, wanted: Sequence[Generation], readable: Readable, *, guessed: bool = False) -> None:
        wanted = [generation for generation in wanted if readable(generation.key)]
        if wanted and self._background.running:
            self._background.start(partial(self._fetch, wanted, guessed=guessed))

    async def _fetch(self, wanted: Sequence[Generation], *, guessed: bool) -> None:
        async with trio.open_nursery() as nursery:
            for number, generation in enumerate(wanted):
                if number % FILES_MADE_AT_ONCE == 0:
                    await self._blobs.recall(wanted[number : number + FILES_MADE_AT_ONCE])
                await self._slots.acquire()
                if self._room.full(generation):
                    self._slots.release()
                    for other in wanted[number:]:
                        self.forget(other)
                    return
                nursery.start_soon(partial(self._fetch_one, generation, guessed=guessed))

    async def _fetch_one(self, generation: Generation, *, guessed: bool) -> None:
        try:
            async with self._blobs.using(generation) as blob:
                with self._account.coming(blob):
                    await self._fetcher.fetch_all(blob, Urgency.AHEAD, guessed=guessed)
                await self._passthrough.register(blob)
        except TrimsError as error:
            log.debug("%s: not prefetched: %s", generation.key, error)
            self.forget(generation)
        finally:
            self._slots.release()


def _split(key: str) -> tuple[str, bytes]:
    """The directory of a key, with its closing slash, and its name there."""
    prefix, slash, name = key.rpartition("/")
    return prefix + slash, name.encode(errors="surrogateescape")
