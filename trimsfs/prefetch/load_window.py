"""How far ahead of its reader a model is fetched: further, as what was guessed turns out to be right."""

from dataclasses import dataclass, field

FIRST_FILES = 2
MOST_FILES = 16
CAUTIOUS_FILES = 1
"""Files that come where another was closed before all of it had come."""
DESCRIBED_FILES = 1
"""Files that come once only the small file that describes them has been opened."""


@dataclass(slots=True)
class LoadWindow:
    """The files that are expected in a load, by key.

    ``files`` is how many are awaited at a time. It doubles when one of them is opened and halves, to none in the end,
    when another one is, unless it is ``fixed``.
    """

    order: list[str] = field(default_factory=list)
    files: int = FIRST_FILES
    fixed: bool = False
    opened: dict[str, None] = field(default_factory=dict)
    _last: str = ""

    def ends_with(self, key: str) -> bool:
        """Whether all that is expected has been opened, this file last."""
        return key == self._last and bool(self.order) and self.opened.keys() >= set(self.order)

    def record_open(self, key: str) -> None:
        """A file is opened; the files that follow it are expected from now on."""
        if key in self.opened:
            return
        awaited = self.awaited()
        self.opened[key] = None
        if self.fixed:
            pass
        elif key in awaited:
            self.files = min(MOST_FILES, self.files * 2)
        elif awaited:
            self.files //= 2
        elif not self.files and self._follows(key):
            self.files = 1
        self._last = key

    def awaited(self) -> list[str]:
        """The next files, in order."""
        place = self.order.index(self._last) + 1 if self._last in self.order else 0
        following = self.order[place:] + self.order[:place]
        return [key for key in following if key not in self.opened][: self.files]

    def _follows(self, key: str) -> bool:
        """Whether a file comes after the one that was opened last."""
        pairs = zip(self.order, self.order[1:], strict=False)
        return (self._last, key) in pairs
