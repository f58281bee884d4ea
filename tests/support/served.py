"""A whole server without FUSE: the file system over a store in memory, and a cache on disk."""

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio

from tests.support.chunks import REQUESTS_PER_CHUNK
from tests.support.parts import InLoop, until
from tests.support.stores import MemoryStore, as_store
from trimsfs.control.authorisation import Caller
from trimsfs.control.control_files import Control
from trimsfs.control.extra import Extra
from trimsfs.errors import FuseUnavailableError
from trimsfs.extras.folding.derived_blobs import DerivedBlobs
from trimsfs.extras.gpu.copies import GpuCopies
from trimsfs.extras.gpu.interface import GpuInterface
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.filesystem.attributes import Attributes
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.filesystem.handles import BACKING_SHIFT, passed_through
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.deferred import Pace
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.namespace.inodes import ROOT_INODE
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import Interruptible
from trimsfs.opening.passthrough import Backing, Passthrough
from trimsfs.options import MountOptions, StoreTable, places
from trimsfs.server.assembly import assemble
from trimsfs.server.components import Components
from trimsfs.server.environment import Environment
from trimsfs.server.plugin import load_plugins
from trimsfs.stores.open import routed
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.host.memory_tier import HostTier

OWNER = Caller(uid=1000, groups=frozenset({1000}))
STRANGER = Caller(uid=2000, groups=frozenset({2000, 2001}))
CONTROL_GID = 3000
MOUNTPOINT = Path("/models")
MAIN = "main"
"""Where a server with several stores has its first one."""
SOON = Pace(idle_s=0.01)
"""What is put off to idle time is compared at once, but for what is still under way."""
MOUNTED_NS = 1_700_000_000_000_000_000


