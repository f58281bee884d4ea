"""Write-behind for the index: records chunks, uses and digests in batches, then syncs the chunks to the disk."""

import errno
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

import trio

from trimsfs.errors import CacheUnusableError, NoThreadError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)

COMPLAINT_INTERVAL_S = 60.0
"""Time between log lines about an index that still cannot be written."""
COMPARISON_PATIENCE_S = 5.0
"""How long an open waits for a disk that perhaps hangs."""


class _Inherited:
    """The *chunks* of a blob that an earlier server did not sync; ``compared`` is set once the disk has them."""

    def __init__(self, chunks: set[int]) -> None:
        self.chunks = chunks
        self.compared = trio.Event()


class Journal:
    """Queues changes of chunks, uses and digests, and writes them to the index in batches.

    Callers that need written bytes to last take it as `Durability`. *unsynced* gets chunks whose sync failed.
    ``recording`` is held during a write to the index, ``syncing`` while one blob is synced. The evictor holds
    ``recording`` to remove a blob, and ``syncing`` to wait for its sync.
    """

    def __init__(
        self, index: BlobIndex, threads: Threads, *, unsynced: Callable[[Blob, Collection[int]], Awaitable[None]]
    ) -> None:
        self._inherited = OrderedDict((token, _Inherited(chunks)) for token, chunks in index.unsynced().items())
        self._index = index
        self._threads = threads
        self.recording = trio.Lock()
        self.syncing = trio.Lock()
        self._pending: list[tuple[str, ChunkRecord]] = []
        self._gone: dict[str, set[int]] = {}
        self._recorded_gone: dict[str, set[int]] = {}
        """The lost chunks whose loss is being recorded now."""
        self._uses: dict[str, int] = {}
        self._digests: dict[str, str | None] = {}
        self._unsynced: dict[Blob, set[int]] = {}
        self._noted = trio.Event()
        self._being_synced: Blob | None = None
        self._on_unsynced = unsynced
        self._failing_since: float | None = None
        self._complaint: tuple[str, float] | None = None
        self._marked = True
        """Whether chunks were marked as synced after the last sync of the index; an earlier server may have done so."""

    @property
    def failing_s(self) -> float:
        """Seconds for which writes to the index have failed, except because of a full disk."""
        return 0.0 if self._failing_since is None else trio.current_time() - self._failing_since

    @property
    def pending(self) -> bool:
        """Whether chunks, losses of chunks or digests wait to be recorded."""
        return bool(self._pending or self._gone or self._digests)

    @property
    def idle(self) -> bool:
        """Whether everything is recorded and synced."""
        return not (self.pending or self._uses or self._unsynced or self._marked or self._failing_since is not None)

    async def noted(self) -> None:
        """Wait for a change to record or sync; return at once if there was one since the last call."""
        await self._noted.wait()
        self._noted = trio.Event()

    def wake(self) -> None:
        """End the wait in `noted`."""
        self._noted.set()

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        """Queue a chunk that has been written whole."""
        self._pending.append((blob.token, record))
        self._unsynced.setdefault(blob, set()).add(record.chunk)
        self.wake()

    def loaded(self, blob: Blob) -> None:
        """Queue the chunks of a loaded blob that an earlier server recorded, but did not sync, for a sync."""
        if (inherited := self._inherited.get(blob.token)) is not None:
            self._unsynced.setdefault(blob, set()).update(inherited.chunks)
            self.wake()

    def has_inherited(self, blob: Blob) -> bool:
        """Whether chunks that an earlier server did not sync were not compared with the disk yet."""
        return blob.token in self._inherited

    def next_inherited(self, tried: Collection[str]) -> str | None:
        """The token of a blob that `has_inherited` chunks and was not *tried*: first one that somebody waits for."""
        return next((token for token in reversed(self._inherited) if token not in tried), None)

    async def wait_until_compared(self, blob: Blob) -> None:
        """Wait until a blob, which `has_inherited` chunks, has none, for at most COMPARISON_PATIENCE_S.

        Until the disk has all that was written, the bytes in memory are right, unless the earlier server met an error.
        """
        self._inherited.move_to_end(blob.token)  # the next one
        with trio.move_on_after(COMPARISON_PATIENCE_S):
            await self._inherited[blob.token].compared.wait()

    def settle(self, token: str) -> None:
        """The inherited chunks of a blob are on the disk, or nobody may read them."""
        inherited = self._inherited.pop(token, None)
        if inherited is not None:
            inherited.compared.set()

    def used(self, blob: Blob, times: int) -> None:
        """Queue that a blob was used so many *times*, the last time now."""
        self._uses[blob.token] = self._uses.pop(blob.token, 0) + times
        self.wake()

    def compared(self, blob: Blob, digest: str | None) -> None:
        """Queue the store's digest that a blob matches; None: the blob must be compared again."""
        self._digests[blob.token] = digest
        self.wake()

    def synced(self, blob: Blob) -> bool:
        """Whether all of a blob has been synced to the disk."""
        return blob not in self._unsynced

    def is_only_user(self, blob: Blob) -> bool:
        """Whether the sync of a blob, which holds ``syncing``, is its only user."""
        return self._being_synced is blob and blob.users == 1

    def gone(self, token: str) -> set[int]:
        """The lost chunks of a blob that may still be in the index."""
        return self._gone.get(token, set()) | self._recorded_gone.get(token, set())

    def lost(self, token: str, chunks: Iterable[int]) -> None:
        """Queue the loss of chunks: delete their records, and drop those that wait to be written."""
        gone = set(chunks)
        if gone:
            self._gone.setdefault(token, set()).update(gone)
            self.wake()
            self._pending = _without(self._pending, {token: gone})

    def discard(self, blob: Blob, chunks: Collection[int]) -> set[int]:
        """Queue the loss of chunks and of all unsynced ones; returns both. The caller holds ``recording``."""
        gone = set(chunks) | self._unsynced.pop(blob, set())
        self.settle(blob.token)
        self.lost(blob.token, gone)
        return gone

    def forget(self, token: str) -> tuple[dict[int, int], set[int]]:
        """Drop all that is queued for a blob. The caller holds ``recording``.

        Returns the bytes of its unrecorded chunks, by number, and the chunks whose loss was not recorded yet.
        """
        unrecorded = {record.chunk: record.length for name, record in self._pending if name == token}
        self._pending = [item for item in self._pending if item[0] != token]
        self._uses.pop(token, None)
        self._digests.pop(token, None)
        self.settle(token)
        self._unsynced = {blob: chunks for blob, chunks in self._unsynced.items() if blob.token != token}
        return unrecorded, self._gone.pop(token, set())

    async def wait_until_recorded(self, blob: Blob) -> None:
        """Wait until a blob's written chunks are recorded; concurrent callers share one transaction.

        Raises CacheUnusableError when the index cannot be written.
        """
        async with self.recording:
            if any(token == blob.token for token, _ in self._pending):
                await self.record()
            if any(token == blob.token for token, _ in self._pending):
                raise CacheUnusableError(f"{blob.generation.key}: the cache index cannot be written: see the log")

    async def flush(self) -> None:
        """Record all that is queued."""
        async with self.recording:
            await self.record()

    async def record(self) -> None:
        """`flush`, for a caller that holds ``recording``."""
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
            self._uses = uses | again  # in order of last use
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
                self._index.remove_chunks(token, chunks)  # first: some may have been refetched since
            self._index.add_chunks(pending)
            self._index.used(uses)
            self._index.set_digests(digests)

    async def sync(self) -> None:
        """Sync the chunks written so far to the disk, then the index."""
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
        """Sync a blob to the disk; returns whether all its chunks have reached it."""
        await self.flush()
        async with self.syncing:
            await self._sync(blob)
        return blob not in self._unsynced and not blob.health.lost

    async def _sync(self, blob: Blob) -> None:
        chunks = self._unsynced.get(blob)
        if chunks is None:
            return  # evicted meanwhile
        lost: OSError | None = None
        self._being_synced = blob
        blob.users += 1
        try:
            async with self.recording:  # wait for a write under way: only recorded chunks can be marked
                done = chunks - {record.chunk for name, record in self._pending if name == blob.token}
            chunks -= done  # a chunk rewritten during the sync needs another one
            if blob.attached:
                blob.fileno()  # only the event loop may reopen it
            inherited = self._inherited.get(blob.token)
            await self._threads.run(_sync, blob, inherited.chunks & done if inherited else ())
            self.settle(blob.token)
            await self._threads.run(self._index.mark_synced, blob.token, done)
            self._marked = True
            if done:
                self._failing_since = None
        except sqlite3.Error as error:
            self._failed(error)
            chunks |= done
        except NoThreadError:
            chunks |= done
            raise
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


def _sync(blob: Blob, inherited: Collection[int]) -> None:
    """Sync a blob to the disk, and compare *inherited* chunks with it. Raises OSError.

    The kernel tells of a failed write once, and has perhaps told the earlier server, which could not act on it.
    """
    blob.sync()
    if inherited and blob.attached and (differing := blob.differing(inherited)):
        raise OSError(errno.EIO, f"the disk lacks {len(differing)} chunks that an earlier server wrote")


def _without(pending: list[tuple[str, ChunkRecord]], gone: Mapping[str, set[int]]) -> list[tuple[str, ChunkRecord]]:
    return [(token, record) for token, record in pending if record.chunk not in gone.get(token, ())]
