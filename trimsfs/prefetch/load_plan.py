"""Load plans: which files a load will likely read, by a hint, the last load, an index of shards or their names."""

import logging
import os

from trimsfs.errors import StoreError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.listing import NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.prefetch.load_history import Want, unpacked
from trimsfs.prefetch.related_files import (
    HINT,
    INDEX_END,
    LARGEST_HINT,
    LARGEST_INDEX,
    MOST_FILES,
    described,
    hinted,
    indexed,
    numbered,
)
from trimsfs.tiers.disk.interfaces import BlobUse
from trimsfs.tiers.index.load_records import LoadRecords
from trimsfs.types import Generation

log = logging.getLogger(__name__)

MOST_INDEXES = 4
"""Most indexes of a directory to search for a file."""
MOST_NAMES = 10_000
"""Most names of a directory to search for indexes. A directory with more is not prefetched whole."""

Expected = list[tuple[Want, Generation]]


class LoadPlanner:
    """Predicts what loads of a store's directories read next."""

    def __init__(self, namespace: Namespace, blobs: BlobUse, loads: LoadRecords, fetcher: Fetcher) -> None:
        self._namespace = namespace
        self._blobs = blobs
        self._loads = loads
        self._fetcher = fetcher

    async def expected(self, key: str) -> Expected:
        """The files of a load that begins with *key*, including it, in the order of reading. Raises TrimsError."""
        prefix = key[: key.rfind("/") + 1]
        name = key[len(prefix) :]
        hint = self._namespace.known_entries(prefix).get(HINT)
        if isinstance(hint, Generation) and (wants := await self._hinted(hint)) is not None:
            expected, absent = await self._existing(prefix, wants)
            if absent:
                log.warning("%s: names files that do not exist, such as %s", hint.key, absent[0])
            return expected
        wants = await self._of_last_load(prefix, name) or await self._by_names(prefix, name)
        return (await self._existing(prefix, wants))[0]

    async def directory(self, prefix: str) -> Expected:
        """All files of a directory. Raises TrimsError."""
        entries = await self._namespace.entries(prefix)
        if len(entries) > MOST_NAMES:
            return []
        return [(Want(os.fsdecode(name)), entry) for name, entry in entries.items() if isinstance(entry, Generation)]

    async def _hinted(self, hint: Generation) -> list[Want] | None:
        """What a publisher's hint names; None if it is malformed."""
        names = hinted(await self._content(hint, LARGEST_HINT))
        if names is None:
            log.warning('%s: not understood: write {"prefetch": [FILE, ...]} or {"prefetch": false}', hint.key)
            return None
        return [Want(name) for name in names]

    async def _of_last_load(self, prefix: str, name: str) -> list[Want]:
        """What the last load read, if that includes this file."""
        record = await self._loads.last(prefix)
        wants = unpacked(record) if record is not None else []
        return wants if len(wants) > 1 and any(want.name == name for want in wants) else []

    async def _by_names(self, prefix: str, name: str) -> list[Want]:
        names, encoded = self._namespace.known_entries(prefix).names, os.fsencode(name)
        if encoded.endswith(INDEX_END):
            return [Want(shard) for shard in await self._indexed(prefix, encoded)]
        for index in [other for other in names[:MOST_NAMES] if other.endswith(INDEX_END)][:MOST_INDEXES]:
            shards = await self._indexed(prefix, index)
            if name in shards:
                return [Want(shard) for shard in shards]
        following = described(encoded, names)
        if not following and (following := numbered(encoded, names)):
            following.insert(0, encoded)
        return [Want(os.fsdecode(other)) for other in following]

    async def _indexed(self, prefix: str, name: bytes) -> list[str]:
        index = self._namespace.known_entries(prefix).get(name)
        return indexed(await self._content(index, LARGEST_INDEX)) if isinstance(index, Generation) else []

    async def _content(self, generation: Generation, most: int) -> bytes:
        """The content of a file of at most *most* bytes; empty for a longer one. Raises TrimsError."""
        if not 0 < generation.size <= most:
            return b""
        async with self._blobs.using(generation) as blob:
            return bytes(await self._fetcher.read(blob, 0, generation.size))

    async def _existing(self, prefix: str, wants: list[Want]) -> tuple[Expected, list[str]]:
        """The wanted files that exist, and the names that do not."""
        existing: Expected = []
        absent: list[str] = []
        for want in wants[:MOST_FILES]:
            directory, slash, name = (prefix + want.name).rpartition("/")
            try:
                entry, _ = await self._namespace.lookup(directory + slash, os.fsencode(name))
            except StoreError as error:
                log.debug("%s%s: not prefetched: %s", prefix, want.name, error)
                continue
            if isinstance(entry, Generation):
                existing.append((want, entry))
            elif entry is NonObject.ABSENT:
                absent.append(want.name)
        return existing, absent
