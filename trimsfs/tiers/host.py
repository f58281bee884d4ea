"""The host tier: the page cache of the blobs, as far as the kernel tells and takes advice."""

import ctypes
import mmap
import os

MADV_POPULATE_READ = 22
_SYS_CACHESTAT = 451  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def resident_bytes(descriptor: int) -> int | None:
    """Bytes of a file that are in the page cache, in whole pages; None on a kernel before 6.5."""
    everything = _Range(0, 0)
    answer = _CacheStat()
    result = _libc.syscall(_SYS_CACHESTAT, descriptor, ctypes.byref(everything), ctypes.byref(answer), 0)
    return answer.cached * mmap.PAGESIZE if result == 0 else None


def populate(descriptor: int, start: int, stop: int) -> None:
    """Read the bytes ``[start, stop)`` of a file into the page cache; *start* is a multiple of the page size.

    Blocks until they are there. Raises OSError.
    """
    with mmap.mmap(descriptor, stop - start, prot=mmap.PROT_READ, offset=start) as mapping:
        try:
            mapping.madvise(MADV_POPULATE_READ)
        except OSError:
            # A kernel before 5.14, or a failing disk: a plain read tells which.
            os.pread(descriptor, stop - start, start)
