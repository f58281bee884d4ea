"""What the kernel does between programs and servers without FUSE: names that it knows, requests that it sends again."""

import errno
import itertools
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import trio

from tests.support.served import OWNER, Server
from trimsfs.errors import TrimsError
from trimsfs.filesystem.attributes import Attributes
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.fuse.errnos import errno_of
from trimsfs.namespace.inodes import ROOT_INODE

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
        self.files: dict[int, Opened] = {}
        self._server: Server | None = None
        self._change = trio.Event()
        self._under_way: set[trio.CancelScope] = set()
        self._releases: list[int] = []
        self._names: dict[tuple[int, str], Name] = {}
        self._told: Counter[int] = Counter()
        self._numbers = itertools.count(1)

    # Servers

    @property
    def server(self) -> Server:
        assert self._server is not None
        return self._server

    @property
    def served(self) -> bool:
        return self._server is not None

    def serve(self, server: Server) -> None:
        """There is a server: what was asked meanwhile goes to it, and what the last one has not answered."""
        self._server = server
        if server.backing is not None:
            server.backing.in_use = self._passes_through
        for handle in self._releases:
            server.filesystem.files.release(handle)
        self._releases.clear()
        self._changed()

    def lose(self) -> None:
        self._server = None
        self._changed()
        for scope in self._under_way:
            scope.cancel()

    async def lost(self) -> None:
        """Wait until nothing of the dead server is left: what its threads have begun they end."""
        while self._under_way:
            await self._change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    def _passes_through(self, backing_id: int) -> bool:
        return any(file.handle >> BACKING_SHIFT == backing_id and self._held(file) for file in self.files.values())

    def _held(self, file: Opened) -> bool:
        """Whether a file is open for the server: one that is passed through is not, once only its mapping is left."""
        return not file.closed or (file.mapped and file.backing is None)

    async def asked(self, request: Callable[[Server], Awaitable[T]]) -> T:
        """The answer to a request, whichever server gives it."""
        while True:
            while (server := self._server) is None:
                await self._change.wait()
            error: OSError | None = None
            with trio.CancelScope() as scope:
                self._under_way.add(scope)
                try:
                    answer = await request(server)
                except (TrimsError, IsADirectoryError, InterruptedError) as cause:
                    error = OSError(errno_of(cause), os.strerror(errno_of(cause)), str(cause))
                    error.__cause__ = cause
                finally:
                    self._under_way.discard(scope)
                    if self._server is None:
                        self._changed()
                if server is self._server:  # or the answer comes from one that is dead
                    if error is not None:
                        raise error
                    return answer

    # Names

    async def look_up(self, parent: int, name: str, *, thread: int = 1, anew: bool = False) -> Attributes:
        """What a name is; asked for again when it is not believed any more, or *anew*."""
        self._invalidate()
        known = self._names.get((parent, name))
        if known is not None and not anew and trio.current_time() < known.until:
            return known.attributes
        self._names.pop((parent, name), None)

        async def look_up(server: Server) -> Attributes:
            known = server.filesystem.names.lookup_known(parent, os.fsencode(name), thread=thread)
            attributes = known or await server.filesystem.names.lookup(parent, os.fsencode(name), thread=thread)
            if server is self._server:
                self._learn(server, parent, name, attributes)
            return attributes

        return await self.asked(look_up)

    def _learn(self, server: Server, parent: int, name: str, attributes: Attributes) -> None:
        server.filesystem.names.count_lookup(attributes)
        self._told[attributes.inode.number] += 1
        self._names[parent, name] = Name(attributes, trio.current_time() + attributes.entry_ttl_s)

    def _invalidate(self) -> None:
        """Do what the server has told: forget some names."""
        while self._server is not None and self._server.invalidated:
            number, name = self._server.invalidated.pop()
            self._names.pop((number, os.fsdecode(name)), None)

    async def walk(self, path: str, *, thread: int = 1, anew: bool = False) -> Attributes:
        attributes: Attributes | None = None
        for name in filter(None, path.split("/")):
            if attributes is not None and not attributes.directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            number = ROOT_INODE if attributes is None else attributes.inode.number
            attributes = await self.look_up(number, name, thread=thread, anew=anew)
        assert attributes is not None
        return attributes

    async def listing(self, path: str) -> set[str]:
        """The names in a directory, each of which becomes known."""
        number = ROOT_INODE
        if path:
            attributes = await self.walk(path)
            if not attributes.directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            number = attributes.inode.number
        handle = await self._opened(lambda server: server.filesystem.names.open_directory(number))
        try:
            return await self.asked(lambda server: self._listed(server, number, handle))
        finally:
            self._release(handle)

    async def _listed(self, server: Server, number: int, handle: int) -> set[str]:
        found = list(await server.filesystem.names.list_directory(handle, 0))
        for name, attributes, _ in found:
            if server is self._server:
                self._learn(server, number, os.fsdecode(name), attributes)
        return {os.fsdecode(name) for name, _, _ in found}

    async def attribute(self, path: str, name: str) -> str:
        number = (await self.walk(path)).inode.number
        asked = f"user.trims.{name}"
        value = await self.asked(lambda server: server.filesystem.xattr(number, asked, lambda: OWNER))
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)
        return value.decode()

    def forget(self) -> None:
        """Give up all names, and all inodes that no open file is of."""
        self._names.clear()
        used = {file.number for file in self.files.values()}
        for number in set(self._told) - used:
            self.server.filesystem.names.inodes.forget(number, self._told.pop(number))

    # Files

    async def open(self, path: str, *, thread: int = 1) -> int:
        """Open a file; with ESTALE, follow the path and try once more."""
        try:
            return await self._open(path, thread, anew=False)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return await self._open(path, thread, anew=True)

    async def _open(self, path: str, thread: int, *, anew: bool) -> int:
        attributes = await self.walk(path, thread=thread, anew=anew)
        number = attributes.inode.number
        if attributes.directory:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)

        async def open_inode(server: Server) -> int:
            files = server.filesystem.files
            handle = files.open_resident(number, 0)
            if handle is None:
                handle = (await files.open(number, lambda: OWNER, nullcontext, thread=thread)).handle
            else:
                files.used(handle, thread, lambda: OWNER)
            server.accepted(handle)
            return handle

        handle = await self._opened(open_inode)
        token = next(self._numbers)
        self.files[token] = Opened(number, handle, attributes.size)
        return token

    async def _opened(self, request: Callable[[Server], Awaitable[int]]) -> int:
        """The handle that an open gives. A server may die before it has told it, or before it has noted that it has."""
        unique, sent = next(self._numbers), itertools.count()

        async def ask(server: Server) -> int:
            if next(sent):
                server.filesystem.resent(unique)
            handle = await request(server)
            server.filesystem.handles.offered(handle, unique)
            await trio.lowlevel.checkpoint()
            return handle

        handle = await self.asked(ask)
        server = self._server
        await trio.lowlevel.cancel_shielded_checkpoint()
        if server is not None and server is self._server:
            server.filesystem.files.delivered(handle)
        return handle

    async def read(self, token: int, offset: int, size: int) -> bytes:
        handle = self.files[token].handle
        return await self.asked(lambda server: server.read(handle, offset, size))

    async def content(self, path: str) -> bytes:
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
        self.files[token].closed = True
        self._let_go(token)

    def unmap(self, token: int) -> None:
        file = self.files[token]
        file.mapped = False
        if file.backing is not None:
            os.close(file.backing)
        self._let_go(token)

    def _let_go(self, token: int) -> None:
        """After a close or an unmap."""
        file = self.files[token]
        if not self._held(file) and file.handle:
            handle, file.handle = file.handle, 0
            self._release(handle)
        if file.closed and not file.mapped:
            del self.files[token]

    def _release(self, handle: int) -> None:
        if self._server is None:
            self._releases.append(handle)
        else:
            self._server.filesystem.files.release(handle)
