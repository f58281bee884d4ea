"""Crash recovery: makes blob files and the index agree after a killed server or a power loss."""

import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from trimsfs.checksums import crc32c
from trimsfs.tiers import extents
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.ranges import chunk_count, chunk_span
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)

SLACK = 64 << 10
"""Bytes that a file may take beyond its content: file systems allocate metadata blocks for it."""


def groups(index: BlobIndex, directory: Path) -> list[str]:
    """The names of all groups of blobs, each to `reconcile`. Blocks on the disk; raises OSError and sqlite3.Error."""
    return sorted({path.name for path in directory.iterdir()} | set(index.groups()))


def reconcile(index: BlobIndex, directory: Path, chunk_size: int, known: Collection[str]) -> list[tuple[str, int]]:
    """Make files and records of the group in a directory agree, except those of the *known* blobs.

    Returns keys, and the bytes of recorded chunks that the disk has lost. Blocks and raises as `groups`.
    """
    lost = list[tuple[str, int]]()
    recorded = index.group(directory.name)
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            if path.name not in recorded and path.name not in known:
                log.info("removing %s: the index does not have it", path)
                path.unlink()
    for token, (record, believed) in recorded.items():
        if token in known:
            continue
        path, key, size = directory / token, record.generation.key, record.generation.size
        gone = _missing_chunks(path, size, chunk_size, believed)
        chunks = [chunk for chunk in believed if chunk not in gone]
        if gone:
            log.warning("%s: %d chunks are lost from the disk: refetching", key, len(gone))
            index.remove_chunks(token, [chunk.chunk for chunk in gone])
            lost.append((key, sum(chunk.length for chunk in gone)))
        if not chunks and not record.pinned:
            index.remove(token)
            path.unlink(missing_ok=True)
        elif path.exists():
            with path.open("r+b", buffering=0) as file:
                free_unrecorded(file.fileno(), size, chunk_size, chunks)
    return lost


def _missing_chunks(path: Path, size: int, chunk_size: int, recorded: Sequence[ChunkRecord]) -> Collection[ChunkRecord]:
    """The recorded chunks that a file lacks: it is missing, has a wrong size, or has holes after a power loss."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return recorded
    with file:
        status = os.fstat(file.fileno())
        if status.st_size != size:
            return recorded
        if status.st_blocks * 512 >= sum(chunk.length for chunk in recorded):
            return ()
        return {
            chunk
            for chunk in recorded
            if _lost_in_hole(file.fileno(), *chunk_span(chunk.chunk, size, chunk_size), chunk.crc)
        }


def _lost_in_hole(descriptor: int, start: int, stop: int, crc: int) -> bool:
    """Whether a chunk has a hole and fails its checksum: zeros of the object may be a hole too."""
    return extents.has_hole(descriptor, start, stop) and crc32c(os.pread(descriptor, stop - start, start)) != crc


def chunks_in_holes(blob: Blob, opened: int) -> list[int]:
    """The chunks of a whole blob that have holes and fail their checksum; *opened* is its descriptor.

    Blocks on the disk. Raises OSError.
    """
    descriptor, size = os.dup(opened), blob.generation.size  # the event loop may close it meanwhile
    try:
        if not extents.has_hole(descriptor, 0, size):
            return []
        return [
            record.chunk
            for record in blob.records()
            if _lost_in_hole(descriptor, *blob.span_of(record.chunk), record.crc)
        ]
    finally:
        os.close(descriptor)


def free_unrecorded(descriptor: int, size: int, chunk_size: int, recorded: Iterable[ChunkRecord]) -> None:
    """Free the disk blocks of a blob's unrecorded chunks. Raises OSError."""
    here = {record.chunk: record.length for record in recorded}
    if os.fstat(descriptor).st_blocks * 512 <= sum(here.values()) + SLACK:
        return
    try:
        for chunk in range(chunk_count(size, chunk_size)):
            if chunk not in here:
                start, stop = chunk_span(chunk, size, chunk_size)
                extents.punch_hole(descriptor, start, stop - start)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
