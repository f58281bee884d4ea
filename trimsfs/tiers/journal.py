"""What is still to be recorded in the index, and brought to the disk."""

import logging
import sqlite3
from collections.abc import Iterable

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index import BlobIndex
from trimsfs.tiers.threads import Threads
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)


class Journal:
    """Keeps the index in step with what is written and used, some at a time.

    ``recording`` is held while something is recorded, ``syncing`` while one blob is brought to the disk: who takes a
    blob out of the index holds both.
    """

    def __init__(self, index: BlobIndex, threads: Threads) -> None:
        self._index = index
        self._threads = threads
        self.recording = trio.Lock()
        self.syncing = trio.Lock()
        self._pending: list[tuple[str, ChunkRecord]] = []
        self._uses: dict[str, int] = {}
        self._digests: dict[str, str | None] = {}
        self._unsynced: dict[Blob, set[int]] = {}
        self._marked = True
        """Whether chunks were marked as synced since the index was, by an earlier server maybe."""

    @property
    def pending(self) -> bool:
        """Whether chunks or digests are to be recorded."""
        return bool(self._pending or self._digests)

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        """A whole chunk has been written."""
        self._pending.append((blob.token, record))
        self._unsynced.setdefault(blob, set()).add(record.chunk)

    def left(self, blob: Blob, chunks: Iterable[int]) -> None:
        """An earlier server has recorded chunks and did not come to bring them to the disk."""
        self._unsynced.setdefault(blob, set()).update(chunks)

    def used(self, blob: Blob, times: int) -> None:
        """A blob was used, so many times, the last time now."""
        self._uses[blob.token] = self._uses.pop(blob.token, 0) + times

    def compared(self, blob: Blob, digest: str | None) -> None:
        """All bytes of a blob have a digest; None when that is not known any more."""
        self._digests[blob.token] = digest

    def synced(self, blob: Blob) -> bool:
        """Whether all of a blob has been brought to the disk."""
        return blob not in self._unsynced

    def forget(self, token: str) -> int:
        """Nothing of a blob is to be recorded; how many bytes of it were to be. For who holds ``recording``."""
        unrecorded = sum(record.length for name, record in self._pending if name == token)
        self._pending = [item for item in self._pending if item[0] != token]
        self._uses.pop(token, None)
        self._digests.pop(token, None)
        self._unsynced = {blob: chunks for blob, chunks in self._unsynced.items() if blob.token != token}
        return unrecorded

    async def recorded(self, blob: Blob) -> None:
        """Return when what was written to a blob so far has been recorded; those who wait together wait for one.

        Raises CacheUnusableError when it cannot be.
        """
        async with self.recording:
            if any(token == blob.token for token, _ in self._pending):
                await self._record_all()
            if any(token == blob.token for token, _ in self._pending):
                raise CacheUnusableError(f"{blob.generation.key}: the cache index cannot be written: see the log")

    async def flush(self) -> None:
        """Record the chunks written and the blobs used so far."""
        async with self.recording:
            await self._record_all()

    async def _record_all(self) -> None:
        pending, self._pending = self._pending, []
        uses, self._uses = self._uses, {}
        digests, self._digests = self._digests, {}
        if not pending and not uses and not digests:
            return
        try:
            await self._threads.run(self._record, pending, uses, digests)
        except sqlite3.Error as error:
            log.error("cannot write the cache index: %s", error)
            self._pending = pending + self._pending
            self._digests = digests | self._digests

    def _record(
        self, pending: list[tuple[str, ChunkRecord]], uses: dict[str, int], digests: dict[str, str | None]
    ) -> None:
        self._index.add_chunks(pending)
        self._index.used(uses)
        if digests:
            self._index.set_digests(digests)

    async def sync(self) -> None:
        """Bring to the disk what was written so far, and the records of it."""
        for blob in list(self._unsynced):
            async with self.syncing:
                await self._sync(blob)
        async with self.syncing:
            if self._marked:
                try:
                    await self._threads.run(self._index.sync)
                    self._marked = False
                except sqlite3.Error as error:
                    log.error("cannot write the cache index: %s", error)

    async def _sync(self, blob: Blob) -> None:
        chunks = self._unsynced.get(blob)
        if chunks is None:
            return  # it has been evicted meanwhile
        blob.users += 1
        try:
            async with self.recording:  # what is being recorded is not in the index yet
                done = chunks - {record.chunk for name, record in self._pending if name == blob.token}
            await self._threads.run(blob.sync)
            await self._threads.run(self._index.mark_synced, blob.token, done)
            chunks -= done
            self._marked = True
        except (OSError, sqlite3.Error) as error:
            log.error("%s: cannot sync to disk: %s", blob.generation.key, error)
        finally:
            blob.users -= 1
        if not chunks:
            self._unsynced.pop(blob, None)
