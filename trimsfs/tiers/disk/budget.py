"""The budget of the disk tier: its limits, and the bytes of models that count against them."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from trimsfs.eviction_policies import Policy, lru
from trimsfs.tiers.quotas import Quotas

FULL_FOR_S = 1.0
"""How long the tier waits to free space again after an attempt has failed."""


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
