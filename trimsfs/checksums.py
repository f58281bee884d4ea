"""CRC checksums. Only this module imports awscrt, which has the fastest CRC32C measured."""

import mmap
import os
from typing import Protocol

from awscrt import checksums

from trimsfs.types import Buffer


class Crc(Protocol):
    """The CRC of bytes that follow others, whose CRC is *previous*. Releases the GIL."""

    def __call__(self, data: Buffer, previous: int = 0, /) -> int: ...


_PIECE = 1 << 18

crc32: Crc = checksums.crc32
crc32c: Crc = checksums.crc32c
crc64nvme: Crc = checksums.crc64nvme


def crc32c_of_file(descriptor: int, start: int, stop: int) -> int | None:
    """The CRC32C of the bytes ``[start, stop)`` of a file; None if it ends before. Raises OSError."""
    buffer = memoryview(mmap.mmap(-1, _PIECE))  # O_DIRECT needs an aligned buffer and whole reads
    crc, offset = 0, start
    while offset < stop:
        count = min(os.preadv(descriptor, [buffer], offset), stop - offset)
        if count == 0:
            return None
        crc = crc32c(buffer[:count], crc)
        offset += count
    return crc


def combine_crc32c(first: int, second: int, length: int) -> int:
    """The CRC32C of two pieces in a row, from the CRC32C of each; *length* is that of the second piece, in bytes."""
    combined: int = checksums.combine_crc32c(first, second, length)
    return combined
