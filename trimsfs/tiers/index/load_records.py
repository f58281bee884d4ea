"""Records of loads: what the last load of each directory read, kept in the index. Only prefetching goes by them."""

import hashlib
import logging
import sqlite3
import time

from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_LOADS = 1024
"""Directories of which the last load is recorded."""
_FORGET = "DELETE FROM loads WHERE place IN (SELECT place FROM loads ORDER BY recorded DESC LIMIT -1 OFFSET ?)"


class LoadRecords:
    """The records of the directories of a *store*. Nobody waits for them, and each may be lost."""

    def __init__(self, index: BlobIndex, threads: Threads, store: str) -> None:
        self._index = index
        self._threads = threads
        self._store = store

    async def last(self, directory: str) -> str | None:
        """What was recorded of the last load of a directory, if it can be read."""
        try:
            return await self._threads.run(self._read, self._place(directory))
        except sqlite3.Error as error:
            log.warning("/%s: cannot read what its last load read: %s", directory, error)
            return None

    async def record(self, directory: str, files: str) -> None:
        """Record what a load of a directory read; of too many directories those loaded longest ago are forgotten."""
        try:
            await self._threads.run(self._write, self._place(directory), files)
        except sqlite3.Error as error:
            log.warning("/%s: cannot record what was read of it: %s", directory, error)

    def _place(self, directory: str) -> str:
        """What the index knows a directory by."""
        return hashlib.sha256(f"{self._store}\0{directory}".encode(errors="surrogateescape")).hexdigest()[:32]

    def _read(self, place: str) -> str | None:
        with self._index.transaction() as connection:
            rows = connection.execute("SELECT files FROM loads WHERE place = ?", (place,)).fetchall()
        return str(rows[0][0]) if rows else None

    def _write(self, place: str, files: str) -> None:
        with self._index.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (place, files, time.time()))
            connection.execute(_FORGET, (MOST_LOADS,))
