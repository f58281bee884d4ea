"""The native library: folding steps, MXNet's arrays, DLPack capsules, and system calls without the GIL."""

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
    """Load the native library; a build for another Python version will do. Raises OSError when there is none."""
    directory = Path(__file__).parent
    own = (directory / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    built = next((path for path in (*own, *directory.glob("_native.*so")) if path.exists()), None)
    if built is None:
        raise FileNotFoundError("the native library of trimsfs is missing: reinstall trimsfs where gcc is installed")
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
    """Issue an ioctl without the GIL, which ``fcntl.ioctl`` would hold. Raises OSError."""
    if libc.ioctl(descriptor, request, (ctypes.c_char * len(argument)).from_buffer(argument)) < 0:
        raise last_error()


class Step:
    """One step of folding: maps a part of a file over the memory ``[start, start + size)``, where both are equal.

    Equal ranges shorter than *least* bytes stay as they are. The executor calls ``trimsfs_execute`` with ``pointer``,
    then ``trimsfs_release``. Raises OSError when the file cannot be read.
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
        """Bytes that the step has mapped; None until it has been executed."""
        shared: int = library().trimsfs_shared(self.pointer)
        return None if shared < 0 else shared


def engine_functions() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """The addresses of the functions that execute and release a step, for MXNet's engine."""
    loaded = library()
    return (
        ctypes.cast(loaded.trimsfs_execute, ctypes.c_void_p),
        ctypes.cast(loaded.trimsfs_release, ctypes.c_void_p),
    )


def execute(step: Step) -> None:
    """Execute a step in this thread."""
    library().trimsfs_execute(None, step.pointer)
    library().trimsfs_release(step.pointer)


def writing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that writes to arrays in the calling thread: during its calls, folding steps map nothing."""
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
    """The error of the last call of a C function."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
