"""Listing records in the index: the store's last listing of each directory, as `trimsfs.namespace` packs it."""

import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable

from trimsfs.origins import Origins, located
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
"""Most bytes of all records together."""
FORGOTTEN = 1 / 8
"""The share of them that is forgotten at once: to find the oldest ones takes a look at all."""
READERS = 2
"""Reads at a time, in threads of their own: a slow read delays no other work of the disk tier."""
_FORGET = (
    "DELETE FROM listings WHERE place IN (SELECT place FROM "
    "(SELECT place, sum(length(names)) OVER (ORDER BY listed DESC, place) AS total FROM listings) WHERE total > ?)"
)


class ListingRecords:
    """The records of the directories of a *store*. Each may be lost."""

    def __init__(self, index: BlobIndex, threads: Threads, store: str | Origins) -> None:
        self._index = index
        self._threads = threads
        self._readers = Threads(READERS)
        self._store = store
        self._bytes: int | None = None
        """At least what all records take; None before the first is written."""

    async def last(self, directory: str) -> tuple[bytes, float] | None:
        """The record of a directory's last listing and its time in seconds since the epoch; None without one."""
        try:
            return await self._readers.ask(self._read, self._place(directory))
        except sqlite3.Error as error:
            log.warning("/%s: cannot read the record of its listing: %s", directory, error)
            return None

    async def record(self, directory: str, pack: Callable[[], bytes]) -> None:
        """Record a listing of now, which *pack* makes in a thread. Beyond MOST_BYTES, forget the oldest ones."""
        try:
            await self._threads.run(self._write, self._place(directory), time.time(), pack)
        except sqlite3.Error as error:
            log.warning("/%s: cannot write the record of its listing: %s", directory, error)

    def _place(self, directory: str) -> str:
        """The name of a directory in the index: a hash. The record of a link has the mount's key of its file."""
        store = located(self._store, directory)[0]
        return hashlib.sha256(f"{store}\0{directory}".encode(errors="surrogateescape")).hexdigest()[:32]

    def _read(self, place: str) -> tuple[bytes, float] | None:
        with self._index.transaction() as connection:
            rows = connection.execute("SELECT names, listed FROM listings WHERE place = ?", (place,)).fetchall()
        return (bytes(rows[0][0]), float(rows[0][1])) if rows else None

    def _write(self, place: str, listed: float, pack: Callable[[], bytes]) -> None:
        names = pack()
        with self._index.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO listings VALUES (?, ?, ?)", (place, names, listed))
            # What this record replaces, if any, is not subtracted: the next count finds it.
            self._bytes = _total(connection) if self._bytes is None else self._bytes + len(names)
            if self._bytes > MOST_BYTES:
                connection.execute(_FORGET, (MOST_BYTES * (1 - FORGOTTEN),))
                self._bytes = _total(connection)


def _total(connection: sqlite3.Connection) -> int:
    ((total,),) = connection.execute("SELECT coalesce(sum(length(names)), 0) FROM listings")
    return int(total)
