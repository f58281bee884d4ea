"""Residency: how much of a generation is on this host's disk and in its memory; pins and evictions, for commands."""

from dataclasses import replace
from pathlib import Path

from trimsfs.errors import InUseError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.evictor import COMMAND_PATIENCE_S, Evictor
from trimsfs.tiers.disk.interfaces import Residency
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.host.page_cache import resident_bytes
from trimsfs.tiers.index.index import BlobRecord
from trimsfs.types import Generation


class DiskResidencies:
    """What a disk tier has, as `Retention`."""

    def __init__(self, state: TierState, evictor: Evictor) -> None:
        self._state = state
        self._evictor = evictor

    async def all(self) -> list[Residency]:
        await self._state.journal.flush()
        records = await self._state.ask_index(self._state.index.records, self._state.store)
        return await self._state.threads.run(lambda: [self._residency(record) for record in records])

    async def of(self, generation: Generation) -> Residency:
        token = generation.token(self._state.store)
        await self._state.journal.flush()
        loaded = await self._state.ask_index(self._state.index.load, token)
        record = loaded[0] if loaded is not None else BlobRecord(token=token, generation=generation)
        if record.generation.key != generation.key:
            record = replace(record, generation=generation)
        return await self._state.threads.run(self._residency, record)

    def _residency(self, record: BlobRecord) -> Residency:
        return _residency_of(record, self._state.blobs.get(record.token), self._state.files.path(record.token))

    async def pin(self, blob: Blob, pinned: bool) -> None:
        await self._state.ask_index(self._state.index.set_pinned, blob.token, pinned)
        blob.pinned = pinned

    async def evict(self, generation: Generation) -> int:
        token = generation.token(self._state.store)
        await self._state.journal.flush()
        loaded = await self._state.ask_index(self._state.index.load, token)
        if loaded is None:
            return 0
        if loaded[0].pinned:
            raise InUseError(f"{generation.key} is pinned: unpin it first")
        async with self._state.journal.syncing:
            freed = await self._evictor.remove(token, generation.file, patience_s=COMMAND_PATIENCE_S)
        if freed is None:
            message = f"{generation.key} is in use: it can be evicted once it is closed and unmapped"
            raise InUseError(message, key=generation.key)
        return freed


def _residency_of(record: BlobRecord, blob: Blob | None, path: Path) -> Residency:
    """The residency from index record, known blob and page cache; *path* is the blob's file."""
    try:
        with path.open("rb") as file:
            host_bytes = resident_bytes(file.fileno())
    except OSError:
        host_bytes = 0
    return Residency(
        generation=record.generation,
        token=record.token,
        disk_bytes=record.bytes,
        host_bytes=host_bytes,
        verified=blob is not None and blob.verified,
        digest=record.digest if blob is None else blob.health.digest,
        pinned=record.pinned,
        handles=blob.handles if blob is not None else 0,
        users=blob.users if blob is not None else 0,
        uses=record.uses,
        last_used=record.last_used,
    )
