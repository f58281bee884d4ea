"""The host tier: keeps blobs in the page cache, within a budget.

The server loads a blob into memory before programs map it, so the kernel charges the server's control group and none of
theirs. An eviction drops a blob from memory, not from disk; the kernel keeps mapped pages.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import CacheFullError
from trimsfs.eviction_policies import Evictable, Policy, eager
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host import cgroups, page_cache
from trimsfs.tiers.quotas import Quotas

log = logging.getLogger(__name__)

Populate = Callable[[int, int, int], Awaitable[None]]
"""Reads the bytes ``[start, stop)`` of a descriptor's file into the page cache. Raises OSError."""

CHECK_INTERVAL_S = 0.2
READ_LATENCY_S = 1e-4
READ_RATE = 1e9
"""Bytes a second: with the latency, the approximate cost of a load from a local disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """Bytes loaded into memory and not evicted, the locked among them, and evictions since the server started.

    The kernel may have reclaimed unlocked bytes: `Residency` measures a file's.
    """

    used_bytes: int
    budget_bytes: int | None
    locked_bytes: int
    evictions: int
    evicted_bytes: int
    tenant_used_bytes: dict[str, int]


@dataclass(slots=True, eq=False)
class _Hosted:
    """A blob in memory. ``address`` is the address of its locked mapping, None while unlocked."""

    blob: Blob
    loaded: int
    last_used: int
    uses: int = 0
    address: int | None = None


class HostTier:
    """Blobs in memory, at most *budget* bytes (None: as many as the kernel keeps).

    Blobs in use or pinned are never evicted. An opened blob is always loaded, so blobs in use may exceed the budget;
    locked bytes never do. Loads run in parallel: only evictions and pins take locks.
    """

    def __init__(self, populate: Populate, *, budget: int | None, policy: Policy, quotas: Quotas | None = None) -> None:
        self._populate = populate
        self._budget = budget
        self._quotas = quotas or Quotas()
        self._policy = policy
        self._hosted: dict[str, _Hosted] = {}
        self._numbers = itertools.count(1)
        self._lock = trio.Lock()
        self._pinning = trio.Lock()
        self._loading: dict[str, trio.Event] = {}
        self._came = trio.Event()
        self._evictions = self._evicted_bytes = 0

    async def run(self) -> None:
        """Evict idle blobs beyond the budget, or all idle ones with the policy eager, until the server stops."""
        while True:
            while all(self._surplus(pool) <= 0 for pool in self._quotas.pools()):
                await self._came.wait()
                self._came = trio.Event()
            await trio.sleep(CHECK_INTERVAL_S)
            async with self._lock:
                for pool in self._quotas.pools():
                    await self._evict(self._surplus(pool), pool)

    def statistics(self) -> HostStatistics:
        return HostStatistics(
            used_bytes=sum(map(self._used, self._quotas.pools())),
            budget_bytes=self._budget,
            locked_bytes=sum(map(self._locked, self._quotas.pools())),
            evictions=self._evictions,
            evicted_bytes=self._evicted_bytes,
            tenant_used_bytes={pool: self._used(pool) for pool in self._quotas.pools() if pool},
        )

    def holds(self, blob: Blob) -> bool:
        """Whether a blob was loaded and not evicted since."""
        return blob.token in self._hosted

    def used(self, blob: Blob) -> None:
        """Count an open of a blob, if it is in memory."""
        hosted = self._hosted.get(blob.token)
        if hosted is not None:
            hosted.uses += 1
            hosted.last_used = next(self._numbers)

    def adopt(self, blob: Blob) -> None:
        """Count a blob as in memory, because it was loaded, maybe by an earlier server."""
        number = next(self._numbers)
        self._hosted[blob.token] = _Hosted(blob, loaded=number, last_used=number)
        self._came.set()

    async def load(self, blob: Blob, *, again: bool = False) -> None:
        """Load a complete blob into memory; with *again*, reload pages that the kernel has reclaimed.

        The caller holds the blob. Raises OSError when the blob cannot be read, and TransientStoreError when the process
        that reads it ends.
        """
        if self.holds(blob) and not again:
            return
        while (loading := self._loading.get(blob.token)) is not None:
            await loading.wait()
            if self.holds(blob):
                return
        self._loading[blob.token] = trio.Event()
        try:
            await self._load(blob)
        finally:
            self._loading.pop(blob.token).set()

    async def _load(self, blob: Blob) -> None:
        size = blob.generation.size
        if not self.holds(blob):
            async with self._lock:
                pool = self._pool(blob)
                await self._evict(self._excess(pool, size), pool)
        if size <= blob.chunk_size:  # quicker than a switch to a thread
            resident = page_cache.resident_bytes(blob.fileno())
        else:
            resident = await in_thread(page_cache.resident_bytes, blob.fileno())
        if resident is None or resident < size:
            await self._populate(blob.fileno(), 0, size)
        if not self.holds(blob):
            self.adopt(blob)

    async def pin(self, blob: Blob) -> str | None:
        """Lock a complete blob, which the caller holds, in memory; returns why the host forbids it, else None.

        Raises CacheFullError when the budget has no space, and the errors of `load`.
        """
        async with self._pinning:
            await self.load(blob, again=True)
            hosted = self._hosted[blob.token]
            hindrance = None if hosted.address is not None else await self._lock_pages(hosted)
        if hindrance is not None:  # pinned on disk; in memory until the kernel reclaims it
            log.warning("%s: not locked in memory: %s", blob.generation.key, hindrance)
        return hindrance

    async def _lock_pages(self, hosted: _Hosted) -> str | None:
        blob, size = hosted.blob, hosted.blob.generation.size
        pool = self._pool(blob)
        limit = self._quotas.limit(pool, self._budget)
        if limit is not None and self._locked(pool) + size > limit:
            full = self._quotas.full(blob.generation.key, "host_size") or "unpin models or raise --host-size"
            raise CacheFullError(f"{blob.generation.key}: no room in memory: {full}")
        lockable = cgroups.lockable_bytes()
        if lockable is not None and lockable < size:
            return f"the control group of the server may hold {lockable} bytes more: raise its memory.max"
        try:
            hosted.address = await in_thread(page_cache.lock, blob.fileno(), size)
        except OSError as error:
            remedy = "raise the server's limit of locked memory (ulimit -l, LimitMEMLOCK=)"
            return f"{error.strerror}: {remedy} or, where that is not possible, give root CAP_SYS_RESOURCE"
        return None

    async def unpin(self, blob: Blob) -> None:
        """Unlock a blob: budget and kernel decide again whether it stays in memory."""
        async with self._pinning:
            self._unlock(blob)

    def _unlock(self, blob: Blob) -> None:
        hosted = self._hosted.get(blob.token)
        if hosted is not None and hosted.address is not None:
            page_cache.unlock(hosted.address, blob.generation.size)
            hosted.address = None

    def removed(self, blob: Blob) -> None:
        """Forget a blob that has left the disk tier."""
        self._unlock(blob)
        self._hosted.pop(blob.token, None)

    async def _evict(self, wanted: int, pool: str) -> None:
        """Evict idle blobs of a pool to free the *wanted* bytes; each pool has its own share of memory."""
        if wanted <= 0:
            return
        idle = [
            Evictable(
                name=token,
                size=hosted.blob.generation.size,
                last_used=hosted.last_used,
                loaded=hosted.loaded,
                uses=hosted.uses,
                cost_s=READ_LATENCY_S + hosted.blob.generation.size / READ_RATE,
            )
            for token, hosted in self._hosted.items()
            if _idle(hosted) and self._pool(hosted.blob) == pool
        ]
        for victim in self._policy(idle, wanted):
            await self._drop(victim.name)

    async def _drop(self, token: str) -> None:
        """Drop a blob from memory, unless somebody uses it by now."""
        hosted = self._hosted.get(token)
        if hosted is None or not _idle(hosted):
            return
        blob = hosted.blob
        self._unlock(blob)
        del self._hosted[token]
        blob.users += 1  # keeps its file open
        try:
            await in_thread(page_cache.drop, blob.fileno())
        except OSError as error:
            log.warning("%s: not dropped from memory: %s", blob.generation.key, error.strerror)
        finally:
            blob.users -= 1
        self._evictions += 1
        self._evicted_bytes += blob.generation.size

    def _surplus(self, pool: str) -> int:
        """Bytes of a pool to evict once their blobs are idle."""
        return self._used(pool) if self._policy is eager else self._excess(pool)

    def _excess(self, pool: str, coming: int = 0) -> int:
        """Bytes of a pool to evict so that *coming* more fit into its share; negative if there is space."""
        limit = self._quotas.limit(pool, self._budget)
        return 0 if limit is None else self._used(pool) + coming - limit

    def _pool(self, blob: Blob) -> str:
        return self._quotas.pool(blob.generation.file)

    def _used(self, pool: str) -> int:
        return sum(hosted.blob.generation.size for hosted in self._of(pool))

    def _locked(self, pool: str) -> int:
        return sum(hosted.blob.generation.size for hosted in self._of(pool) if hosted.address is not None)

    def _of(self, pool: str) -> Iterator[_Hosted]:
        return (hosted for hosted in self._hosted.values() if self._pool(hosted.blob) == pool)


def _idle(hosted: _Hosted) -> bool:
    return hosted.blob.users == 0 and not hosted.blob.pinned and hosted.blob.attached
