"""What the kernel has open, by the handles it names it with; a server's successor goes on with them."""

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from trimsfs.errors import LookUpAgainError
from trimsfs.ledger import Kind as LedgerKind
from trimsfs.ledger import Ledger
from trimsfs.namespace import Entry, Inode, Kind, Namespace
from trimsfs.tiers.blob import Blob

BACKING_SHIFT = 32
"""The upper half of a file handle is the backing id that the kernel passes its reads to, 0 in cached mode."""
_INODE = struct.Struct("=Q")
_OFFERED, _TAKEN = 1, 2
"""Counts of a handle in the ledger: the kernel is about to be told of it, or has it."""


class ControlHandle(Protocol):
    """An open control file."""

    async def read(self, offset: int, size: int) -> bytes:
        """At most *size* bytes from *offset* on; none at the end."""

    def close(self) -> None:
        """The caller has closed the file."""


@dataclass(slots=True)
class OpenFile:
    """An open file. The ``blob`` is None where it is not known whether the kernel took the handle before an earlier
    server died: nothing is kept for it before it is used."""

    inode: Inode
    blob: Blob | None


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


class Handles:
    """Everything that is open. A handle is in the ledger before the kernel is told of it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._numbers = itertools.count(1)
        self._slots: dict[int, int] = {}
        self.files: dict[int, OpenFile] = {}
        self.controls: dict[int, ControlHandle] = {}
        self.directories: dict[int, OpenDirectory] = {}

    def add_file(self, inode: Inode, blob: Blob) -> int:
        """The handle of a file that is being opened, passed through if the inode is resident."""
        handle = self._new(inode, blob.backing_id if inode.resident else 0)
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
        while True:
            handle = backing_id << BACKING_SHIFT | next(self._numbers) % (1 << BACKING_SHIFT)
            if handle not in self._slots:
                break
        self._slots[handle] = self._ledger.add(LedgerKind.HANDLE, handle, _INODE.pack(inode.number), count=_OFFERED)
        return handle

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

    def restore(self, namespace: Namespace) -> Iterable[int]:
        """Take over what the kernel has open since before this server was started.

        Gives the handles of files that it is sure to have, whose blobs are still to be found.
        """
        held = []
        for entry in self._ledger.taken(LedgerKind.HANDLE):
            handle, inode = entry.number, namespace.known(_INODE.unpack(entry.content)[0])
            if inode is None:
                self._ledger.set(entry.slot, 0)
                continue
            self._slots[handle] = entry.slot
            if inode.kind is Kind.CONTROL_FILE:
                self.controls[handle] = _LostControl()
            elif inode.kind is Kind.OBJECT:
                self.files[handle] = OpenFile(inode, None)
                if entry.count == _TAKEN:
                    held.append(handle)
            else:
                self.directories[handle] = OpenDirectory(inode, None)
        return held
