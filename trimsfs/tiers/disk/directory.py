"""A cache directory: locked, its index opened, and whether it can be used at all."""

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from trimsfs.errors import CacheError, CacheUnusableError
from trimsfs.tiers.disk.lock import lock_directory, locks, sign
from trimsfs.tiers.index.index import BlobIndex

log = logging.getLogger(__name__)


class CacheDirectory:
    """The directory of a disk tier. Raises CacheInUseError and CacheUnusableError.

    With *lock*, the descriptor by which an earlier server locked it, a directory that cannot be used by now is no
    error: ``problem`` tells why, and the ``index`` is one in memory.
    """

    def __init__(self, directory: Path, lock: int | None) -> None:
        self.blobs = directory / "blobs"
        self.problem: str | None = None
        self.path = directory
        self._locks = [] if lock is None else [lock]
        try:
            if lock is not None:
                sign(lock)
            if lock is None or not locks(lock, directory):  # somebody has removed the directory, and another was made
                self._locks.append(lock_directory(directory))
            self.index = self._open_index(trusted=lock is not None)
        except CacheError as error:
            if lock is None:
                self._unlock()
                raise
            log.error("%s: nothing is kept until that is over", error)
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
            raise CacheUnusableError(f"cache directory {self.path}: {error.strerror}") from error
        return BlobIndex(self.path / "index.sqlite", trusted=trusted)

    @property
    def lock(self) -> int:
        """The descriptor by which the directory is locked."""
        return self._locks[0]

    def close(self) -> None:
        """Give the directory up."""
        self.index.close()
        self._unlock()

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)

    def gone(self) -> bool:
        """Whether somebody has removed the directory, or the blobs in it. Blocks on the disk."""
        try:
            self.blobs.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # the disk fails
        return _identity(self.path) != self._identity

    def usable(self) -> bool:
        """Whether the directory can be used, now that it could not. Blocks on the disk.

        One that is another than it was is for another server to try: this one may not be allowed to write there.
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
    """What tells a directory from another one at its place; None when there is none that can be looked at."""
    with suppress(OSError):
        status = os.stat(directory)
        return status.st_dev, status.st_ino
    return None
