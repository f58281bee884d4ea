"""Maps files for reading. Unlike Python's `mmap`, a mapping keeps no descriptor of its own."""

import ctypes
import mmap
import os
import weakref

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_pages(descriptor: int, start: int, size: int) -> int:
    """Map a part of a file for reading; returns the address. Raises OSError."""
    # Python's own mmap holds the GIL while it faults pages in, and hides its address.
    address: int | None = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED or address is None:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


def unmap(address: int, size: int) -> None:
    """Undo `map_pages`."""
    _libc.munmap(address, size)


def mapped(descriptor: int, size: int) -> memoryview:
    """The bytes of a file as a view; unmapped with the last view or slice of it. Raises OSError."""
    address = map_pages(descriptor, 0, size)
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, unmap, address, size).atexit = False
    return memoryview(content).cast("B").toreadonly()
