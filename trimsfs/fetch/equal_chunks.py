"""Equal chunks: what a host has of a model's other versions is copied from there, and not fetched again."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio
from cachetools import LRUCache

from trimsfs.errors import StoreError
from trimsfs.fetch.copier import Copier, Extent, LocalBytes
from trimsfs.fetch.flights import Flight
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.telemetry.open_trace import spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import ChunkWrites, KnownBlobs
from trimsfs.tiers.index.chunk_records import EqualChunks, LocalChunk
from trimsfs.types import ChunkRecord

MOST_BLOBS = 64
"""Most blobs under way of which the equal chunks are remembered."""


class _Known:
    """What is known of a blob's chunks: where equal ones are, and their SHA-256s; None before anybody has looked."""

    def __init__(self) -> None:
        self.looking = trio.Lock()
        self.chunks: Mapping[int, tuple[LocalChunk, bytes]] | None = None


class EqualChunkCopier:
    """Makes chunks of a version readable that other files of the model have on the disk.

    The copier compares their bytes with the SHA-256 that the version records for them. Where it records only that of
    the whole file, they come from a blob that had this one. The copier then compares them with the CRC32C that they had
    there. *path* gives the file of a blob by its token.
    """

    def __init__(
        self,
        records: EqualChunks,
        blobs: KnownBlobs,
        writes: ChunkWrites,
        copier: Copier,
        versions: VersionedStore,
        *,
        path: Callable[[str], Path],
    ) -> None:
        self._records = records
        self._blobs = blobs
        self._writes = writes
        self._path = path
        self._copier = copier
        self._versions = versions
        self._known: LRUCache[str, _Known] = LRUCache(MOST_BLOBS)
        self.copied_bytes = 0

    def forget(self, blob: Blob) -> None:
        """Forget what is known of a blob: it is whole."""
        self._known.pop(blob.token, None)

    async def of(self, blob: Blob) -> Mapping[int, tuple[LocalChunk, bytes]]:
        """The chunks on the disk that a blob's are equal to, with their SHA-256s, by the blob's numbers."""
        if not blob.attached:
            return {}
        known = self._known.setdefault(blob.token, _Known())
        async with known.looking:
            if known.chunks is None:
                try:
                    known.chunks = await self._look(blob)
                except StoreError:
                    return {}  # the fetch finds out, and retries
        return known.chunks

    async def _look(self, blob: Blob) -> dict[int, tuple[LocalChunk, bytes]]:
        generation = blob.generation
        file = await self._versions.version_of(generation.key)
        if file is None:
            return {}
        whole = await self._versions.manifests.sha256(file, generation.etag)
        fingerprint = await self._versions.manifests.fingerprint(file)
        if whole is None:
            return {}
        chunks: list[ChunkRecord] = []
        if fingerprint is not None and len(fingerprint.sha256) // len(whole) == len(blob.states):
            chunks = [
                ChunkRecord(chunk=chunk, length=blob.length_of(chunk), crc=crc)
                for chunk, crc in enumerate(fingerprint.chunks)
            ]
        local_chunks = await self._records.find(
            file.model, blob.token, chunks, size=generation.size, digest=f"sha256:{whole.hex()}"
        )
        digests = fingerprint.digest if fingerprint is not None and chunks else lambda _chunk: b""
        return {chunk: (local, digests(chunk)) for chunk, local in local_chunks.items()}

    async def copy(self, equal: Mapping[int, tuple[LocalChunk, bytes]], flight: Flight) -> bool:
        """Copy a chunk, if it is among those that are *equal*; whether its bytes are in its blob.

        They are not if there is no room for them, or the other file has lost or changed them.
        """
        if flight.chunk not in equal:
            return False
        blob, (local, sha256) = flight.blob, equal[flight.chunk]
        start, stop = blob.span_of(flight.chunk)
        record = ChunkRecord(chunk=flight.chunk, length=stop - start, crc=local.record.crc)
        if flight.done.is_set() or not await self._writes.reserve(blob, record.length):
            return False
        copied, resizes = False, blob.resizes
        try:
            extent = Extent(start, stop, blob.fileno(), start, blob.chunk_size)
            with self._opened(local) as descriptor, spanning(blob, "copy equal chunk", offset=start):
                source = LocalBytes(descriptor, local.record.chunk * blob.chunk_size, record.crc, sha256)
                copied = await self._copier.copy(source, extent)
            copied = copied and blob.resizes == resizes and not flight.done.is_set()
        except (OSError, StoreError):
            copied = False  # evicted meanwhile, most likely; the fetch finds out if the disk fails
        finally:
            if not copied:
                self._writes.unreserve(blob, record.length)
        if copied:
            self._writes.wrote(blob, record)
            self.copied_bytes += record.length
        return copied

    @contextmanager
    def _opened(self, local: LocalChunk) -> Iterator[int]:
        """A descriptor of a blob's file. Raises OSError."""
        blob = self._blobs.known(local.token)
        descriptor = os.open(self._path(local.token), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if blob is not None:
            blob.opened_again += 1  # a lease would take it for a program's
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            if blob is not None:
                blob.opened_again -= 1
