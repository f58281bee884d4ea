"""System calls of the kernel, as the C library has them or by number, with errors as OSError."""

import ctypes
import os
import struct

AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, AT_REMOVEDIR = -100, 0x1000, 0x100, 0x200
O_TMPFILE = 0o20200000
_RENAMEAT2, _STATX, _OPENAT2, _PREADV2, _GETDENTS64 = 316, 332, 437, 327, 217

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
for _name in ("munmap", "madvise", "mprotect", "msync", "mlock", "mincore"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p][
        : 2 if _name in {"munmap", "mlock"} else 3
    ]


def checked(result: int | None) -> int:
    """The result of a call; raises what it has failed with."""
    if result is None or result in {-1, (1 << 64) - 1}:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(name: str, *arguments: object) -> int:
    return checked(getattr(libc, name)(*arguments))


def syscall(number: int, *arguments: object) -> int:
    return checked(libc.syscall(ctypes.c_long(number), *arguments))


def renameat2(old: str, new: str, flags: int) -> int:
    return syscall(_RENAMEAT2, AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """Open a path that may be resolved in some ways only."""
    how = struct.pack("=QQQ", flags, 0, resolve)
    return syscall(_OPENAT2, directory, os.fsencode(path), how, len(how))


def statx(path: str, flags: int = 0, mask: int = 0x7FF) -> tuple[int, int, int]:
    """The mask of what is known, the mode and the size of a file."""
    room = ctypes.create_string_buffer(256)
    syscall(_STATX, AT_FDCWD, os.fsencode(path), flags, mask, room)
    return (
        struct.unpack_from("=I", room, 0)[0],
        struct.unpack_from("=H", room, 28)[0],
        struct.unpack_from("=Q", room, 40)[0],
    )


def getdents(descriptor: int, size: int) -> int:
    """Read entries of a directory into so many bytes; how many were filled."""
    return syscall(_GETDENTS64, descriptor, ctypes.create_string_buffer(size), size)


def map_file(descriptor: int, length: int, protection: int, flags: int, offset: int = 0) -> int:
    """Map a file; the address."""
    return checked(libc.mmap(None, length, protection, flags, descriptor, offset))
