"""The host tier: the page cache of the blobs, steered.

The server brings a blob into memory before programs map it, so the memory is charged to the server's control group and
to none of theirs. What is evicted is dropped from memory, not from disk; the kernel keeps pages that are mapped.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio

from trimsfs.errors import CacheFullError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.eviction_policies import Evictable, Policy, eager
from trimsfs.tiers.host import cgroups, page_cache
from trimsfs.tiers.quotas import Quotas

log = logging.getLogger(__name__)

Populate = Callable[[int, int, int], Awaitable[None]]
"""Brings the bytes ``[start, stop)`` of a descriptor's file into the page cache. Raises OSError."""

CHECK_INTERVAL_S = 0.2
READ_LATENCY_S = 1e-4
READ_RATE = 1e9
"""Bytes a second: about what loading from a local disk costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """Bytes brought into memory and not evicted since, of those bytes locked, and evictions since the server started.

    The kernel may have reclaimed some of the bytes that are not locked: see the residency of a file.
    """

    used_bytes: int
    budget_bytes: int | None
    locked_bytes: int
    evictions: int
    evicted_bytes: int
    tenant_used_bytes: dict[str, int]


@dataclass(slots=True, eq=False)
class _Hosted:
    """A blob that is in memory. ``address`` is that of its locked mapping, None while it is not locked."""

    blob: Blob
    loaded: int
    last_used: int
    uses: int = 0
    address: int | None = None


class HostTier:
    """Blobs in memory: at most *budget* bytes (None: as many as the kernel keeps), but for what is open.

    A blob in use or pinned is never evicted; one that is opened is loaded even when the others leave no room. Locked
    bytes never exceed the budget. Loading a blob delays no other: locks are held to evict and to pin only.
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
        """Drop what came in beyond the budget, and with the policy eager what is idle, while the server runs."""
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
        """Whether a blob was brought in and not evicted since."""
        return blob.token in self._hosted

    def used(self, blob: Blob) -> None:
        """A blob that is in memory was opened."""
        hosted = self._hosted.get(blob.token)
        if hosted is not None:
            hosted.uses += 1
            hosted.last_used = next(self._numbers)

    def adopt(self, blob: Blob) -> None:
        """A blob that an earlier server brought in, as far as the kernel has kept it."""
        number = next(self._numbers)
        self._hosted[blob.token] = _Hosted(blob, loaded=number, last_used=number)
        self._came.set()

    async def load(self, blob: Blob, *, again: bool = False) -> None:
        """Load a complete blob, which the caller uses, into memory; *again* also what the kernel has dropped since.

        Raises OSError when it cannot be read, and TransientStoreError when the process that reads it ends.
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
        if size <= blob.chunk_size:  # a look takes less than a thread does
            resident = page_cache.resident_bytes(blob.fileno())
        else:
            resident = await trio.to_thread.run_sync(page_cache.resident_bytes, blob.fileno())
        if resident is None or resident < size:
            await self._populate(blob.fileno(), 0, size)
        if not self.holds(blob):
            self.adopt(blob)

    async def pin(self, blob: Blob) -> str | None:
        """Lock a complete blob, which the caller uses, in memory; why the host does not let it, if so.

        Raises CacheFullError when the budget forbids it, else as `load`.
        """
        async with self._pinning:
            await self.load(blob, again=True)
            hosted = self._hosted[blob.token]
            hindrance = None if hosted.address is not None else await self._lock_pages(hosted)
        if hindrance is not None:  # it stays on disk and, as far as memory lasts, in memory
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
            hosted.address = await trio.to_thread.run_sync(page_cache.lock, blob.fileno(), size)
        except OSError as error:
            return f"{error.strerror}: raise the server's limit of locked memory (ulimit -l, LimitMEMLOCK=)"
        return None

    async def unpin(self, blob: Blob) -> None:
        """Leave it to budget and kernel whether a blob stays in memory."""
        async with self._pinning:
            self._unlock(blob)

    def _unlock(self, blob: Blob) -> None:
        hosted = self._hosted.get(blob.token)
        if hosted is not None and hosted.address is not None:
            page_cache.unlock(hosted.address, blob.generation.size)
            hosted.address = None

    def removed(self, blob: Blob) -> None:
        """A blob has left the disk, and with it the memory."""
        self._unlock(blob)
        self._hosted.pop(blob.token, None)

    async def _evict(self, wanted: int, pool: str) -> None:
        """Drop blobs of a pool, each of which keeps to its own share of memory."""
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
        """Drop a blob from memory, unless it is used by now."""
        hosted = self._hosted.get(token)
        if hosted is None or not _idle(hosted):
            return
        blob = hosted.blob
        self._unlock(blob)
        del self._hosted[token]
        blob.users += 1  # it must not be closed meanwhile
        try:
            await trio.to_thread.run_sync(page_cache.drop, blob.fileno())
        except OSError as error:
            log.warning("%s: not dropped from memory: %s", blob.generation.key, error.strerror)
        finally:
            blob.users -= 1
        self._evictions += 1
        self._evicted_bytes += blob.generation.size

    def _surplus(self, pool: str) -> int:
        """Bytes of a pool that are to be dropped once nobody uses them."""
        return self._used(pool) if self._policy is eager else self._excess(pool)

    def _excess(self, pool: str, coming: int = 0) -> int:
        """Bytes of a pool to drop so that *coming* more of it keep within its share."""
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
