"""The page cache of a file: measures, populates, locks and drops it. All but `resident_bytes` may block."""

import ctypes
import errno
import mmap
import os

from trimsfs.tiers.mapping import map_pages, unmap

MADV_HUGEPAGE, MADV_POPULATE_READ = 14, 22
_SYS_CACHESTAT = 451  # the same number on every architecture
_OVERLAYFS = 0x794C7630
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


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


def resident_bytes(descriptor: int, start: int = 0, length: int = 0) -> int | None:
    """Bytes of a file, or of a part of it, in the page cache, in whole pages; None on a kernel before 6.5."""
    part = _Range(start, length)
    answer = _CacheStat()
    result = _libc.syscall(_SYS_CACHESTAT, descriptor, ctypes.byref(part), ctypes.byref(answer), 0)
    if result == 0 and answer.cached == 0 and _on_overlay(descriptor):
        return _mapped_bytes(descriptor, start, length or os.fstat(descriptor).st_size - start)
    return answer.cached * mmap.PAGESIZE if result == 0 else None


def _on_overlay(descriptor: int) -> bool:
    """Whether a file is on overlayfs, whose pages are those of a file below it: cachestat does not look there."""
    answer = (ctypes.c_long * 32)()  # struct statfs is shorter, and begins with the type
    return _libc.fstatfs(descriptor, answer) == 0 and answer[0] == _OVERLAYFS


def _mapped_bytes(descriptor: int, start: int, length: int) -> int | None:
    """Bytes of a part of a file in the page cache, as a mapping tells if this user owns it; None if unknown."""
    if length <= 0:
        return 0
    address = map_pages(descriptor, start, length)
    try:
        pages = (ctypes.c_ubyte * (-(-length // mmap.PAGESIZE)))()
        succeeded = _libc.mincore(address, length, pages) == 0
        return bytes(pages).count(1) * mmap.PAGESIZE if succeeded else None
    finally:
        unmap(address, length)


def populate(descriptor: int, start: int, stop: int) -> None:
    """Read the bytes ``[start, stop)`` of a file into the page cache; *start* is a multiple of the page size.

    Blocks until they are there. Uses huge pages where the file system has them, which makes mapping cheap.
    Raises OSError.
    """
    if os.fstat(descriptor).st_size < stop:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    address = map_pages(descriptor, start, stop - start)
    try:
        _libc.madvise(address, stop - start, MADV_HUGEPAGE)
        if _libc.madvise(address, stop - start, MADV_POPULATE_READ) != 0:
            # A kernel before 5.14, or a failing disk: a plain read shows which.
            os.pread(descriptor, stop - start, start)
    finally:
        unmap(address, stop - start)


def lock(descriptor: int, size: int) -> int:
    """Map a whole file and lock its pages in memory; returns the address. Raises OSError when that is not allowed."""
    address = map_pages(descriptor, 0, size)
    if _libc.mlock(address, size) != 0:
        number = ctypes.get_errno()
        unmap(address, size)
        raise OSError(number, os.strerror(number))
    return address


def unlock(address: int, size: int) -> None:
    """Undo `lock`; the pages stay in the page cache."""
    unmap(address, size)


def drop(descriptor: int) -> None:
    """Drop a file from the page cache, except mapped pages. Raises OSError."""
    os.fdatasync(descriptor)  # the kernel does not drop dirty pages
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
