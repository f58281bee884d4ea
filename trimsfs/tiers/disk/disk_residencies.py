"""The residencies of what a disk tier has, for reports; pins and evictions, for commands."""

from dataclasses import replace

from trimsfs.errors import InUseError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.evictor import COMMAND_PATIENCE_S, Evictor
from trimsfs.tiers.disk.residency import Residency, residency_of
from trimsfs.tiers.disk.state import TierState
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
        return residency_of(record, self._state.blobs.get(record.token), self._state.files.path(record.token))

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
