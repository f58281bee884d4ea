"""Blob files and their records in the index: loads, makes and removes them."""

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from trimsfs.concurrency.descriptors import patiently_in_thread
from trimsfs.origins import Origins
from trimsfs.tiers.blob import Blob, OpenFiles
from trimsfs.tiers.disk.crash_recovery import free_unrecorded
from trimsfs.tiers.index.index import BlobIndex, Known
from trimsfs.tiers.leases import has_other_openers
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

Loaded = tuple[Blob, Sequence[ChunkRecord], bool]
"""A blob, its lost chunks, and whether it has no file because the disk is full."""
FREED_TRIES, FREED_INTERVAL_S = 20, 0.05
"""Number and length of the waits for the kernel to free the blocks of a removed file."""


def is_full(error: OSError | sqlite3.Error) -> bool:
    """Whether an error means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def _log_failure(generation: Generation, error: OSError | sqlite3.Error) -> bool:
    """Log why a blob has no file; return whether the disk is full."""
    log.error("%s: cannot be cached: %s", generation.key, error)
    return is_full(error)


class BlobFiles:
    """The blob files of a mount's stores in a directory. All methods but `path` block on the disk.

    *usable* says whether the directory can be used, *compares* whether blobs are compared with the store's digests.
    ``open_files`` are the blobs whose files are open.
    """

    def __init__(
        self, directory: Path, index: BlobIndex, store: str | Origins, *, usable: bool, compares: bool, chunk_size: int
    ) -> None:
        self._directory = directory
        self._index = index
        self._store = store
        self._usable = usable
        self._compares = compares
        self._chunk_size = chunk_size
        self.open_files = OpenFiles()

    @property
    def no_digest(self) -> str | None:
        """The digest of an uncompared blob: None if this server compares blobs, else empty."""
        return None if self._compares else ""

    def load(self, token: str, generation: Generation, *, attach: bool = True) -> Loaded:
        """Load a blob and open its file; without a file if none can be made, or unless *attach*.

        Lost chunks are in the index, but not in the file.
        """
        if not attach or not self._can_have_file(generation):
            return self._blob(token, generation), [], False
        try:
            known = self._index.load(token)
            if known is None:
                self._index.add(token, self._store, generation)
        except sqlite3.Error as error:
            return self._blob(token, generation), [], _log_failure(generation, error)
        return self._attached(token, generation, known)

    def load_all(self, wanted: Mapping[str, Generation]) -> list[Loaded]:
        """Load many blobs by token, as `load` does. Leaves only new files open."""
        try:
            known = self._index.load_all(wanted)
            new = {token: each for token, each in wanted.items() if token not in known and self._can_have_file(each)}
            self._index.add_all(self._store, new)
        except sqlite3.Error as error:
            log.error("cannot read the cache index: %s", error)
            return [self.load(token, generation) for token, generation in wanted.items()]
        found = list[Loaded]()
        for token, generation in wanted.items():
            if self._can_have_file(generation):
                found.append(self._attached(token, generation, known.get(token), keep_open=False))
            else:
                found.append((self._blob(token, generation), [], False))
        return found

    def _can_have_file(self, generation: Generation) -> bool:
        return self._usable and generation.size > 0

    def _blob(self, token: str, generation: Generation) -> Blob:
        blob = Blob(token, generation, chunk_size=self._chunk_size)
        blob.health.digest = self.no_digest
        return blob

    def _attached(self, token: str, generation: Generation, known: Known | None, *, keep_open: bool = True) -> Loaded:
        """Load a blob, given its index records. Unless *keep_open*, leaves only a new file open."""
        blob, lost = self._blob(token, generation), list[ChunkRecord]()
        attach = partial(blob.attach, self._path(token), new=known is None, keep_open=keep_open)
        if keep_open:  # else it is one of many
            attach = partial(patiently_in_thread, attach)
        try:
            try:
                fitting = attach()
            except FileNotFoundError:
                self.path(token).parent.mkdir(mode=0o700, exist_ok=True)  # no parents: the server never removes them
                fitting = attach()
            if known is not None:
                record, chunks = known
                blob.pinned = record.pinned
                if fitting:
                    blob.recall(chunks)
                    if self._compares and record.bytes == generation.size:
                        blob.health.digest = record.digest
                    if len(chunks) < len(blob.states) and keep_open:  # else a program may have the file mapped
                        free_unrecorded(blob.fileno(), generation.size, self._chunk_size, chunks)
                else:
                    lost = chunks
                if not keep_open:
                    blob.close_file()
        except OSError as error:
            return blob, lost, _log_failure(generation, error) and not blob.attached
        return blob, lost, False

    def mapped(self, token: str) -> bool:
        """Whether a program has the file of a blob open or mapped, which the server has closed."""
        try:
            descriptor = os.open(self._path(token), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return has_other_openers(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, token: str) -> dict[int, int]:
        """Remove a blob; returns the bytes of its recorded chunks by number. Raises OSError and sqlite3.Error."""
        try:
            freed = self._index.remove(token)
        except sqlite3.OperationalError as error:
            if not is_full(error):
                raise
            # A write to the index needs space, so remove the file first. After a crash here, recovery drops its record.
            self.path(token).unlink(missing_ok=True)
            freed = self._remove_once_freed(token)
        self.path(token).unlink(missing_ok=True)
        return freed

    def _remove_once_freed(self, token: str) -> dict[int, int]:
        """Remove a blob from the index once the kernel has freed the blocks of its file."""
        for _ in range(FREED_TRIES):
            time.sleep(FREED_INTERVAL_S)
            with suppress(sqlite3.OperationalError):
                return self._index.remove(token)
        return self._index.remove(token)

    def path(self, token: str) -> Path:
        """The path of a blob's file, which need not exist."""
        return Path(self._path(token))

    def _path(self, token: str) -> str:
        return f"{self._directory}/{token[:2]}/{token}"
