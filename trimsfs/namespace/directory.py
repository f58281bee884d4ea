"""One directory of a store: its last listing, and the store's answers for single names."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from cachetools import FIFOCache

from trimsfs.errors import StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.namespace.listing import SLICE, Entry, Listing, NonObject
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.types import Generation

STALE_RETRY_S = 5.0
"""After a failed request, how long expired answers serve before the store is asked again."""
KNOWN_NAMES = 10_000
"""Most answers for single names that a directory keeps."""
LEAST_ASKED = 8
"""Fewest single names to ask for before a directory of several pages is listed instead."""
LONG_AGO = float("-inf")
"""Before any request."""
_SIZE, _NAME_SIZE = 2048, 600
"""Estimated bytes of memory for a directory without its listing, and for one single name."""
_NOTHING = Listing()


class Directory:
    """What is known of one directory, and since when.

    ``entries`` is the last whole listing, requested at ``listed``. ``names`` holds answers for single names, each with
    the time of its request. ``restored`` holds names that an earlier server gave to the kernel: it serves only while
    the store does not. ``recalled`` is set once an earlier server's listing was looked for. ``failure`` is why the last
    request failed: until ``retry_at``, expired answers serve instead.

    Answers requested before ``distrusted`` are outdated; ``outdated`` has single names that may be, and since when.
    ``ahead`` says that the listing came before anybody asked: it tells what there is, but not what there is not.
    While ``replaced`` is set, the server already knows that objects may have changed: a listing is then no news.

    A ``large`` directory takes several pages: after ``worth_listing`` single names, a listing costs no more than they
    did.
    """

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.breaker = breaker
        """That of the store which the directory is in."""
        self.entries = _NOTHING
        self.outdated: dict[bytes, float] = {}
        self.listed = LONG_AGO
        self.distrusted = LONG_AGO
        self.complete = self.recalled = self.replaced = self.ahead = False
        self.large = False
        self.worth_listing = LEAST_ASKED
        self._asked, self._asked_since = 0, LONG_AGO
        self.names = FIFOCache[bytes, tuple[Entry, float]](maxsize=KNOWN_NAMES)
        self.restored: dict[bytes, Entry] = {}
        self.failure: StoreError | None = None
        self.retry_at = LONG_AGO
        self._unlistable: tuple[StoreUnavailableError, float] | None = None
        self.lock, self.rechecking = trio.Lock(), trio.Lock()
        self._waiting = set[trio.CancelScope]()
        self.weighed = 0
        """Its size when `Directories` last measured it."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """Hold the lock, for who wants a single name; False, without the lock, once a listing `takes_long`."""
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                await self.lock.acquire()
            finally:
                self._waiting.remove(scope)
        if scope.cancelled_caught:
            yield False
            return
        try:
            yield True
        finally:
            self.lock.release()

    def takes_long(self) -> None:
        """Have nobody wait for the listing under way who wants a single name: they ask for it."""
        self.large = True
        for scope in self._waiting:
            scope.cancel()

    @property
    def unlistable(self) -> StoreUnavailableError | None:
        """Why the directory cannot be listed, by a recent attempt. Its names can be asked for."""
        if self._unlistable is None or trio.current_time() >= self._unlistable[1]:
            return None
        return self._unlistable[0]

    def cannot_be_listed(self, error: StoreUnavailableError, for_s: float) -> None:
        """Have nobody list the directory for so many seconds."""
        self.large = True
        self._unlistable = error, trio.current_time() + for_s

    @property
    def size(self) -> int:
        """Estimated bytes of memory."""
        return _SIZE + self.entries.size + _NAME_SIZE * len(self.names)

    @property
    def expired(self) -> bool:
        """Whether the listing is outdated, or there is none."""
        return not self.complete or self.listed <= self.distrusted

    def latest(self, name: bytes) -> tuple[Entry | None, float]:
        """The last answer for a name, and when it was requested; None if there is none."""
        entry, asked = self.names.get(name, (None, LONG_AGO))
        if self.complete and self.listed > asked:
            return self.entries.get(name, NonObject.ABSENT), self.listed
        return entry, asked

    def stale(self, name: bytes, since: float) -> Entry | None:
        """The last entry of a name, if requested after *since*; None if nothing is known, or the name is unreadable.

        What an earlier server gave to the kernel stands in for a missing answer, an older one, or an absence.
        """
        entry, asked = self.latest(name)
        if entry is NonObject.UNREADABLE:
            return None
        if entry is None or asked < since:
            return self.restored.get(name)
        return self.restored.get(name, entry) if entry is NonObject.ABSENT else entry

    def has_replaced(self, generation: Generation) -> bool:
        """Whether the store's latest answer shows another content of an object."""
        name = os.fsencode(generation.key[generation.key.rfind("/") + 1 :])
        entry, _ = self.names.get(name, (None, LONG_AGO))
        if entry is None and not self.expired:
            entry = self.entries.get(name)
        return is_replaced(generation, entry)

    def restore(self, name: bytes, entry: Entry) -> None:
        """Record a name that an earlier server gave to the kernel; of two generations, the later modified one wins."""
        other = self.restored.get(name)
        if isinstance(other, Generation) and isinstance(entry, Generation) and entry.modified_ns < other.modified_ns:
            return
        self.restored[name] = entry

    def outdated_since(self, name: bytes) -> float:
        """The time before which answers for a name count no more."""
        return max(self.distrusted, self.outdated.get(name, LONG_AGO))

    def answered(self, name: bytes, entry: Entry, asked: float) -> bool:
        """Keep the store's answer for a name, requested at *asked*, unless it is outdated.

        Returns whether the object has another content than before: the whole directory is then distrusted.
        """
        if asked <= self.outdated_since(name):
            return False
        replaced = is_replaced(self.stale(name, LONG_AGO), entry)
        if replaced:
            self.distrust(asked)
        self.names[name] = entry, asked
        self.restored.pop(name, None)
        return replaced

    async def relisted(self, entries: Listing, asked: float) -> bool:
        """Keep a whole listing, requested at *asked*. Returns whether it is news that an object has another content."""
        known = [*((name, entry) for name, (entry, at) in self.names.items() if at <= asked), *self.restored.items()]
        news = not self.replaced and await _any_replaced(known, entries)
        news = news or (not self.replaced and await entries.shows_another(self.entries))
        self.replaced = False
        self.entries, self.listed, self.complete, self.ahead = entries, asked, True, False
        self.outdated = {name: since for name, since in self.outdated.items() if since >= asked}
        later = {name: (entry, at) for name, (entry, at) in self.names.items() if at > asked}
        self.clear_names()
        self.names.update(later)
        return news

    def distrust(self, now: float) -> None:
        """Mark answers requested before *now* as outdated, and drop those for single names."""
        self.expire(now)
        self.replaced = True
        self.clear_names()

    def expire(self, now: float) -> None:
        """Mark answers requested before *now* as outdated: the next use asks the store."""
        self.retry_at = LONG_AGO
        self.distrusted = now
        self._unlistable = None

    def asked(self, within_s: float) -> int:
        """Count a request for a single name. Returns the count in the current window of *within_s* seconds."""
        now = trio.current_time()
        if now - self._asked_since > within_s:
            self._asked, self._asked_since = 0, now
        self._asked += 1
        return self._asked

    def recall(self, entries: Listing, listed: float) -> None:
        """Take over an earlier server's listing of the time *listed*. It counts as expired: the store comes first."""
        self.entries, self.listed, self.complete = entries, listed, True
        self.distrusted = max(self.distrusted, listed)

    def clear_names(self) -> None:
        """Drop all answers for single names, and what an earlier server gave to the kernel."""
        self.names.clear()
        self.restored.clear()

    def may_be_outdated(self, name: bytes) -> bool:
        """Whether a name was marked as outdated and has no newer answer."""
        since = self.outdated.get(name)
        return since is not None and (name not in self.names or self.names[name][1] <= since)

    def failed(self, error: StoreError) -> None:
        """Record that a request failed. A recent failure raised again does not count anew."""
        if self.recent_failure is None:
            self.failure = error
            self.retry_at = trio.current_time() + STALE_RETRY_S

    @property
    def recent_failure(self) -> StoreError | None:
        """Why a request failed recently, in spite of retries; None for a single failed attempt."""
        if trio.current_time() >= self.retry_at or isinstance(self.failure, TransientStoreError):
            return None
        return self.failure

    def raise_recent_failure(self) -> None:
        """Raise the recent failure, if any, so that the caller does not wait for the same one."""
        if self.recent_failure is not None:
            raise self.recent_failure.with_traceback(None)


def is_replaced(before: Entry | None, now: Entry | None) -> bool:
    """Whether an object has another content now; False if it appeared or disappeared."""
    return isinstance(before, Generation) and isinstance(now, Generation) and before.etag != now.etag


async def _any_replaced(known: Sequence[tuple[bytes, Entry]], entries: Listing) -> bool:
    """Whether a known object has another content in a listing."""
    for first in range(0, len(known), SLICE):
        if any(is_replaced(entry, entries.get(name)) for name, entry in known[first : first + SLICE]):
            return True
        await trio.lowlevel.checkpoint()
    return False
