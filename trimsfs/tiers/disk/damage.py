"""What turns out not to be right of the blobs on the disk, and what is known to be."""

import logging
import sqlite3
from collections.abc import Callable, Collection
from typing import TypeVarTuple

from trimsfs.errors import BlobDamagedError
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.state import TierState
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")


class Damage:
    """Keeps index and budget in step with what is found wrong, and repaired, of the blobs of one tier.

    ``found`` counts chunks.
    """

    def __init__(self, state: TierState) -> None:
        self._state = state
        self.found = 0

    # Found by the tier

    async def resized(self, blob: Blob) -> None:
        """Somebody has changed the size of a blob's file: fetch all of it again.

        A file that the kernel serves by itself is repaired in place, in quarantine: handles that are open keep it.
        """
        key = blob.generation.key
        async with self._state.lock, self._state.journal.recording:
            if self._state.blobs.get(blob.token) is not blob or not blob.surplus:
                return  # somebody else has seen to it
            if blob.users and blob.backing_id:
                if not blob.health.quarantined:  # else it is being mended
                    self._state.events.suspected(
                        blob, BlobDamagedError(f"{key}: its file in the cache has another size than its object")
                    )
                return
            log.error("%s: its file in the cache has another size than its object: fetching it again", key)
            if blob.users:
                try:
                    blob.restore_size()  # at once: what comes from now on must not be lost by it
                except OSError as error:
                    log.error("%s: its file in the cache cannot be given its size back: %s", key, error)
            await self._miss(blob, range(len(blob.states)))

    async def not_synced(self, blob: Blob, chunks: Collection[int]) -> None:
        """What was written to a blob has not reached the disk: the kernel may give other bytes from now on."""
        key = blob.generation.key
        self._state.budget.found_failing()
        async with self._state.lock, self._state.journal.recording:
            if self._state.blobs.get(blob.token) is not blob:
                return  # it has been evicted meanwhile
            if not blob.users or not blob.backing_id:
                await self._miss(blob, chunks)
                return
            lost = self._state.journal.take_back(blob, chunks) - blob.health.lost
            blob.health.lost |= lost
            for chunk in lost:
                self._state.budget.add(key, -blob.length_of(chunk))
            self._state.events.suspected(blob, BlobDamagedError(f"{key}: could not be written to the disk"))
            await self._state.journal.record()

    async def _miss(self, blob: Blob, chunks: Collection[int]) -> None:
        """Have chunks fetched again, and those that have not been brought to the disk."""
        if blob.users == 0:
            self._state.close(blob)
        gone = [
            chunk for chunk in self._state.journal.take_back(blob, chunks) if blob.states[chunk] != ChunkState.MISSING
        ]
        if gone:
            self._compare_again(blob)
        for chunk in gone:
            self._give_up(blob, chunk)
        await self._state.journal.record()

    # Found by whoever compares

    async def checked(self, blob: Blob, chunk: int, crc: int | None) -> bool:
        """Take note of the checksum of a chunk that an earlier server left; False, and it is missing, when wrong."""
        if blob.states[chunk] == ChunkState.MISSING:
            return False  # somebody else has found that
        length = blob.length_of(chunk)
        if crc == blob.crc(chunk):
            blob.commit(ChunkRecord(chunk=chunk, length=length, crc=crc))
            return True
        log.warning("%s: chunk %d fails its checksum: fetching again", blob.generation.key, chunk)
        self.found += 1
        self._state.journal.lost(blob.token, [chunk])
        self._give_up(blob, chunk)
        self._compare_again(blob)
        await self._state.journal.flush()
        return False

    def _give_up(self, blob: Blob, chunk: int) -> None:
        """A chunk is missing from now on, and takes no room."""
        blob.forget(chunk)
        if chunk in blob.health.lost:
            blob.health.lost.remove(chunk)  # it is not counted any more
        else:
            self._state.budget.add(blob.generation.key, -blob.length_of(chunk))

    def _compare_again(self, blob: Blob) -> None:
        """What a blob was compared with says nothing of the chunks that are to come."""
        blob.health.bytes_changed(self._state.files.no_digest)
        self._state.journal.compared(blob, None)

    def repaired(self, blob: Blob, record: ChunkRecord) -> None:
        """The bytes of a chunk were wrong, and have been written anew."""
        self.found += 1
        blob.health.revision += 1
        if blob.states[record.chunk] == ChunkState.MISSING:
            return  # others have given it up, and may be writing to it: it is fetched by who wants it
        if record.crc != blob.crc(record.chunk):
            self._compare_again(blob)  # another comparison may have come to its end meanwhile
        if record.chunk in blob.health.lost:
            blob.health.lost.discard(record.chunk)
            self._state.budget.add(blob.generation.key, record.length)
        blob.commit(record)
        self._state.journal.wrote(blob, record)

    async def set_digest(self, blob: Blob, digest: str | None) -> None:
        """All bytes of a blob have this digest, as the store says; None when they are to be compared again: that
        is recorded at once."""
        if digest is None:
            self._compare_again(blob)
            await self._state.journal.flush()
        else:
            blob.health.digest = digest
            self._state.journal.compared(blob, digest)

    async def scrubbed(self, blob: Blob) -> bool:
        """What is on the disk of a blob is right; whether that could be recorded."""
        return await self._note(self._state.index.scrubbed, blob.token)

    async def to_scrub(self, before: float) -> Generation | None:
        """What has not been known to be right on the disk since a time, in seconds since the epoch."""
        try:
            record = await self._state.threads.run(self._state.index.to_scrub, self._state.store, before)
        except sqlite3.Error as error:
            log.error("cannot read the cache index: %s", error)
            return None
        return None if record is None else record.generation

    async def _note(self, function: Callable[[*Ts], None], *arguments: *Ts) -> bool:
        """Write to the index what is no harm if it is lost; whether it could be written."""
        try:
            await self._state.threads.run(function, *arguments)
        except sqlite3.Error as error:
            log.error("cannot write the cache index: %s", error)
            return False
        return True
