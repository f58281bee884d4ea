"""How much of a file system the disk tier may take."""

import os
from pathlib import Path

import trio

FULL_FOR_S = 1.0
"""How long a search for room that was in vain is not repeated."""


class Budget:
    """Counts the bytes used of at most *limit* (None: no limit but the disk), leaving *min_free* on the file system.

    ``used`` is the caller's to change.
    """

    def __init__(self, directory: Path, *, limit: int | None, min_free: int, used: int) -> None:
        self._directory = directory
        self._min_free = min_free
        self._full_until = self._failing_until = float("-inf")
        self.limit = limit
        self.used = used

    def free(self) -> int:
        """Bytes that may still be used without an eviction; negative when too many are used."""
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize - self._min_free
        if self.limit is not None:
            free = min(free, self.limit - self.used)
        return free

    @property
    def full(self) -> bool:
        """Whether room was looked for, or a write tried, a moment ago, in vain."""
        return self.failing or trio.current_time() < self._full_until

    @property
    def failing(self) -> bool:
        """Whether a write failed a moment ago."""
        return trio.current_time() < self._failing_until

    def found_full(self) -> None:
        """Nothing can be evicted: not to be searched again for every chunk of a large file."""
        self._full_until = trio.current_time() + FULL_FOR_S

    def found_failing(self) -> None:
        """The disk does not take what there is room for: not to be tried again for every chunk."""
        self._failing_until = trio.current_time() + FULL_FOR_S

    def found_room(self) -> None:
        """Something was evicted, or can be now."""
        self._full_until = float("-inf")
