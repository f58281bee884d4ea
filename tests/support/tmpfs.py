"""A small file system of its own, for what happens when a disk is full."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2


@contextmanager
def tmpfs(directory: Path, size: int, *, more: str = "") -> Iterator[Path]:
    """A tmpfs of *size* bytes for the length of the block; skips the test where none can be mounted.

    *more* are further mount options, each after a comma.
    """
    directory.mkdir(exist_ok=True)
    options = f"size={size},mode=700{more}".encode()
    if _libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options) != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        if _libc.umount2(os.fsencode(directory), MNT_DETACH) != 0:
            raise OSError(ctypes.get_errno(), "umount2")
