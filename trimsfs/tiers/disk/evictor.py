"""Eviction from the disk: finds the candidates, and removes a blob from disk, index, journal and budget."""

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import replace

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.eviction_policies import Evictable

log = logging.getLogger(__name__)


class Evictor:
    """Removes blobs that are neither in use nor pinned, and counts evictions since the server started.

    *load_cost* estimates the seconds to fetch a number of bytes.
    """

    def __init__(self, state: TierState, load_cost: Callable[[int], float]) -> None:
        self._state = state
        self._load_cost = load_cost
        self.evictions = self.evicted_bytes = 0

    async def candidates(self) -> list[Evictable]:
        """The blobs that are neither in use nor pinned. Raises sqlite3.Error."""
        await self._state.journal.flush()
        return [
            replace(entry, cost_s=self._load_cost(entry.size))
            for entry in await self._state.threads.run(self._state.index.evictable, self._state.store)
            if (blob := self._state.blobs.get(entry.name)) is None or self._is_idle(blob)
        ]

    def _is_idle(self, blob: Blob) -> bool:
        return blob.users == 0 or self._state.journal.is_only_user(blob)

    async def try_remove(self, token: str, key: str) -> bool:
        """Evict a blob unless it is in use or pinned; False if the removal failed.

        Waits for a sync of the blob first.
        """
        journal, blob = self._state.journal, self._state.blobs.get(token)
        try:
            if blob is not None and journal.is_only_user(blob):
                async with journal.syncing:
                    await self.remove(token, key)
            else:
                await self.remove(token, key)
        except (OSError, sqlite3.Error) as error:
            log.error("%s: cannot evict blob %s: %s", key, token, error)
            return False
        return True

    async def remove(self, token: str, key: str) -> int | None:
        """Remove a blob; returns the bytes freed, None if it is in use or pinned.

        Raises OSError and sqlite3.Error.
        """
        state = self._state
        async with state.lock, state.journal.recording:
            blob = state.blobs.get(token)
            if blob is not None:
                if blob.users or blob.pinned:
                    return None
                state.close(blob)
            unrecorded, gone = state.journal.forget(token)
            state.budget.add(key, -sum(unrecorded.values()))
            try:
                recorded = await state.threads.run(state.files.remove, token)
            except BaseException:
                state.journal.lost(token, gone | unrecorded.keys())
                raise
        counted = [size for chunk, size in recorded.items() if chunk not in unrecorded and chunk not in gone]
        state.budget.add(key, -sum(counted))
        state.budget.found_room()
        size = sum(unrecorded.values()) + sum(counted)
        self.evictions += 1
        self.evicted_bytes += size
        log.info("%s: evicted %d bytes (blob %s)", key, size, token)
        return size
