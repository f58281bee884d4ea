"""Folding: processes that write the same bytes over a model's pages share one copy, a derived blob of the mount.

A derived blob lists the ranges of the model's file that it replaces, and holds their bytes. A process maps a range only
after it has compared every byte with its own. So it trusts only the server, which never changes an existing blob.
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
from trimsfs.client.shared_blocks import control_file, similar_model

STEP = 8 << 20
"""Bytes compared and mapped at a time: a few milliseconds."""
LEAST = 1 << 20
"""The fewest private bytes worth folding, and the shortest equal range worth mapping."""
NEAR = 64 << 10
"""Ranges with a gap of at most this many bytes are merged, to save mappings."""
MOST_RANGES = 1000
MOST_MAPPINGS = 20_000
"""A process with this many mappings stops folding: the kernel allows 65,530."""
MOST_NUMBERS = 4
_MAGIC = b"TRIMSFS\1"
_HEADER, _RANGE = struct.Struct("=8sQ"), struct.Struct("=QQ")
_PIECE = struct.Struct("=QQII")
"""The header of a ``struct trimsfs_piece``, as in ``trimsfs/fuse/trimsfs.h``."""
_PIECE_DATA = 16352
_IOC_DERIVED = 1 << 30 | (_PIECE.size + _PIECE_DATA) << 16 | ord("t") << 8 | 0x72
_IOC_CALLER = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x73


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What folding did to a mapping, in bytes: now shared, uploaded to the mount, and still private."""

    shared: int
    passed_on: int
    own: int


def fold(mappings: Iterable[tuple[Path, int, mmap.mmap | bytes]]) -> Folded:
    """Fold mappings of models' files, each given by its path and inode number. Raises OSError before Linux 6.7."""
    done = [
        Foldable(path, inode, mapping).fold() for path, inode, mapping in mappings if isinstance(mapping, mmap.mmap)
    ]
    return Folded(
        shared=sum(each.shared for each in done),
        passed_on=sum(each.passed_on for each in done),
        own=sum(each.own for each in done),
    )


class Foldable:
    """A private mapping of a model's file on a mount; the inode number identifies the file's generation.

    With *within*, regions of memory in order of address, only whole pages inside them are folded, and each step lies in
    one region.
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
        """Private bytes of the mapping. Raises OSError before Linux 6.7."""
        return _total(self._own())

    def fold(
        self,
        execute: Callable[[Step], None] = native.execute,
        settled: Callable[[Sequence[Region]], bool] = lambda _regions: True,
    ) -> Folded:
        """Map equal ranges of derived blobs, and upload the rest once *settled* says that it no longer changes.

        *execute* must keep others from writing to a step's memory meanwhile. Raises OSError before Linux 6.7.
        """
        before, uploaded = self.own(), 0
        try:
            if before >= LEAST and self._is_current() and _mappings() < MOST_MAPPINGS:
                similar = similar_model(self.path)
                if similar is not None:  # its processes may have written the same bytes
                    self._share(similar, 0, execute)
                number = self._share(self.path, 0, execute)
                regions = _joined(self._own())
                if number < MOST_NUMBERS and _total(regions) >= LEAST and settled(regions):
                    uploaded = self._upload(number, regions)
                    self._share(self.path, number, execute)
        except OSError:
            pass  # the mount cannot serve or take derived blobs now
        left = self.own()
        return Folded(shared=max(0, before - left), passed_on=uploaded, own=left)

    def _own(self) -> list[Region]:
        return list(_intersection(pages.own(self._start, self._end), self._within))

    def _is_current(self) -> bool:
        """Whether the path still leads to the generation that is mapped. Raises OSError."""
        return os.stat(self.path).st_ino == self._inode

    def _share(self, path: Path, number: int, execute: Callable[[Step], None]) -> int:
        """Map the equal ranges of a model's derived blobs from *number* on; returns the first number without a blob.

        Raises OSError when a blob cannot be read.
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
        """The path of a derived blob, with the user id as the mount sees it, outside any container's user namespace.

        Raises OSError.
        """
        if self._user is None:
            with self.path.open("rb", buffering=0) as file:
                answer = bytearray(4)
                native.ioctl(file.fileno(), _IOC_CALLER, answer)
            self._user = int.from_bytes(answer, sys.byteorder)
        return control_file(path, f"derived-{self._user}-{number}")

    def _map(self, descriptor: int, execute: Callable[[Step], None]) -> None:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as blob:
            ranges = list(_ranges(blob, self._end - self._start))
        for offset, length, at in ranges:
            start = self._start + offset
            for first, last in _intersection([(start, start + length)], self._within):
                for here in range(first, last, STEP):
                    size = min(STEP, last - here)
                    if pages.own(here, here + size):
                        execute(Step(here, size, descriptor, at + here - start, LEAST))

    def _upload(self, number: int, regions: Sequence[Region]) -> int:
        """Upload the bytes of regions to the mount; returns their number.

        Raises OSError when the mount refuses them, for example while another process uploads the same blob.
        """
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


def _intersection(some: Sequence[Region], others: Sequence[Region]) -> Iterator[Region]:
    """The intersection of two lists of regions, each in order."""
    number = 0
    for start, end in some:
        while number < len(others) and others[number][1] <= start:
            number += 1
        at = number
        while at < len(others) and others[at][0] < end:
            yield max(start, others[at][0]), min(end, others[at][1])
            at += 1


def _joined(regions: Sequence[Region]) -> list[Region]:
    """Regions in order, merged across small gaps until there are at most MOST_RANGES."""
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
    """The ranges of a derived blob: offset in the model's file, length, offset of the bytes in the blob.

    Stops at the first range that is malformed.
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
    """The ioctl arguments that upload *regions* of a mapping, which begins at *start*, as derived blob *number*."""
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
