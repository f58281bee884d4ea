"""Files of a mount that MXNet's arrays have been made of: what they have, and where in memory that still is so."""

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
"""The files that arrays have been made of, as far as they are mapped."""


def register(path: Path, status: os.stat_result, mapping: mmap.mmap) -> "MappedFile":
    """Add a file of a mount to `files`, for as long as its mapping lives."""
    file = MappedFile(path, status, mapping)
    files.append(file)
    weakref.finalize(mapping, files.remove, file).atexit = False
    return file


class _Part(NamedTuple):
    """A part of memory, and the part of a file that is mapped there."""

    start: int
    end: int
    file: tuple[str, str, int]
    """Its device, its inode, and how far before that the file would begin."""


class MappedFile:
    """A file of a mount, which never changes, and where it is mapped."""

    def __init__(self, path: Path, status: os.stat_result, mapping: mmap.mmap) -> None:
        self.path, self.status = path, status
        self.start = pages.address_of(mapping)
        self._end = self.start + len(mapping)
        self.mapping = weakref.ref(mapping)
        # What is read when it is needed. No lock, which a process forked meanwhile would find held: the first counts.
        self._read: dict[str, Any] = {}

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Its arrays; none once it is mapped no more."""
        found: Sequence[Tensor] | None = self._read.get("tensors")
        if found is None:
            mapping = self.mapping()
            tensors = () if mapping is None else parse(BufferSource(memoryview(mapping)), self.path.name).tensors
            found = self._read.setdefault("tensors", tensors)
        return found

    @property
    def parts(self) -> Sequence[_Part]:
        """What is mapped there, some of it from other files with the same bytes.

        Reading this takes longer than all else of loading a model. It has been asked for before anything of that is
        folded, and so it never tells of what folding maps.
        """
        found: Sequence[_Part] | None = self._read.get("parts")
        if found is None:
            found = self._read.setdefault("parts", list(_parts(self.start, self._end)))
        return found

    def open(self) -> io.FileIO:
        """The same file. Raises OSError, also where the path leads to another by now."""
        file = self.path.open("rb", buffering=0)
        if not os.path.samestat(os.fstat(file.fileno()), self.status):
            file.close()
            raise FileNotFoundError(self.path)
        return file

    def unwritten(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tensors that are in memory what they are in the file.

        Raises OSError where the kernel cannot tell.
        """
        regions = {name: (self.start + of.offset, self.start + of.offset + of.nbytes) for name, of in tensors.items()}
        whole = {name: (a // pages.PAGE * pages.PAGE, pages.rounded(b)) for name, (a, b) in regions.items()}
        kept = [name for name in tensors if not pages.own(*whole[name])]
        unchanged = list(
            self._unchanged()
        )  # asked later, for folding maps other files where the process's own pages were
        return {name: tensors[name] for name in kept if _covered(whole[name], unchanged)}

    def _unchanged(self) -> Iterator[pages.Region]:
        """Where the same is mapped as at first."""
        before = {part.start: part for part in self.parts}
        starts = sorted(before)
        for start, end, file in _parts(self.start, self._end):
            part = before[starts[bisect_right(starts, start) - 1]]
            if part.file == file:
                yield start, min(end, part.end)


def _parts(start: int, end: int) -> Iterator[_Part]:
    """What is mapped in a part of memory."""
    lines = Path("/proc/self/maps").read_bytes()
    for line in io.BytesIO(lines[max(0, lines.find(b"%08x-" % start)) :]):  # they are many, and in order
        first = int(line[: line.index(b"-")], 16)
        if first >= end:
            return
        if start <= first:
            region, _, offset, device, inode = line.decode().split(maxsplit=5)[:5]
            yield _Part(first, int(region.partition("-")[2], 16), (device, inode, first - int(offset, 16)))


def _covered(region: pages.Region, parts: Sequence[pages.Region]) -> bool:
    """Whether parts, which do not overlap, cover a region."""
    return sum(max(0, min(region[1], end) - max(region[0], start)) for start, end in parts) == region[1] - region[0]
