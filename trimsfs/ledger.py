"""The ledger: what the kernel has been told, in memory that outlives the server.

The keeper holds the descriptor of the memory and never looks inside; a server writes what its successor has to know:
the inodes and open files that the kernel goes on to use by their numbers, and the terms of the connection. Writing
takes no system call, so every lookup and every open can be recorded.

The memory is a row of slots, each ``size, kind, number, count, length, content``. A slot whose count is 0 is free to be
used again. A count is one aligned word, written last: a server that is killed between two instructions leaves a slot
that is either free or whole.
"""

import enum
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from trimsfs.errors import TakeoverError

_MAGIC = b"trimsfs1"
_SLOT = struct.Struct("=IIQQQ")
_COUNT = struct.Struct("=Q")
_COUNT_AT = 16
_GRAIN = 64
_GROWTH = 1 << 20
"""Bytes by which the memory grows; unused ones take no room."""


class Kind(enum.IntEnum):
    """What a slot is about; its number is an inode's, a file handle, a backing id or a thread's, and else 0."""

    CONNECTION = 1
    INODE = 2
    HANDLE = 3
    BACKING = 4
    SENT_BACK = 5
    OWNERSHIP = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A slot in use: where it begins, and what it holds."""

    slot: int
    kind: Kind
    number: int
    count: int
    content: bytes


class Ledger:
    """The slots in the memory of a descriptor, which is closed, or in memory of its own. For one thread."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("trimsfs-ledger")
        try:
            size = os.fstat(descriptor).st_size
            fresh = size == 0
            if fresh:
                size = _GROWTH
                os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)  # which keeps a descriptor of its own
        finally:
            os.close(descriptor)
        self._end = _GRAIN
        self._free: dict[int, list[int]] = {}
        if fresh:
            self._memory[: len(_MAGIC)] = _MAGIC
        elif self._memory[: len(_MAGIC)] != _MAGIC:
            raise TakeoverError("the ledger is of another version: unmount and mount again")
        self._entries = list(self._scan())

    def taken(self, kind: Kind) -> list[Entry]:
        """The entries of a kind that were there when this ledger was opened."""
        return [entry for entry in self._entries if entry.kind is kind]

    def forget_taken(self) -> None:
        """Let go of what `taken` gives."""
        self._entries.clear()

    def _scan(self) -> Iterator[Entry]:
        limit = len(self._memory)
        while self._end + _SLOT.size <= limit:
            slot = self._end
            size, kind, number, count, length = _SLOT.unpack_from(self._memory, slot)
            if size == 0:
                return
            if size % _GRAIN or slot + size > limit or length > size - _SLOT.size:
                raise TakeoverError(f"the ledger is damaged at byte {slot}: unmount and mount again")
            self._end += size
            if count == 0:
                self._free.setdefault(size, []).append(slot)
                continue
            content = self._memory[slot + _SLOT.size : slot + _SLOT.size + length]
            yield Entry(slot=slot, kind=Kind(kind), number=number, count=count, content=content)

    def add(self, kind: Kind, number: int, content: bytes, *, count: int = 1) -> int:
        """Record something, with a count above 0; its slot."""
        size = -(-(_SLOT.size + len(content)) // _GRAIN) * _GRAIN
        free = self._free.get(size)
        slot = free.pop() if free else self._append(size)
        _SLOT.pack_into(self._memory, slot, size, kind, number, 0, len(content))
        self._memory[slot + _SLOT.size : slot + _SLOT.size + len(content)] = content
        _COUNT.pack_into(self._memory, slot + _COUNT_AT, count)
        return slot

    def set(self, slot: int, count: int) -> None:
        """Change the count of a slot; 0 gives it up."""
        _COUNT.pack_into(self._memory, slot + _COUNT_AT, count)
        if count == 0:
            (size,) = struct.unpack_from("=I", self._memory, slot)
            self._free.setdefault(size, []).append(slot)

    def _append(self, size: int) -> int:
        slot = self._end
        if slot + size > len(self._memory):
            self._memory.resize(len(self._memory) + max(size, _GROWTH))
        self._end += size
        return slot

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
