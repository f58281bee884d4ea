"""A whole server without FUSE: the file system over a store in memory, and a cache on disk."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tests.fakes import MemoryStore, as_store
from tests.unit.parts import fetching, opened, until
from trimsfs import metrics
from trimsfs.control import Caller, Control
from trimsfs.fetch import Fetcher
from trimsfs.filesystem import Attributes, Filesystem
from trimsfs.namespace import ROOT_INODE, Namespace
from trimsfs.options import MountOptions
from trimsfs.tiers.disk import DiskTier

OWNER = Caller(uid=1000, groups=frozenset({1000}))
STRANGER = Caller(uid=2000, groups=frozenset({2000, 2001}))
CONTROL_GID = 3000
MOUNTED_NS = 1_700_000_000_000_000_000


@dataclass(slots=True, kw_only=True)
class Server:
    """The parts of a server, and what the kernel and a program would do with them.

    ``invalidated`` holds the names that the kernel was told to look up again.
    """

    store: MemoryStore
    namespace: Namespace
    disk: DiskTier
    fetcher: Fetcher
    control: Control
    filesystem: Filesystem
    invalidated: list[tuple[int, bytes]]
    _handles: set[int] = field(default_factory=set)
    _told: list[int] = field(default_factory=list)

    async def find(self, path: str) -> Attributes:
        """Walk to a path as the kernel does: what it is."""
        attributes = self.filesystem.attributes(ROOT_INODE)
        for name in filter(None, path.split("/")):
            attributes = await self.filesystem.lookup(attributes.inode.number, name.encode())
            self.filesystem.told(attributes)
            self._told.append(attributes.inode.number)
        return attributes

    async def number(self, path: str) -> int:
        """The inode number of a path."""
        return (await self.find(path)).inode.number

    def forget(self) -> None:
        """Give up all references to inodes, as the kernel does when memory is short."""
        for number in self._told:
            self.filesystem.forget(number, 1)
        self._told.clear()

    async def open(self, path: str, caller: Caller = OWNER) -> int:
        """Look a file up and open it."""
        return await self.open_inode(await self.number(path), caller)

    async def open_inode(self, number: int, caller: Caller = OWNER) -> int:
        """Open an inode that was looked up before."""
        handle = (await self.filesystem.open(number, caller)).handle
        self._handles.add(handle)
        return handle

    async def read(self, handle: int, offset: int = 0, size: int = 1 << 30) -> bytes:
        """What one read gives."""
        return bytes(await self.filesystem.read(handle, offset, size))

    def release(self, handle: int) -> None:
        """Close an open file."""
        self._handles.remove(handle)
        self.filesystem.release(handle)

    async def content(self, path: str, caller: Caller = OWNER) -> bytes:
        """Open a file, read it to its end, close it."""
        handle = await self.open(path, caller)
        content = b""
        try:
            while piece := await self.read(handle, len(content), 100_000):
                content += piece
        finally:
            self.release(handle)
        return content

    async def listing(self, path: str) -> list[str]:
        """The names in a directory; the kernel keeps no reference."""
        handle = await self.filesystem.open_directory(await self.number(path))
        found = list(self.filesystem.list_directory(handle, 0))
        for _, attributes, _ in found:
            self.filesystem.untold(attributes)
        self.filesystem.close_directory(handle)
        return [name.decode() for name, _, _ in found]

    async def info(self, path: str) -> dict[str, Any]:
        """What the control file ``info`` says of a file or directory."""
        facts: dict[str, Any] = json.loads(await self.content(await self.control_file(path, "info")))
        return facts

    async def attribute(self, path: str, name: str) -> str | None:
        """An extended attribute of ours."""
        value = await self.filesystem.xattr(await self.number(path), f"user.trims.{name}")
        return None if value is None else value.decode()

    async def control_file(self, path: str, name: str) -> str:
        """The path of a control file about a file or directory, by the rule that the command line follows."""
        if (await self.find(path)).directory:
            return f"{path}/.trims/.trims/{name}"
        directory, _, subject = path.rpartition("/")
        return f"{directory}/.trims/{subject}/{name}"

    async def command(self, name: str, path: str, caller: Caller = OWNER) -> list[dict[str, Any]]:
        """Give a command and read what it tells until its end: all lines."""
        text = await self.content(await self.control_file(path, name), caller)
        return [json.loads(line) for line in text.splitlines()]

    async def outcome(self, name: str, path: str) -> tuple[str, str | None]:
        """Give a command: the state that it ended in, and the kind of its error."""
        last = (await self.command(name, path))[-1]
        return last["state"], last.get("kind")

    def users(self) -> int:
        """How often blobs are in use, by handles, flights and commands."""
        return sum(blob.users for blob in self.disk._blobs.values())

    async def idle(self) -> None:
        """Close everything, and wait until what is under way has ended. Nothing may be left in use."""
        for handle in list(self._handles):
            self.release(handle)
        self.store.heal()
        with trio.CancelScope(shield=True):
            await until(lambda: self.users() == 0)
        fetch, disk = self.fetcher.statistics(), self.disk.statistics()
        assert (fetch.in_flight, fetch.waiting, disk.open_blobs) == (0, 0, 0)
        assert self.filesystem.statistics().open_handles == 0


@asynccontextmanager
async def served(
    store: MemoryStore,
    directory: Path,
    *,
    chunk_size: int,
    budget: int | None = None,
    ttl_s: float = 60.0,
) -> AsyncIterator[Server]:
    """A server on a cache directory, idle at the end."""
    options = MountOptions(uid=OWNER.uid, control_gid=CONTROL_GID)
    invalidated: list[tuple[int, bytes]] = []
    async with (
        opened(directory, budget=budget) as disk,
        fetching(store, disk, memory_limit=16 * chunk_size) as fetcher,
        trio.open_nursery() as nursery,
    ):
        namespace = Namespace(as_store(store), ttl_s=ttl_s)
        sources: dict[str, metrics.Source] = {"disk": disk.statistics, "fetch": fetcher.statistics}
        control = Control(
            namespace,
            disk,
            fetcher,
            options,
            metrics=metrics.renderer(sources),
            facts=lambda: {"store": store.identity},
        )
        filesystem = Filesystem(
            namespace,
            disk,
            fetcher,
            control,
            mounted_ns=MOUNTED_NS,
            invalidate=lambda number, name: invalidated.append((number, name)),
        )
        await nursery.start(control.run)
        server = Server(
            store=store,
            namespace=namespace,
            disk=disk,
            fetcher=fetcher,
            control=control,
            filesystem=filesystem,
            invalidated=invalidated,
        )
        yield server
        await server.idle()
        nursery.cancel_scope.cancel()
