"""The disk tier: blobs in a cache directory, within a budget; each server inherits them from the last."""

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar, TypeVarTuple

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, InUseError, TrimsError
from trimsfs.eviction_policies import eager
from trimsfs.origins import Origins
from trimsfs.tiers.blob import Blob, ChunkState, FileChange
from trimsfs.tiers.disk.blob_files import BlobFiles
from trimsfs.tiers.disk.budget import Budget, DiskLimits, DiskSpace
from trimsfs.tiers.disk.cache_directory import CacheDirectory
from trimsfs.tiers.disk.crash_recovery import chunks_in_holes
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.evictor import COMMAND_PATIENCE_S, Evictor
from trimsfs.tiers.disk.maintenance import PATIENCE_S, Maintenance
from trimsfs.tiers.disk.open_blobs import OpenBlobs
from trimsfs.tiers.disk.residency import Residency, residency_of
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.index.chunk_records import EqualChunks
from trimsfs.tiers.index.index import BlobRecord
from trimsfs.tiers.index.journal import Journal
from trimsfs.tiers.index.listing_records import ListingRecords
from trimsfs.tiers.index.load_records import LoadRecords
from trimsfs.tiers.threads import Threads
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DISK_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatistics:
    """Bytes in use now, and counts since the server started. ``budget_bytes`` is None if only the disk limits."""

    used_bytes: int
    budget_bytes: int | None
    open_blobs: int
    evictions: int
    evicted_bytes: int
    corrupt_chunks: int
    refused_chunks: int
    tenant_used_bytes: dict[str, int]


