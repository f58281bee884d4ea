"""Parses the tensor tables of model files on demand, and fetches only the bytes that the parser reads."""

import json
import logging
import weakref
from dataclasses import dataclass

import trio
from cachetools import LRUCache

from trimsfs.fetch.fetcher import Fetcher
from trimsfs.formats import FormatError, TensorTable, parse
from trimsfs.formats.source import Bytes
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

AT_ONCE = 2
REMEMBERED, LONGEST_REMEMBERED = 64, 1 << 20
"""The number of cached tables, and the bytes of the longest."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A cached table, valid while the blob's health has this revision: a later one means wrong bytes."""

    blob: "weakref.ref[Blob]"
    revision: int
    table: bytes


class TensorTables:
    """The tensor tables of a mount's files."""

    def __init__(self, disk: DiskTier, fetcher: Fetcher) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._known = LRUCache[str, _Known](maxsize=REMEMBERED)

    async def table(self, generation: Generation) -> bytes:
        """The table of a file as JSON; for a file without a table, the reason. Raises the errors of a read."""
        async with self._disk.using(generation) as blob:
            known = self._known.get(blob.token)
            if known is not None and known.blob() is blob and known.revision == blob.health.revision:
                return known.table
            revision = blob.health.revision
            try:
                table = (await self._parse(blob)).as_dict()
            except FormatError as error:
                table = {"format": None, "error": str(error)}
            found = json.dumps(table).encode()
            self._known.pop(blob.token, None)
            if len(found) <= LONGEST_REMEMBERED:
                self._known[blob.token] = _Known(weakref.ref(blob), revision, found)
        return found

    async def tensors(self, generation: Generation) -> TensorTable | None:
        """The table of a file; None for an unknown format. Raises the errors of a read."""
        try:
            async with self._disk.using(generation) as blob:
                return await self._parse(blob)
        except FormatError:
            return None

    async def _parse(self, blob: Blob) -> TensorTable:
        source = _BlobSource(blob, self._fetcher)
        return await trio.to_thread.run_sync(parse, source, source.name, limiter=self._limiter)


class _BlobSource:
    """The bytes of a blob, for the parser's thread."""

    def __init__(self, blob: Blob, fetcher: Fetcher) -> None:
        self._blob = blob
        self._fetcher = fetcher
        self.name = blob.generation.key
        self.size = blob.generation.size

    def read(self, offset: int, count: int) -> Bytes:
        if count == 0:
            return b""
        return trio.from_thread.run(self._fetcher.read, self._blob, offset, offset + count)
