"""The mapped files under MXNet's arrays, and which parts of memory still equal the file."""

import io
import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimsfs.client import pages
from trimsfs.formats import BufferSource, Tensor, parse

files: "list[MappedFile]" = []
"""The currently mapped files."""


def register(path: Path, status: os.stat_result, mapping: mmap.mmap) -> "MappedFile":
    """Add a file of a mount to `files`, for as long as its mapping lives."""
    file = MappedFile(path, status, mapping)
    files.append(file)
    weakref.finalize(mapping, files.remove, file).atexit = False
    return file


class _Part(NamedTuple):
    """One mapping of the kernel: a part of memory, and the part of a file that is mapped there."""

    start: int
    end: int
    file: tuple[str, str, int]
    """The file's device and inode, and the address at which its first byte would be."""


class MappedFile:
    """One generation of a file of a mount, and where it is mapped."""

    def __init__(self, path: Path, status: os.stat_result, mapping: mmap.mmap) -> None:
        self.path, self.status = path, status
        self.start = pages.address_of(mapping)
        self._end = self.start + len(mapping)
        self.mapping = weakref.ref(mapping)
        # Computed on first use; the first result wins. No lock: a forked child could inherit it held.
        self._read: dict[str, Any] = {}

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors of the file; none after it has been unmapped."""
        cached: Sequence[Tensor] | None = self._read.get("tensors")
        if cached is None:
            mapping = self.mapping()
            tensors = () if mapping is None else parse(BufferSource(memoryview(mapping)), self.path.name).tensors
            cached = self._read.setdefault("tensors", tensors)
        return cached

    @property
    def parts(self) -> Sequence[_Part]:
        """The first mappings there: of the file, or of other files that share its blocks.

        Finding them takes longer than the rest of a load, so it happens later, but before folding changes anything.
        """
        cached: Sequence[_Part] | None = self._read.get("parts")
        if cached is None:
            cached = self._read.setdefault("parts", list(_parts(self.start, self._end)))
        return cached

    def open(self) -> io.FileIO:
        """Open the same generation again. Raises OSError, also when the path now leads to another."""
        file = self.path.open("rb", buffering=0)
        if not os.path.samestat(os.fstat(file.fileno()), self.status):
            file.close()
            raise FileNotFoundError(self.path)
        return file

    def unwritten(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors whose bytes in memory still equal the file. Raises OSError before Linux 6.7."""
        regions = {name: (self.start + of.offset, self.start + of.offset + of.nbytes) for name, of in tensors.items()}
        whole = {name: (a // pages.PAGE * pages.PAGE, pages.rounded(b)) for name, (a, b) in regions.items()}
        kept = [name for name in tensors if not pages.own(*whole[name])]
        unchanged = list(self._unchanged())  # after pages.own: folding replaces private pages by other files
        return {name: tensors[name] for name in kept if _covered(whole[name], unchanged)}

    def _unchanged(self) -> Iterator[pages.Region]:
        """The regions that still have their first mapping."""
        before = {part.start: part for part in self.parts}
        starts = sorted(before)
        for start, end, file in _parts(self.start, self._end):
            part = before[starts[bisect_right(starts, start) - 1]]
            if part.file == file:
                yield start, min(end, part.end)


def _parts(start: int, end: int) -> Iterator[_Part]:
    """The mappings of a part of memory, from ``/proc/self/maps``."""
    lines = Path("/proc/self/maps").read_bytes()
    for line in io.BytesIO(lines[max(0, lines.find(b"%08x-" % start)) :]):  # skip the lower addresses of a long file
        first = int(line[: line.index(b"-")], 16)
        if first >= end:
            return
        if start <= first:
            region, _, offset, device, inode = line.decode().split(maxsplit=5)[:5]
            yield _Part(first, int(region.partition("-")[2], 16), (device, inode, first - int(offset, 16)))


def _covered(region: pages.Region, parts: Sequence[pages.Region]) -> bool:
    """Whether *parts*, which do not overlap, cover a region."""
    return sum(max(0, min(region[1], end) - max(region[0], start)) for start, end in parts) == region[1] - region[0]