class DiskTier:
    """The blobs of a mount's stores in one cache directory, which no other server may use meanwhile.

    *lock* is the locked descriptor that an ended server left to this one. With it, an unusable directory is no error:
    nothing is cached, and ``unusable`` has the reason. ``space`` is reserved before a write; ``damage`` takes reports
    of wrong bytes.

    A blob in use or pinned is never evicted; the policy chooses among the others. If that frees no space, ``space``
    declines, and the caller serves the bytes uncached. *load_cost* estimates the seconds to refetch a number of bytes
    of an object. *compares* says that blobs are compared with the store's digests. *removed* gets each blob that leaves
    the tier, before it is closed, *suspected* each blob in use whose file may be damaged, and the reason; neither may
    block.
    """

    def __init__(
        self,
        directory: Path,
        *,
        store: str | Origins,
        limits: DiskLimits,
        load_cost: Callable[[str, int], float],
        compares: bool,
        removed: Callable[[Blob], None],
        suspected: Callable[[Blob, TrimsError], None],
        lock: int | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        self.directory = directory
        self.store = store
        self.chunk_size = chunk_size
        cache = CacheDirectory(directory, lock, chunk_size=chunk_size)
        self.unusable = cache.problem
        self.index = cache.index
        self.index.origins = store if isinstance(store, Origins) else None
        self.lock_descriptor = cache.lock
        self.files = BlobFiles(
            cache.blobs, self.index, store, usable=self.unusable is None, compares=compares, chunk_size=chunk_size
        )
        self._quotas = limits.quotas
        used = self.index.bytes_by_key() if self._quotas.any else {"": self.index.total_bytes()}
        self._budget = Budget(directory, limits, used=used)
        self._threads = Threads(DISK_THREADS)
        self._journal = Journal(self.index, self._threads, unsynced=self._not_synced)
        self._state = TierState(
            store=store,
            chunk_size=chunk_size,
            directory=cache,
            files=self.files,
            threads=self._threads,
            journal=self._journal,
            budget=self._budget,
            removed=removed,
            suspected=suspected,
        )
        self.damage = Damage(self._state)
        self.evictor = Evictor(self._state, load_cost)
        self.space = DiskSpace(
            self._budget,
            limits,
            chunk_size=chunk_size,
            candidates=self.evictor.candidates,
            evict=self.evictor.evict,
            unfinished=self._state.unfinished,
        )
        self._open_blobs = OpenBlobs(self._state, self.space)
        self._maintenance = Maintenance(self._state, self.space, self._open_blobs)
        self.loads = LoadRecords(self.index, self._threads, store)
        self.listings = ListingRecords(self.index, self._threads, store)
        self.equal_chunks = EqualChunks(self.index, self._threads, store)
        self.keeps_idle = limits.policy is not eager

    def statistics(self) -> DiskStatistics:
        return DiskStatistics(
            used_bytes=self._budget.used,
            budget_bytes=self._budget.limit,
            open_blobs=sum(blob.users > 0 for blob in self._state.blobs.values()),
            evictions=self.evictor.evictions,
            evicted_bytes=self.evictor.evicted_bytes,
            corrupt_chunks=self.damage.found,
            refused_chunks=self.space.refusals,
            tenant_used_bytes={pool: self._budget.used_by(pool) for pool in self._quotas.pools() if pool},
        )

    def too_small(self) -> str | None:
        """Why the disk has no room for any model; None if it has, or shall have none, or if nobody can tell now."""
        return self._budget.too_small()

    def disk_bytes(self) -> int | None:
        """The size of the file system; None if nobody can tell now."""
        return self._budget.disk_bytes()

    def quarantined(self) -> list[Blob]:
        """The blobs whose bytes must not be served."""
        return [blob for blob in self._state.blobs.values() if blob.health.quarantined]

    def known(self, token: str) -> Blob | None:
        """The blob of this token, if the tier knows it; else None."""
        return self._state.blobs.get(token)

    def suspect(self, blob: Blob, error: TrimsError) -> None:
        """Report that the file of a blob in use may be damaged."""
        self._state.suspected(blob, error)

    def complete_blobs(self) -> list[Blob]:
        """The known blobs whose bytes can all be served from their files."""
        return [blob for blob in self._state.blobs.values() if blob.attached and blob.complete]

    async def run(self) -> None:
        """Record writes and uses until the server stops.

        Raises CacheUnusableError when the directory becomes unusable, or usable again: the next server starts without
        it, or with it.
        """
        await self._maintenance.run()

    async def aclose(self, *, sync: bool = True) -> None:
        """Record everything and unlock the directory; with *sync*, sync it to the disk first."""
        await self.flush()
        if sync:
            await self._journal.sync()
        for blob in self._state.blobs.values():
            blob.detach()
        self._state.blobs.clear()
        self._state.directory.close()

    # Using blobs

    @asynccontextmanager
    async def using(self, generation: Generation) -> AsyncIterator[Blob]:
        """Hold the blob of a generation for the length of the block."""
        blob = await self.acquire(generation)
        try:
            yield blob
        finally:
            self.release(blob)

    @asynccontextmanager
    async def inspecting(self, generation: Generation) -> AsyncIterator[Blob]:
        """Hold the blob of a generation, made if needed, for the length of the block, without recording a use."""
        blob = await self._known(generation) or await self._open_blobs.open(generation.token(self.store), generation)
        with self._inspecting(blob):
            yield blob

    @asynccontextmanager
    async def inspecting_cached(self, generation: Generation) -> AsyncIterator[Blob | None]:
        """`inspecting`, but makes no blob: None if there is none. Raises CacheUnusableError if nobody can tell."""
        if self.unusable is not None and generation.size:
            raise CacheUnusableError(f"{generation.key}: cannot be looked at now: {self.unusable}")
        try:
            blob = await self._known(generation)
            blob = blob or await self._open_blobs.find(generation.token(self.store), generation)
        except sqlite3.Error as error:
            raise self._index_fails(error) from error
        if blob is None:
            yield None
            return
        with self._inspecting(blob):
            yield blob

    async def _known(self, generation: Generation) -> Blob | None:
        try:
            return self._unchanged(generation.token(self.store))
        except OSError as error:
            await self._fails(generation, error)

    @contextmanager
    def _inspecting(self, blob: Blob) -> Iterator[None]:
        blob.users += 1
        try:
            yield
        finally:
            blob.users -= 1
            self._open_blobs.released(blob)

    async def acquire(self, generation: Generation, *, opening: bool = False) -> Blob:
        """The blob of a generation, made if needed. The caller holds it until a matching `release`.

        *opening* is as of `use`.
        """
        token = generation.token(self.store)
        try:
            blob = self._unchanged(token)
            if blob is not None and blob.change() is FileChange.RESIZED:
                await self.damage.size_changed(blob)
                blob = self._state.blobs.get(token)
        except OSError as error:
            await self._fails(generation, error)
        if blob is None:
            blob = await self._open_blobs.open(token, generation)
        self.use(blob, generation, opening=opening)
        if self._journal.has_inherited(blob):
            try:
                await self._journal.wait_until_compared(blob)
            except BaseException:
                self.release(blob)
                raise
        return blob

    def unchanged(self, blob: Blob) -> bool:
        """Whether the tier knows a blob and no other program has changed its file: `use` may follow."""
        if self._journal.has_inherited(blob):
            return False
        try:
            return self._state.blobs.get(blob.token) is blob and blob.change() is FileChange.NONE
        except OSError:
            return False

    def use(self, blob: Blob, generation: Generation, *, opening: bool = True) -> None:
        """Acquire the blob of a generation, which is `unchanged`.

        Of names at several paths, bytes are fetched by the last one that a program used for *opening* it: others may
        need credentials that the store refuses.
        """
        if generation.key == blob.generation.key:
            changes = generation.version_id is not None
        else:
            changes = opening or not blob.users or self._at_one_path(generation, blob.generation)
        if changes:
            blob.generation = generation
        blob.users += 1
        self._state.blobs.move_to_end(blob.token)
        self._journal.used(blob, 1)

    def _at_one_path(self, one: Generation, other: Generation) -> bool:
        """Whether requests for two names go to the same store with the same credentials."""
        return isinstance(self.store, str) or self.store.path(one.key) == self.store.path(other.key)

    def _unchanged(self, token: str) -> Blob | None:
        """The blob of this token, if it is known and its file unchanged or resized; else None. Raises OSError.

        A file in use needs no check while the server has it closed: the kernel has it open.
        """
        blob = self._state.blobs.get(token)
        if blob is None or blob.opened or blob.users:
            return blob
        if blob.change() in {FileChange.TOUCHED, FileChange.REPLACED}:
            log.warning("%s: another program changed its file in the cache: verifying it", blob.generation.key)
        elif self._open_blobs.reopen(blob):
            return blob
        self._state.close(blob)
        return None

    async def _fails(self, generation: Generation, error: OSError) -> NoReturn:
        log.error("%s: cannot stat its file in the cache: %s", generation.key, error)
        self._maintenance.found_failing()
        await trio.sleep(PATIENCE_S)  # meanwhile the next server takes over, and gets the request again
        raise CacheUnusableError(f"{generation.key}: the disk of the cache fails: see the log of the mount")

    async def recall(self, generations: Sequence[Generation], *, checked: bool = False) -> list[Blob]:
        """The blobs of generations that an earlier server had in use, loaded together. The caller must hold them.

        With *checked*, the earlier server had verified the chunks in the index, so they count as verified.
        """
        return await self._open_blobs.recall(generations, checked=checked)

    def release(self, blob: Blob) -> None:
        """Undo one `acquire`."""
        blob.users -= 1
        self._journal.used(blob, 0)
        self._open_blobs.released(blob)

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        """Serve a chunk from now on: it is whole, and written to reserved space."""
        if blob.states[record.chunk] != ChunkState.MISSING and record.chunk not in blob.health.lost:
            self._budget.add(blob.generation.file, -record.length)  # fetched twice at the same time
        blob.health.lost -= {record.chunk}
        blob.commit(record)
        self._journal.wrote(blob, record)

    async def check_holes(self, blob: Blob) -> None:
        """Discard chunks in holes, to refetch them: a truncation before the last chunks arrived has left zeros."""
        blob.users += 1  # to keep its file open
        try:
            if len(blob.states) <= 1:  # faster than a switch to a thread
                gone = chunks_in_holes(blob, blob.fileno())
            else:
                gone = await self._threads.run(chunks_in_holes, blob, blob.fileno())
        except OSError as error:
            log.warning("%s: cannot look for holes in its file in the cache: %s", blob.generation.key, error)
            return
        finally:
            blob.users -= 1
        for chunk in gone:
            await self.damage.check_chunk(blob, chunk, None)

    # Commands

    async def residencies(self) -> list[Residency]:
        """The residency of every blob in the index, by key."""
        await self.flush()
        records = await self._ask_index(self.index.records, self.store)
        return await self._threads.run(lambda: [self._residency(record) for record in records])

    async def residency(self, generation: Generation) -> Residency:
        """The residency of one generation."""
        token = generation.token(self.store)
        await self.flush()
        loaded = await self._ask_index(self.index.load, token)
        record = loaded[0] if loaded is not None else BlobRecord(token=token, generation=generation)
        if record.generation.key != generation.key:
            record = replace(record, generation=generation)
        return await self._threads.run(self._residency, record)

    async def pin(self, blob: Blob, pinned: bool) -> None:
        """Pin or unpin a blob. Raises CacheUnusableError."""
        await self._ask_index(self.index.set_pinned, blob.token, pinned)
        blob.pinned = pinned

    async def evict(self, generation: Generation) -> int:
        """Remove a blob; returns the bytes freed.

        Raises InUseError when the blob is open or pinned, and CacheUnusableError when the disk fails.
        """
        token = generation.token(self.store)
        await self.flush()
        loaded = await self._ask_index(self.index.load, token)
        if loaded is None:
            return 0
        if loaded[0].pinned:
            raise InUseError(f"{generation.key} is pinned: unpin it first")
        async with self._journal.syncing:
            freed = await self.evictor.remove(token, generation.file, patience_s=COMMAND_PATIENCE_S)
        if freed is None:
            message = f"{generation.key} is in use: it can be evicted once it is closed and unmapped"
            raise InUseError(message, key=generation.key)
        return freed

    async def flush(self) -> None:
        """Record the chunks written and the blobs used so far."""
        await self._journal.flush()

    async def sync(self, blob: Blob) -> None:
        """Wait until a blob's written bytes have reached the disk. Raises BlobDamagedError when the sync fails."""
        if not await self._journal.sync_blob(blob):
            raise BlobDamagedError(f"{blob.generation.key}: its chunks cannot be synced to the disk")

    async def wait_until_recorded(self, blob: Blob) -> None:
        """Wait until a blob's written chunks are recorded. Raises CacheUnusableError when they cannot be."""
        await self._journal.wait_until_recorded(blob)

    async def _not_synced(self, blob: Blob, chunks: Collection[int]) -> None:
        await self.damage.not_synced(blob, chunks)

    # In worker threads

    async def _ask_index(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a *function* of the index for a command. Raises CacheUnusableError when the index fails."""
        try:
            return await self._threads.run(function, *arguments)
        except sqlite3.Error as error:
            raise self._index_fails(error) from error

    def _index_fails(self, error: sqlite3.Error) -> CacheUnusableError:
        return CacheUnusableError(f"cache index {self.directory / 'index.sqlite'}: {error}")

    def _residency(self, record: BlobRecord) -> Residency:
        return residency_of(record, self._state.blobs.get(record.token), self.files.path(record.token))
