"""The budget of the disk tier: how many bytes it has, uses and may still take."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from trimsfs.tiers.eviction_policies import Policy, lru
from trimsfs.tiers.quotas import Quotas

FULL_FOR_S = 1.0
"""How long the tier does not try again to make space after it found none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLimits:
    """Most bytes of all models (None: no limit but the disk), bytes to leave free on the file system, the shares of the
    tenants, and the policy that chooses what is evicted to keep to them."""

    budget: int | None = None
    min_free: int = 0
    quotas: Quotas = field(default_factory=Quotas)
    policy: Policy = lru


class Budget:
    """Counts the bytes used within *limits*, those of each tenant by themselves.

    *used* is what is used already, by the objects' keys.
    """

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
        """Bytes used, by all."""
        return self._used.total()

    def used_by(self, pool: str) -> int:
        """Bytes used by a tenant, or by the rest."""
        return self._used[pool]

    def add(self, key: str, size: int) -> None:
        """Bytes of an object are used from now on; fewer of them for a negative size."""
        self._used[self._quotas.pool(key)] += size

    def free(self) -> int:
        """Bytes that may still be used without an eviction; negative when too many are used."""
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize - self._min_free
        if self.limit is not None:
            free = min(free, self.limit - self.used)
        return free

    def left(self, pool: str) -> int | None:
        """Bytes that a pool may still use of its share; negative when too many are used, None without a limit."""
        limit = self._quotas.limit(pool, self.limit)
        return None if limit is None else limit - self._used[pool]

    def full(self, key: str) -> bool:
        """Whether a moment ago no space could be made for an object of the same pool, or no write succeeded."""
        return self.failing or trio.current_time() < self._full_until.get(self._quotas.pool(key), float("-inf"))

    @property
    def failing(self) -> bool:
        """Whether a write failed a moment ago."""
        return trio.current_time() < self._failing_until

    def found_full(self, key: str) -> None:
        """Nothing can be evicted for an object: not to be searched again for every chunk of a large file."""
        self._full_until[self._quotas.pool(key)] = trio.current_time() + FULL_FOR_S

    def found_failing(self) -> None:
        """The disk refuses writes though it has space: not to be tried again for every chunk."""
        self._failing_until = trio.current_time() + FULL_FOR_S

    def found_room(self) -> None:
        """Something was evicted, or can be now."""
        self._full_until.clear()
