"""What a cache directory holds, looked at from outside: files, blocks of the disk, and records of the index."""

import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.parts import blob_files
from trimsfs.tiers.disk.crash_recovery import SLACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A blob in the index; ``bytes`` is how much of it is recorded as being there."""

    key: str
    size: int
    bytes: int
    pinned: bool


def allocated(cache: Path) -> int:
    """Bytes of the disk that blobs take."""
    total = 0
    for path in blob_files(cache):
        with suppress(FileNotFoundError):  # it has just been evicted
            total += path.stat().st_blocks * 512
    return total


def recorded(cache: Path) -> dict[str, Recorded]:
    """The index of a cache directory, by token."""
    query = (
        "SELECT token, key, size, pinned, (SELECT coalesce(sum(bytes), 0) FROM chunks WHERE token = blobs.token) "
        "FROM blobs"
    )
    with closing(sqlite3.connect(cache / "index.sqlite")) as connection:
        return {
            token: Recorded(key=os.fsdecode(key), size=size, bytes=here, pinned=bool(pinned))
            for token, key, size, pinned, here in connection.execute(query)
        }


def disagreements(cache: Path) -> list[str]:
    """What index and files of a cache that no server uses do not agree about."""
    rows, block = recorded(cache), os.statvfs(cache).f_frsize
    files = {path.name: path.stat() for path in blob_files(cache)}
    found = [f"{name}: a file without a row" for name in files.keys() - rows.keys()]
    for token, row in rows.items():
        if token not in files:
            found += [f"{row.key}: {row.bytes} bytes recorded, but no file"] if row.bytes else []
            continue
        if files[token].st_size != row.size:
            found.append(f"{row.key}: a file of {files[token].st_size} bytes, not {row.size}")
        allocated, wanted = files[token].st_blocks * 512, -(-row.bytes // block) * block
        if not wanted <= allocated <= wanted + SLACK:
            found.append(f"{row.key}: {allocated} bytes on the disk, {row.bytes} recorded")
    return found
