"""CRC checksums of bytes in memory. The only home of awscrt, whose CRC32C is the fastest of those measured."""

from typing import Protocol

from awscrt import checksums

from trimsfs.types import Buffer


class Crc(Protocol):
    """A CRC of bytes that follow others, whose CRC is *previous*. It lets other threads run meanwhile."""

    def __call__(self, data: Buffer, previous: int = 0, /) -> int: ...


crc32: Crc = checksums.crc32
crc32c: Crc = checksums.crc32c
crc64nvme: Crc = checksums.crc64nvme


def combine_crc32c(first: int, second: int, length: int) -> int:
    """The CRC32C of two pieces of bytes together, from those of each; *length* is the second one's, in bytes."""
    combined: int = checksums.combine_crc32c(first, second, length)
    return combined
