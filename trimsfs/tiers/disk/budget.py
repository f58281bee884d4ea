"""The budget of the disk tier: counts the bytes of models, and enforces the limits, as every write reserves space."""

import contextlib
import errno
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.eviction_policies import Evictable, Policy, eager, lru, never
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.quotas import REST, Quotas
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FULL_FOR_S = 1.0
"""How long the tier waits to free space again after an attempt has failed."""
HEADROOM_CHUNKS = 4
"""Chunks to evict beyond the need, so that not each chunk searches a full cache for victims."""
AHEAD_SHARE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLimits:
    """The limits of a disk tier, in bytes, and the eviction *policy* that keeps to them.

    ``budget`` is for all models (None: only the disk limits them). ``min_free`` bytes of the file system stay free.
    """

    budget: int | None = None
    min_free: int = 0
    quotas: Quotas = field(default_factory=Quotas)
    policy: Policy = lru


class Budget:
    """Counts the bytes used within *limits*, in total and per tenant; *used* are the first ones, by object key."""

    def __init__(self, directory: Path, limits: DiskLimits, *, used: Mapping[str, int]) -> None:
        self._directory = directory
        self._min_free = limits.min_free
        self._failing_until = float("-inf")
        self._full_until: dict[str, float] = {}
        self._quotas = limits.quotas
        self._used = Counter[str]()
        self.limit = limits.budget
        for key, size in used.items():
            self.add(key, size)

    @property
    def used(self) -> int:
        """Bytes used in total."""
        return self._used.total()

    def used_by(self, pool: str) -> int:
        """Bytes used by a pool: a tenant, or the rest."""
        return self._used[pool]

    def add(self, key: str, size: int) -> None:
        """Add *size* bytes of an object, which may be negative."""
        self._used[self._quotas.pool(key)] += size

    def free(self) -> int:
        """Bytes that may still be used without an eviction; negative if too many are used. Raises OSError."""
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize - self._min_free
        if self.limit is not None:
            free = min(free, self.limit - self.used)
        return free

    def too_small(self) -> str | None:
        """Why no eviction makes room for a model; None if there is room, shall be none, or nobody can tell now."""
        with contextlib.suppress(OSError):  # the directory was removed
            status = os.statvfs(self._directory)
            available = status.f_bavail * status.f_frsize
            if self.limit != 0 and available + self.used <= self._min_free:
                return (
                    f"{self._directory}: {available >> 20} MiB available and --min-free keeps {self._min_free >> 20}: "
                    "models are not cached: free some space, lower --min-free or set --cache-dir"
                )
        return None

    def disk_bytes(self) -> int | None:
        """The size of the cache's file system; None if nobody can tell now."""
        with contextlib.suppress(OSError):
            status = os.statvfs(self._directory)
            return status.f_blocks * status.f_frsize
        return None

    def left(self, pool: str) -> int | None:
        """Bytes left in a pool's share; negative if too many are used, None without a limit."""
        limit = self._quotas.limit(pool, self.limit)
        return None if limit is None else limit - self._used[pool]

    def full(self, key: str) -> bool:
        """Whether the object's pool was full, or a write failed, within the last FULL_FOR_S."""
        return self.failing or trio.current_time() < self._full_until.get(self._quotas.pool(key), float("-inf"))

    @property
    def failing(self) -> bool:
        """Whether a write failed within the last FULL_FOR_S."""
        return trio.current_time() < self._failing_until

    def found_full(self, key: str) -> None:
        """Note that no eviction helps an object, so that not each chunk of a large file searches for one."""
        self._full_until[self._quotas.pool(key)] = trio.current_time() + FULL_FOR_S

    def found_failing(self) -> None:
        """Note that writes fail though the disk has space, so that not each chunk tries one."""
        self._failing_until = trio.current_time() + FULL_FOR_S

    def found_room(self) -> None:
        """Note that a blob was evicted, or can be evicted now."""
        self._full_until.clear()


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
