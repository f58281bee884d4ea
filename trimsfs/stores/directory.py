"""A local directory as a store."""

import os
import stat as stat_module
from bisect import bisect_right
from collections.abc import Callable
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
from trimsfs.stores.base import PAGE_LIMIT, Page, absent
from trimsfs.types import Generation

T = TypeVar("T")

MAX_THREADS = 32


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

    async def probe(self) -> None:
        await self._call(self._probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return await self._call(partial(self._list_page, prefix, token, limit))

    async def stat(self, key: str) -> Generation:
        return await self._call(partial(self._stat, key))

    async def read_into(self, generation: Generation, offset: int, buffer: memoryview) -> None:
        await self._call(partial(self._read_into, generation, offset, buffer))

    async def aclose(self) -> None:
        """Nothing is held open between calls."""

    async def _call(self, function: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=True)
        except PermissionError as error:
            raise StoreAccessError(f"{error.filename}: {error.strerror}") from error
        except OSError as error:
            raise TransientStoreError(f"{error.filename}: {error.strerror}") from error

    def _probe(self) -> None:
        if not self._root.is_dir():
            raise BucketNotFoundError(f"store directory {self._root} does not exist: create it")
        os.scandir(self._root).close()

    def _list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        try:
            with os.scandir(self._path(prefix)) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except (OSError, ObjectNotFoundError) as error:
            if not absent(error):
                raise
            self._probe()
            return Page(objects=(), prefixes=(), next_token=None)
        first = bisect_right(entries, token, key=lambda entry: entry.name) if token else 0
        page = entries[first : first + limit]
        objects: list[Generation] = []
        prefixes: list[str] = []
        for entry in page:
            try:
                status = self._stat_entry(prefix, entry)
            except (OSError, ObjectNotFoundError):
                continue  # gone since the listing, or a link that leads nowhere or outside
            if stat_module.S_ISDIR(status.st_mode):
                prefixes.append(f"{prefix}{entry.name}/")
            elif stat_module.S_ISREG(status.st_mode):
                objects.append(_generation(prefix + entry.name, status))
        return Page(
            objects=tuple(objects),
            prefixes=tuple(prefixes),
            next_token=page[-1].name if first + limit < len(entries) else None,
            empty=not objects and not prefixes,
        )

    def _stat_entry(self, prefix: str, entry: "os.DirEntry[str]") -> os.stat_result:
        if not entry.is_symlink():
            return entry.stat(follow_symlinks=False)
        target = self._path(prefix + entry.name)
        parts = prefix.split("/")
        if target in {self._path("/".join(parts[:depth])) for depth in range(len(parts))}:
            raise ObjectNotFoundError(f"{prefix}{entry.name}: leads back to {target}")
        return os.stat(target)

    def _stat(self, key: str) -> Generation:
        try:
            status = os.stat(self._path(key))
        except OSError as error:
            if not absent(error):
                raise
            raise ObjectNotFoundError(f"{key}: no such file in {self._root}") from None
        if not stat_module.S_ISREG(status.st_mode):
            raise ObjectNotFoundError(f"{key}: not a regular file in {self._root}")
        return _generation(key, status)

    def _read_into(self, generation: Generation, offset: int, buffer: memoryview) -> None:
        try:
            descriptor = os.open(self._path(generation.key), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if not absent(error):
                raise
            raise ObjectNotFoundError(f"{generation.key}: removed from {self._root}") from None
        try:
            done = 0
            while done < len(buffer) and stat_module.S_ISREG(os.fstat(descriptor).st_mode):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
            # A writer changes the times of the file with its bytes, so looking afterwards is enough.
            now = _generation(generation.key, os.fstat(descriptor))
        finally:
            os.close(descriptor)
        if now != generation or done < len(buffer):
            raise ObjectChangedError(f"{generation.key}: the file in {self._root} has changed")

    def _path(self, key: str) -> str:
        """The file of a key. Raises ObjectNotFoundError when a link leads out of the directory."""
        path = os.path.realpath(self._root / key)
        if path != str(self._root) and not path.startswith(os.path.join(self._root, "")):
            raise ObjectNotFoundError(f"{key}: outside {self._root}")
        return path


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
        modified_ns=status.st_mtime_ns,
    )
