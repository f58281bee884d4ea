"""The known directories of a store, within a bound on memory."""

from collections import OrderedDict
from collections.abc import Iterator

from trimsfs.namespace.directory import Directory
from trimsfs.origins import ByPath
from trimsfs.stores.circuit_breaker import CircuitBreaker

MOST_BYTES = 128 << 20
"""Memory for all directories together: a listing of a million names fits."""
LOOKS = 8
"""Most directories that one call of `weigh` considers forgetting."""


class Directories:
    """Directories by prefix, least recently used first. Each has the breaker of its store.

    Forgets from the front when all take more than *most* bytes. Spares a directory that is being listed, and one with
    names that an earlier server gave to the kernel.
    """

    def __init__(self, breakers: ByPath[CircuitBreaker], most: int = MOST_BYTES) -> None:
        self._breakers = breakers
        self._most = most
        self._known = OrderedDict[str, Directory]()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[tuple[str, Directory]]:
        return iter(self._known.items())

    def get(self, prefix: str) -> Directory | None:
        """The directory of a prefix; None if it is not known."""
        return self._known.get(prefix)

    def use(self, prefix: str) -> Directory:
        """Return the directory of a prefix, made if new, as the most recently used."""
        directory = self._known.get(prefix)
        if directory is None:
            directory = self._known[prefix] = Directory(self._breakers.of(prefix))
            self.weigh(prefix)
        else:
            self._known.move_to_end(prefix)
        return directory

    def weigh(self, prefix: str) -> None:
        """Measure a directory again, and forget others if all take too much memory."""
        directory = self._known.get(prefix)
        if directory is None:
            return  # forgotten meanwhile
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
