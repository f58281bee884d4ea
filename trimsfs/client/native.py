"""What is in C: steps of folding, MXNet's arrays, and system calls that let other threads of Python go on meanwhile."""

import ctypes
import functools
import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


@functools.cache
def library() -> ctypes.CDLL:
    """The library built of what is in C, whatever interpreter it was built for. Raises OSError when it is not there."""
    directory = Path(__file__).parent
    own = (directory / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    built = next((path for path in (*own, *directory.glob("_native.*so")) if path.exists()), None)
    if built is None:
        raise FileNotFoundError("trimsfs has been installed without its parts in C: pip install it with gcc")
    loaded = ctypes.CDLL(str(built), use_errno=True)
    loaded.trimsfs_step.restype = ctypes.c_void_p
    size = ctypes.c_size_t
    loaded.trimsfs_step.argtypes = (ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int64, size)
    loaded.trimsfs_shared.restype = ctypes.c_long
    for name in ("trimsfs_execute", "trimsfs_release", "trimsfs_shared"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * (2 if name == "trimsfs_execute" else 1)
    loaded.trimsfs_scan.restype = ctypes.c_long
    loaded.trimsfs_scan.argtypes = (ctypes.c_void_p, size, ctypes.c_void_p, size)
    loaded.trimsfs_lend.restype = ctypes.c_long
    loaded.trimsfs_lend.argtypes = (ctypes.c_void_p, size, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    loaded.trimsfs_unused.restype = size
    loaded.trimsfs_unused.argtypes = (ctypes.c_void_p, size)
    return loaded


def ioctl(descriptor: int, request: int, argument: bytearray) -> None:
    """``fcntl.ioctl`` holds all threads up for as long as it takes. Raises OSError."""
    if libc.ioctl(descriptor, request, (ctypes.c_char * len(argument)).from_buffer(argument)) < 0:
        raise last_error()


class Step:
    """A part of this process's memory, ``[start, start + size)``, and the part of a file to be mapped over it as far as
    they are equal, in parts of no less than *least* bytes.

    Whoever executes it calls ``execute`` with ``pointer``, and then ``release``. Raises OSError when the file cannot be
    read.
    """

    def __init__(self, start: int, size: int, descriptor: int, offset: int, least: int) -> None:
        self.start, self.size = start, size
        made = library().trimsfs_step(start, size, descriptor, offset, least)
        if not made:
            raise last_error()
        self.pointer = ctypes.c_void_p(made)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            library().trimsfs_release(self.pointer)

    @property
    def shared(self) -> int | None:
        """Bytes that are shared now; None until it has been executed."""
        shared: int = library().trimsfs_shared(self.pointer)
        return None if shared < 0 else shared


def engine_functions() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Where the functions are that execute a step and then release it, as an engine takes them."""
    loaded = library()
    return (
        ctypes.cast(loaded.trimsfs_execute, ctypes.c_void_p),
        ctypes.cast(loaded.trimsfs_release, ctypes.c_void_p),
    )


def execute(step: Step) -> None:
    """Execute a step, here and now."""
    library().trimsfs_execute(None, step.pointer)
    library().trimsfs_release(step.pointer)


def writing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes to memory by itself, kept apart from steps: none is executed while it is called."""
    begin, end = library().trimsfs_begin_write, library().trimsfs_end_write

    @functools.wraps(function, updated=())
    def call(*arguments: Any) -> Any:
        begin()
        try:
            return function(*arguments)
        finally:
            end()

    return call


def last_error() -> OSError:
    """What the call just made has failed with."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
