"""Keeps listings over the end of the server: what the store said last, for while it does not answer the next one."""

import json
import os
import time
import zlib
from collections.abc import Mapping
from functools import partial

import trio

from trimsfs.concurrency.background import Background
from trimsfs.namespace.directory import Entry, NonObject, possible
from trimsfs.tiers.index.listing_records import ListingRecords
from trimsfs.types import Generation

MOST_NAMES = 100_000
"""Names of the longest listing that is kept."""
RENEWED_AFTER_S = 600.0
"""How long a listing that says the same as the last one is not kept anew."""
RECALL_S = 1.0
"""How long a lookup waits for a record: the disk may stand still, and the store be well."""
LARGEST = 64 << 20
"""Bytes of the largest record, once it is unpacked."""


class KeptListings:
    """The last listings of directories. Nobody waits until one is kept."""

    def __init__(self, records: ListingRecords) -> None:
        self._records = records
        self._kept: dict[str, tuple[Mapping[bytes, Entry], float]] = {}
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep listings in the background, for as long as the server runs."""
        await self._background.run(task_status)

    async def last(self, prefix: str) -> tuple[dict[bytes, Entry], float] | None:
        """The last listing of a directory and its age in seconds, if there is one that can be read and understood, and
        the disk gives it in time."""
        found = None
        with trio.move_on_after(RECALL_S):
            found = await self._records.last(prefix)
        if found is None:
            return None
        record, listed = found
        entries = unpacked(prefix, record)
        return None if entries is None else (entries, max(0.0, time.time() - listed))

    def keep(self, prefix: str, entries: Mapping[bytes, Entry]) -> None:
        """The store has just listed a directory; the caller must not change *entries* any more."""
        if len(entries) > MOST_NAMES or not self._background.running:
            return
        now = trio.current_time()
        before, since = self._kept.get(prefix, ({}, -RENEWED_AFTER_S))
        renewed = now - since >= RENEWED_AFTER_S or before != entries
        self._kept[prefix] = entries, now if renewed else since
        if renewed:
            self._background.start(self._records.record, prefix, partial(packed, entries))


def packed(entries: Mapping[bytes, Entry]) -> bytes:
    """A record of a listing."""
    names: list[list[object]] = []
    for name, entry in entries.items():
        text = os.fsdecode(name)
        if isinstance(entry, Generation):
            names.append([text, entry.etag, entry.size, entry.modified_ns, entry.version_id, entry.linked])
        elif entry is NonObject.DIRECTORY:
            names.append([text])
        elif entry is NonObject.UNREADABLE:
            names.append([text, None])
    return zlib.compress(json.dumps(names).encode(), level=1)


def unpacked(prefix: str, record: bytes) -> dict[bytes, Entry] | None:
    """The entries of a directory by its record; None if it is damaged."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(record, LARGEST)
        names = json.loads(text) if unpacker.eof else None
        if not isinstance(names, list):
            return None
        return dict(_entry(prefix, item) for item in names)
    except (ValueError, RecursionError, zlib.error):
        return None


def _entry(prefix: str, item: object) -> tuple[bytes, Entry]:
    """Raises ValueError for what no listing has."""
    match item:
        case [str(name)] if possible(os.fsencode(name)):
            return os.fsencode(name), NonObject.DIRECTORY
        case [str(name), None] if possible(os.fsencode(name)):
            return os.fsencode(name), NonObject.UNREADABLE
        case [
            str(name),
            str(etag),
            int(size),
            int(modified_ns),
            str() | None as version_id,
            str() | None as linked,
        ]:
            generation = Generation(
                key=prefix + name, etag=etag, size=size, modified_ns=modified_ns, version_id=version_id, linked=linked
            )
            if possible(os.fsencode(name)) and generation.plausible:
                return os.fsencode(name), generation
    raise ValueError("no entry of a listing")
