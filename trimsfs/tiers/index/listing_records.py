"""Records of listings, kept in the index: what the store last said of each directory, as `trimsfs.namespace` has it."""

import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable

from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
"""Bytes of all records."""
READERS = 2
"""Reads at a time. One that the disk holds up holds up no other thread of the disk tier."""
_FORGET = (
    "DELETE FROM listings WHERE place IN (SELECT place FROM "
    "(SELECT place, sum(length(names)) OVER (ORDER BY listed DESC, place) AS total FROM listings) WHERE total > ?)"
)


class ListingRecords:
    """The records of the directories of a *store*. Each may be lost."""

    def __init__(self, index: BlobIndex, threads: Threads, store: str) -> None:
        self._index = index
        self._threads = threads
        self._readers = Threads(READERS)
        self._store = store

    async def last(self, directory: str) -> tuple[bytes, float] | None:
        """What was recorded of the last listing of a directory, and when, in seconds since the epoch."""
        try:
            return await self._readers.ask(self._read, self._place(directory))
        except sqlite3.Error as error:
            log.warning("/%s: cannot read what was listed of it: %s", directory, error)
            return None

    async def record(self, directory: str, pack: Callable[[], bytes]) -> None:
        """Record a listing of now, which *pack* makes in a thread; of too many those listed longest ago are
        forgotten."""
        try:
            await self._threads.run(self._write, self._place(directory), time.time(), pack)
        except sqlite3.Error as error:
            log.warning("/%s: cannot record what was listed of it: %s", directory, error)

    def _place(self, directory: str) -> str:
        """What the index knows a directory by."""
        return hashlib.sha256(f"{self._store}\0{directory}".encode(errors="surrogateescape")).hexdigest()[:32]

    def _read(self, place: str) -> tuple[bytes, float] | None:
        with self._index.transaction() as connection:
            rows = connection.execute("SELECT names, listed FROM listings WHERE place = ?", (place,)).fetchall()
        return (bytes(rows[0][0]), float(rows[0][1])) if rows else None

    def _write(self, place: str, listed: float, pack: Callable[[], bytes]) -> None:
        names = pack()
        with self._index.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO listings VALUES (?, ?, ?)", (place, names, listed))
            connection.execute(_FORGET, (MOST_BYTES,))
