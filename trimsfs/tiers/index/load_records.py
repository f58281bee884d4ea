"""Load records in the index: what the last load of each directory read. Only prefetching uses them."""

import hashlib
import logging
import sqlite3
import time

from trimsfs.origins import Origins, located
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_LOADS = 1024
"""Most directories with a record."""
_FORGET = "DELETE FROM loads WHERE place IN (SELECT place FROM loads ORDER BY recorded DESC LIMIT -1 OFFSET ?)"


class LoadRecords:
    """The records of the directories of a *store*. Each may be lost."""

    def __init__(self, index: BlobIndex, threads: Threads, store: str | Origins) -> None:
        self._index = index
        self._threads = threads
        self._store = store

    async def last(self, directory: str) -> str | None:
        """The record of a directory's last load; None without a readable one."""
        try:
            return await self._threads.run(self._read, self._place(directory))
        except sqlite3.Error as error:
            log.warning("/%s: cannot read the record of its last load: %s", directory, error)
            return None

    async def record(self, directory: str, files: str) -> None:
        """Record what a load of a directory read. Beyond MOST_LOADS directories, forget those loaded longest ago."""
        try:
            await self._threads.run(self._write, self._place(directory), files)
        except sqlite3.Error as error:
            log.warning("/%s: cannot write the record of its last load: %s", directory, error)

    def _place(self, directory: str) -> str:
        """The name of a directory in the index: a hash."""
        return hashlib.sha256("\0".join(located(self._store, directory)).encode(errors="surrogateescape")).hexdigest()[
            :32
        ]

    def _read(self, place: str) -> str | None:
        with self._index.transaction() as connection:
            rows = connection.execute("SELECT files FROM loads WHERE place = ?", (place,)).fetchall()
        return str(rows[0][0]) if rows else None

    def _write(self, place: str, files: str) -> None:
        with self._index.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (place, files, time.time()))
            connection.execute(_FORGET, (MOST_LOADS,))
