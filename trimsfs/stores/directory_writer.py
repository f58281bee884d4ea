"""Writes files of a directory store: see `trimsfs.stores.writer`."""

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import BucketNotFoundError, ObjectChangedError, StoreAccessError, StoreUnavailableError
from trimsfs.mountinfo import mount_of
from trimsfs.stores.local_directory import etag_of, no_directory
from trimsfs.stores.writer import Stored, Upload, part_size

T = TypeVar("T")

SMALL = 16 << 20
"""Bytes of the largest file that is read whole."""
_NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
_PIECE = 1 << 20
MOST_ATTEMPTS = 5
"""How often a directory is made that other writers remove as it is empty."""


class DirectoryWriter:
    """Writes files below a directory. A file is written and synced under another name in *scratch*, then linked.

    *scratch* is a key below the directory. A file there is locked while its writer lives.
    """

    def __init__(self, root: Path, *, scratch: str, max_requests: int) -> None:
        self._root = root
        self._scratch = root / scratch
        self._limiter = trio.CapacityLimiter(max_requests)
        self._discarded = False
        """Whether this writer has removed what dead ones left."""
        self._unfinished: dict[Path, int] = {}
        """The descriptors of uploads that are not complete."""

    @property
    def location(self) -> str:
        return str(self._root)

    async def find(self, key: str) -> Stored | None:
        return await self.ask(partial(self._find, key))

    async def read(self, key: str) -> tuple[bytes, str] | None:
        return await self.ask(partial(self._read, key))

    async def list(self, prefix: str) -> AsyncIterator[Stored]:
        for stored in await self.ask(lambda: [*self._list(prefix)]):
            yield stored

    async def directories(self, prefix: str) -> AsyncIterator[str]:
        for name in await self.ask(lambda: [*self._directories(prefix)]):
            yield name

    async def age(self, key: str) -> timedelta | None:
        return await self.ask(partial(self._age, key))

    async def put_if_absent(self, key: str, data: bytes, *, sha256: str | None = None) -> None:
        def put() -> None:
            with self._written(data) as new:
                self._link(new, key)

        await self.ask(put)

    async def put_if_match(self, key: str, data: bytes, etag: str) -> None:
        def put() -> None:
            with self._written(data) as new, self._locked():
                current = self._read(key)
                if current is None or current[1] != etag:
                    raise ObjectChangedError(f"{key}: it was {'replaced' if current else 'deleted'}")
                os.replace(new, self._root / key)
                _sync((self._root / key).parent)

        await self.ask(put)

    async def upload(self, key: str, size: int, sha256: str) -> Upload:
        new, descriptor = await self.ask(self._new_file)
        self._unfinished[new] = descriptor
        return DirectoryUpload(self, key, size, new, descriptor)

    async def complete(self, new: Path, key: str) -> None:
        """Complete the upload that has written a new file."""
        await self.ask(partial(_finish, self._unfinished[new]))
        await self.ask(partial(self._link, new, key))
        os.close(self._unfinished.pop(new))

    async def delete(self, keys: Sequence[str]) -> None:
        await self.ask(partial(self._delete, keys))

    async def discard_uploads(self, prefix: str) -> None:
        """Remove the files in the scratch directory whose writers are dead, of whatever keys they were to be."""
        await self.ask(self._discard)

    async def aclose(self) -> None:
        """Remove the files of uploads that are not complete."""
        while self._unfinished:
            new, descriptor = self._unfinished.popitem()
            os.close(descriptor)
            new.unlink(missing_ok=True)

    async def ask(self, function: Callable[[], T]) -> T:
        """Call *function* in a thread. Raises StoreError for the operating system's errors."""
        try:
            return await in_thread(function, limiter=self._limiter)
        except PermissionError as error:
            raise StoreAccessError(f"{error.filename or self._root}: {error.strerror}: change its mode") from error
        except OSError as error:
            message = f"{error.filename or self._root}: {error.strerror}"
            if error.errno == errno.EROFS:
                raise StoreAccessError(f"{message}: {self._writable()}") from error
            remedy = ": free some space there" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
            raise StoreUnavailableError(message + remedy) from error

    def _writable(self) -> str:
        """What to write to instead of a directory that is mounted read-only."""
        mounted = mount_of(self._root.resolve())
        if mounted is None:
            return "mount it for writing (`mount -o remount,rw`), or name another store"
        return f"{mounted.mountpoint} is a mount of trimsfs, which never takes writes: name its store, {mounted.source}"

    def _new_file(self) -> tuple[Path, int]:
        """A new file in the scratch directory, and its locked descriptor."""
        if not self._root.is_dir():
            if os.path.lexists(self._root):
                raise no_directory(self._root)
            raise BucketNotFoundError(f"store directory {self._root} does not exist: make it first")
        _make_directories(self._scratch)
        if not self._discarded:
            self._discard()
            self._discarded = True
        new = self._scratch / uuid.uuid4().hex
        descriptor = os.open(new, _NEW, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return new, descriptor
        os.close(descriptor)  # somebody took it for one that a dead writer has left
        return self._new_file()

    def _link(self, new: Path, key: str) -> None:
        """Give a written file its name. Raises ObjectChangedError when there is a file of that name."""
        target = self._root / key
        for attempt in range(1, MOST_ATTEMPTS + 1):
            _make_directories(target.parent)
            try:
                os.link(new, target)
                break
            except FileExistsError:
                raise ObjectChangedError(f"{key}: it is there already") from None
            except FileNotFoundError:  # another writer has removed the directory, which was empty
                if attempt == MOST_ATTEMPTS:
                    raise
        new.unlink()
        _sync(target.parent)

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A new file with content that is on stable storage."""
        new, descriptor = self._new_file()
        try:
            _write(descriptor, data, 0)
            _finish(descriptor)
            yield new
        finally:
            os.close(descriptor)
            new.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The turn of a writer that replaces a file."""
        descriptor = os.open(self._scratch.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _find(self, key: str) -> Stored | None:
        try:
            with (self._root / key).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                status = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stored(key=key, size=status.st_size, etag=etag_of(status), sha256=sha256)

    def _read(self, key: str) -> tuple[bytes, str] | None:
        try:
            with (self._root / key).open("rb") as file:
                data = file.read(SMALL + 1)
                status = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(data) > SMALL:
            raise StoreUnavailableError(f"{key}: larger than {SMALL >> 20} MiB: it is not an object of trimsfs")
        return data, etag_of(status)

    def _age(self, key: str) -> timedelta | None:
        try:
            written = (self._root / key).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        new, descriptor = self._new_file()
        try:
            return timedelta(seconds=os.fstat(descriptor).st_mtime - written)
        finally:
            os.close(descriptor)
            new.unlink(missing_ok=True)

    def _list(self, prefix: str) -> Iterator[Stored]:
        for directory, _, names in os.walk(self._root / prefix):
            if Path(directory) == self._scratch:
                continue
            for name in names:
                with suppress(FileNotFoundError):
                    file = Path(directory, name)
                    status = file.stat()
                    yield Stored(key=str(file.relative_to(self._root)), size=status.st_size, etag=etag_of(status))

    def _directories(self, prefix: str) -> Iterator[str]:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._root / prefix) as entries:
            yield from (entry.name for entry in entries if entry.is_dir())

    def _delete(self, keys: Sequence[str]) -> None:
        directories = set()
        for key in keys:
            (self._root / key).unlink(missing_ok=True)
            directories |= {self._root / parent for parent in Path(key).parents if parent != Path()}
        for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it has other files
                directory.rmdir()
        for directory in {self._root, *directories}:
            with suppress(FileNotFoundError):
                _sync(directory)

    def _discard(self) -> None:
        with suppress(FileNotFoundError):
            for file in self._scratch.iterdir():
                with suppress(FileNotFoundError, BlockingIOError), file.open("rb") as opened:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.unlink()


class DirectoryUpload:
    """A file in the scratch directory that parts are written to. It does not outlive its writer."""

    def __init__(self, writer: DirectoryWriter, key: str, size: int, new: Path, descriptor: int) -> None:
        self.part_size = part_size(size)
        self._writer = writer
        self._key = key
        self._new = new
        self._descriptor = descriptor

    async def put_part(self, number: int, data: bytes) -> bool:
        await self._writer.ask(partial(_write, self._descriptor, data, number * self.part_size))
        return True

    async def complete(self) -> None:
        await self._writer.complete(self._new, self._key)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of the data."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _finish(descriptor: int) -> None:
    """Put what was written on stable storage, and let nobody write to the file any more."""
    os.fchmod(descriptor, os.fstat(descriptor).st_mode & 0o555)
    os.fsync(descriptor)


def _make_directories(directory: Path) -> None:
    """Make a directory and those above it that are missing, so that a crash of the host loses none of them."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        _sync(one.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
