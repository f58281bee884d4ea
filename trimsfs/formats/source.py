"""Reads a file in pieces, within its size, and at most HEADER_LIMIT bytes in all."""

import functools
import struct
from typing import NoReturn, Protocol

from trimsfs.formats.table import FormatError

HEADER_LIMIT = 32 << 20
"""The most bytes of a file that may describe its tensors."""
COST = 16
"""Bytes that each piece counts besides its own, to limit time as well."""
BLOCK = 64 << 10
"""Bytes read at a time."""

Bytes = bytes | memoryview


class Source(Protocol):
    """A file of ``size`` bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> Bytes:
        """The bytes ``[offset, offset + count)``, which lie in the file. Raises OSError."""


class BufferSource:
    """A file in memory, or a mapped file."""

    def __init__(self, buffer: Bytes) -> None:
        self._view = memoryview(buffer)

    @property
    def size(self) -> int:
        return len(self._view)

    def read(self, offset: int, count: int) -> Bytes:
        return self._view[offset : offset + count]


@functools.lru_cache(maxsize=256)
def _little_endian(layout: str) -> struct.Struct:
    return struct.Struct(f"<{layout}")


class Cursor:
    """Reads a source from an offset on, block by block.

    Raises FormatError at the end of the source, and when all cursors made from one by `at` have together read more than
    HEADER_LIMIT. Each piece counts COST bytes more than its size.
    """

    def __init__(self, source: Source, offset: int = 0) -> None:
        self._source = source
        self._size = source.size
        self._budget = _Budget(HEADER_LIMIT)
        self._block: Bytes = b""
        self._block_offset = 0
        self.offset = offset

    def at(self, offset: int) -> "Cursor":
        """A cursor at another offset, which counts against the same limit."""
        other = Cursor(self._source, offset)
        other._budget, other._block, other._block_offset = self._budget, self._block, self._block_offset
        return other

    def take(self, count: int) -> Bytes:
        """The next *count* bytes."""
        begin = self._next(count)
        return self._block[begin : begin + count]

    def skip(self, count: int) -> None:
        """Skip *count* bytes without reading them."""
        self._check(count)
        self.offset += count

    def unpack(self, layout: str) -> tuple[int, ...]:
        """The next integers, little-endian, by a format string of struct."""
        fields = _little_endian(layout)
        begin = self._next(fields.size)
        return fields.unpack_from(self._block, begin)

    def _next(self, count: int) -> int:
        """Load and skip the next *count* bytes; returns where they begin in the block."""
        begin = self.offset - self._block_offset
        if begin < 0 or count < 0 or begin + count > len(self._block):
            self._check(count)
            if count + COST > self._budget.left:  # check before reading
                self._budget.exceeded()
            length = min(max(count, BLOCK), self._size - self.offset)
            self._block, self._block_offset, begin = self._source.read(self.offset, length), self.offset, 0
        self._budget.left -= count + COST
        if self._budget.left < 0:
            self._budget.exceeded()
        self.offset += count
        return begin

    def _check(self, count: int) -> None:
        if not 0 <= count <= self._size - self.offset:
            raise FormatError(f"{count} bytes at {self.offset} exceed the file of {self._size} bytes")

    def number(self, layout: str) -> int:
        """The next integer."""
        return self.unpack(layout)[0]

    def text(self, length: int) -> str:
        """The next *length* bytes as UTF-8."""
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"the text at {self.offset - length} is not UTF-8") from None


class _Budget:
    """The bytes that may still be read, shared by cursors."""

    def __init__(self, left: int) -> None:
        self.left = left

    def exceeded(self) -> NoReturn:
        raise FormatError(f"the description of the tensors exceeds {HEADER_LIMIT >> 20} MiB")
