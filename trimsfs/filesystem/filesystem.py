"""The filesystem, free of FUSE: what each call of the kernel means."""

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from trimsfs.control.files import SUBJECT, XATTR_PREFIX, Caller, Control, shows_content
from trimsfs.errors import (
    InvalidRequestError,
    LookUpAgainError,
    NameTooLongError,
    NoSuchEntryError,
    ObjectChangedError,
)
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.filesystem.attributes import Attributes, Describer
from trimsfs.filesystem.handles import Handles, OpenFile, passed_through
from trimsfs.gpu.copy_requests import MemoryKind
from trimsfs.gpu.interface import IoctlAnswer
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.models.derived_blobs import DerivedBlobs, Piece
from trimsfs.namespace.directory import CONTROL_NAME, NAME_MAX, Entry, NonObject
from trimsfs.namespace.tree import Inode, InodeKind, Namespace
from trimsfs.opening.cold_open import ColdOpener, Interruptible
from trimsfs.opening.passthrough import Passthrough
from trimsfs.opening.reopens import SentBack
from trimsfs.prefetch.siblings import Siblings
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Buffer, Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

FOREVER_S = 86400.0
"""For attributes: an inode's never change, as another content is another inode."""
CONTROL_TTL_S = 1.0
IS_VERIFIED, IS_PASSTHROUGH, IS_PINNED, TELLS_COMMON = 1, 2, 4, 8
UNKNOWN = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An open file. ``cached`` tells that the kernel may keep its pages, also from an earlier open, ``direct`` that it
    should pass every read on.

    A handle with a backing id in its upper half is passed through: the kernel reads the local file by itself.
    """

    handle: int
    cached: bool
    direct: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemStatistics:
    """Handles open now, and of those in passthrough mode; opens of each mode, reads answered and bytes handed to the
    kernel since the server started."""

    open_handles: int
    passthrough_handles: int
    passthrough_opens: int
    cached_opens: int
    reads: int
    read_bytes: int


class Filesystem:
    """Files and directories of a store, read-only.

    Errors are those of ``trimsfs.errors``. *invalidate* is called with a directory's inode number and a name
    when the kernel should look the name up again; it must not block.

    The number of an inode decides how it is opened, so that the kernel never meets one inode opened both ways. An open
    by a number that the name no longer leads to is sent back (ESTALE), upon which the kernel looks the name up and
    opens what it finds, but only once: a second open by the same thread is served as it is. So is that of a file that
    is bind-mounted, to which no lookup leads.
    """

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        fetcher: Fetcher,
        control: Control,
        passthrough: Passthrough,
        cold_opener: ColdOpener,
        siblings: Siblings,
        derived: DerivedBlobs,
        *,
        mounted_ns: int,
        signature_policy: SignaturePolicy | None = None,
        ledger: Ledger | None = None,
        invalidate: Callable[[int, bytes], None] = lambda _number, _name: None,
    ) -> None:
        self._namespace = namespace
        self._disk = disk
        self._fetcher = fetcher
        self._control = control
        self._passthrough = passthrough
        self._cold_opener = cold_opener
        self._siblings = siblings
        self._derived = derived
        self._describe = Describer(namespace, control.access, passthrough, mounted_ns=mounted_ns)
        self._signature_policy = signature_policy
        self._invalidate = invalidate
        self._ledger = ledger or Ledger()
        self._handles = Handles(self._ledger)
        self._sent_back = SentBack(self._ledger)
        self._doubtful: dict[int, int] = {}
        self._reads = self._read_bytes = self._passthrough_opens = self._cached_opens = 0

    def statistics(self) -> FilesystemStatistics:
        return FilesystemStatistics(
            open_handles=len(self._handles.files),
            passthrough_handles=sum(map(passed_through, self._handles.files)),
            passthrough_opens=self._passthrough_opens,
            cached_opens=self._cached_opens,
            reads=self._reads,
            read_bytes=self._read_bytes,
        )

    # Names

    async def lookup(self, parent: int, name: bytes, *, thread: int = 0) -> Attributes:
        """What a name is, for a thread of some process; the caller counts it with `told`.

        Raises NoSuchEntryError for a name that does not exist, NameTooLongError for one that cannot.
        """
        directory = self._namespace.inode(parent)
        if directory.kind is InodeKind.CONTROL_DIRECTORY:
            return await self._lookup_control(directory, name)
        if name == CONTROL_NAME:
            return self._describe.inode(
                self._namespace.reference(InodeKind.CONTROL_DIRECTORY, directory.path), FOREVER_S
            )
        if len(name) > NAME_MAX:
            raise NameTooLongError(f"a name of {len(name)} bytes")
        entry, left = await self._namespace.lookup(directory.path, name)
        path = directory.path + os.fsdecode(name)
        if isinstance(entry, Generation) and self._sent_back.has(thread, path) and not self._here(entry):
            # The thread comes back to open it only once: it must not meet what the store no longer has.
            self._namespace.doubt(path)
            entry, left = await self._namespace.lookup(directory.path, name)
        attributes = self._describe.entry(directory.path, name, entry, left)
        attributes.inode.replaced = False  # this content is what the store has, perhaps again
        return attributes

    def _here(self, generation: Generation) -> bool:
        """Whether all of a generation is known to be here."""
        blob = self._disk.known(generation.token(self._disk.store))
        return blob is not None and blob.complete

    async def _lookup_control(self, directory: Inode, name: bytes) -> Attributes:
        text = os.fsdecode(name)
        found = self._control.find(directory, text)
        if found is not None:
            inode = self._namespace.reference(found[0], directory.path, directory.generation, found[1])
            return self._describe.inode(inode, CONTROL_TTL_S)
        if directory.control:
            return await self._lookup_derived(directory, text)
        path, generation = directory.path, None
        if name != CONTROL_NAME:
            entry, _ = await self._namespace.lookup(directory.path, name)
            if entry is NonObject.ABSENT:
                raise NoSuchEntryError(f"{directory.path}{text}")
            path += text if isinstance(entry, Generation) else f"{text}/"
            generation = entry if isinstance(entry, Generation) else None
        inode = self._namespace.reference(InodeKind.CONTROL_DIRECTORY, path, generation, SUBJECT)
        return self._describe.inode(inode, CONTROL_TTL_S)

    async def _lookup_derived(self, directory: Inode, name: str) -> Attributes:
        model = directory.generation
        derived = await self._derived.find(model, name) if model is not None else None
        if derived is None:
            raise NoSuchEntryError(f"no control file {name}")
        passthrough = self._passthrough.has(derived)
        inode = self._namespace.reference(InodeKind.OBJECT, derived.key, derived, name, passthrough=passthrough)
        return self._describe.inode(inode, CONTROL_TTL_S)

    def told(self, attributes: Attributes) -> None:
        """The kernel has been told of an inode once more; it will `forget` as often."""
        self._namespace.told(attributes.inode)

    def untold(self, attributes: Attributes) -> None:
        """The kernel has not been told of an inode after all."""
        self._namespace.discard(attributes.inode)

    def forget(self, number: int, lookups: int) -> None:
        """The kernel no longer refers to an inode as often as that."""
        self._namespace.forget(number, lookups)

    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode that the kernel knows."""
        return self._describe.inode(self._namespace.inode(number), FOREVER_S)

    # Directories

    async def open_directory(self, number: int) -> int:
        """A handle on the listing of a directory as it is now."""
        inode = self._namespace.inode(number)
        return self._handles.add_directory(inode, await self._list(inode))

    async def _list(self, inode: Inode) -> list[tuple[bytes, Entry]]:
        return list((await self._namespace.entries(inode.path)).items()) if inode.kind is InodeKind.DIRECTORY else []

    async def list_directory(self, handle: int, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """The entries of a listing from position *start* on: name, attributes and the position after it.

        The caller counts with `told` those that it passes on and gives the first it cannot back with `untold`.
        Control directories name their files; ``.trims`` itself is in no listing.
        """
        directory = self._handles.directories.get(handle)
        if directory is None:
            raise LookUpAgainError(f"handle {handle} is not known")
        inode = directory.inode
        if directory.entries is None:
            directory.entries = await self._list(inode)
        entries = directory.entries
        if inode.kind is InodeKind.CONTROL_DIRECTORY:
            return self._list_control(inode, start)
        return (
            (name, self._describe.entry(inode.path, name, entry, CONTROL_TTL_S), position)
            for position, (name, entry) in enumerate(entries[start:], start + 1)
        )

    def _list_control(self, inode: Inode, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        for position, name in enumerate(self._control.names(inode)[start:], start + 1):
            kind, control = self._control.find(inode, name) or (InodeKind.CONTROL_FILE, name)
            file = self._namespace.reference(kind, inode.path, inode.generation, control)
            yield name.encode(), self._describe.inode(file, CONTROL_TTL_S), position

    # Files

    async def open(
        self, number: int, caller: Callable[[], Caller], interruptible: Interruptible, *, thread: int = 0
    ) -> Opened:
        """Open a file for reading, for a thread of some process.

        Raises ObjectChangedError when the store is known to have replaced it, LookUpAgainError when the name leads to
        another inode by now, InterruptedError for a signal while it waits.
        """
        inode = self._namespace.inode(number)
        if inode.kind is InodeKind.CONTROL_FILE:
            with interruptible():
                if self._signature_policy is not None and inode.generation is not None and shows_content(inode.control):
                    await self._signature_policy.admit_file(inode.generation, nullcontext)
                control = await self._control.open(inode, caller())
                handle = self._handles.add_control(inode, control)
                self._control.opened(control, handle)
            return Opened(handle=handle, cached=False, direct=True)
        if inode.generation is None:
            raise IsADirectoryError(inode.path)
        blob = await self._disk.acquire(inode.generation)
        self._siblings.opened(inode, here=blob.complete)
        try:
            if self._signature_policy is not None:
                await self._signature_policy.admit(blob, interruptible)
            await (self._resident if inode.passthrough else self._cold)(inode, blob, interruptible, thread)
        except BaseException as error:
            self._disk.release(blob)
            if isinstance(error, ObjectChangedError):
                self._sent_back.may(thread, inode.path)
                self._replaced(inode)
            raise
        self._cold_opener.opened(blob, thread)
        handle = self._handles.add_file(inode, blob)
        self._sent_back.answering(thread, inode.path, handle)
        return Opened(handle=handle, cached=not passed_through(handle))

    async def _resident(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Open in passthrough mode; what has been evicted since the kernel learnt the number is fetched again."""
        if not self._passthrough.ready(blob):
            if not blob.backing_id and self._sent_back.may(thread, inode.path):
                raise LookUpAgainError(inode.path)
            with self._sent_back.coming(thread, inode.path):
                if not await self._cold_opener.fetch(blob, interruptible):
                    blob.health.check()
                    raise LookUpAgainError(inode.path)
        blob.health.check()
        self._passthrough.used(blob)
        self._passthrough_opens += 1

    async def _cold(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Open in cached mode. Raises LookUpAgainError when the blob has become resident meanwhile."""
        if inode.replaced and not blob.complete:
            raise ObjectChangedError(f"{inode.path} has been replaced")
        self._fetcher.hold(blob)
        try:
            with self._sent_back.coming(thread, inode.path):
                resident = blob.backing_id != 0 or await self._cold_opener.wait(blob, interruptible, thread)
            blob.health.check()
            if resident and self._sent_back.may(thread, inode.path):
                raise LookUpAgainError(inode.path)
        except BaseException:
            self._fetcher.unhold(blob)
            raise
        self._cached_opens += 1

    def opened(self, handle: int) -> None:
        """The kernel has got the handle of an open file or directory."""
        self._handles.taken(handle)
        self._sent_back.answered(handle)

    def offered(self, handle: int, request: int) -> None:
        """The kernel is about to get a handle as the answer to the open of this number, 0 where that is not known."""
        self._handles.offered(handle, request)

    async def restore(self) -> None:
        """Go on with the files that the kernel has open since before this server was started."""
        self._sent_back.restore()
        held = self._handles.restore(self._namespace, self._control.restored)
        files = {one.handle: one.inode for one in held if one.inode.kind is InodeKind.OBJECT}
        blobs = await self._disk.recall([inode.generation for inode in files.values() if inode.generation is not None])
        for (handle, inode), blob in zip(files.items(), blobs, strict=True):
            self._handles.files[handle] = OpenFile(inode, blob)
            blob.users += 1
            if not passed_through(handle):
                self._fetcher.hold(blob)
            self._control.gpu.reopened(handle)
        self._control.gpu.all_reopened()
        self._doubtful = {one.asked_by: one.handle for one in held if one.asked_by is not None}

    def asked_again(self, request: int) -> None:
        """An open that an earlier server has not answered comes again: what it was to be given, the kernel has not."""
        handle = self._doubtful.pop(request, None)
        if handle is not None:
            self.release(handle)

    def all_asked_again(self) -> None:
        """What an earlier server has not answered has come again: the kernel has all that is left."""
        for handle in self._doubtful.values():
            self._handles.taken(handle)
        self._doubtful.clear()

    async def read(self, handle: int, offset: int, size: int) -> Buffer:
        """At most *size* bytes of an open file from *offset* on; fewer only at its end.

        Raises ObjectChangedError when bytes that are not here belong to a content that the store no longer has.
        """
        control = self._handles.controls.get(handle)
        if control is not None:
            return await control.read(offset, size)
        file = self._handles.files.get(handle)
        if file is None:
            raise LookUpAgainError(f"handle {handle} is not known")
        stop = min(offset + size, file.blob.generation.size)
        if offset >= stop:
            return b""
        try:
            data = await self._trusted(file.blob, partial(self._fetcher.read, file.blob, offset, stop))
        except ObjectChangedError:
            self._replaced(file.inode)
            raise
        self._reads += 1
        self._read_bytes += len(data)
        return data

    async def _trusted(self, blob: Blob, read: Callable[[], Awaitable[T]]) -> T:
        """What is read of an open file, once it has been compared with whatever it is to be compared with."""
        read = partial(self._cold_opener.read, blob, read)
        data = await read()
        if self._signature_policy is not None and not await self._signature_policy.stands(blob):
            data = await self._signature_policy.read(blob, read)
        return data

    def release(self, handle: int) -> None:
        """The last reference to an open file, mappings included, or directory is gone."""
        file = self._handles.remove(handle)
        self._sent_back.not_answered(handle)
        if file is None:
            return
        if not passed_through(handle):
            self._fetcher.unhold(file.blob)
        self._derived.closed(handle)
        self._control.gpu.closed(handle)
        self._disk.release(file.blob)

    def _replaced(self, inode: Inode) -> None:
        if inode.replaced:
            return
        inode.replaced = True
        log.info("/%s has been replaced in the store", inode.path)
        self._namespace.replaced(inode.path)
        self._look_up_again(inode.path)

    def _look_up_again(self, path: str) -> None:
        """Have the kernel forget what it knows of a name."""
        prefix, _, name = path.rpartition("/")
        directory = self._namespace.reference(InodeKind.DIRECTORY, prefix and f"{prefix}/")
        self._invalidate(directory.number, os.fsencode(name))
        self._namespace.discard(directory)

    # Attributes

    async def xattr(self, number: int, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an extended attribute; None when there is no such attribute, or not for the caller."""
        inode = self._namespace.inode(number)
        short = name.removeprefix(XATTR_PREFIX)
        if self._signature_policy is not None and inode.generation is not None and shows_content(short):
            await self._signature_policy.admit_file(inode.generation, nullcontext)
        return await self._control.xattr(inode, name, caller)

    async def residency(self, number: int) -> tuple[int, int, int, int]:
        """What of a file is here: its size, bytes on disk, bytes in memory and flags, as in ``trimsfs.h``."""
        inode = self._namespace.inode(number)
        if inode.kind is not InodeKind.OBJECT or inode.generation is None:
            raise NoSuchEntryError(f"{inode.path} is no model file")
        here = await self._disk.residency(inode.generation)
        host = UNKNOWN if here.host_bytes is None else here.host_bytes
        flags = (
            (IS_VERIFIED if here.verified else 0)
            | (IS_PASSTHROUGH if self._passthrough.has(inode.generation) else 0)
            | (IS_PINNED if here.pinned else 0)
        )
        return inode.generation.size, here.disk_bytes, host, flags

    def state(self, handle: int) -> int:
        """Whether every byte of an open file is here and has been checked, and whether the mount tells what it has in
        common with others: flags as in ``trimsfs.h``."""
        file = self._handles.files.get(handle)
        verified = IS_VERIFIED if file is not None and file.blob.complete else 0
        return verified | (TELLS_COMMON if self._control.tells_common else 0)

    async def derive(self, handle: int, piece: Piece) -> None:
        """Take a piece of what was made of an open file. Raises as `DerivedBlobs.take`."""
        file = self._handles.files.get(handle)
        if file is None or file.inode.control:
            raise InvalidRequestError("not a model's file")
        await self._derived.take(file.blob.generation, handle, piece)

    async def lend(self, handle: int, uid: int, pid: int, device: str, memory: MemoryKind) -> IoctlAnswer:
        """Load a copy of an open file to a GPU, and keep it for as long as the file is open."""
        file = self._handles.files.get(handle)
        if file is None:
            raise InvalidRequestError("not a model's file")
        await self._trusted(file.blob, _nothing)
        lent = await self._control.gpu.lend(file.blob.generation, handle, uid, pid, device, memory)
        if handle not in self._handles.files:  # it has been closed meanwhile
            self._control.gpu.closed(handle)
        return lent

    def xattr_names(self, number: int) -> list[str]:
        return self._control.xattr_names(self._namespace.inode(number))

    def space(self) -> tuple[int, int]:
        """Bytes of models that fit on disk, and how many more of them."""
        free = self._disk.free_bytes()
        return self._disk.statistics().used_bytes + free, free


async def _nothing() -> None:
    """What there is to be read is waited for, and no more."""
