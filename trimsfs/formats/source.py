"""Reading a file piece by piece, never beyond its end and never more than a header may be long."""

import struct
from typing import Protocol

from trimsfs.formats.table import FormatError

HEADER_LIMIT = 32 << 20
"""Most bytes that all that describes the tensors of a file may take."""
BLOCK = 64 << 10
"""Bytes read at a time."""

Bytes = bytes | memoryview


class Source(Protocol):
    """A file of ``size`` bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> Bytes:
        """The bytes ``[offset, offset + count)``, all of which are in the file. Raises OSError."""


class BufferSource:
    """A file that is in memory or mapped."""

    def __init__(self, buffer: Bytes) -> None:
        self._view = memoryview(buffer)

    @property
    def size(self) -> int:
        return len(self._view)

    def read(self, offset: int, count: int) -> Bytes:
        return self._view[offset : offset + count]


class Cursor:
    """Reads on from a place in a source, block by block. Raises FormatError at the end and at HEADER_LIMIT."""

    def __init__(self, source: Source, offset: int = 0) -> None:
        self._source = source
        self._block: Bytes = b""
        self._block_offset = 0
        self._taken = 0
        self.offset = offset

    def take(self, count: int) -> Bytes:
        """The next *count* bytes."""
        if not 0 <= count <= self._source.size - self.offset:
            raise FormatError(f"{count} bytes are to follow at {self.offset}, but the file has {self._source.size}")
        self._taken += count
        if self._taken > HEADER_LIMIT:
            raise FormatError(f"its header is longer than {HEADER_LIMIT >> 20} MiB")
        begin = self.offset - self._block_offset
        if begin < 0 or begin + count > len(self._block):
            length = min(max(count, BLOCK), self._source.size - self.offset)
            self._block, self._block_offset, begin = self._source.read(self.offset, length), self.offset, 0
        self.offset += count
        return self._block[begin : begin + count]

    def skip(self, count: int) -> None:
        """Go on after *count* bytes that need not be read."""
        if not 0 <= count <= self._source.size - self.offset:
            raise FormatError(f"{count} bytes are to follow at {self.offset}, but the file has {self._source.size}")
        self.offset += count

    def unpack(self, layout: str) -> tuple[int, ...]:
        """The next integers, little-endian, by a format of struct."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def number(self, layout: str) -> int:
        """The next integer."""
        return self.unpack(layout)[0]

    def text(self, length: int) -> str:
        """The next *length* bytes as UTF-8."""
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"the name at {self.offset - length} is not UTF-8") from None
