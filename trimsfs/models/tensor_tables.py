"""Tensor tables of model files, as JSON: parsed when asked for, of what has to be fetched for that and no more."""

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
"""Tables that are kept, and the bytes of the longest of them."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A table, as long as the bytes are those that it was made of: they may have gone wrong on the way."""

    blob: "weakref.ref[Blob]"
    revision: int
    table: bytes


class TensorTables:
    """What tensors the files of a mount hold."""

    def __init__(self, disk: DiskTier, fetcher: Fetcher) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._known = LRUCache[str, _Known](maxsize=REMEMBERED)

    async def table(self, generation: Generation) -> bytes:
        """The table of a file as JSON; of one that has none, why. Raises what a read does."""
        async with self._disk.using(generation) as blob:
            known = self._known.get(blob.token)
            if known is not None and known.blob() is blob and known.revision == blob.health.revision:
                return known.table
            revision = blob.health.revision
            try:
                told = (await self._parse(blob)).as_dict()
            except FormatError as error:
                told = {"format": None, "error": str(error)}
            found = json.dumps(told).encode()
            self._known.pop(blob.token, None)
            if len(found) <= LONGEST_REMEMBERED:
                self._known[blob.token] = _Known(weakref.ref(blob), revision, found)
        return found

    async def tensors(self, generation: Generation) -> TensorTable | None:
        """The table of a file; None when it is of no known format. Raises what a read does."""
        try:
            async with self._disk.using(generation) as blob:
                return await self._parse(blob)
        except FormatError:
            return None

    async def _parse(self, blob: Blob) -> TensorTable:
        source = _BlobSource(blob, self._fetcher)
        return await trio.to_thread.run_sync(parse, source, source.name, limiter=self._limiter)


class _BlobSource:
    """The bytes of a blob, for a thread."""

    def __init__(self, blob: Blob, fetcher: Fetcher) -> None:
        self._blob = blob
        self._fetcher = fetcher
        self.name = blob.generation.key
        self.size = blob.generation.size

    def read(self, offset: int, count: int) -> Bytes:
        if count == 0:
            return b""
        return trio.from_thread.run(self._fetcher.read, self._blob, offset, offset + count)
