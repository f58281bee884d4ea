"""Handles: what the kernel has open, for the next server to take over."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.control.handle import ControlHandle
from trimsfs.errors import StaleHandleError
from trimsfs.fetch.bypass import AccessPattern
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.namespace.inodes import Inode, InodeKind, Inodes
from trimsfs.namespace.listing import Listing
from trimsfs.telemetry.open_trace import OpenTrace
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

BACKING_SHIFT = 32
"""The upper half of a file handle is the backing id of the local file that the kernel reads; 0 in cached mode."""
_HANDLE, _INODE_SIZE = struct.Struct("=QQ"), 8
"""The content of a handle's ledger record: the inode's number, and the kernel's number of the open request."""
_MADE, _OFFERED, _DELIVERED = 1, 2, 3
"""The count of a handle's ledger record: the kernel does not know the handle, is about to get it, or has it."""
_RESERVE = 1 << 16
"""Handle numbers reserved at a time, so that no server reuses the numbers of one that died."""


@dataclass(slots=True)
class OpenFile:
    """An open file, and the blob that is kept for it.

    ``thread`` opened it, 0 if unknown. ``reopened_by`` is the thread that reopened it, until the kernel has the handle.
    ``pattern`` describes its reads, from the first that the server answers. ``trace`` is that of its open, while its
    bytes arrive.
    """

    inode: Inode
    blob: Blob
    thread: int = 0
    reopened_by: int | None = None
    pattern: AccessPattern | None = None
    trace: OpenTrace | None = None


@dataclass(slots=True)
class OpenDirectory:
    """An open directory. ``entries`` is None if an earlier server opened it, until it is listed again."""

    inode: Inode
    entries: Listing | None


class _LostControl:
    """A control file that an earlier server opened: its command ended with that server."""

    async def read(self, offset: int, size: int) -> bytes:
        raise StaleHandleError("the control file was opened before the server was restarted: open it again")

    def close(self) -> None:
        """Do nothing: no command is left to end."""


def passed_through(handle: int) -> bool:
    """Whether the kernel reads the local file of a handle by itself."""
    return handle >> BACKING_SHIFT != 0


class Handles:
    """Everything that is open. A handle is in the ledger before the kernel gets it, and no handle is used twice.

    A handle that an earlier server offered is unconfirmed: `resent` returns it to be released, `all_resent` confirms
    it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._slots: dict[int, int] = {}
        self._unconfirmed: dict[int, int] = {}
        self.files: dict[int, OpenFile] = {}
        self.controls: dict[int, ControlHandle] = {}
        self.directories: dict[int, OpenDirectory] = {}
        before = ledger.inherited(RecordKind.HANDLE_NUMBERS)
        self._next = self._reserved = before[0].count if before else 1
        self._numbers = before[0].slot if before else ledger.add(RecordKind.HANDLE_NUMBERS, 0, b"", count=1)

    def add_file(self, file: OpenFile, *, passed: bool) -> int:
        """Make the handle of a file that is being opened, and *passed* through or not."""
        handle = self.made(file.inode, file.blob) if passed else self._new(file.inode)
        self.add(handle, file)
        return handle

    def made(self, inode: Inode, blob: Blob) -> int:
        """Make a handle for a possible open that is passed through: call `add` when it happens, `remove` when it will
        not."""
        return self._new(inode, blob.backing_id)

    def add(self, handle: int, file: OpenFile) -> None:
        """Record that a file is open by the handle made for it."""
        self.files[handle] = file
        file.inode.opened = True
        file.blob.handles += 1

    def names(self, blob: Blob) -> list[Generation]:
        """The generations by which programs have a blob open, each with the key of the file that they opened."""
        inodes = (file.inode for file in self.files.values() if file.blob is blob)
        return [inode.generation for inode in inodes if inode.generation is not None]

    def add_control(self, inode: Inode, control: ControlHandle) -> int:
        """Make the handle of a control file that is being opened."""
        handle = self._new(inode)
        self.controls[handle] = control
        return handle

    def add_directory(self, inode: Inode, entries: Listing) -> int:
        """Make the handle of a directory that is being opened."""
        handle = self._new(inode)
        self.directories[handle] = OpenDirectory(inode, entries)
        return handle

    def _new(self, inode: Inode, backing_id: int = 0) -> int:
        while True:
            if self._next == self._reserved:
                self._reserved += _RESERVE
                self._ledger.set_count(self._numbers, self._reserved)
            number = self._next % (1 << BACKING_SHIFT)
            handle = backing_id << BACKING_SHIFT | number
            self._next += 1
            if number and handle not in self._slots:  # numbers begin anew one day, and some files stay open
                break
        # The 0 is room for the number of the open request, which is not known until the answer.
        self._slots[handle] = self._ledger.add(RecordKind.HANDLE, handle, _HANDLE.pack(inode.number, 0), count=_MADE)
        return handle

    def offered(self, handle: int, request: int) -> None:
        """Record that the kernel is about to get a handle as the answer to *request*; 0 if its number is not known."""
        slot = self._slots.get(handle)
        if slot is not None:
            self._ledger.set_word(slot, _INODE_SIZE, request)
            self._ledger.set_count(slot, _OFFERED)

    def delivered(self, handle: int) -> None:
        """Record that the kernel has got a handle."""
        slot = self._slots.get(handle)
        if slot is not None:
            self._ledger.set_count(slot, _DELIVERED)

    def resent(self, request: int) -> int | None:
        """Return the handle that an earlier server made for an open that the kernel sends again; None if none."""
        return self._unconfirmed.pop(request, None)

    def all_resent(self) -> None:
        """Confirm all other handles: the kernel has sent again every open without an answer."""
        for handle in self._unconfirmed.values():
            self.delivered(handle)
        self._unconfirmed.clear()

    def remove(self, handle: int) -> OpenFile | None:
        """Remove a handle that nobody has any more. Returns its open file; None for any other handle."""
        slot = self._slots.pop(handle, None)
        if slot is not None:
            self._ledger.set_count(slot, 0)
        control = self.controls.pop(handle, None)
        if control is not None:
            control.close()
        self.directories.pop(handle, None)
        file = self.files.pop(handle, None)
        if file is not None:
            file.blob.handles -= 1
        return file

    def restore(
        self, inodes: Inodes, restored: Callable[[Inode, int], ControlHandle | None] = lambda *_: None
    ) -> dict[int, Inode]:
        """Take over what the kernel has open, or may have, since before this server started. Returns inodes by handle.

        The caller finds the blobs of files and fills ``files``. *restored* returns a control file that goes on, else
        None.
        """
        by_handle = {}
        for record in self._ledger.inherited(RecordKind.HANDLE):
            number, request = _HANDLE.unpack(record.content)
            handle, inode = record.number, inodes.get(number)
            if inode is None or record.count == _MADE:  # the kernel never got it
                self._ledger.set_count(record.slot, 0)
                continue
            self._slots[handle] = record.slot
            if inode.kind is InodeKind.CONTROL_FILE:
                self.controls[handle] = restored(inode, handle) or _LostControl()
            elif inode.kind is not InodeKind.OBJECT:
                self.directories[handle] = OpenDirectory(inode, None)
            if record.count == _OFFERED and request:
                self._unconfirmed[request] = handle
            inode.opened = True
            by_handle[handle] = inode
        return by_handle
