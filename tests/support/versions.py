"""Versions of a model as `docs/versions.md` lays them out, made step by step: an unfinished one, too."""

import hashlib
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.support.stores import MemoryStore
from trimsfs.formats.version_records import (
    Alias,
    Manifest,
    Tombstone,
    VersionFile,
    alias_key,
    manifest_key,
    tombstone_key,
)

Put = Callable[[str, bytes], str]
"""Writes an object and returns its ETag."""
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def in_memory(store: MemoryStore) -> Put:
    """Writes into a store in memory."""
    return lambda key, content: store.put(key, content).etag


def in_directory(root: Path) -> Put:
    """Writes into a directory store, each file in one step."""

    def put(key: str, content: bytes) -> str:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        new.write_bytes(content)
        new.rename(path)
        return ""

    return put


def write_files(put: Put, model: str, version: str, files: Mapping[str, bytes]) -> dict[str, VersionFile]:
    """What a push does first: as long as there is no manifest, nobody sees the version."""
    return {
        path: VersionFile(
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            etag=put(f"{model}/{version}/{path}", content),
        )
        for path, content in files.items()
    }


def publish(put: Put, model: str, version: str, files: Mapping[str, bytes]) -> None:
    """A whole version."""
    written = write_files(put, model, version, files)
    manifest = Manifest(version=version, created=NOW, files=written)
    put(manifest_key(model, version), manifest.encode())


def move(put: Put, model: str, alias: str, version: str) -> None:
    """Make an alias lead to a version."""
    put(alias_key(model, alias), Alias(version=version, history=(), moved=NOW).encode())


def remove(put: Put, model: str, version: str) -> None:
    """Remove a version; its files are deleted later."""
    tombstone = Tombstone(version=version, removed=NOW, delete_after=NOW + timedelta(days=1))
    put(tombstone_key(model, version), tombstone.encode())
