"""The directories of which something is known, within a bound on memory."""

from collections import OrderedDict
from collections.abc import Iterator

from trimsfs.namespace.directory import Directory

MOST_BYTES = 128 << 20
"""Bytes that may be known of all directories together: a listing of a million names fits in."""
LOOKS = 8
"""Directories that are looked at for one to be forgotten, at a time."""


class Directories:
    """Directories by their prefixes, the one used longest ago first. That is forgotten when all take more than *most*
    bytes, unless it is being listed, or an earlier server gave names of it to the kernel."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._known = OrderedDict[str, Directory]()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[tuple[str, Directory]]:
        return iter(self._known.items())

    def get(self, prefix: str) -> Directory | None:
        """A directory, if something is known of it."""
        return self._known.get(prefix)

    def use(self, prefix: str) -> Directory:
        """A directory that is asked for."""
        directory = self._known.get(prefix)
        if directory is None:
            directory = self._known[prefix] = Directory()
            self.weigh(prefix)
        else:
            self._known.move_to_end(prefix)
        return directory

    def weigh(self, prefix: str) -> None:
        """More may be known of a directory now."""
        directory = self._known.get(prefix)
        if directory is None:
            return  # it was forgotten meanwhile
        size = directory.size
        self.bytes += size - directory.weighed
        directory.weighed = size
        for _ in range(LOOKS):
            if self.bytes <= self._most or len(self._known) == 1:
                break
            first, oldest = next(iter(self._known.items()))
            if oldest.restored or oldest.lock.locked() or oldest is directory:
                self._known.move_to_end(first)
            else:
                del self._known[first]
                self.bytes -= oldest.weighed
