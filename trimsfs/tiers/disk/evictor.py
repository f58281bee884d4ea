"""Removing blobs from the disk: those that could go, and taking one out of all that knows it."""

import logging
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import replace

import trio

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.budget import Budget
from trimsfs.tiers.disk.files import BlobFiles
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.index.journal import Journal
from trimsfs.tiers.policies import Evictable
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)


class Evictor:
    """Removes blobs of one store that nobody uses or has pinned.

    *blobs* are those that are open. *lock* is held to bring or remove one, and *forget* closes one that nobody uses.
    ``load_cost`` says how many seconds it takes to fetch so many bytes. Counts since the server started.
    """

    def __init__(
        self,
        store: str,
        files: BlobFiles,
        index: BlobIndex,
        threads: Threads,
        journal: Journal,
        budget: Budget,
        blobs: Mapping[str, Blob],
        lock: trio.Lock,
        forget: Callable[[Blob], None],
    ) -> None:
        self._store = store
        self._files = files
        self._index = index
        self._threads = threads
        self._journal = journal
        self._budget = budget
        self._blobs = blobs
        self._lock = lock
        self._forget = forget
        self.load_cost: Callable[[int], float] = lambda _size: 0.0
        self.evictions = self.evicted_bytes = 0

    async def candidates(self) -> list[Evictable]:
        """The blobs that are neither in use nor pinned. Raises sqlite3.Error."""
        await self._journal.flush()
        return [
            replace(entry, cost_s=self.load_cost(entry.size))
            for entry in await self._threads.run(self._index.evictable, self._store)
            if (blob := self._blobs.get(entry.name)) is None or blob.users == 0
        ]

    async def make_room_of(self, token: str, key: str) -> bool:
        """Evict a blob, if nobody uses it or has pinned it; False when it could not be removed."""
        try:
            await self.remove(token, key)
        except (OSError, sqlite3.Error) as error:
            log.error("cannot evict %s: %s", token, error)
            return False
        return True

    async def remove(self, token: str, key: str) -> int | None:
        """Remove a blob that nobody uses or has pinned; None when somebody has. The bytes freed, none if it is gone.

        Raises OSError and sqlite3.Error.
        """
        async with self._lock, self._journal.recording:
            blob = self._blobs.get(token)
            if blob is not None:
                if blob.users or blob.pinned:
                    return None
                self._forget(blob)
            unrecorded, gone = self._journal.forget(token)
            self._budget.add(key, -sum(unrecorded.values()))
            try:
                recorded = await self._threads.run(self._files.remove, token)
            except BaseException:
                self._journal.lost(token, gone | unrecorded.keys())
                raise
        counted = [size for chunk, size in recorded.items() if chunk not in unrecorded and chunk not in gone]
        self._budget.add(key, -sum(counted))
        self._budget.found_room()
        size = sum(unrecorded.values()) + sum(counted)
        self.evictions += 1
        self.evicted_bytes += size
        log.info("evicted %s: %d bytes", token, size)
        return size
