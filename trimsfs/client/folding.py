"""Folding: what every process writes over a model's pages alike is had once, as a derived blob of the mount.

A derived blob tells which ranges of the model's file it replaces, and has their bytes. A process maps a range only when
it has compared each byte with what it has there itself, so nobody need be trusted but the server, which never changes a
blob that is there.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from trimsfs.client import pages
from trimsfs.client.pages import Region

STEP = 8 << 20
"""Bytes compared and mapped at a time: a few milliseconds."""
LEAST = 1 << 20
"""Bytes of a process's own that are worth a derived blob."""
NEAR = 64 << 10
"""Ranges that lie so near each other are one: fewer mappings."""
MOST_NUMBERS = 4
_MAGIC = b"TRIMSFS\1"
_HEADER, _RANGE = struct.Struct("=8sQ"), struct.Struct("=QQ")
_PIECE = struct.Struct("=QQII")
"""What stands before the data of a ``struct trimsfs_piece``, as in ``trimsfs/fuse/trimsfs.h``."""
_PIECE_DATA = 16352
_IOC_DERIVED = 1 << 30 | (_PIECE.size + _PIECE_DATA) << 16 | ord("t") << 8 | 0x72

Gate = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """Bytes of a mapping that were this process's own and are shared now, were passed to the mount, and are still its
    own."""

    shared: int
    passed_on: int
    own: int


class Foldable:
    """A private mapping of a model's file on a mount, whose inode number says which generation it is of."""

    def __init__(self, path: Path, inode: int, mapping: mmap.mmap) -> None:
        self.path = path
        self._inode = inode
        self._mapping = mapping
        self._start = pages.address_of(mapping)
        self._end = self._start + pages.rounded(len(mapping))

    def own(self) -> int:
        """Bytes of the mapping that are this process's own. Raises OSError where the kernel cannot tell."""
        return _total(self._own())

    def fold(self, gate: Gate = contextlib.nullcontext) -> Folded:
        """Share what is there to share, and pass on what is not. Within a *gate* nobody writes to the mapping.

        Raises OSError where the kernel cannot tell what is this process's own.
        """
        before, passed_on = self.own(), 0
        if before >= LEAST and self._is_of_now():
            number = self._share(0, gate)
            if number < MOST_NUMBERS and self.own() >= LEAST:
                passed_on = self._pass_on(number)
                self._share(number, gate)
        left = self.own()
        return Folded(shared=max(0, before - left), passed_on=passed_on, own=left)

    def _own(self) -> list[Region]:
        return pages.own(self._start, self._end)

    def _is_of_now(self) -> bool:
        """Whether the path still leads to what is mapped here."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except OSError:
            return False

    def _share(self, number: int, gate: Gate) -> int:
        """Map the derived blobs from this number on, as far as they are the same; the first number there is none of."""
        for present in range(number, MOST_NUMBERS):
            try:
                with self._derived(present).open("rb", buffering=0) as file:
                    self._map(file.fileno(), gate)
            except OSError:
                return present
        return MOST_NUMBERS

    def _derived(self, number: int) -> Path:
        return self.path.parent / ".trims" / self.path.name / f"derived-{os.geteuid()}-{number}"

    def _map(self, descriptor: int, gate: Gate) -> None:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as blob:
            address = pages.address_of(blob)
            for offset, length, at in _ranges(blob, self._end - self._start):
                for begin in range(0, length, STEP):
                    size = min(STEP, length - begin)
                    here = self._start + offset + begin
                    if pages.own(here, here + size):
                        with gate():
                            _map_equal(here, address, at + begin, size, descriptor)

    def _pass_on(self, number: int) -> int:
        """Pass the bytes that are this process's own to the mount; how many. None where another process does, or it
        cannot be done."""
        regions = _joined(self._own())
        try:
            with self.path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_ino != self._inode:
                    return 0
                for piece in _pieces(self._start, regions, number):
                    fcntl.ioctl(file.fileno(), _IOC_DERIVED, piece, True)  # bytes may be no longer than 1024
        except OSError as error:
            if error.errno in {errno.EBUSY, errno.ENOSPC, errno.EPERM, errno.ENOTTY}:
                return 0
            raise
        return _total(regions)


def _map_equal(here: int, blob: int, offset: int, size: int, descriptor: int) -> None:
    """Map what is at an offset of a blob over as many bytes here, or over those parts that are the same."""
    if pages.equal(here, blob + offset, size):
        pages.map_over(here, size, descriptor, offset)
    elif size > NEAR:
        half = pages.rounded(size // 2)
        for begin, length in ((0, half), (half, size - half)):
            if pages.own(here + begin, here + begin + length):
                _map_equal(here + begin, blob, offset + begin, length, descriptor)


def _total(regions: Iterable[Region]) -> int:
    return sum(end - start for start, end in regions)


def _joined(regions: Sequence[Region]) -> list[Region]:
    """Regions in order, those that are near each other made one."""
    joined: list[Region] = []
    for start, end in regions:
        if joined and start - joined[-1][1] <= NEAR:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def _ranges(blob: mmap.mmap, limit: int) -> Iterator[tuple[int, int, int]]:
    """Of each range in a derived blob: where it is in the model's file, its length, and where its bytes are.

    None of a blob that is not right.
    """
    if len(blob) < _HEADER.size:
        return
    magic, count = _HEADER.unpack_from(blob)
    at = pages.rounded(_HEADER.size + count * _RANGE.size)
    if magic != _MAGIC or at > len(blob):
        return
    for number in range(count):
        offset, length = _RANGE.unpack_from(blob, _HEADER.size + number * _RANGE.size)
        whole_pages = offset % pages.PAGE == length % pages.PAGE == 0
        if not whole_pages or offset + length > limit or at + length > len(blob):
            return
        yield offset, length, at
        at += length


def _pieces(start: int, regions: Sequence[Region], number: int) -> Iterator[bytearray]:
    """A derived blob of regions of a mapping that begins at *start*, as the ioctl takes it."""
    header = _HEADER.pack(_MAGIC, len(regions))
    header += b"".join(_RANGE.pack(first - start, last - first) for first, last in regions)
    header = header.ljust(pages.rounded(len(header)), b"\0")
    size, offset, data = len(header) + _total(regions), 0, bytearray()
    sources = [memoryview(header), *(pages.view(first, last) for first, last in regions)]
    for source in sources:
        for begin in range(0, len(source), _PIECE_DATA):
            data += source[begin : begin + _PIECE_DATA]
            while len(data) >= _PIECE_DATA:
                yield bytearray(_PIECE.pack(size, offset, _PIECE_DATA, number)) + data[:_PIECE_DATA]
                offset += _PIECE_DATA
                del data[:_PIECE_DATA]
    if data:
        yield bytearray(_PIECE.pack(size, offset, len(data), number)) + data.ljust(_PIECE_DATA, b"\0")
