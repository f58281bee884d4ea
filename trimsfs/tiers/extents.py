"""Extents of files: finds and makes extents that two files share; finds and punches holes.

Copy-on-write file systems, XFS and btrfs, can share extents. All functions block on the disk and raise OSError.
"""

import ctypes
import errno
import fcntl
import os
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
LEAST_SHARED = 64 << 10
"""Fewest bytes worth sharing: smaller parts would fragment a file into many extents."""
_DEDUPE = struct.Struct("=QQHHIqQQiI")
"""``struct file_dedupe_range`` for one other file: offset, length, count; descriptor, offset, bytes shared, status."""
_FIDEDUPERANGE = 3 << 30 | 24 << 16 | 0x94 << 8 | 54
_SAME, _DIFFERS = 0, 1
_FIEMAP, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
"""``struct fiemap``: start, length, flags, extents found, extents asked for; ``struct fiemap_extent``: offset in the
file, on the disk, length, and flags as the sixth."""
_FS_IOC_FIEMAP = 3 << 30 | _FIEMAP.size << 16 | ord("f") << 8 | 11
_LAST, _NOT_ON_DISK = 1, 1 << 1 | 1 << 2 | 1 << 9 | 1 << 11
"""Extent flags: the last extent of the file; extents at an unknown position, in the inode, or not yet written."""
_EXTENTS = 512
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class SharedExtent:
    """``length`` bytes at ``offset`` of one file and at ``at`` of another, which lie in the same blocks of the disk."""

    offset: int
    at: int
    length: int


def can_share(directory: Path) -> bool:
    """Whether files in a directory can share blocks."""
    with tempfile.TemporaryFile(dir=directory) as one, tempfile.TemporaryFile(dir=directory) as other:
        for file in (one, other):
            file.write(bytes(BLOCK))
            file.flush()
        try:
            return _dedupe(one.fileno(), 0, other.fileno(), 0, BLOCK) == BLOCK
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL}:
                return False
            raise


def has_hole(descriptor: int, start: int, stop: int) -> bool:
    """Whether a range has a hole: a part without blocks on the disk, as is all behind the end of the file."""
    try:
        return os.lseek(descriptor, start, os.SEEK_HOLE) < stop
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True


def share(source: int, at: int, target: int, offset: int, length: int) -> int:
    """Make a range of *target* share the blocks of a range of *source*; if they differ, only the equal parts.

    Returns the number of bytes shared. Both ranges begin at a block boundary, and end at one or at the end of the file.
    The kernel compares them itself while both files are locked, so no content changes.
    """
    if (shared := _dedupe(source, at, target, offset, length)) or length <= LEAST_SHARED:
        return shared
    half = -(-length // 2 // LEAST_SHARED) * LEAST_SHARED
    rest = share(source, at + half, target, offset + half, length - half)
    return share(source, at, target, offset, half) + rest


def _dedupe(source: int, at: int, target: int, offset: int, length: int) -> int:
    argument = bytearray(_DEDUPE.pack(at, length, 1, 0, 0, target, offset, 0, 0, 0))
    fcntl.ioctl(source, _FIDEDUPERANGE, argument)
    *_, shared, status, _ = _DEDUPE.unpack(argument)
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    return int(shared) if status == _SAME else 0


def shared_extents(one: int, other: int, *, offset: int = 0, at: int = 0, length: int) -> list[SharedExtent]:
    """The blocks that *length* bytes at *offset* of one file share with those at *at* of another, in order."""
    theirs = sorted((position, begin, size) for begin, position, size in _extents(other, at, length))
    positions = [position for position, _, _ in theirs]
    shared: list[SharedExtent] = []
    for begin, position, size in _extents(one, offset, length):
        for other_position, other_begin, other_size in theirs[max(0, bisect_right(positions, position) - 1) :]:
            if other_position >= position + size:
                break
            low, high = max(position, other_position), min(position + size, other_position + other_size)
            if low < high:
                _add(shared, begin + low - position, other_begin + low - other_position, high - low)
    return shared


def _add(shared: list[SharedExtent], offset: int, at: int, length: int) -> None:
    """Add a part, merged with the last one if it follows it."""
    if shared and (shared[-1].offset + shared[-1].length, shared[-1].at + shared[-1].length) == (offset, at):
        length += shared[-1].length
        offset, at = shared[-1].offset, shared.pop().at
    shared.append(SharedExtent(offset, at, length))


def _extents(descriptor: int, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The extents of a part of a file, cut to it: offset, position on the disk, length."""
    stop, last = start + length, False
    while start < stop and not last:
        request = _FIEMAP.pack(start, stop - start, 0, 0, _EXTENTS, 0)
        argument = bytearray(request.ljust(_FIEMAP.size + _EXTENTS * _EXTENT.size, b"\0"))
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, argument)
        count = _FIEMAP.unpack_from(argument)[3]
        if count == 0:
            return
        for number in range(count):
            begin, position, size, _, _, flags, *_ = _EXTENT.unpack_from(argument, _FIEMAP.size + number * _EXTENT.size)
            low, high = max(begin, start), min(begin + size, stop)
            if low < high and not flags & _NOT_ON_DISK:
                yield low, position + low - begin, high - low
            last = bool(flags & _LAST)
        start = begin + size


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Free the blocks of a part of a file, which then reads as zeros. All file systems with sparse files support it."""
    if _libc.fallocate64(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
