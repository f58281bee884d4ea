"""The account of what was fetched ahead: how much of it was used, and how much was wasted."""

from dataclasses import dataclass

from cachetools import LRUCache

REMEMBERED = 1 << 16
"""Files that are remembered until they are opened or go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """Counts since the server started, of files that nobody had asked for: those that came, at least in part; those
    of them that were opened then; and those that were stopped, evicted or closed before anybody opened them."""

    ahead_files: int
    ahead_bytes: int
    used_files: int
    used_bytes: int
    wasted_files: int
    wasted_bytes: int


class Account:
    """Counts the files that come ahead, by the tokens of their blobs."""

    def __init__(self) -> None:
        self._unused: LRUCache[str, int] = LRUCache(REMEMBERED)
        self._ahead = [0, 0]
        self._used = [0, 0]
        self._wasted = [0, 0]

    def statistics(self) -> PrefetchStatistics:
        return PrefetchStatistics(
            ahead_files=self._ahead[0],
            ahead_bytes=self._ahead[1],
            used_files=self._used[0],
            used_bytes=self._used[1],
            wasted_files=self._wasted[0],
            wasted_bytes=self._wasted[1],
        )

    def came(self, token: str, size: int) -> None:
        """So many bytes of a file have come ahead."""
        if size > 0:
            self._ahead[0] += token not in self._unused
            self._ahead[1] += size
            self._unused[token] = self._unused.get(token, 0) + size

    def opened(self, token: str) -> None:
        """A file is opened."""
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
