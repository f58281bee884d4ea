"""The account of what was fetched ahead: how much of it was used, and how much was wasted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cachetools import LRUCache

from trimsfs.tiers.blob import Blob

REMEMBERED = 1 << 16
"""Files that are remembered until they are opened or go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """Files that are coming and that nobody has asked for; and counts of such files since the server started: those
    that came, at least in part; those of them that were opened then; and those that were stopped, evicted or closed
    before anybody opened them."""

    coming_files: int
    ahead_files: int
    ahead_bytes: int
    used_files: int
    used_bytes: int
    wasted_files: int
    wasted_bytes: int


class Account:
    """Counts the files that come ahead, by the tokens of their blobs."""

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
        """A file comes ahead; what somebody opens meanwhile does not."""
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
        """A file is opened."""
        self._coming.discard(token)
        size = self._unused.pop(token, None)
        if size is not None:
            self._used[0] += 1
            self._used[1] += size

    def gone(self, token: str) -> None:
        """A file has left the disk, or is closed."""
        size = self._unused.pop(token, None)
        if size is not None:
            self._wasted[0] += 1
            self._wasted[1] += size
