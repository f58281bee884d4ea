"""Maps a model's file copy-on-write, so that a process has pages of its own only where it writes."""

import io
import mmap
import os
from pathlib import Path

from trimsfs.client.shared_blocks import map_shared


def mapped(path: Path, file: io.FileIO, *, common: bool) -> mmap.mmap | bytes:
    """Map all of an open file, which is local; what it has in *common* with another file, from that one.

    Raises OSError.
    """
    mapping = map_file(file)
    if common and isinstance(mapping, mmap.mmap):
        map_shared(path, os.fstat(file.fileno()).st_ino, mapping)
    return mapping


def map_file(file: io.FileIO) -> mmap.mmap | bytes:
    """Map all of a file, which is local: a page of any other may not arrive, and the process gets SIGBUS.

    An empty file cannot be mapped, and gives ``b""``. Raises OSError.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
