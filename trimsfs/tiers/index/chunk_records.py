"""Looks up chunks that other blobs of a model have on the disk, by what the model's versions tell of a file."""

import logging
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from trimsfs.origins import Origins, located
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.index.journal import Journal
from trimsfs.tiers.threads import Threads
from trimsfs.types import ChunkRecord

log = logging.getLogger(__name__)

_BLOBS = "JOIN blobs USING (token) WHERE store = ? AND substr(key, 1, ?) = ? AND token <> ? AND"
_BY_CHECKSUM = f"SELECT token, chunk FROM chunks {_BLOBS} crc = ? AND bytes = ?"  # noqa: S608
_BY_DIGEST = f"SELECT token FROM checks {_BLOBS} digest = ? AND size = ?"  # noqa: S608
_CHUNKS = "SELECT chunk, bytes, crc FROM chunks WHERE token = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalChunk:
    """A chunk of a blob on the disk, by the blob's token."""

    token: str
    record: ChunkRecord


class EqualChunks:
    """Looks among the blobs of a *store*. What it finds may be evicted or damaged by the time that it is read.

    Only files below one *directory* count, a key with a closing slash. What need not be fetched must not tell a reader
    of one model which others a host has.
    """

    def __init__(self, index: BlobIndex, threads: Threads, store: str | Origins, journal: Journal) -> None:
        self._index = index
        self._threads = threads
        self._store = store
        self._journal = journal

    async def find(
        self, directory: str, token: str, chunks: Sequence[ChunkRecord], *, size: int, digest: str
    ) -> dict[int, LocalChunk]:
        """The chunks of a file that blobs other than *token* have, by number; one may be from this blob, one from that.

        They are of a blob of this *size* that has matched this *digest*, or have the CRC32C and length of *chunks*.
        """
        store, below = map(os.fsencode, located(self._store, directory))
        among = (store, len(below), below, token)
        await self._journal.flush()  # what was written last counts, too
        try:
            return await self._threads.run(self._find, among, chunks, (digest, size))
        except sqlite3.Error as error:
            log.warning("/%s: cannot look for equal chunks in the index: %s", directory, error)
            return {}

    def _find(
        self, among: tuple[object, ...], chunks: Sequence[ChunkRecord], whole: tuple[str, int]
    ) -> dict[int, LocalChunk]:
        local: dict[int, LocalChunk] = {}
        with self._index.transaction() as connection:
            for token in connection.execute(_BY_DIGEST, (*among, *whole)).fetchall()[:1]:
                for chunk, length, crc in connection.execute(_CHUNKS, token):
                    local[chunk] = LocalChunk(token=token[0], record=ChunkRecord(chunk=chunk, length=length, crc=crc))
            for each in chunks:
                row = connection.execute(_BY_CHECKSUM, (*among, each.crc, each.length)).fetchone()
                if row is not None and each.chunk not in local:
                    record = ChunkRecord(chunk=row[1], length=each.length, crc=each.crc)
                    local[each.chunk] = LocalChunk(token=row[0], record=record)
        return local
