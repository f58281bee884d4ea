"""Maps the blocks that two models share on disk from one of their files, so that the page cache holds them once.

The mount lists only ranges that lie in the same disk blocks. The kernel compared their bytes before it shared them.
"""

import io
import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimsfs.client import pages
from trimsfs.client.file_state import generation_of, is_local

LEAST = 1 << 20
"""Bytes of the smallest model for which the client asks the mount."""


def map_shared(path: Path, file: io.FileIO, mapping: mmap.mmap) -> int:
    """Map the shared ranges over a private mapping of a model's open file on a mount; returns their total bytes.

    The program must not have written to the mapping. *path* led to the file. Of a file that is not all on this host
    nothing is mapped: a page that cannot be fetched would raise SIGBUS.
    """
    listing = _listing(path) if len(mapping) >= LEAST else {}
    with suppress(OSError):
        # The path may lead to another content by now, or the listing be of an earlier one.
        if listing and generation_of(file) == listing["of"]:
            with _beside(path, listing["path"]).open("rb", buffering=0) as other:
                if generation_of(other) == listing["generation"] and is_local(other):
                    return _map(mapping, other.fileno(), listing["parts"])
    return 0


def similar_model(path: Path) -> Path | None:
    """A model that shares blocks with the one at a path of a mount; None when the mount knows of none."""
    listing = _listing(path)
    return _beside(path, listing["path"]) if listing else None


def control_file(path: Path, name: str) -> Path:
    """A control file of a model: these lie beside the file itself, not beside links to it."""
    there = Path(os.path.realpath(path))
    return there.parent / ".trims" / there.name / name


def _beside(path: Path, name: str) -> Path:
    """A path that is relative to the directory of the file itself."""
    return Path(os.path.realpath(path)).parent / name


def _listing(path: Path) -> dict[str, Any]:
    """The content of a model's control file ``shared``; empty off a mount, and on a mount that shares no chunks."""
    try:
        listing: dict[str, Any] = json.loads(control_file(path, "shared").read_bytes())
    except OSError:
        return {}
    return listing


def _map(mapping: mmap.mmap, descriptor: int, parts: list[tuple[int, int, int]]) -> int:
    start, mapped = pages.address_of(mapping), 0
    for offset, at, length in parts:
        size = min(length, len(mapping) - offset) // pages.PAGE * pages.PAGE
        if offset >= 0 and size > 0 and offset % pages.PAGE == at % pages.PAGE == 0:
            pages.map_over(start + offset, size, descriptor, at)
            mapped += size
    return mapped
