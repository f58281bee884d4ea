"""What the kernel does between programs and a server without FUSE: names that it knows, and opens that it repeats."""

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from tests.unit.served import OWNER, Server
from trimsfs.errors import TrimsError
from trimsfs.filesystem import Attributes
from trimsfs.fuse.errnos import errno_of
from trimsfs.handles import BACKING_SHIFT
from trimsfs.namespace import ROOT_INODE

T = TypeVar("T")


@dataclass(slots=True)
class Name:
    """A name that the kernel knows, and how long it believes it."""

    attributes: Attributes
    until: float


@dataclass(slots=True)
class Opened:
    """An open file. ``backing`` is what a mapping of a file that is passed through reads, whatever is closed."""

    number: int
    handle: int
    size: int
    closed: bool = False
    mapped: bool = False
    backing: int | None = None


class Kernel:
    """Goes on while servers come and go. Errors are OSError, as programs meet them."""

    def __init__(self) -> None:
        self.server: Server
        self.files: dict[int, Opened] = {}
        self._names: dict[tuple[int, str], Name] = {}
        self._told: Counter[int] = Counter()
        self._tokens = 0

    async def asked(self, request: Callable[[], Awaitable[T]]) -> T:
        """The answer to a request."""
        try:
            return await request()
        except (TrimsError, IsADirectoryError, InterruptedError) as error:
            number = errno_of(error)
            raise OSError(number, os.strerror(number), str(error)) from error

    async def look_up(self, parent: int, name: str, *, anew: bool = False) -> Attributes:
        """What a name is; asked for again when it is not believed any more, or *anew*."""
        self.invalidate()
        known = self._names.get((parent, name))
        if known is not None and not anew and trio.current_time() < known.until:
            return known.attributes
        self._names.pop((parent, name), None)
        attributes = await self.asked(lambda: self.server.filesystem.lookup(parent, os.fsencode(name)))
        self._learn(parent, name, attributes)
        return attributes

    def _learn(self, parent: int, name: str, attributes: Attributes) -> None:
        self.server.filesystem.told(attributes)
        self._told[attributes.inode.number] += 1
        self._names[parent, name] = Name(attributes, trio.current_time() + attributes.entry_ttl_s)

    async def walk(self, path: str, *, anew: bool = False) -> Attributes:
        """Follow a path."""
        attributes = self.server.filesystem.attributes(ROOT_INODE)
        for name in filter(None, path.split("/")):
            if not attributes.directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            attributes = await self.look_up(attributes.inode.number, name, anew=anew)
        return attributes

    async def open(self, path: str, *, thread: int = 1) -> int:
        """Open a file; with ESTALE, follow the path and try once more."""
        for anew in (False, True):
            attributes = await self.walk(path, anew=anew)
            number = attributes.inode.number
            if attributes.directory:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            try:
                handle = await self.asked(lambda: self.server.open_inode(number, thread=thread))  # noqa: B023
            except OSError as error:
                if error.errno != errno.ESTALE or anew:
                    raise
            else:
                self._tokens += 1
                self.files[self._tokens] = Opened(number, handle, attributes.size)
                return self._tokens
        raise AssertionError("unreachable: the second attempt returns or raises")

    async def read(self, token: int, offset: int, size: int) -> bytes:
        handle = self.files[token].handle
        return await self.asked(lambda: self.server.read(handle, offset, size))

    async def content(self, path: str) -> bytes:
        """All of a control file."""
        token, content = await self.open(path), b""
        try:
            while piece := await self.read(token, len(content), 1 << 16):
                content += piece
        finally:
            self.close(token)
        return content

    def map(self, token: int) -> None:
        file = self.files[token]
        file.mapped = True
        if file.handle >> BACKING_SHIFT:
            assert self.server.backing is not None
            file.backing = self.server.backing.mapped(file.handle >> BACKING_SHIFT)

    async def read_mapped(self, token: int, offset: int, size: int) -> bytes:
        """What a mapping shows; what cannot be had is EFAULT, or SIGBUS for who touches it."""
        file = self.files[token]
        if file.backing is not None:
            return os.pread(file.backing, size, offset)
        try:
            return await self.read(token, offset, size)
        except OSError as error:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT), str(error)) from error

    def close(self, token: int) -> None:
        """Close a file: at once where it is passed through, and else once its mapping is gone."""
        file = self.files[token]
        file.closed = True
        if file.backing is not None or not file.mapped:
            self.server.release(file.handle)
        self._done(token)

    def unmap(self, token: int) -> None:
        file = self.files[token]
        file.mapped = False
        if file.backing is not None:
            os.close(file.backing)
        elif file.closed:
            self.server.release(file.handle)
        self._done(token)

    def _done(self, token: int) -> None:
        if self.files[token].closed and not self.files[token].mapped:
            del self.files[token]

    async def listing(self, path: str) -> set[str]:
        """The names in a directory, each of which becomes known."""
        attributes = await self.walk(path)
        if not attributes.directory:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        number = attributes.inode.number
        handle = await self.asked(lambda: self.server.filesystem.open_directory(number))
        try:
            found = list(await self.asked(lambda: self.server.filesystem.list_directory(handle, 0)))
        finally:
            self.server.filesystem.release(handle)
        for name, attributes, _ in found:
            self._learn(number, os.fsdecode(name), attributes)
        return {os.fsdecode(name) for name, _, _ in found}

    async def attribute(self, path: str, name: str) -> str:
        number = (await self.walk(path)).inode.number
        value = await self.asked(lambda: self.server.filesystem.xattr(number, f"user.trims.{name}", lambda: OWNER))
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)
        return value.decode()

    def invalidate(self) -> None:
        """Do what the server has told: forget some names."""
        while self.server.invalidated:
            number, name = self.server.invalidated.pop()
            self._names.pop((number, os.fsdecode(name)), None)

    def forget(self) -> None:
        """Give up all names, and all inodes that no open file is of."""
        self._names.clear()
        used = {file.number for file in self.files.values()}
        for number in set(self._told) - used:
            self.server.filesystem.forget(number, self._told.pop(number))
