"""Finds the pages that this process has written to, which are private, and maps files over its memory."""

import ctypes
import fcntl
import mmap
import struct
from collections.abc import Iterator

from trimsfs.client.native import last_error, libc

Region = tuple[int, int]
"""Addresses ``[start, end)``."""

PAGE = mmap.PAGESIZE
_SCAN = struct.Struct("=12Q")
"""``struct pm_scan_arg``: size, flags, start, end, walk_end, vec, vec_len, max_pages, and the masks of categories:
inverted, all of, any of, returned."""
_PAGEMAP_SCAN = 3 << 30 | _SCAN.size << 16 | ord("f") << 8 | 16
_REGION = struct.Struct("=3Q")
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 1024
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)


def address_of(mapping: mmap.mmap) -> int:
    """The address at which a writable mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def rounded(size: int) -> int:
    """*size* rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def own(start: int, end: int) -> list[Region]:
    """The parts of a private file mapping that are private pages, because this process wrote to them.

    Raises OSError before Linux 6.7, which lacks PAGEMAP_SCAN.
    """
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return list(_scan(pagemap.fileno(), start, end))


def _scan(pagemap: int, start: int, end: int) -> Iterator[Region]:
    vector = ctypes.create_string_buffer(_REGIONS * _REGION.size)
    while start < end:
        argument = bytearray(
            _SCAN.pack(
                *(_SCAN.size, 0, start, end, 0),
                *(ctypes.addressof(vector), _REGIONS, 0),
                *(_FILE, _FILE, _PRESENT | _SWAPPED, _FILE),
            )
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument, True)
        for number in range(count):
            first, last, _ = _REGION.unpack_from(vector, number * _REGION.size)
            yield first, last
        start = _SCAN.unpack(argument)[4]


def view(start: int, end: int) -> memoryview:
    """The bytes of a region. The view does not keep the region mapped."""
    return memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B")


def map_over(start: int, size: int, descriptor: int, offset: int) -> None:
    """Map a part of a file privately in place of this process's memory. Raises OSError."""
    flags = mmap.MAP_PRIVATE | _MAP_FIXED
    address = libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)
    if address == _MAP_FAILED:
        raise last_error()
