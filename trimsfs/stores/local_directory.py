"""A local directory as a store."""

import ctypes
import errno
import os
import stat as stat_module
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    TransientStoreError,
)
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, absent, moment
from trimsfs.stores.digests import Digest
from trimsfs.stores.stall_guard import STALL_S, StallGuard
from trimsfs.types import Generation

T = TypeVar("T")

MAX_THREADS = 32
PIECE = 1 << 18
"""Bytes read at a time."""
MOST_NAMES = 10_000
"""Names in a page."""
SLOWEST_STAT_S = 0.1
"""How long a look at one name of a page may take: a network file system may be far away."""
_getdents64 = ctypes.CDLL(None, use_errno=True).getdents64
_DIRENT, _DIRENT_NAME = struct.Struct("=8xqH"), 19
"""A ``struct linux_dirent64``: the place after it and its length; where the name begins, after a byte for its type."""
_DIRENTS = 1 << 15
"""Bytes of them that are read at a time."""


class DirectoryReader(Protocol):
    """Looks at the files of a directory store. Blocks on the disk; raises OSError, and StoreError as a `Store` does."""

    def probe(self) -> None:
        """As `Store.probe`."""

    def list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        """As `Store.list_page`."""

    def stat(self, key: str) -> Generation:
        """As `Store.stat`."""

    def open(self, key: str) -> int:
        """A descriptor of a file, for reading."""


def no_directory(root: Path) -> BucketNotFoundError:
    """The error of a store directory that is a file, or lies below one."""
    remedy = f": name the one that it lies in, {root.parent}" if root.exists() else ""
    return BucketNotFoundError(f"store directory {root} is not a directory{remedy}")


