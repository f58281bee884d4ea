"""Load history: what the last load of each directory read, kept in the index. The next load likely reads the same."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimsfs.prefetch.related_files import MOST_FILES, is_below

LONGEST = 1 << 16
"""Bytes of the longest record."""
MOST_PARTS = 64
"""Most ranges recorded of one file; a file with more counts as wanted whole."""


@dataclass(frozen=True, slots=True)
class Want:
    """A file that a load wants, by its path below the directory. ``parts`` are ranges of its chunks; None means all."""

    name: str
    parts: tuple[tuple[int, int], ...] | None = None


def packed(wants: Iterable[Want]) -> str:
    """The record of a load, cut to LONGEST bytes."""
    items: list[tuple[str, object]] = []
    size = 2
    for want in wants:
        size += len(json.dumps(want.name)) + 16 + 24 * len(want.parts or ())
        if size > LONGEST or len(items) == MOST_FILES:
            break
        items.append((want.name, want.parts))
    return json.dumps(items)


def unpacked(record: str) -> list[Want]:
    """What a load wanted, as far as its record is valid."""
    try:
        items = json.loads(record) if len(record) <= LONGEST else None
    except (ValueError, RecursionError):
        return []
    wants = map(_want, items[:MOST_FILES]) if isinstance(items, list) else ()
    return [want for want in wants if want is not None]


def _want(item: object) -> Want | None:
    match item:
        case [str(name), None] if is_below(name):
            return Want(name)
        case [str(name), list(parts)] if is_below(name) and 0 < len(parts) <= MOST_PARTS and all(map(_is_range, parts)):
            return Want(name, tuple((start, stop) for start, stop in parts))
    return None


def _is_range(part: object) -> bool:
    match part:
        case [int(start), int(stop)]:
            return 0 <= start < stop
    return False


def ranges(chunks: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """The ranges of sorted chunks; None if there are none or more than MOST_PARTS."""
    joined: list[tuple[int, int]] = []
    for chunk in chunks:
        if joined and joined[-1][1] == chunk:
            joined[-1] = joined[-1][0], chunk + 1
        else:
            joined.append((chunk, chunk + 1))
    return tuple(joined) if 0 < len(joined) <= MOST_PARTS else None
