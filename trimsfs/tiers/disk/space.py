"""Space on the disk: every write reserves some, for which blobs are evicted if need be."""

import contextlib
import errno
import logging
import sqlite3
from collections.abc import Set

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.eviction_policies import eager, never
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.budget import DiskLimits
from trimsfs.tiers.disk.evictor import Evictor
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.quotas import REST
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

HEADROOM_CHUNKS = 4
"""Chunks to evict beyond the need, so that not each chunk searches a full cache for victims."""
AHEAD_SHARE = 4


class DiskSpace:
    """Keeps a disk tier within its limits, with some headroom. Others see it as `ChunkWrites` and `Room`."""

    def __init__(self, state: TierState, limits: DiskLimits, evictor: Evictor) -> None:
        self._state = state
        self._budget = state.budget
        self._quotas = limits.quotas
        self._policy = limits.policy
        self._evictor = evictor
        self._lock = trio.Lock()
        self.refusals = 0

    def _free_bytes(self) -> int:
        """Bytes that models may still use on the disk without an eviction."""
        try:
            return max(0, self._budget.free())
        except OSError:
            return 0  # the directory was removed

    def sizes(self) -> tuple[int, int]:
        free = self._free_bytes()
        return self._budget.used + free, free

    def full(self, generation: Generation) -> bool:
        return self._budget.full(generation.file)

    def room_ahead(self, generation: Generation, here: int) -> int:
        pool = self._quotas.pool(generation.file)
        left = self._budget.left(pool)
        free = self._free_bytes() if left is None else max(0, min(left, self._free_bytes()))
        share = 0 if self._policy is never else (free + self._budget.used_by(pool)) // AHEAD_SHARE
        return max(free + here, share)

    async def reserve(self, blob: Blob, size: int) -> bool:
        if not blob.attached or self._budget.failing:
            return False
        try:
            return await self._make(blob.generation.file, size)
        except OSError as error:
            log.error("%s: cannot stat the file system of the cache: %s", blob.generation.key, error)
            self._budget.found_failing()
            return False

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        if blob.states[record.chunk] != ChunkState.MISSING and record.chunk not in blob.health.lost:
            self._budget.add(blob.generation.file, -record.length)  # fetched twice at the same time
        blob.health.lost -= {record.chunk}
        blob.commit(record)
        self._state.journal.wrote(blob, record)

    def unreserve(self, blob: Blob, size: int) -> None:
        self._budget.add(blob.generation.file, -size)
        self._state.unfinished.add(blob.token)

    async def write_failed(self, blob: Blob, size: int, error: OSError, *, last: bool) -> None:
        self.unreserve(blob, size)
        if not last and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            await self.evict_for(blob.generation.file, size)
        else:
            log.error("%s: cannot write to the cache: %s", blob.generation.key, error)
            self._budget.found_failing()

    def refused(self, blob: Blob) -> str | None:
        self.refusals += 1
        key = blob.generation.file
        left = self._budget.left(self._quotas.pool(key))
        missing = blob.generation.size - blob.verified_bytes
        return self._quotas.full(key, "cache_size") if left is not None and left < missing else None

    async def _make(self, key: str, size: int) -> bool:
        """Reserve *size* bytes for an object, after evictions if needed; False if there is no space.

        Only blobs of the same tenant, or of none, are evicted. Raises OSError.
        """
        pool = self._quotas.pool(key)
        if self._missing(pool, size) > 0:
            async with self._lock:
                if self._budget.full(key):
                    return False
                left = self._budget.left(pool)
                if left is not None and left < size:
                    await self._free(size - left, {pool})
                if self._budget.free() < size:
                    await self._free(size - self._budget.free(), {pool, REST})
                if self._missing(pool, size) > 0:
                    self._budget.found_full(key)
                    return False
        self._budget.add(key, size)
        return True

    def _missing(self, pool: str, size: int) -> int:
        """Bytes that a pool lacks for *size* more; negative if it has space left."""
        free, left = self._budget.free(), self._budget.left(pool)
        return size - (free if left is None else min(left, free))

    async def _free(self, size: int, pools: Set[str]) -> None:
        """Evict blobs of some pools to free *size* bytes plus headroom; none if they hold less than *size*."""
        await self._choose(size + HEADROOM_CHUNKS * self._state.chunk_size, pools, at_least=size)

    async def evict_for(self, key: str, size: int) -> None:
        """Evict blobs for *size* bytes of an object, as far as possible: the disk was full before statvfs said so."""
        await self._choose(size + HEADROOM_CHUNKS * self._state.chunk_size, {self._quotas.pool(key), REST})

    async def keep(self) -> None:
        """Evict blobs beyond this server's limits: the last server's may have been higher."""
        with contextlib.suppress(OSError):
            for pool in self._quotas.pools():
                left = self._budget.left(pool)
                if left is not None and left < 0:
                    await self._choose(-left, {pool})
            await self._choose(-self._budget.free(), {REST})

    async def tidy(self) -> None:
        """With the policy eager, evict all idle blobs."""
        if self._policy is eager:
            await self._choose(1, set(self._quotas.pools()))

    async def _choose(self, wanted: int, pools: Set[str], *, at_least: int = 0) -> None:
        """Evict what the policy chooses to free *wanted* bytes, and others for what turns out to be in use."""
        freed = 0
        with contextlib.suppress(CacheUnusableError):
            while freed < wanted:
                try:
                    idle = await self._evictor.candidates()
                except sqlite3.Error as error:
                    log.error("cannot read the cache index: %s", error)
                    return
                candidates = [entry for entry in idle if self._quotas.pool(entry.key) in pools]
                if sum(entry.size for entry in candidates) < at_least - freed:
                    return
                victims = self._policy(candidates, wanted - freed)
                sizes = [await self._evictor.evict(victim.name, victim.key) for victim in victims]
                freed += sum(size or 0 for size in sizes)
                if None not in sizes:
                    return
