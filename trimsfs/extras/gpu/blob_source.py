"""Reads a blob for a GPU copy, while its bytes may still arrive from the store."""

from trimsfs.fetch.fetcher import Fetcher
from trimsfs.tiers.blob import Blob
from trimsfs.types import Buffer


class BlobSource:
    """The bytes of a blob, which the caller keeps in use.

    *in_memory* says whether the blob's file is always in memory, as on a tmpfs.
    """

    def __init__(self, blob: Blob, fetcher: Fetcher, *, in_memory: bool) -> None:
        self._blob = blob
        self._fetcher = fetcher
        self._in_memory = in_memory

    async def bytes_of(self, start: int, stop: int) -> Buffer | None:
        """Wait for the bytes ``[start, stop)``; None if they are in the file, as always unless the disk is full."""
        blob = self._blob
        data = await self._fetcher.read(blob, start, stop)
        return None if blob.attached and blob.readable(start, stop) else data

    def fileno(self) -> int:
        return self._blob.fileno()

    @property
    def registrable(self) -> int:
        whole = self._in_memory and self._blob.attached and self._blob.complete
        return self._blob.generation.size if whole else 0
