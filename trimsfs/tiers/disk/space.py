"""Space on the disk: decides which pools to evict from, and how much."""

import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Set

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.disk.budget import Budget, DiskLimits
from trimsfs.tiers.eviction_policies import Evictable, eager
from trimsfs.tiers.quotas import REST

log = logging.getLogger(__name__)

HEADROOM_CHUNKS = 4
"""Chunks to evict beyond the need, so that not each chunk searches a full cache for victims."""


class DiskSpace:
    """Keeps a disk tier within its limits, with some headroom.

    *candidates* returns the blobs that may be evicted, and raises sqlite3.Error. *evict* removes one by token and key,
    and returns the bytes freed; None if it is in use, and no candidate for a while. Raises CacheUnusableError.
    """

    def __init__(
        self,
        budget: Budget,
        limits: DiskLimits,
        *,
        chunk_size: int,
        candidates: Callable[[], Awaitable[list[Evictable]]],
        evict: Callable[[str, str], Awaitable[int | None]],
    ) -> None:
        self._budget = budget
        self._quotas = limits.quotas
        self._policy = limits.policy
        self._chunk_size = chunk_size
        self._candidates = candidates
        self._evict = evict
        self._lock = trio.Lock()

    async def make(self, key: str, size: int) -> bool:
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

    async def write_failed(self, key: str, size: int) -> None:
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
