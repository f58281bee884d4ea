"""The files of blobs, and what the index has of them: found again, made, removed."""

import logging
import sqlite3
from pathlib import Path

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index import BlobIndex
from trimsfs.tiers.leftovers import give_back
from trimsfs.types import Generation

log = logging.getLogger(__name__)


class BlobFiles:
    """The blobs of a store in a directory. All methods but `path` block on the disk."""

    def __init__(self, directory: Path, index: BlobIndex, store: str) -> None:
        self._directory = directory
        self._index = index
        self._store = store
        self.compares = False
        """Whether blobs are compared with what the store says of them."""
        self.usable = True
        """Whether files can be made, and those that are there be used."""

    def load(self, token: str, generation: Generation) -> tuple[Blob, int]:
        """A blob, without a file if none can be made, and the bytes that the index wrongly believed to be in it."""
        blob = Blob(token, generation)
        blob.digest = None if self.compares else ""
        lost = 0
        if generation.size == 0 or not self.usable:
            return blob, lost
        try:
            loaded = self._index.load(token)
            if loaded is None:
                self._index.add(token, self._store, generation)
            path = self.path(token)
            if loaded is None:
                path.unlink(missing_ok=True)  # what an eviction that was cut short has left may still be mapped
            try:
                fitting = blob.attach(path)
            except FileNotFoundError:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                fitting = blob.attach(path)
            if loaded is not None:
                blob.pinned = loaded[0].pinned
                if fitting:
                    blob.recall(loaded[1])
                    blob.digest = loaded[0].digest if self.compares else ""
                    give_back(blob.fileno(), generation.size, loaded[1])
                else:
                    self._index.remove_chunks(token, [record.chunk for record in loaded[1]])
                    lost = loaded[0].bytes
        except (OSError, sqlite3.Error) as error:
            log.error("%s: not cached: %s", generation.key, error)
        return blob, lost

    def remove(self, token: str) -> int:
        """Remove a blob; the bytes that were recorded of it. Raises OSError and sqlite3.Error."""
        try:
            freed = self._index.remove(token)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                raise
            # The index takes room to be told. A record without a file is found to be one.
            self.path(token).unlink(missing_ok=True)
            freed = self._index.remove(token)
        self.path(token).unlink(missing_ok=True)
        return freed

    def path(self, token: str) -> Path:
        """The file of a blob, whether or not it is there."""
        return self._directory / token[:2] / token
