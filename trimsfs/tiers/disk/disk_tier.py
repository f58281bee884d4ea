"""The disk tier: blobs in a cache directory, within a budget; each server inherits them from the last."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from trimsfs.errors import TrimsError
from trimsfs.origins import Origins
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.blob_files import BlobFiles
from trimsfs.tiers.disk.blobs import Blobs
from trimsfs.tiers.disk.budget import Budget, DiskLimits
from trimsfs.tiers.disk.cache_directory import CacheDirectory
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.evictor import Evictor
from trimsfs.tiers.disk.maintenance import Maintenance
from trimsfs.tiers.disk.open_blobs import OpenBlobs
from trimsfs.tiers.disk.residency import DiskResidencies
from trimsfs.tiers.disk.space import DiskSpace
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.index.chunk_records import EqualChunks
from trimsfs.tiers.index.journal import Journal
from trimsfs.tiers.index.listing_records import ListingRecords
from trimsfs.tiers.index.load_records import LoadRecords
from trimsfs.tiers.threads import Threads
from trimsfs.types import CHUNK_SIZE

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

    It assembles the tier and runs it; callers take the components that they need, by the `interfaces`: ``blobs`` for
    who reads, ``space`` for who writes, ``damage`` for who checks, ``journal`` for who needs what is written to last,
    ``residencies`` for reports and commands.

    *lock* is the locked descriptor that an ended server left to this one. With it, an unusable directory is no error:
    nothing is cached, and ``unusable`` has the reason.

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
        self.budget = Budget(directory, limits, used=used)
        threads = Threads(DISK_THREADS)
        self.journal = Journal(self.index, threads, unsynced=self._not_synced)
        self._state = state = TierState(
            store=store,
            chunk_size=chunk_size,
            directory=cache,
            files=self.files,
            threads=threads,
            journal=self.journal,
            budget=self.budget,
            removed=removed,
            suspected=suspected,
        )
        self.damage = Damage(state)
        self.evictor = Evictor(state, load_cost)
        self.space = DiskSpace(state, limits, self.evictor)
        self._open_blobs = OpenBlobs(state, self.space)
        self._maintenance = Maintenance(state, self.space, self._open_blobs)
        self.blobs = Blobs(state, self._open_blobs, self.damage, self._maintenance)
        self.residencies = DiskResidencies(state, self.evictor)
        self.loads = LoadRecords(self.index, threads, store)
        self.listings = ListingRecords(self.index, threads, store)
        self.equal_chunks = EqualChunks(self.index, threads, store, self.journal)

    async def _not_synced(self, blob: Blob, chunks: Collection[int]) -> None:
        await self.damage.not_synced(blob, chunks)

    def statistics(self) -> DiskStatistics:
        return DiskStatistics(
            used_bytes=self.budget.used,
            budget_bytes=self.budget.limit,
            open_blobs=sum(blob.users > 0 for blob in self.blobs),
            evictions=self.evictor.evictions,
            evicted_bytes=self.evictor.evicted_bytes,
            corrupt_chunks=self.damage.found,
            refused_chunks=self.space.refusals,
            tenant_used_bytes={pool: self.budget.used_by(pool) for pool in self._quotas.pools() if pool},
        )

    async def run(self) -> None:
        """Record writes and uses until the server stops.

        Raises CacheUnusableError when the directory becomes unusable, or usable again: the next server starts without
        it, or with it.
        """
        await self._maintenance.run()

    async def aclose(self, *, sync: bool = True) -> None:
        """Record everything and unlock the directory; with *sync*, sync it to the disk first."""
        await self.journal.flush()
        if sync:
            await self.journal.sync()
        for blob in self.blobs:
            blob.detach()
        self._state.blobs.clear()
        self._state.directory.close()
