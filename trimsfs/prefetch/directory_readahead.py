"""Which small files of a directory to prefetch, as programs open them one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from trimsfs.types import Generation

SMALL = 1 << 20
"""Bytes in the largest file that is prefetched: an eighth of a chunk."""
FIRST_WINDOW = 32
LAST_WINDOW = 512
LEAST_WINDOW = 4


@dataclass(slots=True)
class DirectoryReadahead:
    """One directory: the second small file that is opened has others prefetched, those that follow it first.

    ``window`` is how many are chosen at a time. It doubles when half of the last ones have been opened, which is
    also when the next are chosen, and halves when a file is opened that was not chosen. ``chosen`` holds the ETags,
    by name, of what was opened or chosen so far; ``awaited`` the names chosen last, of which ``met`` were opened. Files
    up to ``small`` bytes are.
    """

    small: int = SMALL
    window: int = FIRST_WINDOW
    chosen: dict[bytes, str] = field(default_factory=dict)
    awaited: set[bytes] = field(default_factory=set)
    met: int = 0

    def record_open(self, name: bytes, generation: Generation, entries: Mapping[bytes, object]) -> list[Generation]:
        """A file is opened: the files to prefetch now.

        *entries* are those of the directory, in order of name.
        """
        if generation.size > self.small:
            return []
        if name in self.awaited:
            self.awaited.remove(name)
            self.met += 1
            if self.met < len(self.awaited):
                return []
            self.window = min(LAST_WINDOW, self.window * 2)
        elif self.chosen.get(name) == generation.etag:
            return []  # opened before
        elif self.awaited:
            self.window = max(LEAST_WINDOW, self.window // 2)
        self.chosen[name] = generation.etag
        wanted = self._next(name, entries) if len(self.chosen) > 1 else {}
        self.awaited, self.met = set(wanted), 0
        self.chosen |= {other: entry.etag for other, entry in wanted.items()}
        return list(wanted.values())

    def _next(self, name: bytes, entries: Mapping[bytes, object]) -> dict[bytes, Generation]:
        names = list(entries)
        start = names.index(name) + 1 if name in entries else 0
        wanted: dict[bytes, Generation] = {}
        for other in names[start:] + names[:start]:
            entry = entries[other]
            if len(wanted) == self.window:
                break
            if isinstance(entry, Generation) and 0 < entry.size <= self.small and self.chosen.get(other) != entry.etag:
                wanted[other] = entry
        return wanted
