"""Lifetimes: for how long the store's answers for names serve, and for how much longer while it fails."""

import trio

from trimsfs.namespace.directory import LONG_AGO, STALE_RETRY_S, Directory
from trimsfs.namespace.listing import Entry, NonObject

NEGATIVE_TTL_S = 5.0
"""Longest that an absence is cached: a model just uploaded should appear soon."""
ABSENT_AFTER_S = 3.0
"""How long the store must be silent before its last answer that a name is absent serves."""


class Lifetimes:
    """Names are cached for *ttl_s* seconds; while the store fails, expired answers serve for at most *stale_for_s*."""

    def __init__(self, ttl_s: float, stale_for_s: float) -> None:
        self.ttl_s = ttl_s
        self.absent_s = min(ttl_s, NEGATIVE_TTL_S)
        self._stale_for_s = stale_for_s

    def of(self, entry: Entry) -> float:
        """For how many seconds an answer of the store is cached."""
        return self.absent_s if entry is NonObject.ABSENT else self.ttl_s

    def usable(self, directory: Directory, spare_s: float = 0.0, *, listed_ahead: bool = True) -> bool:
        """Whether the listing may be used: it is valid for *spare_s* more, or the store fails to give another.

        Unless *listed_ahead*, one that no program has asked for is used only if the store fails.
        """
        now = trio.current_time()
        asked_for = listed_ahead or not directory.ahead
        if asked_for and not directory.expired and now + spare_s < directory.listed + self.ttl_s:
            return True
        failing = directory.breaker.failing or now < directory.retry_at
        return failing and directory.complete and directory.listed >= self.oldest()

    def oldest(self) -> float:
        """The time of the oldest answers that serve while the store fails."""
        return trio.current_time() - self._stale_for_s

    def known(self, directory: Directory, name: bytes) -> tuple[Entry, float] | None:
        """The cached answer for a name, and for how many seconds it holds; None when the store must be asked."""
        now = trio.current_time()
        if directory.may_be_outdated(name):
            return None
        asked = LONG_AGO
        if name in directory.names:
            entry, asked = directory.names[name]
            left = asked + self.of(entry) - now
            if left > 0 and asked >= directory.distrusted:
                return entry, left
        if not directory.expired and directory.listed > asked:
            entry = directory.entries.get(name, NonObject.ABSENT)
            left = directory.listed + self.of(entry) - now
            if directory.ahead and entry is NonObject.ABSENT:
                left = 0.0  # it may have come since
            if left > 0 and entry is not NonObject.UNREADABLE:  # of an unreadable name, the store tells why
                return entry, left
        if directory.breaker.failing or now < directory.retry_at:
            return self.stale(directory, name)
        return None

    def stale(self, directory: Directory, name: bytes) -> tuple[Entry, float] | None:
        """The last answer for a name while the store fails; an absence only after ABSENT_AFTER_S of silence."""
        entry = directory.stale(name, self.oldest())
        if entry is None or (entry is NonObject.ABSENT and directory.breaker.silent_s < ABSENT_AFTER_S):
            return None
        return entry, STALE_RETRY_S
