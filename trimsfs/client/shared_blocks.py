"""What a model has in common with another on the mount is mapped from that one, so that memory has it once.

The mount tells only of what lies in the same blocks of the disk, for which the kernel has compared the bytes.
"""

import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimsfs.client import pages

LEAST = 1 << 20
"""Bytes of a model that is worth asking for."""


def map_shared(path: Path, inode: int, mapping: mmap.mmap) -> int:
    """Map what is common over a private mapping of a model's file on a mount; how many bytes.

    Nothing may have been written to the mapping. *inode* says which generation it is of.
    """
    told = _told(path) if len(mapping) >= LEAST else {}
    with suppress(OSError):
        if told and os.stat(path).st_ino == inode:
            with (path.parent / told["path"]).open("rb", buffering=0) as other:
                if os.getxattr(other.fileno(), "user.trims.generation").decode() == told["generation"]:
                    return _map(mapping, other.fileno(), told["parts"])
    return 0


def similar_model(path: Path) -> Path | None:
    """A model that has something in common with the one at a path of a mount, if there is one."""
    told = _told(path)
    return path.parent / told["path"] if told else None


def _told(path: Path) -> dict[str, Any]:
    """What the mount tells; nothing off a mount, or of one that does not share chunks."""
    try:
        told: dict[str, Any] = json.loads((path.parent / ".trims" / path.name / "shared").read_bytes())
    except OSError:
        return {}
    return told


def _map(mapping: mmap.mmap, descriptor: int, parts: list[tuple[int, int, int]]) -> int:
    start, mapped = pages.address_of(mapping), 0
    for offset, at, length in parts:
        size = min(length, len(mapping) - offset) // pages.PAGE * pages.PAGE
        if offset >= 0 and size > 0 and offset % pages.PAGE == at % pages.PAGE == 0:
            pages.map_over(start + offset, size, descriptor, at)
            mapped += size
    return mapped
