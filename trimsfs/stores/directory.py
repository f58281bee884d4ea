"""A local directory as a store."""

import os
import stat as stat_module
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    TransientStoreError,
)
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, absent, moment
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation

T = TypeVar("T")

MAX_THREADS = 32
PIECE = 1 << 18
"""Bytes read at a time."""


class DirectoryStore:
    """The files below a directory. A file's ETag is made of its inode, size and times.

    Symbolic links are followed while they stay inside the directory and lead to no directory above themselves;
    others do not exist. Special files do not exist.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._limiter = trio.CapacityLimiter(MAX_THREADS)

    @property
    def identity(self) -> str:
        return f"file://{self._root}"

    @property
    def streaming(self) -> bool:
        return False  # only afterwards is it known that the file has not changed

    @property
    def forkable(self) -> bool:
        return True

    async def probe(self) -> None:
        await self._call(self._probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return await self._call(partial(self._list_page, prefix, token, limit))

    async def stat(self, key: str) -> Generation:
        return await self._call(partial(self._stat, key))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        await self._call(partial(self._read, generation, offset, length, sink))

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return None

    async def aclose(self) -> None:
        """Nothing is held open between calls."""

    async def _call(self, function: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=True)
        except PermissionError as error:
            remedy = f"let uid {os.geteuid()} read it, or set --server-user" if os.geteuid() else "change its mode"
            raise StoreAccessError(f"{self._named(error)}: {error.strerror}: {remedy}") from error
        except OSError as error:
            raise TransientStoreError(f"{self._named(error)}: {error.strerror}") from error

    def _named(self, error: OSError) -> object:
        """The file that an error is about; errors of calls on descriptors name none."""
        return self._root if isinstance(error.filename, int | None) else error.filename

    def _probe(self) -> None:
        if not self._root.is_dir():
            known = "is not a directory" if self._root.exists() else "does not exist: create it"
            raise BucketNotFoundError(f"store directory {self._root} {known}")
        os.scandir(self._root).close()

    def _list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        try:
            with self._opened(prefix, os.O_RDONLY | os.O_DIRECTORY) as descriptor, os.scandir(descriptor) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
                first = bisect_right(entries, token, key=lambda entry: entry.name) if token else 0
                page = entries[first : first + limit]
                found = [(entry.name, self._stat_entry(prefix, entry)) for entry in page]
        except (OSError, ObjectNotFoundError) as error:
            if not absent(error):
                raise
            self._probe()
            return Page(objects=(), prefixes=(), next_token=None)
        modes = [(name, status, stat_module.S_IFMT(status.st_mode)) for name, status in found if status is not None]
        objects = [_generation(prefix + name, status) for name, status, mode in modes if mode == stat_module.S_IFREG]
        prefixes = [f"{prefix}{name}/" for name, _, mode in modes if mode == stat_module.S_IFDIR]
        return Page(
            objects=tuple(objects),
            prefixes=tuple(prefixes),
            next_token=page[-1].name if first + limit < len(entries) else None,
            empty=not objects and not prefixes,
        )

    def _stat_entry(self, prefix: str, entry: "os.DirEntry[str]") -> os.stat_result | None:
        """The status of an entry; None for one that is gone, or a link that leads nowhere, outside or round."""
        try:
            if not entry.is_symlink():
                return entry.stat(follow_symlinks=False)
            target = self._path(prefix + entry.name)
            parts = prefix.split("/")
            if target in {self._path("/".join(parts[:depth])) for depth in range(len(parts))}:
                return None
            with self._opened(prefix + entry.name, os.O_PATH) as descriptor:
                return os.fstat(descriptor)
        except (OSError, ObjectNotFoundError) as error:
            if absent(error) or (isinstance(error, PermissionError) and entry.is_symlink()):
                return None
            raise

    def _stat(self, key: str) -> Generation:
        try:
            with self._opened(key, os.O_PATH) as descriptor:
                status = os.fstat(descriptor)
        except OSError as error:
            if not absent(error):
                raise
            self._probe()
            raise ObjectNotFoundError(f"{key}: no such file in {self._root}") from None
        if not stat_module.S_ISREG(status.st_mode):
            raise ObjectNotFoundError(f"{key}: not a regular file in {self._root}")
        return _generation(key, status)

    def _read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        buffer = memoryview(bytearray(min(PIECE, length)))
        done = 0
        try:
            with self._opened(generation.key, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                while done < length and stat_module.S_ISREG(os.fstat(descriptor).st_mode):
                    count = os.preadv(descriptor, [buffer[: length - done]], offset + done)
                    if count == 0:
                        break
                    sink(buffer[:count])
                    done += count
                # A writer changes the times of the file with its bytes, so looking afterwards is enough.
                now = _generation(generation.key, os.fstat(descriptor))
        except OSError as error:
            if not absent(error):
                raise
            self._probe()
            raise ObjectNotFoundError(f"{generation.key}: removed from {self._root}") from None
        if now != generation or done < length:
            raise ObjectChangedError(f"{generation.key}: the file in {self._root} has changed")

    @contextmanager
    def _opened(self, key: str, flags: int) -> Iterator[int]:
        """A descriptor of a key's file, which is inside the directory even if links are changed meanwhile."""
        descriptor = os.open(self._path(key), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._check_inside(os.readlink(f"/proc/self/fd/{descriptor}"), key)
            yield descriptor
        finally:
            os.close(descriptor)

    def _path(self, key: str) -> str:
        """The file of a key. Raises ObjectNotFoundError when a link leads out of the directory."""
        path = os.path.realpath(self._root / key)
        self._check_inside(path, key)
        return path

    def _check_inside(self, path: str, key: str) -> None:
        if path != str(self._root) and not path.startswith(os.path.join(self._root, "")):
            raise ObjectNotFoundError(f"{key}: outside {self._root}")


def _generation(key: str, status: os.stat_result) -> Generation:
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return Generation(
        key=key,
        etag="-".join(f"{number:x}" for number in identity),
        size=status.st_size,
        modified_ns=moment(status.st_mtime_ns),
    )
