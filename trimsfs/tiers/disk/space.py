"""Space on the disk: reserves it, and decides which pools to evict from, and how much."""

import contextlib
import errno
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Set

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.eviction_policies import Evictable, eager, never
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.budget import Budget, DiskLimits
from trimsfs.tiers.quotas import REST
from trimsfs.types import Generation

log = logging.getLogger(__name__)

HEADROOM_CHUNKS = 4
"""Chunks to evict beyond the need, so that not each chunk searches a full cache for victims."""
AHEAD_SHARE = 4


class DiskSpace:
    """Keeps a disk tier within its limits, with some headroom.

    *candidates* returns the blobs that may be evicted, and raises sqlite3.Error. *evict* removes one by token and key,
    and returns the bytes freed; None if it is in use, and no candidate for a while. Raises CacheUnusableError.
    ``unfinished`` gets the tokens of blobs with chunks that were reserved and not written.
    """

    def __init__(
        self,
        budget: Budget,
        limits: DiskLimits,
        *,
        chunk_size: int,
        candidates: Callable[[], Awaitable[list[Evictable]]],
        evict: Callable[[str, str], Awaitable[int | None]],
        unfinished: set[str],
    ) -> None:
        self._budget = budget
        self._quotas = limits.quotas
        self._policy = limits.policy
        self._chunk_size = chunk_size
        self._candidates = candidates
        self._evict = evict
        self._unfinished = unfinished
        self._lock = trio.Lock()
        self.refusals = 0

    def free_bytes(self) -> int:
        """Bytes that models may still use on the disk without an eviction."""
        try:
            return max(0, self._budget.free())
        except OSError:
            return 0  # the directory was removed

    def full(self, generation: Generation) -> bool:
        """Whether the disk recently had no space for an object of the same tenant, or a write failed."""
        return self._budget.full(generation.file)

    def tenant_full(self, blob: Blob) -> str | None:
        """The error message that a tenant's share has no space for the rest of a blob; None if it has."""
        key = blob.generation.file
        left = self._budget.left(self._quotas.pool(key))
        missing = blob.generation.size - blob.verified_bytes
        return self._quotas.full(key, "cache_size") if left is not None and left < missing else None

    def room_ahead(self, generation: Generation, here: int) -> int:
        """Bytes that prefetches for an object's load may take, including the bytes that are *here*.

        That is the free space, or a quarter of the tenant's space if that is more and the policy evicts.
        """
        pool = self._quotas.pool(generation.file)
        left = self._budget.left(pool)
        free = self.free_bytes() if left is None else max(0, min(left, self.free_bytes()))
        share = 0 if self._policy is never else (free + self._budget.used_by(pool)) // AHEAD_SHARE
        return max(free + here, share)

    async def reserve(self, blob: Blob, size: int) -> bool:
        """Reserve space for *size* bytes to write to a blob; False if the disk or the tenant's share lacks it.

        `unreserve` returns the space of bytes that are not written after all.
        """
        if not blob.attached or self._budget.failing:
            return False
        try:
            return await self._make(blob.generation.file, size)
        except OSError as error:
            log.error("%s: cannot stat the file system of the cache: %s", blob.generation.key, error)
            self._budget.found_failing()
            return False

    def unreserve(self, blob: Blob, size: int) -> None:
        """Return reserved space."""
        self._budget.add(blob.generation.file, -size)
        self._unfinished.add(blob.token)

    async def write_failed(self, blob: Blob, size: int, error: OSError, *, last: bool) -> None:
        """Handle a failed write of *size* reserved bytes: if the disk is full, make space for a retry, if any.

        Otherwise, also after the *last* try, `reserve` declines for a while.
        """
        self.unreserve(blob, size)
        if not last and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            await self.evict_for(blob.generation.file, size)
        else:
            log.error("%s: cannot write to the cache: %s", blob.generation.key, error)
            self._budget.found_failing()

    def refused(self) -> None:
        """Count a chunk that is not cached because there is no space."""
        self.refusals += 1

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
        await self._choose(size + HEADROOM_CHUNKS * self._chunk_size, pools, at_least=size)

    async def evict_for(self, key: str, size: int) -> None:
        """Evict blobs for *size* bytes of an object, as far as possible: the disk was full before statvfs said so."""
        await self._choose(size + HEADROOM_CHUNKS * self._chunk_size, {self._quotas.pool(key), REST})

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
                    candidates = [entry for entry in await self._candidates() if self._quotas.pool(entry.key) in pools]
                except sqlite3.Error as error:
                    log.error("cannot read the cache index: %s", error)
                    return
                if sum(entry.size for entry in candidates) < at_least - freed:
                    return
                victims = self._policy(candidates, wanted - freed)
                sizes = [await self._evict(victim.name, victim.key) for victim in victims]
                freed += sum(size or 0 for size in sizes)
                if None not in sizes:
                    return
