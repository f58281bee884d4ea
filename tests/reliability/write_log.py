"""What a disk holds when its power is cut at any moment: from the log of its writes, which QEMU keeps (blklogwrites).

The log has the format of dm-log-writes. A disk with a volatile cache keeps what was written before the last flush that
has ended, what was written with FUA, and any part of what came later.
"""

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


class Kind(IntFlag):
    """What an entry of the log is, as in the kernel's dm-log-writes."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to a disk: *size* bytes for *offset*, which the log has at *place*."""

    kind: Kind
    offset: int
    size: int
    place: int


def logged(log: Path) -> int:
    """How many requests a log has by now."""
    with log.open("rb") as file:
        header = file.read(_SUPER.size)
    if len(header) < _SUPER.size:
        return 0
    magic, version, count, _ = _SUPER.unpack(header)
    assert (magic, version) == (MAGIC, 1), f"{log}: no log of writes"
    return int(count)


def entries(log: Path) -> Iterator[Entry]:
    """The requests of a log in their order."""
    with log.open("rb") as file:
        *_, sector = _SUPER.unpack(file.read(_SUPER.size))
        place = sector
        for _ in range(logged(log)):
            file.seek(place)
            first, sectors, flags, data = _ENTRY.unpack(file.read(_ENTRY.size))
            kind = Kind(flags & 15)
            place += sector
            yield Entry(kind, first * sector, sectors * sector, place)
            place += data if Kind.MARK in kind else 0 if Kind.DISCARD in kind else sectors * sector


class Disk:
    """A disk as its log goes on: *image* is what it held when the log began, and later what is flushed."""

    def __init__(self, log: Path, image: Path) -> None:
        self._log = log.open("rb")
        self._image = image.open("r+b")
        self._entries = list(entries(log))
        self._done = 0
        self._unflushed: list[Entry] = []

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._image.close()

    def __len__(self) -> int:
        return len(self._entries)

    def go_on(self, count: int) -> None:
        """Have the first *count* requests come to the disk."""
        for entry in self._entries[self._done : count]:
            if Kind.FLUSH in entry.kind:
                self._settle()
            if entry.size and not entry.kind & (Kind.DISCARD | Kind.MARK):  # a disk may ignore what is discarded
                self._unflushed.append(entry)
        self._done = count

    def cut(self, target: Path, draw: random.Random) -> None:
        """What is left when the power is cut now: a copy of the image with some of what is not flushed."""
        kept = self._chosen(draw)
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _copy_sparsely(self._image.fileno(), descriptor)
            for entry in kept:
                self._write(descriptor, entry)
        finally:
            os.close(descriptor)

    def _chosen(self, draw: random.Random) -> list[Entry]:
        """What has come to the disk of what is not flushed: all, or a beginning, or anything, and what has FUA."""
        first = draw.choice((0, len(self._unflushed), draw.randrange(len(self._unflushed) + 1)))
        share = draw.choice((0.0, 0.5))
        return [
            entry
            for place, entry in enumerate(self._unflushed)
            if place < first or Kind.FUA in entry.kind or draw.random() < share
        ]

    def _settle(self) -> None:
        for entry in self._unflushed:
            self._write(self._image.fileno(), entry)
        self._unflushed.clear()

    def _write(self, descriptor: int, entry: Entry) -> None:
        os.pwrite(descriptor, os.pread(self._log.fileno(), entry.size, entry.place), entry.offset)


def _copy_sparsely(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.truncate(target, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return  # only a hole follows
        at = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < at:
            begin += os.copy_file_range(source, target, at - begin, begin, begin)
