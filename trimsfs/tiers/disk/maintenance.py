"""Maintenance of a disk tier: records, syncs, recovers after a crash and monitors the directory."""

import logging
import sqlite3
from contextlib import suppress

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.disk.crash_recovery import free_unrecorded, groups, reconcile
from trimsfs.tiers.disk.open_blobs import OpenBlobs
from trimsfs.tiers.disk.space import DiskSpace
from trimsfs.tiers.disk.state import TierState

log = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.05
SYNC_INTERVAL_S, LONGEST_SYNC_INTERVAL_S = 2.0, 15.0
"""Shortest and longest time between syncs. Writes postpone a sync, as readers wait for them."""
REST_S = 15.0
"""Time between checks of the directory while there is nothing to record or sync."""
PATIENCE_S = 2.0
"""How long writes to the index may fail before the server ends."""
LOOK_INTERVAL_S = 5.0
"""Time between checks of an unusable directory."""


class Maintenance:
    """Maintains the directory of a disk tier."""

    def __init__(self, state: TierState, space: DiskSpace, open_blobs: OpenBlobs) -> None:
        self._state = state
        self._space = space
        self._open_blobs = open_blobs
        self._failing = False

    def found_failing(self) -> None:
        """Note that the disk fails: `run` then raises, and the server ends."""
        self._failing = True
        self._state.journal.wake()

    async def run(self) -> None:
        """Record writes and uses while the directory is usable; else wait until it is.

        Raises CacheUnusableError when that changes.
        """
        if self._state.directory.problem is not None:
            await self._wait_until_usable()
        self._warn_of_limits()
        await self._sync_recorded()  # first: opens wait for it
        await self._recover()
        await self._space.keep()
        synced = written = trio.current_time()
        while True:
            await self._rest()
            now = trio.current_time()
            if self._state.journal.pending:
                written = now
            due = now - max(synced, written) >= SYNC_INTERVAL_S or now - synced >= LONGEST_SYNC_INTERVAL_S
            if self._state.journal.pending or due:
                await self._state.journal.flush()
            await self._space.tidy()
            await self._free_unfinished()
            if due:
                await self._state.journal.sync()
                self._open_blobs.close_idle()
                if await self._state.threads.run(self._state.directory.removed):
                    self._failing = True
                synced = trio.current_time()
            if self._failing or self._state.journal.failing_s > PATIENCE_S:
                await self._give_up()

    def _warn_of_limits(self) -> None:
        """Log what makes the cache hold nothing, or less than its limit says."""
        budget, path = self._state.budget, self._state.directory.path
        too_small, size = budget.too_small(), budget.disk_bytes()
        if too_small is not None:
            log.warning("nothing is cached: %s", too_small)
        elif budget.limit is not None and size is not None and budget.limit > size:
            log.warning("cache directory %s: its file system has %d MiB, less than --cache-size", path, size >> 20)

    async def _rest(self) -> None:
        """Sleep until there is work, and for a moment longer, to batch it."""
        if self._state.journal.idle:
            with trio.move_on_after(REST_S):
                await self._state.journal.noted()
        await trio.sleep(FLUSH_INTERVAL_S)

    async def _wait_until_usable(self) -> None:
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            if await self._state.threads.run(self._state.directory.usable):
                break
        raise CacheUnusableError(
            f"cache directory {self._state.directory.path} can be used again: starting a server that uses it"
        )

    async def _give_up(self) -> None:
        with suppress(OSError, sqlite3.Error):
            await self._state.threads.run(self._state.index.rebuild)
        raise CacheUnusableError(
            f"cache directory {self._state.directory.path} cannot be used any longer: starting a server without it"
        )

    async def _free_unfinished(self) -> None:
        """Free the space of partly written chunks whose fetch failed, once nobody uses the blob."""
        for token in list(self._state.unfinished):
            async with self._state.lock:
                blob = self._state.blobs.get(token)
                if blob is not None and blob.users:
                    continue
                self._state.unfinished.discard(token)
                if blob is None or blob.complete or not blob.attached:
                    continue
                del self._state.blobs[token]  # so that a concurrent open waits for the lock
                blob.users += 1
                try:
                    await self._state.threads.run(
                        free_unrecorded, blob.fileno(), blob.generation.size, blob.chunk_size, list(blob.records())
                    )
                except OSError as error:
                    log.error("%s: cannot free partly written chunks of a failed fetch: %s", blob.generation.key, error)
                finally:
                    blob.users -= 1
                    self._state.blobs[token] = blob

    async def _recover(self) -> None:
        """Reconcile files and index after a crash in the middle of a change."""
        state, directory = self._state, self._state.directory.blobs
        try:
            names = await state.threads.run(groups, state.index, directory)
        except (OSError, sqlite3.Error) as error:
            log.error("crash recovery: cannot list the blobs in the cache: %s", error)
            return
        for group in names:
            async with state.lock:
                try:
                    for key, lost in await state.threads.run(
                        reconcile, state.index, directory / group, state.chunk_size, set(state.blobs)
                    ):
                        state.budget.add(key, -lost)
                except (OSError, sqlite3.Error) as error:
                    log.error("crash recovery: cannot reconcile the blobs %s*: %s", group, error)

    async def _sync_recorded(self) -> None:
        """Sync chunks that an earlier server recorded but did not sync: a reboot would lose them."""
        journal, tried = self._state.journal, set[str]()
        try:
            while (token := journal.next_inherited(tried)) is not None:
                tried.add(token)
                blob = await self._open_blobs.find(token)
                if blob is None:  # evicted meanwhile
                    journal.settle(token)
                else:
                    await journal.sync_blob(blob)
            if tried:
                await journal.sync()
        except sqlite3.Error as error:
            log.error("cannot read the cache index: %s", error)