class FakeBacking:
    """Hands out ids 1, 2, 3, ... as a kernel might, and remembers what they were closed for.

    ``open_ids`` are those that are not closed; ``error`` fails the next opens, ``gate`` holds them back. ``violations``
    are ids that were closed though an open file had them, which ``in_use`` tells.
    """

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.error: FuseUnavailableError | None = None
        self.gate: trio.Event | None = None
        self.in_use: Callable[[int], bool] = lambda _number: False
        self.violations: list[int] = []
        self._files: dict[int, int] = {}

    @property
    def open_ids(self) -> set[int]:
        return set(self._files)

    async def open(self, descriptor: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        number = len(self.opened) + 1
        self._files[number] = os.open(f"/proc/self/fd/{descriptor}", os.O_PATH)  # as the keeper does
        self.opened.append(number)
        return number

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        done()
        os.close(self._files.pop(backing_id))  # KeyError: closed twice, or never opened
        self.closed.append(backing_id)
        if self.in_use(backing_id):
            self.violations.append(backing_id)

    def read(self, backing_id: int, offset: int, size: int) -> bytes:
        """What the kernel would read for a handle that is passed through."""
        descriptor = self.mapped(backing_id)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def mapped(self, backing_id: int) -> int:
        """A descriptor for what a mapping of a handle that is passed through shows, whatever is closed."""
        return os.open(f"/proc/self/fd/{self._files[backing_id]}", os.O_RDONLY)

    def dispose(self) -> None:
        """The mount is gone, and all ids with it."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def as_backing(backing: FakeBacking) -> Backing:
    """The same; lets the type checker compare it with the protocol."""
    return backing


E = TypeVar("E", bound=Extra)


class NoDescriptorStore:
    """Keeps nothing."""

    async def hold(self, number: int, descriptor: int) -> bool:
        return False

    def let_go(self, number: int, done: Callable[[], None]) -> None:
        done()

    async def recall(self, number: int) -> int | None:
        return None

    async def listen(self) -> tuple[Path, int] | None:
        return None


class Signal:
    """What a signal to an opening thread does: `send` it."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self.sent = False

    def send(self) -> None:
        self.sent = True
        self._scope.cancel()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        self._scope = trio.CancelScope()
        with self._scope:
            if self.sent:
                self._scope.cancel()
            yield
        if self._scope.cancelled_caught:
            raise InterruptedError


@dataclass(slots=True, kw_only=True)
class Server:
    """The parts of a server, and what the kernel and a program would do with them.

    ``invalidated`` holds the names that the kernel was told to look up again, ``expired`` those that it shall when they
    are used next, ``pruned`` the inodes that it may give up, ``dropped`` those whose pages it was told to drop.
    ``handles`` are those that are open.
    """

    store: MemoryStore
    components: Components
    backing: FakeBacking | None
    invalidated: list[tuple[int, bytes]]
    pruned: list[int]
    dropped: list[int]
    expired: list[tuple[int, bytes]]
    beside: list[MemoryStore] = field(default_factory=list)
    handles: set[int] = field(default_factory=set)
    _told: list[int] = field(default_factory=list)

    namespace: Namespace = field(init=False)
    disk: DiskTier = field(init=False)
    host: HostTier = field(init=False)
    passthrough: Passthrough = field(init=False)
    control: Control = field(init=False)
    integrity: Integrity = field(init=False)
    filesystem: Filesystem = field(init=False)

    def __post_init__(self) -> None:
        for part in ("namespace", "disk", "host", "passthrough", "control", "integrity", "filesystem"):
            setattr(self, part, getattr(self.components, part))

    @property
    def fetcher(self) -> StoreFetcher:
        """The fetcher of a mount with a single store."""
        assert isinstance(self.components.fetcher, StoreFetcher)
        return self.components.fetcher

    def extra(self, kind: type[E]) -> E:
        [found] = [extra for extra in self.components.extras if isinstance(extra, kind)]
        return found

    @property
    def derived(self) -> DerivedBlobs:
        return self.extra(DerivedBlobs)

    @property
    def gpu(self) -> GpuCopies:
        return self.extra(GpuInterface).copies

    async def find(self, path: str, *, thread: int = 1) -> Attributes:
        """Walk to a path as the kernel does for a thread: what it is."""
        attributes = self.filesystem.names.attributes(ROOT_INODE)
        for name in filter(None, path.split("/")):
            names, parent = self.filesystem.names, attributes.inode.number
            known = names.lookup_known(parent, name.encode(), thread=thread)
            attributes = known or await names.lookup(parent, name.encode(), thread=thread)
            names.count_lookup(attributes)
            self._told.append(attributes.inode.number)
        return attributes

    async def number(self, path: str, *, thread: int = 1) -> int:
        return (await self.find(path, thread=thread)).inode.number

    def forget(self) -> None:
        """Give up all references to inodes, as the kernel does when memory is short."""
        for number in self._told:
            self.filesystem.names.inodes.forget(number, 1)
        self._told.clear()

    async def open(self, path: str, caller: Caller = OWNER, *, interruptible: Interruptible = nullcontext) -> int:
        """Look a file up and open it."""
        return await self.open_inode(await self.number(path), caller, interruptible=interruptible)

    async def open_inode(
        self, number: int, caller: Caller = OWNER, *, interruptible: Interruptible = nullcontext, thread: int = 1
    ) -> int:
        """Open an inode that was looked up before."""
        handle = self.open_resident(number, caller, thread=thread)
        if handle is None:
            handle = (await self.filesystem.files.open(number, lambda: caller, interruptible, thread=thread)).handle
            self.accepted(handle)
            self.filesystem.files.delivered(handle)
            self.handles.add(handle)
        return handle

    def accepted(self, handle: int) -> None:
        """The kernel accepts a handle: it fails an open in one mode while the inode is open in the other."""
        file = self.filesystem.handles.files.get(handle)
        if file is not None:
            assert not (file.inode.cached if passed_through(handle) else file.inode.passed), file.inode

    def open_resident(self, number: int, caller: Caller = OWNER, *, thread: int = 1, request: int = 1) -> int | None:
        """Open an inode that was looked up before, if that is answered at once."""
        handle = self.filesystem.files.open_resident(number, request)
        if handle is not None:
            self.filesystem.files.used(handle, thread, lambda: caller)
            self.accepted(handle)
            self.handles.add(handle)
        return handle

    async def read(self, handle: int, offset: int = 0, size: int = 1 << 30) -> bytes:
        """What one read gives, of a file that is passed through as of any other."""
        backing_id = handle >> BACKING_SHIFT
        if backing_id:
            assert self.backing is not None
            return self.backing.read(backing_id, offset, size)
        return bytes(await self.filesystem.files.read(handle, offset, size))

    def release(self, handle: int) -> None:
        self.handles.remove(handle)
        self.filesystem.files.release(handle)

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
        handle = await self.filesystem.names.open_directory(await self.number(path))
        found = list(await self.filesystem.names.list_directory(handle, 0))
        for _, attributes, _ in found:
            self.filesystem.names.inodes.discard(attributes.inode)
        self.filesystem.files.release(handle)
        return [name.decode() for name, _, _ in found]

    async def info(self, path: str) -> dict[str, Any]:
        """What the control file ``info`` says of a file or directory."""
        facts: dict[str, Any] = json.loads(await self.content(await self.control_file(path, "info")))
        return facts

    async def attribute(self, path: str, name: str) -> str | None:
        """An extended attribute of ours."""
        value = await self.filesystem.xattr(await self.number(path), f"user.trims.{name}", lambda: OWNER)
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

    def passes_through(self, backing_id: int) -> bool:
        """Whether an open file has a backing id."""
        return any(handle >> BACKING_SHIFT == backing_id for handle in self.handles)

    def users(self) -> int:
        """How often blobs are in use, by handles, flights and commands."""
        return sum(blob.users for blob in self.disk._state.blobs.values())

    @asynccontextmanager
    async def without_syncs(self) -> AsyncIterator[None]:
        """Hold the disk tier's syncs back for the length of the block: a blob that is being synced is in use."""
        async with self.disk._state.journal.syncing:
            yield

    async def idle(self) -> None:
        """Close everything, and wait until what is under way has ended. Nothing may be left in use."""
        for handle in list(self.handles):
            self.release(handle)
        for store in (self.store, *self.beside):
            store.heal()
        with trio.CancelScope(shield=True):
            # The last chunk of a stream lands a moment before its request ends.
            await until(lambda: self.users() == self.components.fetcher.statistics().in_flight == 0)
        fetch, disk = self.components.fetcher.statistics(), self.disk.statistics()
        assert (fetch.in_flight, fetch.waiting, disk.open_blobs) == (0, 0, 0)
        assert self.filesystem.statistics().open_handles == 0


def mount_options(store: MemoryStore, directory: Path, chunk_size: int, **options: Any) -> MountOptions:
    """The options of a mount, some of which no user could give: tests are small, and in a hurry."""
    defaults = {
        "store": store.identity,
        "cache_dir": directory,
        "min_free": 0,
        "memory_limit": 16 * chunk_size,
        "cold_open": "stream",
        "uid": OWNER.uid,
        "control_gid": CONTROL_GID,
        "scrub_interval": 0.0,
        "scrub_rate": 1 << 30,
        "server_user": None,
    }
    unknown = options.keys() - MountOptions.model_fields.keys()
    assert not unknown, unknown
    return MountOptions().resolved(MOUNTPOINT).model_copy(update=defaults | options)


@asynccontextmanager
async def served(
    store: MemoryStore,
    directory: Path,
    *,
    chunk_size: int,
    backing: FakeBacking | None = None,
    ledger: Ledger | None = None,
    read_manifest: ReadManifest | None = None,
    pace: Pace = SOON,
    beside: Mapping[str, MemoryStore] | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """A server on a cache directory, idle at the end; without a *backing*, all files are served in cached mode.

    One with a *ledger* goes on with what is in it. Nothing is closed at its end: another may go on after it. Other
    arguments are `MountOptions`; *read_manifest* counts where they have ``signatures`` checked. With other stores
    *beside* it, by path, the store is at the path MAIN.
    """
    invalidated: list[tuple[int, bytes]] = []
    expired: list[tuple[int, bytes]] = []
    pruned: list[int] = []
    dropped: list[int] = []
    origin, stores = as_store(store), {MAIN: store, **(beside or {})}
    if beside is not None:
        options["stores"] = tuple(StoreTable(path=path, store=each.identity) for path, each in stores.items())
    mount = mount_options(store, directory, chunk_size, **options)
    if beside is not None:
        origin = routed(places(mount), {f"{path}/": as_store(each) for path, each in stores.items()})
    environment = Environment(
        mountpoint=MOUNTPOINT,
        mounted_ns=MOUNTED_NS,
        started=time.time(),
        restarts=0,
        keeper_pid=os.getppid(),
        keeper=NoDescriptorStore(),
        ledger=ledger or Ledger(),
        lock=None,
        store=origin,
        copier=InLoop(origin, threads=8),
        read_manifest=None if mount.signatures == "off" else read_manifest,
        invalidate=lambda number, name: invalidated.append((number, name)),
        forget_pages=lambda _number: None,
        expire=expired.extend,
        prune=pruned.extend,
        drop_pages=dropped.append,
        chunk_size=chunk_size,
        request_memory=chunk_size // REQUESTS_PER_CHUNK,
        pace=pace,
    )
    plugins = load_plugins(mount.model_copy(update={"gpu": "off"}), alone=False)
    components = assemble(mount, environment, plugins)
    try:
        async with trio.open_nursery() as nursery:
            await components.start(nursery)
            refusal = "not wanted" if backing is None else None
            settings = ConnectionSettings(passthrough=True, overlay=False, mounted_ns=0, refusal=refusal)
            components.decide_modes(as_backing(backing or FakeBacking()), settings)
            if ledger is not None:
                await components.take_over(unclaimed=())
                ledger.forget_inherited()
            await components.start_maintenance(nursery)
            server = Server(
                store=store,
                components=components,
                backing=backing,
                invalidated=invalidated,
                expired=expired,
                pruned=pruned,
                dropped=dropped,
                beside=list((beside or {}).values()),
            )
            if backing is not None:
                backing.in_use = server.passes_through
            try:
                yield server
                if ledger is None:
                    await server.idle()
                assert backing is None or backing.violations == []
            finally:
                if backing is not None and ledger is None:
                    backing.dispose()
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await components.disk.aclose()


Serving = Callable[..., AbstractAsyncContextManager[Server]]
"""`served` with what a test has in common with others."""
