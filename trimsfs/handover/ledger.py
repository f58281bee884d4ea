"""The ledger: what the kernel knows of the mount, recorded in memory that outlives the server.

The keeper holds the descriptor of the memory and never looks inside. A server records what the next one needs: inodes
and open files, which the kernel uses by their numbers, and the connection's settings. Recording takes no system call,
so a server records every lookup and every open.

The memory is a row of slots: the words ``size, kind, number, count, length``, then the content. A slot with a count of
0 is free for another record of its size. One instruction writes each word: the count last, and the size of a new slot
after it. So a server that is killed between two instructions leaves each slot either free or whole.
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
"""Changes when a server cannot read the ledgers of earlier versions."""
_MAGIC = int.from_bytes(b"trimsfs" + VERSION.encode(), "little")
_CAPACITY = 1 << 30
"""Bytes of the mapping; unused ones take no memory."""
_WORD, _HEAD, _GRAIN, _LARGE = 8, 40, 64, 4096
_SIZE, _KIND, _NUMBER, _COUNT, _LENGTH = range(5)
UNRECORDED = 0
"""The slot of a record that did not fit into a full ledger: the next server will not have it."""


class RecordKind(enum.IntEnum):
    """The kind of a record. Its number is that of an inode, handle, backing id, thread, process or copy, or 0."""

    CONNECTION = 1
    INODE = 2
    HANDLE = 3
    BACKING = 4
    REOPEN = 5
    OWNERSHIP = 6
    HANDLE_NUMBERS = 7
    GPU_COPY = 8
    GPU_LEASE = 9
    STORE_AWAY = 10
    JOB = 11
    ALIAS_TARGET = 12
    FLEET_OFF = 13
    QUARANTINE = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A slot in use: its offset, and what it holds."""

    slot: int
    kind: RecordKind
    number: int
    count: int
    content: bytes


class Ledger:
    """The slots in the memory of a *descriptor*, which this closes, or in new memory. Not thread-safe.

    Raises TakeoverError if the memory is damaged, or of another version.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("trimsfs-ledger")
        try:
            fresh = os.fstat(descriptor).st_size == 0
            if fresh:
                os.ftruncate(descriptor, _CAPACITY)
            self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)  # duplicates the descriptor
        finally:
            os.close(descriptor)
        self._words = memoryview(self._memory).cast("Q")
        self._end = _GRAIN
        self._free: dict[int, list[int]] = {}
        self._full = False
        if fresh:
            self._words[0] = _MAGIC
        elif self._words[0] != _MAGIC:
            raise TakeoverError("the ledger is of another version: unmount and mount again")
        self._records = list(self._scan())

    def inherited(self, kind: RecordKind) -> list[Record]:
        """The records of a kind that earlier servers left."""
        return [record for record in self._records if record.kind is kind]

    def forget_inherited(self) -> None:
        """Free the memory of what `inherited` returns."""
        self._records.clear()

    def _scan(self) -> Iterator[Record]:
        limit = len(self._memory)
        while self._end + _HEAD <= limit:
            slot = self._end
            size, kind, number, count, length = self._words[slot // _WORD : slot // _WORD + 5]
            if size == 0:
                # A server that died in `add` has left a part of the content: no later one must read it as a head.
                torn = min(slot + _HEAD + length, limit)
                self._memory[slot:torn] = bytes(torn - slot)
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
        """Add a record with a count above 0; its slot, UNRECORDED if the ledger is full."""
        size = -(-(_HEAD + len(content)) // _GRAIN) * _GRAIN
        if size > _LARGE:
            size = 1 << (size - 1).bit_length()  # few sizes, so that others can reuse the slot
        free = self._free.get(size)
        slot = free.pop() if free else self._end
        if slot + size > len(self._memory):
            if not self._full:
                self._full = True  # logged once: each lookup and open comes here
                log.warning("the ledger is full: the next server will not know of all open files")
            return UNRECORDED
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

    def set_word(self, slot: int, offset: int, word: int) -> None:
        """Change a word of a slot's content, at an offset that is a multiple of 8."""
        if slot != UNRECORDED:
            self._words[(slot + _HEAD + offset) // _WORD] = word

    def set_count(self, slot: int, count: int) -> None:
        """Change the count of a slot; 0 frees it."""
        if slot == UNRECORDED:
            return
        self._words[slot // _WORD + _COUNT] = count
        if count == 0:
            self._free.setdefault(self._words[slot // _WORD + _SIZE], []).append(slot)

    def close(self) -> None:
        """Unmap the memory."""
        self._words.release()
        self._memory.close()
