"""Kept listings: the last listings outlive the server, for a successor whose store does not answer."""

import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.namespace.listing import SLICE, Entry, Listing, NonObject, possible
from trimsfs.origins import Origins
from trimsfs.tiers.index.listing_records import ListingRecords
from trimsfs.types import Generation, Symlink

MOST_NAMES = 100_000
"""Most names of a listing that is kept."""
RENEWED_AFTER_S = 600.0
"""How long an unchanged listing is not recorded again."""
RECALL_S = 1.0
"""How long a lookup waits for a record: the disk may hang while the store answers."""
LARGEST = 64 << 20
"""Most bytes of a record, unpacked."""
PIECE = 1 << 16
"""Bytes unpacked at a time."""
MOST_KNOWN = 10_000
"""Directories whose recorded digest is remembered."""
MOST_WAITING = 1000
"""Listings that may wait to be recorded, as each takes memory: the disk may be slower than the store, or hang."""


class KeptListings:
    """The last listings of directories, recorded in the background. *origins* are those of `Inodes`."""

    def __init__(self, records: ListingRecords, origins: Origins | None = None) -> None:
        self._records = records
        self._origins = origins
        self._kept = LRUCache[str, tuple[bytes, float]](maxsize=MOST_KNOWN)
        """Digest and time of the recorded listings."""
        self._background = Background()
        self._waiting = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Record listings in the background until the server stops."""
        await self._background.run(task_status)

    async def last(self, prefix: str) -> tuple[Listing, float] | None:
        """The last listing of a directory and its age in seconds; None if it is missing, damaged or slow to read."""
        saved = None
        with trio.move_on_after(RECALL_S):
            saved = await self._records.last(prefix)
        if saved is None:
            return None
        record, listed = saved
        entries = await unpacked(prefix, record, self._origins)
        return None if entries is None else (entries, max(0.0, time.time() - listed))

    def keep(self, prefix: str, entries: Listing) -> None:
        """Record a new listing, unless it is too long, too many wait, or the recorded one is equal and recent."""
        if len(entries) <= MOST_NAMES and self._waiting < MOST_WAITING and self._background.running:
            self._waiting += 1
            self._background.start(self._keep, prefix, entries)

    async def _keep(self, prefix: str, entries: Listing) -> None:
        try:
            now, digest = trio.current_time(), await in_thread(entries.digest)
            before, since = self._kept.get(prefix, (b"", -math.inf))
            if now - since >= RENEWED_AFTER_S or before != digest:
                self._kept[prefix] = digest, now
                await self._records.record(prefix, partial(packed, entries))
        finally:
            self._waiting -= 1


def packed(entries: Mapping[bytes, Entry]) -> bytes:
    """Pack a listing into a record: compressed lines of JSON, each short enough not to hold up other requests."""
    packer, left, record = zlib.compressobj(level=1), iter(entries.items()), b""
    while rows := [_packed(name, entry) for name, entry in islice(left, SLICE)]:
        record += packer.compress(json.dumps(rows).encode() + b"\n")
    return record + packer.flush()


def _packed(name: bytes, entry: Entry) -> list[object]:
    text = os.fsdecode(name)
    if isinstance(entry, Generation):
        return [text, entry.etag, entry.size, entry.modified_ns, entry.version_id, entry.linked]
    if isinstance(entry, Symlink):
        return [text, entry.target]
    return [text] if entry is NonObject.DIRECTORY else [text, None]


async def unpacked(prefix: str, record: bytes, origins: Origins | None = None) -> Listing | None:
    """The listing of a directory from its record; None if the record is damaged."""
    listing = Listing(prefix)
    try:
        for line in _lines(record):
            await listing.extend([_entry(prefix, item, origins) for item in json.loads(line)])
            await trio.lowlevel.checkpoint()
    except (TypeError, ValueError, RecursionError, zlib.error):
        return None
    await listing.put_in_order()
    return listing


def _lines(record: bytes) -> Iterator[bytes]:
    """The lines of a record. Raises ValueError or zlib.error if it is damaged."""
    unpacker, text, size = zlib.decompressobj(), b"", 0
    while not unpacker.eof:
        piece = unpacker.decompress(record, PIECE)
        record, size = unpacker.unconsumed_tail, size + len(piece)
        if size > LARGEST or not (piece or unpacker.eof):
            raise ValueError("the record is too long, or cut off")
        *lines, text = (text + piece).split(b"\n")
        yield from lines
    yield from filter(None, [text])


def _entry(prefix: str, item: object, origins: Origins | None) -> tuple[str, Entry]:
    """A name and its entry from a recorded row. Raises ValueError for a row that no listing can have."""
    entry: Entry
    match item:
        case [str(name)]:
            entry = NonObject.DIRECTORY
        case [str(name), None]:
            entry = NonObject.UNREADABLE
        case [str(name), str(target)]:
            entry = Symlink(key=prefix + name, target=target)
        case [str(name), str(etag), int(size), int(modified_ns), str() | None as version_id, str() | None as linked]:
            if origins is not None:
                linked = origins.relinked(prefix + name, linked)
            entry = Generation(
                key=prefix + name, etag=etag, size=size, modified_ns=modified_ns, version_id=version_id, linked=linked
            )
        case _:
            raise ValueError("no entry of a listing")
    if not possible(os.fsencode(name)) or (isinstance(entry, Generation) and not entry.plausible):
        raise ValueError("no entry that a listing shows")
    return name, entry