class LocalReader:
    """The `DirectoryReader` that reads as this process may; with *share_links*, links to a file have one content."""

    def __init__(self, root: Path, *, share_links: bool) -> None:
        self.root = Path(os.path.realpath(root))
        _refuse_snapshot(self.root)
        self._share_links = share_links

    def probe(self) -> None:
        try:
            with self._opened("", os.O_RDONLY | os.O_DIRECTORY) as (descriptor, _):
                os.scandir(descriptor).close()
                os.stat(".", dir_fd=descriptor)  # which takes the right to enter it
        except FileNotFoundError:
            raise BucketNotFoundError(f"store directory {self.root} does not exist: is it mounted?") from None
        except NotADirectoryError:
            raise no_directory(self.root) from None

    def list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        objects, prefixes, unreadable = list[Generation](), list[str](), list[str]()
        try:
            with self._opened(prefix, os.O_RDONLY | os.O_DIRECTORY) as (descriptor, directory):
                page = list(islice(_names(descriptor, int(token or 0)), limit + 1))
                more = len(page) > limit
                entries = [
                    (prefix + name, self._stat_entry(descriptor, directory, prefix, name))
                    for name, _ in sorted(page[:limit])
                ]
        except OSError as error:
            if not absent(error):
                raise
            self.probe()
            return Page(objects=(), prefixes=(), next_token=None)
        for key, known in entries:
            if isinstance(known, PermissionError):
                unreadable.append(key)
            elif known is not None and stat_module.S_ISREG(known[1].st_mode):
                objects.append(self._generation(key, *known))
            elif known is not None and stat_module.S_ISDIR(known[1].st_mode):
                prefixes.append(f"{key}/")
        return Page(
            objects=tuple(objects),
            prefixes=tuple(prefixes),
            next_token=str(page[-2][1]) if more else None,
            empty=not objects and not prefixes,
            unreadable=tuple(unreadable),
        )

    def _stat_entry(
        self, descriptor: int, directory: str, prefix: str, name: str
    ) -> tuple[str, os.stat_result] | PermissionError | None:
        """The key and the status of the file that a name in a directory leads to. None if the name is gone, or is a
        link that leads nowhere, out of the store, or back to a directory above. The error if the file may not be
        read."""
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not stat_module.S_ISLNK(status.st_mode):
                return os.path.join(directory, name), status
            with self._opened(prefix + name, os.O_PATH) as (followed, file):
                status = os.fstat(followed)
            round_ = stat_module.S_ISDIR(status.st_mode) and file in self._above(prefix)
        except PermissionError as error:
            return error
        except OSError as error:
            if absent(error):
                return None
            raise
        return None if round_ else (file, status)

    def _above(self, prefix: str) -> Iterator[str]:
        """The keys of the directories that a prefix leads through, and of its own."""
        parts = prefix.split("/")
        for depth in range(len(parts)):
            with self._opened("/".join(parts[:depth]), os.O_PATH) as (_, directory):
                yield directory

    def stat(self, key: str) -> Generation:
        try:
            with self._opened(key, os.O_PATH) as (descriptor, file):
                status = os.fstat(descriptor)
        except OSError as error:
            if not absent(error):
                raise
            self.probe()
            raise ObjectNotFoundError(f"{key}: no such file in {self.root}") from None
        if not stat_module.S_ISREG(status.st_mode):
            raise ObjectNotFoundError(f"{key}: not a regular file in {self.root}")
        return self._generation(key, file, status)

    def open(self, key: str) -> int:
        try:
            with self._opened(key, os.O_PATH) as (descriptor, _):
                if not stat_module.S_ISREG(os.fstat(descriptor).st_mode):
                    raise ObjectNotFoundError(f"{key}: not a regular file in {self.root}")
                try:  # to open a device can have effects, so what it is was asked first
                    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.root / key)) from None
        except OSError as error:
            if not absent(error):
                raise
            self.probe()
            raise ObjectNotFoundError(f"{key}: removed from {self.root}") from None

    def _generation(self, key: str, file: str, status: os.stat_result) -> Generation:
        return Generation(
            key=key,
            etag=etag_of(status),
            size=status.st_size,
            modified_ns=moment(status.st_mtime_ns),
            linked=file if self._share_links and file != key else None,
        )

    @contextmanager
    def _opened(self, key: str, flags: int) -> Iterator[tuple[int, str]]:
        """A descriptor of a key's file, and the key of that file: another one for a link. The file is inside the
        directory even if links change meanwhile."""
        descriptor = os.open(self._path(key), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield descriptor, self._key(os.readlink(f"/proc/self/fd/{descriptor}"))
        finally:
            os.close(descriptor)

    def _path(self, key: str) -> str:
        """The file of a key."""
        path = str(self.root / key)
        try:
            path = os.path.realpath(path, strict=True)
        except PermissionError:
            self._key(os.path.realpath(path))
            raise
        self._key(path)
        return path

    def _key(self, path: str) -> str:
        """The key of a file. Raises FileNotFoundError for one outside of the directory: it is none of the store's."""
        above = os.path.join(self.root, "")
        if path != str(self.root) and not path.startswith(above):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return path[len(above) :]


def _refuse_snapshot(root: Path) -> None:
    """Raises ConfigurationError for a snapshot of a Hugging Face cache: its files are links to blobs outside of it."""
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not (repository / "blobs").is_dir():
        return
    blobs = os.path.join(repository, "blobs", "")
    with suppress(OSError), os.scandir(root) as entries:
        if any(os.path.realpath(entry).startswith(blobs) for entry in entries if entry.is_symlink()):
            raise ConfigurationError(f"store {root}: its links lead out of it, to {blobs}: mount {repository}")


def _names(descriptor: int, start: int) -> Iterator[tuple[str, int]]:
    """The names in a directory from a place on, each with the place after it, from which the file system goes on.

    What is there all the time comes once, whatever else comes and goes.
    """
    os.lseek(descriptor, start, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(_DIRENTS)
    while count := _getdents64(descriptor, buffer, _DIRENTS):
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        data, place = buffer.raw[:count], 0
        while place < count:
            following, length = _DIRENT.unpack_from(data, place)
            name = data[place + _DIRENT_NAME : place + length].partition(b"\0")[0]
            if name not in {b".", b".."}:
                yield os.fsdecode(name), following
            place += length


def etag_of(status: os.stat_result) -> str:
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{number:x}" for number in identity)


class DirectoryStore:
    """The files below a directory. A file's ETag is made of its inode, size and times.

    Symbolic links are followed while they stay inside the directory and lead to no directory above themselves;
    others do not exist. Special files do not exist. With *share_links*, all links to a file have its content.

    ``broker`` reads what this process may not, if there is one.
    """

    streaming = False  # only afterwards is it known that the file has not changed
    forkable = True
    links = True

    def __init__(self, root: Path, *, share_links: bool = True) -> None:
        self.local = LocalReader(root, share_links=share_links)
        self.broker: DirectoryReader | None = None
        self._root = self.local.root
        self._limiter = trio.CapacityLimiter(MAX_THREADS)

    @property
    def identity(self) -> str:
        return f"file://{self._root}"

    async def probe(self) -> None:
        await self._call(partial(self._ask, lambda reader: reader.probe()))

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        limit = min(limit, MOST_NAMES)
        guard = StallGuard(STALL_S + limit * SLOWEST_STAT_S)
        return await self._call(partial(self._list_page, prefix, token, limit), guard)

    async def stat(self, key: str) -> Generation:
        return await self._call(partial(self._ask, lambda reader: reader.stat(key)))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        guard = StallGuard()
        await self._call(partial(self._read, generation, offset, length, guard.watching(sink)), guard)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return None

    async def aclose(self) -> None:
        """Nothing is held open between calls."""

    async def _call(self, function: Callable[[], T], guard: StallGuard | None = None) -> T:
        try:
            return await (guard or StallGuard()).call(function, self._limiter, self._root)
        except PermissionError as error:
            raise StoreAccessError(f"{self._named(error)}: {error.strerror}: {self._remedy()}") from error
        except OSError as error:
            raise TransientStoreError(f"{self._root}: {error.strerror}") from error

    def _named(self, error: OSError) -> object:
        """The file that an error is about; errors of calls on descriptors name none."""
        if not isinstance(error.filename, str) or not os.path.isabs(error.filename):
            return self._root
        return error.filename if Path(error.filename).is_relative_to(self._root) else f"{self._root}: {error.filename}"

    def _remedy(self) -> str:
        if os.geteuid() == 0:
            return "change its mode"
        other = "mount as root" if self.broker is None else "set --server-user root"
        return f"let uid {os.geteuid()} read it, or {other}"

    def _ask(self, question: Callable[[DirectoryReader], T]) -> T:
        """What this process may read, else what the broker may."""
        try:
            return question(self.local)
        except PermissionError:
            if self.broker is None:
                raise
        return question(self.broker)

    def _list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        page = self._ask(lambda reader: reader.list_page(prefix, token, limit))
        if page.unreadable and self.broker is not None:
            return self.broker.list_page(prefix, token, limit)
        return page

    def _read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        descriptor = self._ask(lambda reader: reader.open(generation.file))
        buffer = memoryview(bytearray(min(PIECE, length)))
        done = 0
        try:
            while done < length:
                count = os.preadv(descriptor, [buffer[: length - done]], offset + done)
                if count == 0:
                    break
                sink(buffer[:count])
                done += count
            # A writer changes the times of the file with its bytes, so looking afterwards is enough.
            now = etag_of(os.fstat(descriptor))
        finally:
            os.close(descriptor)
        if now != generation.etag or done < length:
            raise ObjectChangedError(f"{generation.key}: the file in {self._root} has changed")
