"""The reference model: what a store has held, and what may be seen of it through a mount, by docs/semantics.md."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from trimsfs.namespace.directory import STALE_RETRY_S
from trimsfs.namespace.lifetimes import NEGATIVE_TTL_S
from trimsfs.stores.recent_failures import REMEMBERED_S

DIRECTORY = "directory"
ABSENT = "absent"


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One content that a name has had; another is another even if its bytes are the same."""

    path: str
    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.content)


Thing = Version | str
"""What a path is: a version of an object, a directory, or absent."""


@dataclass(slots=True, eq=False)
class File:
    """An open file: whichever version it turns out to be of, it is of that one until it is closed."""

    path: str
    token: int
    candidates: list[Version]
    mapped: bool = False
    closed: bool = False
    whole: bool = False

    def saw(self, offset: int, size: int, data: bytes) -> None:
        """A read gave these bytes."""
        left = [version for version in self.candidates if version.content[offset : offset + size] == data]
        sizes = [version.size for version in self.candidates]
        assert left, f"{self.path}: {len(data)} bytes at {offset} of {sizes} are of no version that it could be"
        self.candidates = left


class Model:
    """A store's history, and what is known of its failures.

    Names are believed for *ttl_s* seconds, and for *slack_s* more where clocks are coarse; while the store cannot be
    asked and a moment after that, whatever was known is believed.
    """

    def __init__(self, now: Callable[[], float], *, ttl_s: float, slack_s: float) -> None:
        self._now = now
        self._ttl_s = ttl_s + slack_s
        self._negative_ttl_s = min(ttl_s, NEGATIVE_TTL_S) + slack_s
        self._history: list[tuple[float, dict[str, Version]]] = [(-math.inf, {})]
        self._blind_until = -math.inf
        self._blind_since = math.inf
        self._failing_until = -math.inf
        self._errors: set[int] = set()
        self.failing = False

    # What happens to the store

    @property
    def current(self) -> dict[str, Version]:
        return self._history[-1][1]

    def put(self, version: Version) -> None:
        self._history.append((self._now(), self.current | {version.path: version}))

    def delete(self, path: str) -> None:
        self._history.append((self._now(), {key: version for key, version in self.current.items() if key != path}))

    def fail(self, number: int) -> None:
        """From now on the store fails, and programs may be told so."""
        self.failing = True
        recent = self._errors if self._now() <= self._failing_until + STALE_RETRY_S else set()
        self._errors = recent | {number, errno.EIO}
        self._failing_until = self._blind_until = math.inf

    def heal(self) -> None:
        if self.failing:
            self.failing = False
            self._failing_until = self._now()
            self._blind_until = self._now() + 2 * STALE_RETRY_S  # as long by the server as by the kernel

    def hiccup(self, *, over: bool) -> None:
        """A request fails once, or has: nobody is told, but that what is known may be believed for longer."""
        self._blind_until = self._now() + 2 * STALE_RETRY_S if over else math.inf

    # What may be seen

    def errors(self, begun: float, *, names: bool) -> set[int]:
        """The errors of a failing store that an operation may give; about names, also a moment afterwards.

        A fetch that has failed is remembered for longer.
        """
        well_s = begun - self._failing_until
        told = self._errors if well_s <= (STALE_RETRY_S if names else 0) else set()
        return told | {errno.EIO} if well_s <= REMEMBERED_S else told

    def ever(self) -> set[Version]:
        return {version for _, held in self._history for version in held.values()}

    def believable(self, path: str, begun: float) -> list[Version]:
        """The versions that a path may lead to, for who has begun to ask then."""
        return [thing for thing in self._things(path, self._believed_since(begun)) if isinstance(thing, Version)]

    def may_be_directory(self, path: str, begun: float) -> bool:
        return DIRECTORY in self._things(path, self._believed_since(begun))

    def may_be_absent(self, path: str, begun: float) -> bool:
        """Whether somebody may be told that there is nothing: it, or what it is in, was really absent of late."""
        parts = path.split("/")
        paths = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        # While the store does not answer, the last listing counts for as long as it takes.
        since = -math.inf if begun <= self._blind_until else begun - self._negative_ttl_s
        return any(ABSENT in self._things(above, since) for above in paths)

    def may_be_no_directory(self, path: str, begun: float) -> bool:
        """Whether what should be a directory, on the path or at its end, may be a file."""
        parts = path.split("/")
        return any(self.believable("/".join(parts[:depth]), begun) for depth in range(1, len(parts) + 1))

    def may_list(self, path: str, names: set[str], begun: float) -> bool:
        """Whether a directory had just these names at one moment of late."""
        prefix = f"{path}/" if path else ""
        return any(
            names == {key[len(prefix) :].split("/")[0] for key in held if key.startswith(prefix)}
            for held in self._held_since(self._believed_since(begun))
        )

    def _believed_since(self, begun: float) -> float:
        return -math.inf if begun <= self._blind_until else begun - self._ttl_s

    def _things(self, path: str, since: float) -> list[Thing]:
        things: list[Thing] = []
        for held in self._held_since(since):
            if any(key.startswith(f"{path}/") for key in held):
                things.append(DIRECTORY)
            else:
                things.append(held.get(path, ABSENT))
        return list(dict.fromkeys(things))

    def _held_since(self, since: float) -> list[dict[str, Version]]:
        """What the store held at some moment since then."""
        ends = [begin for begin, _ in self._history[1:]] + [math.inf]
        return [held for (_, held), end in zip(self._history, ends, strict=True) if end >= since]
