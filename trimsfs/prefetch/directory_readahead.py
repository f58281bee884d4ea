"""Which small files of a directory to prefetch, as programs open and list them."""

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
"""The files of a window have at most this part of the bytes that as many of the largest would have."""
LOOKED_AT = 2048
"""Names that are looked at for one window: a directory may have a million, none of which is small."""
SAMPLE = 256
"""Names of a listing that tell whether a directory is one of small files."""

Readable = Callable[[str], bool]
"""Whether a user may read the file of a key."""


@dataclass(slots=True)
class DirectoryReadahead:
    """One directory: the first small file that is opened has others prefetched, those that follow it first.

    ``window`` is how many are chosen at a time. It doubles when half of the last ones have been opened, which is
    also when the next are chosen, and halves when a file is opened that was not chosen. ``chosen`` holds the ETags,
    by name, of what was opened or chosen so far and is still here; ``awaited`` the names chosen last, of which ``met``
    were opened. Files up to ``small`` bytes are.
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
        """A file is opened, which may be *here*: the files to prefetch now.

        *names* are those of the directory's *entries*, in order.
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
        """A program lists the directory: the files to prefetch now, if most are small and nothing is awaited."""
        if self.awaited or not self._mostly_small(names, entries):
            return []
        return self._choose(0, names, entries)

    def forget(self, name: bytes) -> None:
        """A file is not here any more, or has not come."""
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
    """The names from a place on and round, as many as are looked at."""
    return (names[(start + step) % len(names)] for step in range(min(len(names), LOOKED_AT)))
