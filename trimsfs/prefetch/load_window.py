"""The load window: how far ahead of its reader a model is fetched. It grows while the predictions are right."""

from dataclasses import dataclass, field

FIRST_FILES = 2
MOST_FILES = 16
CAUTIOUS_FILES = 1
"""Files to prefetch after a program closed another one before all of it was fetched."""
DESCRIBED_FILES = 1
"""Files to prefetch while only the small file that describes them has been opened."""


@dataclass(slots=True)
class LoadWindow:
    """The files that are expected in a load, by key.

    ``files`` is the number awaited at a time. Unless ``fixed``, it doubles when a program opens one of them and halves,
    down to 0, when it opens another file.
    """

    order: list[str] = field(default_factory=list)
    files: int = FIRST_FILES
    fixed: bool = False
    opened: dict[str, None] = field(default_factory=dict)
    _last: str = ""

    def ends_with(self, key: str) -> bool:
        """Whether all expected files have been opened, this one last."""
        return key == self._last and bool(self.order) and self.opened.keys() >= set(self.order)

    def record_open(self, key: str) -> None:
        """Record an open: from now on, the files after this one are expected."""
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
        """The expected files that come next, in order."""
        place = self.order.index(self._last) + 1 if self._last in self.order else 0
        following = self.order[place:] + self.order[:place]
        return [key for key in following if key not in self.opened][: self.files]

    def _follows(self, key: str) -> bool:
        """Whether a file is expected right after the one opened last."""
        pairs = zip(self.order, self.order[1:], strict=False)
        return (self._last, key) in pairs
