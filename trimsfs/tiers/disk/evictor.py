"""Eviction from the disk: finds the candidates, and removes a blob from disk, index, journal and budget."""

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.eviction_policies import Evictable
from trimsfs.tiers.disk.blob_files import is_full
from trimsfs.tiers.disk.state import TierState
from trimsfs.tiers.leases import has_other_openers

log = logging.getLogger(__name__)

MAPPED_FOR_S = 10.0
"""For how long a blob that was found mapped is no candidate: it is not looked at again for each chunk."""
MAPPED_INTERVAL_S = 0.01
"""When to look again whether a blob is mapped: the server opens files for moments too, and forks inherit them."""
COMMAND_PATIENCE_S = 0.2
"""For how long a command looks: unlike an eviction for space, it cannot take another blob."""


class Evictor:
    """Removes blobs that are neither in use nor pinned, and counts evictions since the server started.

    *load_cost* estimates the seconds to fetch a number of bytes of the object with a key.
    """

    def __init__(self, state: TierState, load_cost: Callable[[str, int], float]) -> None:
        self._state = state
        self._load_cost = load_cost
        self.evictions = self.evicted_bytes = 0
        self._mapped: dict[str, float] = {}

    async def candidates(self) -> list[Evictable]:
        """The blobs that are neither in use nor pinned, as far as is known. Raises sqlite3.Error."""
        journal = self._state.journal
        await journal.flush()
        now = trio.current_time()
        self._mapped = {token: until for token, until in self._mapped.items() if until > now}
        return [
            replace(entry, cost_s=self._load_cost(entry.key, entry.size))
            for entry in await self._state.threads.run(self._state.index.evictable, self._state.store)
            if entry.name not in self._mapped
            and ((blob := self._state.blobs.get(entry.name)) is None or not blob.users or journal.is_only_user(blob))
        ]

    async def evict(self, token: str, key: str) -> int | None:
        """Evict a blob; returns the bytes freed, or None if it is in use or pinned. Raises CacheUnusableError.

        Waits for a sync of the blob first.
        """
        journal, blob = self._state.journal, self._state.blobs.get(token)
        if blob is not None and journal.is_only_user(blob):
            async with journal.syncing:
                return await self.remove(token, key)
        return await self.remove(token, key)

    async def remove(self, token: str, key: str, *, patience_s: float = MAPPED_INTERVAL_S) -> int | None:
        """Remove a blob; returns the bytes freed, None if it is in use or pinned.

        A file that a program has mapped, and closed, is in use: without it the next program would have another copy.
        It is when it is so for *patience_s*. Raises CacheUnusableError.
        """
        deadline = time.monotonic() + patience_s  # whatever trio's clock does: threads and processes are waited for
        try:
            while (freed := await self._remove(token, key)) is None and not self._is_used(token):
                if time.monotonic() >= deadline:
                    self._mapped[token] = trio.current_time() + MAPPED_FOR_S
                    break
                await self._state.threads.run(time.sleep, MAPPED_INTERVAL_S)
        except (OSError, sqlite3.Error) as error:
            log.error("%s: cannot evict blob %s: %s", key, token, error)
            remedy = ": free some space" if is_full(error) else ""
            what = "cannot be removed from the cache" if isinstance(error, OSError) else "its record cannot be removed"
            raise CacheUnusableError(f"{key}: {what}: {error}{remedy}") from error
        return freed

    async def _remove(self, token: str, key: str) -> int | None:
        """Remove a blob; returns the bytes freed, None if it is in use, pinned or mapped."""
        state = self._state
        async with state.lock, state.journal.recording:
            if self._is_used(token):
                return None
            if await self._is_mapped(token) or self._is_used(token):  # opened meanwhile
                return None
            blob = state.blobs.get(token)
            if blob is not None:
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

    def _is_used(self, token: str) -> bool:
        """Whether a blob is known to be in use or pinned."""
        blob = self._state.blobs.get(token)
        return blob is not None and (blob.users > 0 or blob.pinned)

    async def _is_mapped(self, token: str) -> bool:
        """Whether a program has the file of a blob open or mapped; False while the server checks it on the disk."""
        blob = self._state.blobs.get(token)
        if blob is not None and blob.opened_again:
            return False
        if blob is None or not blob.opened:
            return await self._state.threads.run(self._state.files.mapped, token)
        return has_other_openers(blob.fileno())
