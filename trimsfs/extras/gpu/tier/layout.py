"""Lays out a file's tensors in a device's memory, in batches for copying. Pure logic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trimsfs.formats.table import Tensor, TensorTable

ALIGNMENT = 256
"""Bytes: the alignment of CUDA's allocations, which kernels of its libraries expect."""
MOST_PARTS = 1000
"""The most parts of a run: one system call accepts 1024 buffers."""


class Part(NamedTuple):
    """``length`` bytes from offset ``source`` of the file go to ``offset`` of the copy."""

    source: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Run:
    """Parts that are contiguous in the file."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        """Offset in the file of the first byte."""
        return self.parts[0].source

    @property
    def stop(self) -> int:
        """Offset in the file behind the last byte."""
        return self.parts[-1].source + self.parts[-1].length


@dataclass(frozen=True, slots=True)
class Batch:
    """The bytes ``[offset, offset + length)`` of the copy, which one transfer copies to the device."""

    offset: int
    length: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The contents of a copy: ``nbytes`` bytes. ``format`` is the file's, or None for the image of an unknown format.

    The offsets of ``tensors`` are in the copy. ``parts``, in order of offset, map the copy to the file.
    """

    format: str | None
    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    nbytes: int

    def batches(self, size: int) -> Iterator[Batch]:
        """The whole copy in batches of at most *size* bytes, a multiple of ALIGNMENT."""
        waiting: list[Part] = []
        for part in self.parts:
            begin, left = part.offset, part.length
            while left:
                if waiting and begin + 1 > waiting[0].offset + size:
                    yield _batch(waiting)
                    waiting = []
                first = waiting[0].offset if waiting else begin
                length = min(left, first + size - begin)
                waiting.append(Part(part.source + begin - part.offset, begin, length))
                begin, left = begin + length, left - length
        if waiting:
            yield _batch(waiting)


def lay_out(table: TensorTable | None, size: int) -> Layout:
    """The layout of a file of *size* bytes: its tensors in file order or, without a *table*, its image.

    It leaves out tensors in other files. Each tensor begins at a multiple of ALIGNMENT, unless it overlaps another:
    then both overlap in the copy as in the file.
    """
    if table is None:
        return Layout(format=None, tensors=(), parts=(Part(0, 0, size),) if size else (), nbytes=size)
    inside = [tensor for tensor in table.tensors if tensor.file is None]
    parts: list[Part] = []
    places: dict[tuple[int, int], int] = {}
    for tensor in sorted(inside, key=lambda tensor: tensor.offset):
        begin, end = tensor.offset, tensor.offset + tensor.nbytes
        last = parts[-1] if parts else Part(0, 0, 0)
        known = last.source + last.length
        if tensor.nbytes and begin < known:  # it overlaps the one before
            parts[-1] = last._replace(length=max(end, known) - last.source)
        elif tensor.nbytes:
            parts.append(Part(begin, -(-(last.offset + last.length) // ALIGNMENT) * ALIGNMENT, tensor.nbytes))
        part = parts[-1] if tensor.nbytes else Part(begin, 0, 0)
        places[begin, tensor.nbytes] = part.offset + begin - part.source
    tensors = tuple(tensor._replace(offset=places[tensor.offset, tensor.nbytes]) for tensor in inside)
    nbytes = parts[-1].offset + parts[-1].length if parts else 0
    return Layout(format=table.format, tensors=tensors, parts=tuple(parts), nbytes=nbytes)


def _batch(parts: list[Part]) -> Batch:
    runs: list[list[Part]] = []
    for part in parts:
        last = runs[-1][-1] if runs else None
        if last is None or last.source + last.length != part.source or len(runs[-1]) == MOST_PARTS:
            runs.append([])
        runs[-1].append(part)
    first, last = parts[0], parts[-1]
    return Batch(first.offset, last.offset + last.length - first.offset, tuple(Run(tuple(run)) for run in runs))
