"""CRC checksums of bytes in memory. Only this module imports awscrt, which has the fastest CRC32C measured."""

from typing import Protocol

from awscrt import checksums

from trimsfs.types import Buffer


class Crc(Protocol):
    """The CRC of bytes that follow others, whose CRC is *previous*. Releases the GIL."""

    def __call__(self, data: Buffer, previous: int = 0, /) -> int: ...


crc32: Crc = checksums.crc32
crc32c: Crc = checksums.crc32c
crc64nvme: Crc = checksums.crc64nvme


def combine_crc32c(first: int, second: int, length: int) -> int:
    """The CRC32C of two pieces in a row, from the CRC32C of each; *length* is that of the second piece, in bytes."""
    combined: int = checksums.combine_crc32c(first, second, length)
    return combined
