"""Maps a model's file copy-on-write: a process gets private pages only where it writes."""

import io
import mmap
import os
from pathlib import Path

from trimsfs.client.shared_blocks import map_shared


def mapped(path: Path, file: io.FileIO, *, common: bool) -> mmap.mmap | bytes:
    """Map all of an open file, which must be local: a page that cannot be fetched would raise SIGBUS.

    If *common*, map the blocks that it shares with another file from that file. Returns ``b""`` for an empty file,
    which cannot be mapped. Raises OSError.
    """
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if common:
        map_shared(path, file.fileno(), mapping)
    return mapping
