"""Related files: what a load of a model reads with a file, by its name and by small files that list others."""

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

LARGEST_INDEX = 2 << 20
"""Bytes of the longest index of shards that is read; the shards of a longer one are mostly numbered as well."""
LARGEST_HINT = 1 << 16
"""Bytes of the longest hint that is read."""
HINT = b".trims-prefetch.json"
"""A publisher's hint: ``{"prefetch": ["a.safetensors", "b.bin"]}``, or ``false`` for nothing."""
MOST_FILES = 1024
"""Files of a directory that are brought ahead in one load."""
LOOKED_AT = 8 * MOST_FILES
"""Names that are looked at for one number of a name."""
MOST_DIGITS = 9
INDEX_END, SYMBOL_END, PARAMS_END, ONNX_END = b".index.json", b"-symbol.json", b".params", b".onnx"

NAME_MAX = 255
_NUMBER = re.compile(rb"\d+")
_EPOCH = re.compile(rb"-(\d{4})\.params")


def numbered(name: bytes, names: Sequence[bytes]) -> list[bytes]:
    """The names that differ from *name* in one number only: first those with higher numbers, then those with lower.

    *names* are sorted. Only numbers that count from 0 or 1 without a gap mark parts; others are sizes, versions or
    precisions. MXNet numbers its ``.params`` by epoch, so they are no parts.
    """
    if name.endswith(PARAMS_END):
        return []
    parts = max((_varying(name, match, names) for match in _NUMBER.finditer(name)), key=len, default=[])
    if len(parts) < 2 or parts[0][0] > 1 or any(number != parts[0][0] + step for step, (number, _) in enumerate(parts)):
        return []
    ordered = [other for _, other in parts]
    if name not in ordered:
        return []  # there are more than are looked at
    place = ordered.index(name)
    return (ordered[place + 1 :] + ordered[:place])[:MOST_FILES]


def _varying(name: bytes, match: "re.Match[bytes]", names: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """The names that differ from *name* in this number only, with their numbers, sorted."""
    before, after = name[: match.start()], name[match.end() :]
    similar: list[tuple[int, bytes]] = []
    first = bisect_left(names, before)
    for place in range(first, min(first + LOOKED_AT, len(names))):
        other = names[place]
        if not other.startswith(before) or len(similar) > MOST_FILES:
            break
        digits = other[len(before) : len(other) - len(after)]
        if other.endswith(after) and len(other) > len(before) + len(after) and digits.isdigit():
            if len(digits) > MOST_DIGITS:
                return []
            similar.append((int(digits), other))
    return sorted(similar)


def described(name: bytes, names: Sequence[bytes]) -> list[bytes]:
    """The large files that a small one describes, by its name: ONNX's external data, MXNet's parameters."""
    if name.endswith(SYMBOL_END):
        stem = name.removesuffix(SYMBOL_END)
        epochs = (other for other in _beginning(stem + b"-", names) if _EPOCH.fullmatch(other[len(stem) :]))
        return list(epochs)[:1]
    if name.endswith(ONNX_END):
        stem = name.removesuffix(ONNX_END)
        rests = (other[len(stem) :] for other in _beginning(stem, names))
        return [stem + rest for rest in rests if rest in _ONNX_DATA or rest.startswith(b".onnx_data_")]
    return []


_ONNX_DATA = {b".onnx.data", b".onnx_data", b".data"}


def _beginning(start: bytes, names: Sequence[bytes]) -> Iterator[bytes]:
    """The sorted names that begin with *start*; at most MOST_FILES."""
    place = bisect_left(names, start)
    return (other for other in names[place : place + MOST_FILES] if other.startswith(start))


def describes(name: bytes) -> bool:
    """Whether programs open a small file of this name just before they load large ones."""
    return name.endswith((INDEX_END, SYMBOL_END, ONNX_END))


def indexed(content: bytes) -> list[str]:
    """The files that an index of shards names, in the order of their first use; none if it is malformed."""
    index = _parsed(content)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    return _plain(shards.values()) if isinstance(shards, dict) else []


def hinted(content: bytes) -> list[str] | None:
    """The files that a hint names; empty if it switches prefetching off, None if it is malformed."""
    hint = _parsed(content)
    wanted = hint.get("prefetch") if isinstance(hint, dict) else None
    if wanted is False:
        return []
    return _plain(wanted) if isinstance(wanted, list) else None


def _parsed(content: bytes) -> object:
    try:
        parsed: object = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return parsed


def _plain(names: Iterable[object]) -> list[str]:
    """The names that are paths below the directory, each once; at most MOST_FILES."""
    plain: dict[str, None] = {}
    for name in names:
        if isinstance(name, str) and is_below(name):
            plain[name] = None
            if len(plain) == MOST_FILES:
                break
    return list(plain)


def is_below(name: str) -> bool:
    """Whether a name is a relative path that stays below its directory."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return all(0 < len(part) <= NAME_MAX and part not in {b".", b".."} and 0 not in part for part in parts)
