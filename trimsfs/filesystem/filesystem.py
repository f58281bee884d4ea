"""The read-only file system over a store, assembled from names, files and ioctls. It takes over what is open.

The path of a read: `names` looks the path up. `files` opens the file in the way that `trimsfs.opening.opener` decides,
and reads it. `trust` repeats a read whose bytes must not be served yet. `trimsfs.fetch.store_fetcher` gets missing
bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimsfs.control import xattrs
from trimsfs.control.authorisation import Caller, readable_by
from trimsfs.control.control_files import Control
from trimsfs.filesystem.attributes import Describer
from trimsfs.filesystem.files import Files
from trimsfs.filesystem.handles import Handles, OpenFile, passed_through
from trimsfs.filesystem.ioctls import Ioctls
from trimsfs.filesystem.names import Names
from trimsfs.filesystem.savings import saved_bytes
from trimsfs.filesystem.trust import Trust
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.alias_targets import AliasTargets
from trimsfs.namespace.inodes import InodeKind
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.opener import Opener
from trimsfs.prefetch.prefetcher import Prefetcher
from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.model_counters import ModelStatistics
from trimsfs.telemetry.tracer import Tracer
from trimsfs.tiers.disk.interfaces import FileOpens, Residencies, Room


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemStatistics:
    """Files open now, and how many of them are passed through; the other counts are since the server started.

    ``reads`` and ``read_bytes`` are those that the server answered. ``replaced_while_open`` is how often the store
    replaced a file while files of its directory were open. ``open_seconds`` is how long opens waited,
    ``first_byte_seconds`` how long the first byte of a file that was not resident took.
    """

    open_handles: int
    passthrough_handles: int
    passthrough_opens: int
    cached_opens: int
    reads: int
    read_bytes: int
    open_seconds: Histogram
    first_byte_seconds: Histogram
    replaced_while_open: int


class Filesystem:
    """Files and directories of a store, read-only. Errors are those of ``trimsfs.errors``.

    *ledger* and *mounted_ns* are of the mount. *prune* lets the kernel give up inodes that nothing uses, by their
    numbers. *drop_pages* makes it drop the pages of an inode, and returns at once.
    """

    def __init__(
        self,
        namespace: Namespace,
        blobs: FileOpens,
        residencies: Residencies,
        room: Room,
        control: Control,
        prefetcher: Prefetcher,
        opener: Opener,
        trust: Trust,
        tracer: Tracer,
        *,
        ledger: Ledger,
        mounted_ns: int,
        prune: Callable[[Sequence[int]], None],
        drop_pages: Callable[[int], None],
    ) -> None:
        self._inodes = namespace.inodes
        self._blobs = blobs
        self._room = room
        self._control = control
        self._opener = opener
        self._trust = trust
        self._prefetcher = prefetcher
        self._tracer = tracer
        self.handles = handles = Handles(ledger)
        describe = Describer(namespace.inodes, control.authorisation.permissions, mounted_ns=mounted_ns)
        aliases = AliasTargets(ledger)
        self.names = Names(namespace, blobs, control, opener.reopens, describe, handles, tracer, aliases, prune)
        self.ioctls = Ioctls(namespace.inodes, residencies, control, opener.passthrough, trust, handles)
        self.files = Files(
            self.names, blobs, control, prefetcher, opener, trust, handles, self.ioctls, tracer, drop_pages
        )

    async def restore(self) -> None:
        """Take over all that the kernel had open before this server started. Runs before the first request."""
        self._opener.reopens.restore()
        opened = self.handles.restore(self._inodes, self._control.restored)
        files = {handle: inode for handle, inode in opened.items() if inode.kind is InodeKind.OBJECT}
        blobs = await self._blobs.recall([inode.generation for inode in files.values() if inode.generation is not None])
        for (handle, inode), blob in zip(files.items(), blobs, strict=True):
            self.handles.files[handle] = OpenFile(inode, blob)
            blob.users += 1
            blob.handles += 1
            self._opener.restore(inode, blob, passed=passed_through(handle))
            for extra in self._control.extras:
                extra.restore_file(handle)
        for extra in self._control.extras:
            extra.all_restored()

    def resent(self, request: int) -> None:
        """Release the handle that an earlier server made for an open that the kernel sends again: nobody has it."""
        handle = self.handles.resent(request)
        if handle is not None:
            self.files.release(handle)

    def statistics(self) -> FilesystemStatistics:
        return FilesystemStatistics(
            open_handles=len(self.handles.files),
            passthrough_handles=sum(map(passed_through, self.handles.files)),
            passthrough_opens=self._opener.passthrough_opens,
            cached_opens=self._opener.cached_opens,
            reads=self.files.reads,
            read_bytes=self.files.read_bytes,
            open_seconds=self._tracer.open_seconds,
            first_byte_seconds=self._tracer.first_byte_seconds,
            replaced_while_open=self.names.replaced_while_open,
        )

    def model_statistics(self) -> ModelStatistics:
        """What models were used for, and what sharing saves: bytes in memory times the processes that have them open,
        less one."""
        return self._tracer.models.statistics(
            saved_bytes(self.handles.files.values(), self._opener.passthrough.resident)
        )

    async def open_directory(self, number: int, caller: Callable[[], Caller]) -> int:
        """Open a directory: a handle on its current listing. Tells the prefetcher, as its files may be read next."""
        handle = await self.names.open_directory(number)
        self._prefetcher.record_listing(self._inodes[number], readable_by(self._control.authorisation, caller))
        return handle

    async def xattr(self, number: int, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an extended attribute; None if it does not exist, or not for this caller."""
        inode, problem = self._inodes[number], name == xattrs.PROBLEM
        if not problem:  # that is for whom the file was refused
            await self._trust.admit_control(inode, name.removeprefix(xattrs.PREFIX))
        value = await self._control.xattrs.value(inode, name, caller)
        if value is None and problem and (refusal := self.files.refusal(inode)) is not None:
            return refusal.encode(errors="surrogateescape")
        return value

    def xattr_names(self, number: int) -> list[str]:
        """The names of the extended attributes of an inode."""
        return self._control.xattrs.names(self._inodes[number])

    def known_files(self) -> int:
        """The number of files and directories that the kernel may know."""
        return len(self._inodes)

    def space(self) -> tuple[int, int]:
        """Bytes for models on disk: in total, and free."""
        return self._room.sizes()
