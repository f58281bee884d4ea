"""What the kernel has open, by the handles it names it with; a server's successor goes on with them."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.control.handle import ControlHandle
from trimsfs.errors import LookUpAgainError
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.namespace.directory import Entry
from trimsfs.namespace.tree import Inode, InodeKind, Namespace
from trimsfs.tiers.blob import Blob

BACKING_SHIFT = 32
"""The upper half of a file handle is the backing id that the kernel passes its reads to, 0 in cached mode."""
_HANDLE, _INODE_SIZE = struct.Struct("=QQ"), 8
"""A handle in the ledger: the inode, and the kernel's number of the open."""
_MADE, _OFFERED, _TAKEN = 1, 2, 3
"""Counts of a handle in the ledger: the kernel knows nothing of it, is about to be told, or has it."""
_RESERVE = 1 << 16
"""Numbers of handles that are set apart at a time: those of a server that has died are not used again."""


@dataclass(slots=True)
class OpenFile:
    """An open file; its blob is kept for it."""

    inode: Inode
    blob: Blob


@dataclass(slots=True)
class OpenDirectory:
    """An open directory; ``entries`` is None when it was opened by an earlier server, and is to be listed again."""

    inode: Inode
    entries: list[tuple[bytes, Entry]] | None


class _LostControl:
    """A control file that an earlier server opened: its command has ended with that."""

    async def read(self, offset: int, size: int) -> bytes:
        raise LookUpAgainError("opened before the server was started again")

    def close(self) -> None:
        """Nothing goes on."""


def passed_through(handle: int) -> bool:
    """Whether the kernel reads the local file of a handle by itself."""
    return handle >> BACKING_SHIFT != 0


@dataclass(frozen=True, slots=True)
class Held:
    """A handle of an earlier server. ``asked_by`` is the kernel's number of the open, if it is not certain that it was
    answered: one that was not comes again."""

    handle: int
    inode: Inode
    asked_by: int | None


class Handles:
    """Everything that is open. A handle is in the ledger before the kernel is told of it, and never comes twice."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._slots: dict[int, int] = {}
        self.files: dict[int, OpenFile] = {}
        self.controls: dict[int, ControlHandle] = {}
        self.directories: dict[int, OpenDirectory] = {}
        before = ledger.taken(RecordKind.HANDLE_NUMBERS)
        self._next = self._reserved = before[0].count if before else 1
        self._numbers = before[0].slot if before else ledger.add(RecordKind.HANDLE_NUMBERS, 0, b"", count=1)

    def add_file(self, inode: Inode, blob: Blob) -> int:
        """The handle of a file that is being opened, passed through if the inode is resident."""
        handle = self._new(inode, blob.backing_id if inode.passthrough else 0)
        self.files[handle] = OpenFile(inode, blob)
        return handle

    def add_control(self, inode: Inode, control: ControlHandle) -> int:
        """The handle of a control file that is being opened."""
        handle = self._new(inode)
        self.controls[handle] = control
        return handle

    def add_directory(self, inode: Inode, entries: list[tuple[bytes, Entry]]) -> int:
        """The handle of a directory that is being opened."""
        handle = self._new(inode)
        self.directories[handle] = OpenDirectory(inode, entries)
        return handle

    def _new(self, inode: Inode, backing_id: int = 0) -> int:
        if self._next == self._reserved:
            self._reserved += _RESERVE
            self._ledger.set(self._numbers, self._reserved)
        handle = backing_id << BACKING_SHIFT | self._next % (1 << BACKING_SHIFT)
        self._next += 1
        # Room for the number of the open, which is known when it is answered.
        self._slots[handle] = self._ledger.add(RecordKind.HANDLE, handle, _HANDLE.pack(inode.number, 0), count=_MADE)
        return handle

    def offered(self, handle: int, request: int) -> None:
        """The kernel is about to get a handle as the answer to the open of this number, 0 where that is not known."""
        slot = self._slots.get(handle)
        if slot is not None:
            self._ledger.write(slot, _INODE_SIZE, request)
            self._ledger.set(slot, _OFFERED)

    def taken(self, handle: int) -> None:
        """The kernel has got a handle."""
        slot = self._slots.get(handle)
        if slot is not None:
            self._ledger.set(slot, _TAKEN)

    def remove(self, handle: int) -> OpenFile | None:
        """Nobody has a handle any more; the file that it was of, if it was one."""
        slot = self._slots.pop(handle, None)
        if slot is not None:
            self._ledger.set(slot, 0)
        control = self.controls.pop(handle, None)
        if control is not None:
            control.close()
        self.directories.pop(handle, None)
        return self.files.pop(handle, None)

    def restore(
        self, namespace: Namespace, restored: Callable[[Inode, int], ControlHandle | None] = lambda *_: None
    ) -> list[Held]:
        """Take over what the kernel has open since before this server was started, and may have.

        Of the files, the caller finds the blobs and puts them into ``files``; *restored* finds those of the control
        files that can be gone on with.
        """
        held = []
        for entry in self._ledger.taken(RecordKind.HANDLE):
            number, request = _HANDLE.unpack(entry.content)
            handle, inode = entry.number, namespace.known(number)
            if inode is None or entry.count == _MADE:  # the kernel has not heard of it
                self._ledger.set(entry.slot, 0)
                continue
            self._slots[handle] = entry.slot
            if inode.kind is InodeKind.CONTROL_FILE:
                self.controls[handle] = restored(inode, handle) or _LostControl()
            elif inode.kind is not InodeKind.OBJECT:
                self.directories[handle] = OpenDirectory(inode, None)
            held.append(Held(handle, inode, request if entry.count == _OFFERED and request else None))
        return held
