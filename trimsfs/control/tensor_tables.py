"""Parses the tensor tables of model files on demand, and fetches only the bytes that the parser reads."""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio
from cachetools import LRUCache

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.formats import FormatError, TensorTable, parse
from trimsfs.formats.source import Bytes
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse
from trimsfs.types import Generation

T = TypeVar("T")

AT_ONCE = 2
REMEMBERED, LONGEST_REMEMBERED = 64, 1 << 20
"""The number of remembered tables, and the bytes of the longest."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class RenderedTable:
    """A table as JSON, valid while the blob's health has this revision: a later one means wrong bytes."""

    blob: "weakref.ref[Blob]"
    revision: int
    content: bytes


class TensorTables:
    """The tensor tables of a mount's files."""

    def __init__(self, blobs: BlobUse, fetcher: Fetcher) -> None:
        self._blobs = blobs
        self._fetcher = fetcher
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        # By the blob's token: those that anybody has, and those that are kept for the next.
        self._rendered: weakref.WeakValueDictionary[str, RenderedTable] = weakref.WeakValueDictionary()
        self._remembered = LRUCache[str, RenderedTable](maxsize=REMEMBERED)

    async def table(self, generation: Generation) -> RenderedTable:
        """The table of a file; for a file without a table, the reason. Raises the errors of a read.

        Who keeps the result shares its bytes with who asks next.
        """
        async with self._blobs.using(generation) as blob:
            rendered = self._known(blob)
            if rendered is None:
                revision = blob.health.revision
                content = await self._in_thread(_rendered, blob)
                # Somebody else may have rendered it meanwhile.
                rendered = self._known(blob) or RenderedTable(weakref.ref(blob), revision, content)
                self._rendered[blob.token] = rendered
            if len(rendered.content) <= LONGEST_REMEMBERED:
                self._remembered[blob.token] = rendered
        return rendered

    def _known(self, blob: Blob) -> RenderedTable | None:
        known = self._rendered.get(blob.token)
        valid = known is not None and known.blob() is blob and known.revision == blob.health.revision
        return known if valid else None

    async def tensors(self, generation: Generation) -> TensorTable | None:
        """The table of a file; None for an unknown format. Raises the errors of a read."""
        try:
            async with self._blobs.using(generation) as blob:
                return await self._in_thread(_parsed, blob)
        except FormatError:
            return None

    async def _in_thread(self, make: "Callable[[_BlobSource], T]", blob: Blob) -> T:
        return await in_thread(make, _BlobSource(blob, self._fetcher), limiter=self._limiter)


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


def _parsed(source: _BlobSource) -> TensorTable:
    return parse(source, source.name)


def _rendered(source: _BlobSource) -> bytes:
    try:
        return _parsed(source).as_json()
    except FormatError as error:
        return json.dumps({"format": None, "error": str(error)}).encode()
