"""One directory of a store: which names are possible in it, its last listing, and answers for single names."""

import os

import trio
from cachetools import FIFOCache

from trimsfs.errors import StoreError, TransientStoreError
from trimsfs.namespace.listing import Entry, Listing, NonObject
from trimsfs.types import Generation

STALE_RETRY_S = 5.0
"""How long a name that has expired is used on before the store is asked again."""
KNOWN_NAMES = 10_000
"""Single names remembered in a directory that is too large to be listed for a lookup."""
LEAST_ASKED = 8
"""Single names that are asked for, at least, before a directory of several pages is listed for them."""
LONG_AGO = float("-inf")
"""Before any request."""
_SIZE, _NAME_SIZE = 2048, 600
"""Bytes of memory that a directory takes, without its listing, and a single name."""
_NOTHING = Listing()


class Directory:
    """What is known of one directory, and since when.

    ``entries`` is the last whole listing, which was asked for at ``listed``; ``names`` holds answers for single names,
    each with its time. ``restored`` is what an earlier server gave to the kernel: it counts only while the store cannot
    be asked. ``recalled`` tells that the last listing of an earlier server was looked for. ``failure`` is why the store
    could not be asked; it is not asked again before ``retry_at``. Answers to what was asked before ``distrusted`` are
    outdated, and ``replaced`` tells that an object of the listing is known to have been; ``outdated`` has the names of
    which alone that is so, or may be, and since when. A ``large`` directory takes several pages: once ``worth_listing``
    single names have been asked for, a listing costs no more than they did.
    """

    def __init__(self) -> None:
        self.entries = _NOTHING
        self.outdated: dict[bytes, float] = {}
        self.listed = LONG_AGO
        self.distrusted = LONG_AGO
        self.complete = self.recalled = self.replaced = False
        self.large = False
        self.worth_listing = LEAST_ASKED
        self._asked, self._asked_since = 0, LONG_AGO
        self.names = FIFOCache[bytes, tuple[Entry, float]](maxsize=KNOWN_NAMES)
        self.restored: dict[bytes, Entry] = {}
        self.failure: StoreError | None = None
        self.retry_at = LONG_AGO
        self.lock = trio.Lock()
        self.weighed = 0
        """The bytes that are counted for it."""

    @property
    def size(self) -> int:
        """About the bytes of memory that it takes."""
        return _SIZE + self.entries.size + _NAME_SIZE * len(self.names)

    @property
    def expired(self) -> bool:
        """Whether the listing is known to be outdated, or there is none."""
        return not self.complete or self.listed <= self.distrusted

    def stale(self, name: bytes, since: float) -> Entry | None:
        """What a name was when the store was last asked for it, if that was after a time; None if nobody knows."""
        entry, asked = self.names.get(name, (None, LONG_AGO))
        if self.complete and self.listed > asked:
            entry, asked = self.entries.get(name, NonObject.ABSENT), self.listed
        if entry is NonObject.UNREADABLE:
            return None
        if entry is None or asked < since:
            return self.restored.get(name)
        return self.restored.get(name, entry) if entry is NonObject.ABSENT else entry

    def has_replaced(self, generation: Generation) -> bool:
        """Whether the store has told of another content of an object of this directory, and nothing since."""
        name = os.fsencode(generation.key[generation.key.rfind("/") + 1 :])
        entry, _ = self.names.get(name, (None, LONG_AGO))
        if entry is None and not self.expired:
            entry = self.entries.get(name)
        return is_replaced(generation, entry)

    def restore(self, name: bytes, entry: Entry) -> None:
        """An earlier server gave this of a name to the kernel; of two generations the later one counts."""
        other = self.restored.get(name)
        if isinstance(other, Generation) and isinstance(entry, Generation) and entry.modified_ns < other.modified_ns:
            return
        self.restored[name] = entry

    def answered(self, name: bytes, entry: Entry, asked: float) -> bool:
        """Keep the store's answer for a name, to a request of the time *asked*, unless it is outdated.

        Returns whether it has another content than before: then nothing else that was known of the directory counts.
        """
        if asked <= max(self.distrusted, self.outdated.get(name, LONG_AGO)):
            return False
        replaced = is_replaced(self.stale(name, LONG_AGO), entry)
        if replaced:
            self.distrust(asked)
        self.names[name] = entry, asked
        self.restored.pop(name, None)
        return replaced

    async def relisted(self, entries: Listing, asked: float) -> bool:
        """Keep a whole listing, which was requested at the time *asked*; whether it is news that one of its names has
        another content."""
        told = [*((name, entry) for name, (entry, _) in self.names.items()), *self.restored.items()]
        news = not self.replaced and any(is_replaced(entry, entries.get(name)) for name, entry in told)
        news = news or (not self.replaced and await entries.shows_another(self.entries))
        self.replaced = False
        self.entries, self.listed, self.complete = entries, asked, True
        self.outdated = {name: since for name, since in self.outdated.items() if since >= asked}
        self.clear_names()
        return news

    def distrust(self, now: float) -> None:
        """What was asked before this time is outdated in part: it is not used on."""
        self.expire(now)
        self.clear_names()

    def expire(self, now: float) -> None:
        """What was asked before this time may be outdated: the store is to be asked again."""
        self.retry_at = LONG_AGO
        self.distrusted = now
        self.replaced = True

    def asked(self, within_s: float) -> int:
        """Count a single name that is asked for; how many have been in this time."""
        now = trio.current_time()
        if now - self._asked_since > within_s:
            self._asked, self._asked_since = 0, now
        self._asked += 1
        return self._asked

    def recall(self, entries: Listing, listed: float) -> None:
        """An earlier server has listed the directory, so long ago that the store is to be asked first."""
        self.entries, self.listed, self.complete = entries, listed, True
        self.distrusted = max(self.distrusted, listed)

    def clear_names(self) -> None:
        """Single names say nothing any more."""
        self.names.clear()
        self.restored.clear()

    def may_be_outdated(self, name: bytes) -> bool:
        """Whether what is known of a name may be outdated."""
        since = self.outdated.get(name)
        return since is not None and (name not in self.names or self.names[name][1] <= since)

    def failed(self, error: StoreError) -> None:
        """The store could not be asked just now; a recent failure that is raised again does not count anew."""
        if self.recent_failure is None:
            self.failure = error
            self.retry_at = trio.current_time() + STALE_RETRY_S

    @property
    def recent_failure(self) -> StoreError | None:
        """Why the store could not be asked lately, in spite of retries; a single failed attempt does not count."""
        if trio.current_time() >= self.retry_at or isinstance(self.failure, TransientStoreError):
            return None
        return self.failure

    def raise_recent_failure(self) -> None:
        """Spare the caller the wait for the same failure."""
        if self.recent_failure is not None:
            raise self.recent_failure.with_traceback(None)


def is_replaced(before: Entry | None, now: Entry | None) -> bool:
    """Whether an object has another content now; not whether it has come or gone."""
    return isinstance(before, Generation) and isinstance(now, Generation) and before.etag != now.etag
