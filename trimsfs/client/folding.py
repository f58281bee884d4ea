"""Folding: what every process writes over a model's pages alike is had once, as a derived blob of the mount.

A derived blob tells which ranges of the model's file it replaces, and has their bytes. A process maps a range only when
it has compared each byte with what it has there itself, so nobody need be trusted but the server, which never changes a
blob that is there.
"""

import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimsfs.client import native, pages
from trimsfs.client.file_state import ensure_local
from trimsfs.client.native import Step
from trimsfs.client.pages import Region
from trimsfs.client.shared_blocks import similar_model

STEP = 8 << 20
"""Bytes compared and mapped at a time: a few milliseconds."""
LEAST = 1 << 20
"""Bytes of a process's own that are worth a derived blob, and the least that are mapped at a time."""
NEAR = 64 << 10
"""Ranges that lie so near each other are one: fewer mappings."""
MOST_RANGES = 1000
MOST_MAPPINGS = 20_000
"""Of a process in all, before folding makes no more: the kernel allows 65,530."""
MOST_NUMBERS = 4
_MAGIC = b"TRIMSFS\1"
_HEADER, _RANGE = struct.Struct("=8sQ"), struct.Struct("=QQ")
_PIECE = struct.Struct("=QQII")
"""What stands before the data of a ``struct trimsfs_piece``, as in ``trimsfs/fuse/trimsfs.h``."""
_PIECE_DATA = 16352
_IOC_DERIVED = 1 << 30 | (_PIECE.size + _PIECE_DATA) << 16 | ord("t") << 8 | 0x72
_IOC_CALLER = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x73


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """Bytes of a mapping that were this process's own and are shared now, were passed to the mount, and are still its
    own."""

    shared: int
    passed_on: int
    own: int


class Foldable:
    """A private mapping of a model's file on a mount, whose inode number says which generation it is of.

    All of it is folded, or the whole pages *within* regions of memory, in order of address, of which each step lies in
    one.
    """

    def __init__(self, path: Path, inode: int, mapping: mmap.mmap, within: Sequence[Region] | None = None) -> None:
        self.path = path
        self._inode = inode
        self._mapping = mapping
        self._start = pages.address_of(mapping)
        self._end = self._start + pages.rounded(len(mapping))
        self._user: int | None = None
        inner = [(pages.rounded(start), end // pages.PAGE * pages.PAGE) for start, end in within or ()]
        self._within = [(self._start, self._end)] if within is None else [each for each in inner if each[0] < each[1]]

    def own(self) -> int:
        """Bytes of the mapping that are this process's own. Raises OSError where the kernel cannot tell."""
        return _total(self._own())

    def fold(
        self,
        execute: Callable[[Step], None] = native.execute,
        settled: Callable[[Sequence[Region]], bool] = lambda _regions: True,
    ) -> Folded:
        """Share what is there to share, and pass on what is not, once that is *settled*.

        Nobody writes to a step's part of memory while *execute* has it executed. Raises OSError where the kernel cannot
        tell what is this process's own.
        """
        before, passed_on = self.own(), 0
        try:
            if before >= LEAST and self._is_of_now() and _mappings() < MOST_MAPPINGS:
                relative = similar_model(self.path)
                if relative is not None:  # what it has rewritten may be the same
                    self._share(relative, 0, execute)
                number = self._share(self.path, 0, execute)
                regions = _joined(self._own())
                if number < MOST_NUMBERS and _total(regions) >= LEAST and settled(regions):
                    passed_on = self._pass_on(number, regions)
                    self._share(self.path, number, execute)
        except OSError:
            pass  # the mount does not give or take any more just now
        left = self.own()
        return Folded(shared=max(0, before - left), passed_on=passed_on, own=left)

    def _own(self) -> list[Region]:
        return list(_common(pages.own(self._start, self._end), self._within))

    def _is_of_now(self) -> bool:
        """Whether the path still leads to what is mapped here. Raises OSError."""
        return os.stat(self.path).st_ino == self._inode

    def _share(self, path: Path, number: int, execute: Callable[[Step], None]) -> int:
        """Map a model's derived blobs from this number on, as far as they are the same; the first there is none of.

        Raises OSError when one that is there cannot be read.
        """
        for present in range(number, MOST_NUMBERS):
            try:
                file = self._derived(path, present).open("rb", buffering=0)
            except OSError:
                return present
            with file:
                ensure_local(file)
                self._map(file.fileno(), execute)
        return MOST_NUMBERS

    def _derived(self, path: Path, number: int) -> Path:
        """The file of a derived blob; its name has the user's number as the mount knows it, from outside of a container
        say. Raises OSError."""
        if self._user is None:
            with self.path.open("rb", buffering=0) as file:
                answer = bytearray(4)
                native.ioctl(file.fileno(), _IOC_CALLER, answer)
            self._user = int.from_bytes(answer, sys.byteorder)
        return path.parent / ".trims" / path.name / f"derived-{self._user}-{number}"

    def _map(self, descriptor: int, execute: Callable[[Step], None]) -> None:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as blob:
            ranges = list(_ranges(blob, self._end - self._start))
        for offset, length, at in ranges:
            start = self._start + offset
            for first, last in _common([(start, start + length)], self._within):
                for here in range(first, last, STEP):
                    size = min(STEP, last - here)
                    if pages.own(here, here + size):
                        execute(Step(here, size, descriptor, at + here - start, LEAST))

    def _pass_on(self, number: int, regions: Sequence[Region]) -> int:
        """Pass what is in regions to the mount; how many bytes. Raises OSError when it is not taken, as when another
        process is at it."""
        with self.path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_ino != self._inode:
                return 0
            for piece in _pieces(self._start, regions, number):
                native.ioctl(file.fileno(), _IOC_DERIVED, piece)
        return _total(regions)


def _mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def _total(regions: Iterable[Region]) -> int:
    return sum(end - start for start, end in regions)


def _common(some: Sequence[Region], others: Sequence[Region]) -> Iterator[Region]:
    """What is in regions of both, which are in order."""
    number = 0
    for start, end in some:
        while number < len(others) and others[number][1] <= start:
            number += 1
        at = number
        while at < len(others) and others[at][0] < end:
            yield max(start, others[at][0]), min(end, others[at][1])
            at += 1


def _joined(regions: Sequence[Region]) -> list[Region]:
    """Regions in order, those that are near each other made one."""
    near = NEAR
    while True:
        joined: list[Region] = []
        for start, end in regions:
            if joined and start - joined[-1][1] <= near:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        if len(joined) <= MOST_RANGES:
            return joined
        near *= 2


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
