"""Write-behind for the index: chunks, uses and digests are recorded some at a time, chunks then synced to the disk."""

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)

COMPLAINT_INTERVAL_S = 60.0
"""How often the log says that the index still cannot be written."""


class Journal:
    """Keeps the index in step with what is written and used, some at a time.

    ``recording`` is held while something is recorded, ``syncing`` while one blob is synced; whoever removes a blob from
    the index holds both. *unsynced* hears of chunks that did not reach the disk.
    """

    def __init__(
        self, index: BlobIndex, threads: Threads, *, unsynced: Callable[[Blob, Collection[int]], Awaitable[None]]
    ) -> None:
        self._index = index
        self._threads = threads
        self.recording = trio.Lock()
        self.syncing = trio.Lock()
        self._pending: list[tuple[str, ChunkRecord]] = []
        self._gone: dict[str, set[int]] = {}
        self._recorded_gone: dict[str, set[int]] = {}
        """Those of them that are being recorded now."""
        self._uses: dict[str, int] = {}
        self._digests: dict[str, str | None] = {}
        self._unsynced: dict[Blob, set[int]] = {}
        self._noted = trio.Event()
        self._being_synced: Blob | None = None
        self._on_unsynced = unsynced
        self._failing_since: float | None = None
        self._complaint: tuple[str, float] | None = None
        self._marked = True
        """Whether chunks were marked as synced since the index was, by an earlier server maybe."""

    @property
    def failing_s(self) -> float:
        """For how long the index could not be written, for another reason than a full disk."""
        return 0.0 if self._failing_since is None else trio.current_time() - self._failing_since

    @property
    def pending(self) -> bool:
        """Whether chunks, losses of chunks or digests are to be recorded."""
        return bool(self._pending or self._gone or self._digests)

    @property
    def idle(self) -> bool:
        """Whether all is recorded and synced."""
        return not (self.pending or self._uses or self._unsynced or self._marked or self._failing_since is not None)

    async def noted(self) -> None:
        """Wait until something is noted that is to be recorded or synced, or was since the last call."""
        await self._noted.wait()
        self._noted = trio.Event()

    def wake(self) -> None:
        """Have whoever waits for something to be noted look at once."""
        self._noted.set()

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        """A whole chunk has been written."""
        self._pending.append((blob.token, record))
        self._unsynced.setdefault(blob, set()).add(record.chunk)
        self.wake()

    def found_unsynced(self, blob: Blob, chunks: Iterable[int]) -> None:
        """An earlier server has recorded chunks and not synced them."""
        self._unsynced.setdefault(blob, set()).update(chunks)
        self.wake()

    def used(self, blob: Blob, times: int) -> None:
        """A blob was used, so many times, the last time now."""
        self._uses[blob.token] = self._uses.pop(blob.token, 0) + times
        self.wake()

    def compared(self, blob: Blob, digest: str | None) -> None:
        """All bytes of a blob have a digest; None when that is not known any more."""
        self._digests[blob.token] = digest
        self.wake()

    def synced(self, blob: Blob) -> bool:
        """Whether all of a blob has been synced to the disk."""
        return blob not in self._unsynced

    def is_only_user(self, blob: Blob) -> bool:
        """Whether a blob is in use only as it is being synced, which ends with ``syncing``."""
        return self._being_synced is blob and blob.users == 1

    def gone(self, token: str) -> set[int]:
        """Chunks of a blob that are not there any more, though they may still be recorded."""
        return self._gone.get(token, set()) | self._recorded_gone.get(token, set())

    def lost(self, token: str, chunks: Iterable[int]) -> None:
        """Chunks of a blob are not there any more: they are not to be recorded, and no longer if they are."""
        gone = set(chunks)
        if gone:
            self._gone.setdefault(token, set()).update(gone)
            self.wake()
            self._pending = _without(self._pending, {token: gone})

    def discard(self, blob: Blob, chunks: Collection[int]) -> set[int]:
        """`lost`, for chunks and for those that have not been synced; returns all of them. Needs ``recording``."""
        gone = set(chunks) | self._unsynced.pop(blob, set())
        self.lost(blob.token, gone)
        return gone

    def forget(self, token: str) -> tuple[dict[int, int], set[int]]:
        """Record nothing of a blob. Returns the bytes of its chunks that were to be recorded, by their numbers, and the
        chunks whose loss was. Needs ``recording``."""
        unrecorded = {record.chunk: record.length for name, record in self._pending if name == token}
        self._pending = [item for item in self._pending if item[0] != token]
        self._uses.pop(token, None)
        self._digests.pop(token, None)
        self._unsynced = {blob: chunks for blob, chunks in self._unsynced.items() if blob.token != token}
        return unrecorded, self._gone.pop(token, set())

    async def wait_until_recorded(self, blob: Blob) -> None:
        """Return when what was written to a blob so far has been recorded; callers at once share one transaction.

        Raises CacheUnusableError when it cannot be.
        """
        async with self.recording:
            if any(token == blob.token for token, _ in self._pending):
                await self.record()
            if any(token == blob.token for token, _ in self._pending):
                raise CacheUnusableError(f"{blob.generation.key}: the cache index cannot be written: see the log")

    async def flush(self) -> None:
        """Record the chunks written and the blobs used so far."""
        async with self.recording:
            await self.record()

    async def record(self) -> None:
        """`flush`, which needs ``recording``."""
        pending, self._pending = self._pending, []
        uses, self._uses = self._uses, {}
        digests, self._digests = self._digests, {}
        gone, self._gone = self._gone, {}
        self._recorded_gone = gone
        if not pending and not gone and not uses and not digests:
            return
        try:
            await self._threads.run(self._record, gone, pending, uses, digests)
        except sqlite3.Error as error:
            self._failed(error)
            self._pending = _without(pending, self._gone) + self._pending
            for token, chunks in gone.items():
                self._gone.setdefault(token, set()).update(chunks)
            again = {token: times + uses.pop(token, 0) for token, times in self._uses.items()}
            self._uses = uses | again  # in the order of the last use
            self._digests = digests | self._digests
        else:
            self._failing_since = self._complaint = None
        finally:
            self._recorded_gone = {}

    def _failed(self, error: sqlite3.Error) -> None:
        now, text = trio.current_time(), str(error)
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            self._failing_since = now if self._failing_since is None else self._failing_since
        if self._complaint is None or self._complaint[0] != text or now - self._complaint[1] > COMPLAINT_INTERVAL_S:
            self._complaint = text, now
            log.error("cannot write the cache index: %s", error)

    def _record(
        self,
        gone: dict[str, set[int]],
        pending: list[tuple[str, ChunkRecord]],
        uses: dict[str, int],
        digests: dict[str, str | None],
    ) -> None:
        with self._index.transaction():
            for token, chunks in gone.items():
                self._index.remove_chunks(token, chunks)  # first: they may have come again since
            self._index.add_chunks(pending)
            self._index.used(uses)
            self._index.set_digests(digests)

    async def sync(self) -> None:
        """Sync to the disk what was written so far, and the records of it."""
        for blob in list(self._unsynced):
            async with self.syncing:
                await self._sync(blob)
        async with self.syncing:
            if self._marked:
                try:
                    await self._threads.run(self._index.sync)
                    self._marked = False
                    self._failing_since = None
                except sqlite3.Error as error:
                    self._failed(error)

    async def sync_blob(self, blob: Blob) -> bool:
        """Sync to the disk what was written to a blob; whether all of it has reached it."""
        await self.flush()
        async with self.syncing:
            await self._sync(blob)
        return blob not in self._unsynced and not blob.health.lost

    async def _sync(self, blob: Blob) -> None:
        chunks = self._unsynced.get(blob)
        if chunks is None:
            return  # it has been evicted meanwhile
        lost: OSError | None = None
        self._being_synced = blob
        blob.users += 1
        try:
            async with self.recording:  # what is being recorded is not in the index yet
                done = chunks - {record.chunk for name, record in self._pending if name == blob.token}
            chunks -= done  # what is written again meanwhile is to be synced again
            if blob.attached:
                blob.fileno()  # opened here, if need be, and not in a thread
            await self._threads.run(self._sync_file, blob, done)
            self._marked = True
            if done:
                self._failing_since = None
        except sqlite3.Error as error:
            self._failed(error)
            chunks |= done
        except OSError as error:
            lost = error
        finally:
            blob.users -= 1
            self._being_synced = None
        if lost is not None:
            log.error("%s: cannot sync its chunks to the disk: %s", blob.generation.key, lost)
            await self._on_unsynced(blob, done)
        elif not chunks and self._unsynced.get(blob) is chunks:
            del self._unsynced[blob]

    def _sync_file(self, blob: Blob, chunks: Collection[int]) -> None:
        blob.sync()
        self._index.mark_synced(blob.token, chunks)


def _without(pending: list[tuple[str, ChunkRecord]], gone: Mapping[str, set[int]]) -> list[tuple[str, ChunkRecord]]:
    return [(token, record) for token, record in pending if record.chunk not in gone.get(token, ())]
