"""The account of prefetched files: how much of them was used, and how much was wasted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cachetools import LRUCache

from trimsfs.tiers.blob import Blob

REMEMBERED = 1 << 16
"""Prefetched files that are remembered until they are opened or leave the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """Prefetched files: those in flight now (``coming``), and counts since the server started.

    ``ahead`` counts files fetched at least in part, ``used`` those that a program opened later, ``wasted`` those that
    were cancelled, evicted or closed before.
    """

    coming_files: int
    ahead_files: int
    ahead_bytes: int
    used_files: int
    used_bytes: int
    wasted_files: int
    wasted_bytes: int


class Account:
    """Counts prefetched files, by the tokens of their blobs."""

    def __init__(self) -> None:
        self._coming = set[str]()
        self._unused: LRUCache[str, int] = LRUCache(REMEMBERED)
        self._ahead = [0, 0]
        self._used = [0, 0]
        self._wasted = [0, 0]

    def statistics(self) -> PrefetchStatistics:
        return PrefetchStatistics(
            coming_files=len(self._coming),
            ahead_files=self._ahead[0],
            ahead_bytes=self._ahead[1],
            used_files=self._used[0],
            used_bytes=self._used[1],
            wasted_files=self._wasted[0],
            wasted_bytes=self._wasted[1],
        )

    @contextmanager
    def coming(self, blob: Blob) -> Iterator[None]:
        """Count bytes fetched in the block as prefetched, unless a program opens the file meanwhile."""
        before = blob.present_bytes
        self._coming.add(blob.token)
        try:
            yield
        finally:
            if blob.token in self._coming:
                self._coming.remove(blob.token)
                self._came(blob.token, blob.present_bytes - before)

    def _came(self, token: str, size: int) -> None:
        if size > 0:
            self._ahead[0] += token not in self._unused
            self._ahead[1] += size
            self._unused[token] = self._unused.get(token, 0) + size

    def opened(self, token: str) -> None:
        """Record that a program opens a file."""
        self._coming.discard(token)
        size = self._unused.pop(token, None)
        if size is not None:
            self._used[0] += 1
            self._used[1] += size

    def gone(self, token: str) -> None:
        """Record that a file has left the disk or is closed."""
        size = self._unused.pop(token, None)
        if size is not None:
            self._wasted[0] += 1
            self._wasted[1] += size
