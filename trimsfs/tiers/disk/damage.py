"""Damage: discards wrong and lost chunks and records repairs, in step with index and budget."""

import logging
import sqlite3
from collections.abc import Callable, Collection
from typing import TypeVarTuple

from trimsfs.errors import BlobDamagedError
from trimsfs.tiers.blob import Blob, ChunkState, FileChange
from trimsfs.tiers.disk.crash_recovery import chunks_in_holes
from trimsfs.tiers.disk.state import TierState
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")


class Damage:
    """Keeps index and budget in step with damage and repair of a tier's blobs, also as `ChunkChecks`.

    ``found`` counts damaged chunks.
    """

    def __init__(self, state: TierState) -> None:
        self._state = state
        self.found = 0

    # Found by the tier

    async def size_changed(self, blob: Blob) -> None:
        """Discard all chunks of a blob, because another program has changed the size of its file.

        Reports a passed-through file as suspect instead: open handles keep it, so it is repaired in place.
        """
        key, journal = blob.generation.key, self._state.journal
        async with journal.syncing, self._state.lock, journal.recording:  # a sync counts as a user
            if self._state.blobs.get(blob.token) is not blob or blob.change() is not FileChange.RESIZED:
                return  # another open found it first
            if blob.users and blob.backing_id:
                if not blob.health.quarantined:  # else a repair is under way
                    self._state.suspected(
                        blob, BlobDamagedError(f"{key}: its file in the cache has another size than its object")
                    )
                return
            log.error("%s: its file in the cache has another size than its object: refetching", key)
            if blob.users:
                try:
                    blob.restore_size()  # before further writes
                except OSError as error:
                    log.error("%s: cannot restore the size of its file in the cache: %s", key, error)
            await self._discard(blob, range(len(blob.states)))

    async def not_synced(self, blob: Blob, chunks: Collection[int]) -> None:
        """Discard chunks that did not reach the disk, or suspect their blob: the kernel may now return other bytes."""
        key = blob.generation.key
        self._state.budget.found_failing()
        async with self._state.lock, self._state.journal.recording:
            if self._state.blobs.get(blob.token) is not blob:
                return  # it was evicted meanwhile
            if not blob.users or not blob.backing_id:
                await self._discard(blob, chunks)
                return
            lost = self._state.journal.discard(blob, chunks) - blob.health.lost
            blob.health.lost |= lost
            for chunk in lost:
                self._state.budget.add(blob.generation.file, -blob.length_of(chunk))
            self._state.suspected(blob, BlobDamagedError(f"{key}: its chunks could not be synced to the disk"))
            await self._state.journal.record()

    async def _discard(self, blob: Blob, chunks: Collection[int]) -> None:
        """Discard chunks, and those not yet synced to the disk, so that the server refetches them."""
        if blob.users == 0:
            self._state.close(blob)
        gone = [
            chunk for chunk in self._state.journal.discard(blob, chunks) if blob.states[chunk] != ChunkState.MISSING
        ]
        if gone:
            self._compare_again(blob)
        for chunk in gone:
            self._discard_chunk(blob, chunk)
        await self._state.journal.record()

    # Found by readers, the scrub and `trimsfs verify`

    async def check_chunk(self, blob: Blob, chunk: int, crc: int | None) -> bool:
        if blob.states[chunk] == ChunkState.MISSING:
            return False  # another reader found it first
        length = blob.length_of(chunk)
        if crc == blob.crc(chunk):
            blob.commit(ChunkRecord(chunk=chunk, length=length, crc=crc))
            return True
        log.warning("%s: chunk %d fails its checksum: refetching", blob.generation.key, chunk)
        self.found += 1
        self._state.journal.lost(blob.token, [chunk])
        self._discard_chunk(blob, chunk)
        self._compare_again(blob)
        await self._state.journal.flush()
        return False

    async def check_holes(self, blob: Blob) -> None:
        blob.users += 1  # to keep its file open
        try:
            if len(blob.states) <= 1:  # faster than a switch to a thread
                gone = chunks_in_holes(blob, blob.fileno())
            else:
                gone = await self._state.threads.run(chunks_in_holes, blob, blob.fileno())
        except OSError as error:
            log.warning("%s: cannot look for holes in its file in the cache: %s", blob.generation.key, error)
            return
        finally:
            blob.users -= 1
        for chunk in gone:
            await self.check_chunk(blob, chunk, None)

    def _discard_chunk(self, blob: Blob, chunk: int) -> None:
        """Mark a chunk as missing and return its bytes to the budget."""
        blob.forget(chunk)
        if chunk in blob.health.lost:
            blob.health.lost -= {chunk}  # the budget no longer counts it
        else:
            self._state.budget.add(blob.generation.file, -blob.length_of(chunk))

    def _compare_again(self, blob: Blob) -> None:
        """Mark a blob as uncompared, because its bytes changed."""
        blob.health.bytes_changed(self._state.files.no_digest)
        self._state.journal.compared(blob, None)

    def repaired(self, blob: Blob, record: ChunkRecord) -> None:
        """Record that a chunk was overwritten with the bytes of the store."""
        self.found += 1
        blob.health.revision += 1
        if blob.states[record.chunk] == ChunkState.MISSING:
            return  # discarded meanwhile; a fetch may be writing it
        if record.crc != blob.crc(record.chunk):
            self._compare_again(blob)  # also if another comparison ended meanwhile
        if record.chunk in blob.health.lost:
            blob.health.lost -= {record.chunk}
            self._state.budget.add(blob.generation.file, record.length)
        blob.commit(record)
        self._state.journal.wrote(blob, record)

    async def set_digest(self, blob: Blob, digest: str | None) -> None:
        """Record that a blob matches a digest; with None, record at once that it must be compared again."""
        if digest is None:
            self._compare_again(blob)
            await self._state.journal.flush()
        else:
            blob.health.digest = digest
            self._state.journal.compared(blob, digest)

    async def record_scrub(self, blob: Blob) -> bool:
        """Record that a blob's chunks on disk passed their checksums; returns whether the index could be written."""
        return await self._record(self._state.index.scrubbed, blob.token)

    async def next_to_scrub(self, before: float) -> Generation | None:
        """The generation scrubbed longest ago, if that was *before* a time in seconds since the epoch; else None."""
        try:
            record = await self._state.threads.run(self._state.index.to_scrub, self._state.store, before)
        except sqlite3.Error as error:
            log.error("cannot read the cache index: %s", error)
            return None
        return None if record is None else record.generation

    async def _record(self, function: Callable[[*Ts], None], *arguments: *Ts) -> bool:
        """Write a dispensable record to the index; returns whether that succeeded."""
        try:
            await self._state.threads.run(function, *arguments)
        except sqlite3.Error as error:
            log.error("cannot write the cache index: %s", error)
            return False
        return True
