"""Maps the blocks that two models share on disk from one of their files, so that the page cache holds them once.

The mount lists only ranges that lie in the same disk blocks. The kernel compared their bytes before it shared them.
"""

import functools
import json
import logging
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimsfs.client import pages
from trimsfs.client.file_attributes import read_attribute
from trimsfs.client.file_state import is_local

log = logging.getLogger(__name__)

LEAST = 1 << 20
"""Bytes of the smallest model for which the client asks the mount."""


def map_shared(path: Path, descriptor: int, mapping: mmap.mmap) -> int:
    """Map the shared ranges over a private mapping of a model's file on a mount; returns their total bytes.

    The program must not have written to the mapping. *descriptor* is the file's, and *path* led to it. Of a file that
    is not all on this host nothing is mapped: a page that cannot be fetched would raise SIGBUS.
    """
    listing = _listing(path) if len(mapping) >= LEAST else {}
    with suppress(OSError):
        # The path may lead to another content by now, or the listing be of an earlier one.
        if listing and _generation(descriptor) == listing.get("of"):
            with _beside(path, listing["path"]).open("rb", buffering=0) as other:
                if _generation(other.fileno()) == listing["generation"] and is_local(other):
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


def _generation(descriptor: int) -> str | None:
    """The generation of an open file; None without the package xattr. Raises OSError."""
    try:
        return read_attribute(descriptor, "generation")
    except ImportError:  # it is missing, cannot be loaded, or is another module of the program
        _warn_of_missing_package()
        return None


@functools.cache
def _warn_of_missing_package() -> None:
    log.warning("trimsfs: models do not share equal blocks in memory: this Python lacks xattr: pip install xattr")


def _map(mapping: mmap.mmap, descriptor: int, parts: list[tuple[int, int, int]]) -> int:
    start, mapped = pages.address_of(mapping), 0
    for offset, at, length in parts:
        size = min(length, len(mapping) - offset) // pages.PAGE * pages.PAGE
        if offset >= 0 and size > 0 and offset % pages.PAGE == at % pages.PAGE == 0:
            pages.map_over(start + offset, size, descriptor, at)
            mapped += size
    return mapped
