"""Finds a model's files: by an index of shards, by their numbers, or as a directory's only model."""

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trimsfs.formats import FormatError
from trimsfs.formats.source import HEADER_LIMIT
from trimsfs.formats.table import check_json

_PREFERRED = "safetensors"
_SHARDED = "safetensors|bin|pt|pth|gguf"
_FILE = re.compile(rf"[^.].*\.(?P<format>{_SHARDED}|npy|npz|onnx|params)")
_INDEX = re.compile(rf"[^.].*\.(?P<format>{_SHARDED})\.index(\..+)?\.json")
"""A variant's index has its name inside: ``model.safetensors.index.fp16.json``."""
_NUMBERED = re.compile(rf"(?P<model>.+)-(?P<number>\d{{1,9}})-of-(?P<count>\d{{1,9}})\.(?P<format>{_SHARDED})")
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The files of a sharded model, by their paths below ``directory``.

    ``path`` is the index, or the directory if there is none. ``shard_of`` maps tensors to files, as the index does.
    """

    path: Path
    directory: Path
    files: tuple[str, ...]
    shard_of: Mapping[str, str] | None = None


def is_index(name: str) -> bool:
    """Whether a file of this name is an index."""
    return _INDEX.fullmatch(name) is not None


def by_index(index: Path) -> Shards:
    """The shards that an index lists. Raises FormatError, FileNotFoundError when one is missing, and OSError."""
    return _indexed(index, _weight_map(index))


def in_directory(directory: Path) -> Path | Shards:
    """The file, or the shards, of the only model in a directory.

    Raises FormatError for several models and for an invalid index, FileNotFoundError for no model and for a missing
    shard, and OSError.
    """
    names = _preferred(os.listdir(directory))
    indexes = {name: _weight_map(directory / name) for name in names if is_index(name)}
    shards = {shard for weight_map in indexes.values() for shard in weight_map.values()}
    groups: dict[str, list[re.Match[str] | None]] = {}
    for name in names:
        if name not in indexes and name not in shards:
            match = _NUMBERED.fullmatch(name)
            group = name if match is None else f"{match['model']}-*-of-{match['count']}.{match['format']}"
            groups.setdefault(group, []).append(match)
    models = [*indexes, *groups]
    if not models:
        remedy = f"no model in this directory: open a model's file, or its directory{_below(directory)}"
        raise FileNotFoundError(errno.ENOENT, remedy, str(directory))
    if len(models) > 1:
        shown = ", ".join(models[:_SHOWN]) + (", …" if len(models) > _SHOWN else "")
        remedy = "open one by the path of its file or index, or move each to a directory of its own"
        raise FormatError(f"{directory}: {len(models)} models: {shown}: {remedy}")
    if indexes:
        [(index, weight_map)] = indexes.items()
        return _indexed(directory / index, weight_map)
    (matches,) = groups.values()
    numbered = [match for match in matches if match is not None]
    return _numbered(directory, numbered) if numbered else directory / models[0]


def _below(directory: Path) -> str:
    """The directories in one, such as versions and aliases of a model, for a message."""
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))
    return ", one of " + ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "") if names else ""


def _preferred(names: Iterable[str]) -> list[str]:
    """The model files and indexes among names, in order: those of safetensors, or all if there are none."""
    matches = [match for name in sorted(names) if (match := _INDEX.fullmatch(name) or _FILE.fullmatch(name))]
    preferred = [match for match in matches if match["format"] == _PREFERRED]
    return [match[0] for match in preferred or matches]


def _indexed(index: Path, weight_map: Mapping[str, str]) -> Shards:
    files = tuple(sorted(set(weight_map.values())))
    for file in files:
        try:
            os.stat(index.parent / file)
        except FileNotFoundError:
            raise _missing(index.parent / file, f"{index.name} lists it") from None
    return Shards(path=index, directory=index.parent, files=files, shard_of=weight_map)


def _numbered(directory: Path, matches: Iterable["re.Match[str]"]) -> Shards:
    files = {int(match["number"]): match for match in matches}
    _, some = min(files.items())
    for number in range(1, int(some["count"]) + 1):
        if number not in files:
            name = f"{some['model']}-{number:0{len(some['number'])}}-of-{some['count']}.{some['format']}"
            raise _missing(directory / name, f"{some[0]} is one of {int(some['count'])}")
    return Shards(path=directory, directory=directory, files=tuple(files[number][0] for number in sorted(files)))


def _missing(shard: Path, why: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, f"a shard is missing ({why}): add it", str(shard))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises FormatError, and OSError."""
    with index.open("rb") as file:
        data = file.read(HEADER_LIMIT + 1)
    if len(data) > HEADER_LIMIT:
        raise FormatError(f"{index}: the index exceeds {HEADER_LIMIT >> 20} MiB")
    try:
        text = str(data, "utf-8-sig")
        check_json(text)
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{index}: not a valid index of shards: {error}: replace it") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: not an index of shards: it has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_below(shard):
            raise FormatError(f"{index}: tensor {tensor!r} is in {shard!r}, which is not a path below the index")
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate name."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{name!r} is a duplicate name")
        members[name] = value
    return members


def _is_below(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file
