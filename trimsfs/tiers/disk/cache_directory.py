"""A cache directory: locks it, opens its index and checks whether it is usable."""

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from trimsfs.errors import CacheError
from trimsfs.tiers.disk.lock import is_lock_of, lock_directory, unusable, write_pid
from trimsfs.tiers.index.index import BlobIndex

log = logging.getLogger(__name__)


class CacheDirectory:
    """The directory of a disk tier. Raises CacheInUseError and CacheUnusableError.

    *lock* is the descriptor by which an earlier server locked it. With a *lock*, an unusable directory is no error:
    ``problem`` holds the reason, and ``index`` is in memory.
    """

    def __init__(self, directory: Path, lock: int | None, *, chunk_size: int) -> None:
        self.blobs = directory / "blobs"
        self.problem: str | None = None
        self.path = directory
        self._chunk_size = chunk_size
        self._locks = [] if lock is None else [lock]
        try:
            if lock is not None:
                write_pid(lock)
            if lock is None or not is_lock_of(lock, directory):  # the directory was removed and recreated
                self._locks.append(lock_directory(directory))
            self.index = self._open_index(trusted=lock is not None)
        except CacheError as error:
            if lock is None:
                self._unlock()
                raise
            log.error("%s: serving from the store without a cache until it can be used", error)
            self.problem = str(error)
            self.index = BlobIndex(Path(":memory:"))
        except BaseException:
            self._unlock()
            raise
        self._identity = _identity(directory)

    def _open_index(self, *, trusted: bool) -> BlobIndex:
        try:
            self.blobs.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise unusable(self.path, error) from error
        return BlobIndex(self.path / "index.sqlite", chunk_size=self._chunk_size, trusted=trusted)

    @property
    def lock(self) -> int:
        """The descriptor that holds the directory's lock."""
        return self._locks[0]

    def close(self) -> None:
        """Close the index and unlock the directory."""
        self.index.close()
        self._unlock()

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)

    def removed(self) -> bool:
        """Whether another program removed the directory, or the blobs in it. Blocks on the disk."""
        try:
            self.blobs.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # the disk fails
        return _identity(self.path) != self._identity

    def usable(self) -> bool:
        """Whether an unusable directory is usable again. Blocks on the disk.

        A new directory at its path counts as usable without a test: this server may lack the permission to write there.
        """
        found = _identity(self.path)
        if found is None or found != self._identity:
            return found is not None
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"written")
                file.flush()
                os.fdatasync(file.fileno())
            self._open_index(trusted=False).close()
        except (OSError, CacheError):
            return False
        return True


def _identity(directory: Path) -> tuple[int, int] | None:
    """Device and inode number, which distinguish a directory from a new one at its path; None if there is none."""
    with suppress(OSError):
        status = os.stat(directory)
        return status.st_dev, status.st_ino
    return None
