"""The ledger: what the kernel has been told, in memory that outlives the server.

The keeper holds the descriptor of the memory and never looks inside; a server writes what its successor has to know:
the inodes and open files that the kernel goes on to use by their numbers, and the terms of the connection. Writing
takes no system call, so every lookup and every open can be recorded.

The memory is a row of slots, of words ``size, kind, number, count, length`` and content. A slot whose count is 0 is
free to be used again, in its size for ever. Every word is written by one instruction, the count last, and the size of a
new slot after that: a server that is killed between two instructions leaves each slot free or whole.
"""

import enum
import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from trimsfs.errors import TakeoverError

log = logging.getLogger(__name__)

VERSION = "2"
"""Changes when a server could not read what one of before has written."""
_MAGIC = int.from_bytes(b"trimsfs" + VERSION.encode(), "little")
_CAPACITY = 1 << 30
"""Bytes that can be used; those that are not take no memory."""
_WORD, _HEAD, _GRAIN, _LARGE = 8, 40, 64, 4096
_SIZE, _KIND, _NUMBER, _COUNT, _LENGTH = range(5)
NOWHERE = 0
"""The slot of what could not be recorded, because the ledger is full: a successor will not know of it."""


class RecordKind(enum.IntEnum):
    """What a slot is about; its number is an inode's, a file handle, a backing id, a thread's, a copy's, and else 0."""

    CONNECTION = 1
    INODE = 2
    HANDLE = 3
    BACKING = 4
    REOPEN = 5
    OWNERSHIP = 6
    HANDLE_NUMBERS = 7
    GPU_COPY = 8
    GPU_LEASE = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A slot in use: where it begins, and what it holds."""

    slot: int
    kind: RecordKind
    number: int
    count: int
    content: bytes


class Ledger:
    """The slots in the memory of a descriptor, which is closed, or in memory of its own. For one thread.

    Raises TakeoverError for memory that holds something else.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("trimsfs-ledger")
        try:
            fresh = os.fstat(descriptor).st_size == 0
            if fresh:
                os.ftruncate(descriptor, _CAPACITY)
            self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)  # with a descriptor of its own
        finally:
            os.close(descriptor)
        self._words = memoryview(self._memory).cast("Q")
        self._end = _GRAIN
        self._free: dict[int, list[int]] = {}
        if fresh:
            self._words[0] = _MAGIC
        elif self._words[0] != _MAGIC:
            raise TakeoverError("the ledger is of another version: unmount and mount again")
        self._records = list(self._scan())

    def taken(self, kind: RecordKind) -> list[Record]:
        """The records of a kind that were there when this ledger was opened."""
        return [record for record in self._records if record.kind is kind]

    def forget_taken(self) -> None:
        """Let go of what `taken` gives."""
        self._records.clear()

    def _scan(self) -> Iterator[Record]:
        limit = len(self._memory)
        while self._end + _HEAD <= limit:
            slot = self._end
            size, kind, number, count, length = self._words[slot // _WORD : slot // _WORD + 5]
            if size == 0:
                return
            if size % _GRAIN or slot + size > limit or length > size - _HEAD:
                raise TakeoverError(f"the ledger is damaged at byte {slot}: unmount and mount again")
            self._end += size
            if count == 0:
                self._free.setdefault(size, []).append(slot)
                continue
            content = self._memory[slot + _HEAD : slot + _HEAD + length]
            try:
                yield Record(slot=slot, kind=RecordKind(kind), number=number, count=count, content=content)
            except ValueError as error:
                raise TakeoverError(f"the ledger is of another version: {error}: unmount and mount again") from None

    def add(self, kind: RecordKind, number: int, content: bytes, *, count: int = 1) -> int:
        """Record something, with a count above 0; its slot."""
        size = -(-(_HEAD + len(content)) // _GRAIN) * _GRAIN
        if size > _LARGE:
            size = 1 << (size - 1).bit_length()  # or each would have a size that no other fits into
        free = self._free.get(size)
        slot = free.pop() if free else self._end
        if slot + size > len(self._memory):
            log.warning("the ledger is full: another server will not know all that is open")
            return NOWHERE
        words, at = self._words, slot // _WORD
        words[at + _KIND] = kind
        words[at + _NUMBER] = number
        words[at + _LENGTH] = len(content)
        self._memory[slot + _HEAD : slot + _HEAD + len(content)] = content
        words[at + _COUNT] = count
        if slot == self._end:
            words[at + _SIZE] = size
            self._end += size
        return slot

    def write(self, slot: int, offset: int, word: int) -> None:
        """Change a word of what a slot holds, at an offset that is a multiple of 8."""
        if slot != NOWHERE:
            self._words[(slot + _HEAD + offset) // _WORD] = word

    def set(self, slot: int, count: int) -> None:
        """Change the count of a slot; 0 gives it up."""
        if slot == NOWHERE:
            return
        self._words[slot // _WORD + _COUNT] = count
        if count == 0:
            self._free.setdefault(self._words[slot // _WORD + _SIZE], []).append(slot)

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._memory.close()
