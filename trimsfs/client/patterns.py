"""Patterns of tensor names, as in `fnmatch`, by which a program selects tensors."""

import fnmatch
from collections.abc import Collection, Iterable
from pathlib import Path

Patterns = str | Iterable[str] | None
"""One pattern, or several; None selects all tensors."""


def listed(tensors: str | Iterable[str]) -> list[str]:
    """The patterns without duplicates. Raises ValueError when there is none."""
    patterns = [tensors] if isinstance(tensors, str) else list(dict.fromkeys(tensors))
    if not patterns:
        raise ValueError("tensors: give at least one pattern of tensor names")
    return patterns


def matching(names: Collection[str], tensors: Patterns, path: Path) -> set[str]:
    """The *names* that match. Raises LookupError, which names *path*, for a pattern that matches none."""
    if tensors is None:
        return set(names)
    selected: set[str] = set()
    for pattern in listed(tensors):
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise LookupError(f"{path}: no tensor name matches {pattern!r}")
        selected.update(matches)
    return selected
