"""Directory readahead: which small files of a directory to prefetch as programs open and list them."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trimsfs.types import Generation

SMALL = 1 << 20
"""Bytes in the largest file that is prefetched: an eighth of a chunk."""
FIRST_WINDOW = 32
LAST_WINDOW = 512
LEAST_WINDOW = 4
WINDOW_SHARE = 4
"""A window's files may have at most 1/N of the bytes that as many files of the largest size would have."""
LOOKED_AT = 2048
"""Most names to search for one window: a directory may have a million, none of them small."""
SAMPLE = 256
"""Names of a listing that are sampled to tell whether a directory has mostly small files."""

Readable = Callable[[str], bool]
"""Whether a user may read the file of a key."""


@dataclass(slots=True)
class DirectoryReadahead:
    """The readahead of one directory: the first open of a small file prefetches others, those after it first.

    ``window`` is the number of files chosen at a time. When half of the last ones have been opened, it doubles and the
    next ones are chosen. It halves when a program opens a file that was not chosen. ``chosen`` holds the ETags, by
    name, of the files opened or chosen so far that are still here. ``awaited`` has the names chosen last, of which
    ``met`` were opened. A file is small up to ``small`` bytes.
    """

    small: int = SMALL
    window: int = FIRST_WINDOW
    chosen: dict[bytes, str] = field(default_factory=dict)
    awaited: set[bytes] = field(default_factory=set)
    met: int = 0

    def record_open(
        self,
        name: bytes,
        generation: Generation,
        names: Sequence[bytes],
        entries: Mapping[bytes, object],
        *,
        here: bool = False,
    ) -> list[Generation]:
        """Record an open of a file, which may be *here* already; the files to prefetch now.

        *names* are those of the directory's *entries*, sorted.
        """
        if generation.size > self.small:
            return []
        if name in self.awaited:
            self.awaited.remove(name)
            self.met += 1
            if self.met < len(self.awaited):
                return []
            self.window = min(LAST_WINDOW, self.window * 2)
        elif self.chosen.get(name) == generation.etag or here:
            self.chosen[name] = generation.etag
            return []
        elif self.awaited:
            self.window = max(LEAST_WINDOW, self.window // 2)
        self.chosen[name] = generation.etag
        return self._choose(bisect_right(names, name), names, entries)

    def record_listing(self, names: Sequence[bytes], entries: Mapping[bytes, object]) -> list[Generation]:
        """Record a listing of the directory; the files to prefetch now, if most are small and none is awaited."""
        if self.awaited or not self._mostly_small(names, entries):
            return []
        return self._choose(0, names, entries)

    def forget(self, name: bytes) -> None:
        """Forget a file that has left the disk or was not fetched."""
        self.chosen.pop(name, None)
        self.awaited.discard(name)
        if not self.chosen:
            self.window = FIRST_WINDOW

    def _mostly_small(self, names: Sequence[bytes], entries: Mapping[bytes, object]) -> bool:
        files = [entry for name in names[:SAMPLE] if isinstance(entry := entries[name], Generation)]
        return 2 * sum(file.size <= self.small for file in files) > len(files)

    def _choose(self, start: int, names: Sequence[bytes], entries: Mapping[bytes, object]) -> list[Generation]:
        wanted: dict[bytes, Generation] = {}
        left = self.window * self.small // WINDOW_SHARE
        for name in _round(names, start):
            entry = entries[name]
            if len(wanted) == self.window or left <= 0:
                break
            if isinstance(entry, Generation) and 0 < entry.size <= self.small and self.chosen.get(name) != entry.etag:
                wanted[name] = entry
                left -= entry.size
        self.awaited, self.met = set(wanted), 0
        self.chosen |= {name: entry.etag for name, entry in wanted.items()}
        return list(wanted.values())


def _round(names: Sequence[bytes], start: int) -> Iterator[bytes]:
    """The names from *start* on, then those before it; at most LOOKED_AT."""
    return (names[(start + step) % len(names)] for step in range(min(len(names), LOOKED_AT)))
