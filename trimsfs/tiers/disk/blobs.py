"""The blobs of a disk tier, for those who read them: known ones, held ones, and ones that are only looked at."""

import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import trio

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.blob import Blob, FileChange
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.maintenance import PATIENCE_S, Maintenance
from trimsfs.tiers.disk.open_blobs import OpenBlobs
from trimsfs.tiers.disk.state import TierState
from trimsfs.types import Generation

log = logging.getLogger(__name__)


class Blobs:
    """The blobs of a disk tier, as `FileOpens` and `Inspection`."""

    def __init__(self, state: TierState, open_blobs: OpenBlobs, damage: Damage, maintenance: Maintenance) -> None:
        self._state = state
        self._open_blobs = open_blobs
        self._damage = damage
        self._maintenance = maintenance

    def token(self, generation: Generation) -> str:
        return generation.token(self._state.store)

    def known(self, token: str) -> Blob | None:
        return self._state.blobs.get(token)

    def __iter__(self) -> Iterator[Blob]:
        return iter(self._state.blobs.values())

    # Held

    async def acquire(self, generation: Generation, *, opening: bool = False) -> Blob:
        token, journal = self.token(generation), self._state.journal
        try:
            blob = self._unchanged(token)
            if blob is not None and blob.change() is FileChange.RESIZED:
                await self._damage.size_changed(blob)
                blob = self.known(token)
        except OSError as error:
            await self._fails(generation, error)
        if blob is None:
            blob = await self._open_blobs.open(token, generation)
        self.use(blob, generation, opening=opening)
        if journal.has_inherited(blob):
            try:
                await journal.wait_until_compared(blob)
            except BaseException:
                self.release(blob)
                raise
        return blob

    @asynccontextmanager
    async def using(self, generation: Generation) -> AsyncIterator[Blob]:
        blob = await self.acquire(generation)
        try:
            yield blob
        finally:
            self.release(blob)

    def release(self, blob: Blob) -> None:
        blob.users -= 1
        self._state.journal.used(blob, 0)
        self._open_blobs.released(blob)

    async def recall(self, generations: Sequence[Generation], *, checked: bool = False) -> list[Blob]:
        return await self._open_blobs.recall(generations, checked=checked)

    def unchanged(self, blob: Blob) -> bool:
        if self._state.journal.has_inherited(blob):
            return False
        try:
            return self.known(blob.token) is blob and blob.change() is FileChange.NONE
        except OSError:
            return False

    def use(self, blob: Blob, generation: Generation, *, opening: bool = True) -> None:
        if generation.key == blob.generation.key:
            changes = generation.version_id is not None
        else:
            changes = opening or not blob.users or self._at_one_path(generation, blob.generation)
        if changes:
            blob.generation = generation
        blob.users += 1
        self._state.blobs.move_to_end(blob.token)
        self._state.journal.used(blob, 1)

    def _at_one_path(self, one: Generation, other: Generation) -> bool:
        """Whether requests for two names go to the same store with the same credentials."""
        store = self._state.store
        return isinstance(store, str) or store.path(one.key) == store.path(other.key)

    def _unchanged(self, token: str) -> Blob | None:
        """The blob of this token, if it is known and its file unchanged or resized; else None. Raises OSError.

        A file in use needs no check while the server has it closed: the kernel has it open.
        """
        blob = self.known(token)
        if blob is None or blob.opened or blob.users:
            return blob
        if blob.change() in {FileChange.TOUCHED, FileChange.REPLACED}:
            log.warning("%s: another program changed its file in the cache: verifying it", blob.generation.key)
        elif self._open_blobs.reopen(blob):
            return blob
        self._state.close(blob)
        return None

    async def _fails(self, generation: Generation, error: OSError) -> NoReturn:
        log.error("%s: cannot stat its file in the cache: %s", generation.key, error)
        self._maintenance.found_failing()
        await trio.sleep(PATIENCE_S)  # meanwhile the next server takes over, and gets the request again
        raise CacheUnusableError(f"{generation.key}: the disk of the cache fails: see the log of the mount")

    # Looked at

    @asynccontextmanager
    async def inspecting(self, generation: Generation) -> AsyncIterator[Blob]:
        blob = await self._found(generation) or await self._open_blobs.open(self.token(generation), generation)
        with self._inspecting(blob):
            yield blob

    @asynccontextmanager
    async def inspecting_cached(self, generation: Generation) -> AsyncIterator[Blob | None]:
        problem = self._state.directory.problem
        if problem is not None and generation.size:
            raise CacheUnusableError(f"{generation.key}: cannot be looked at now: {problem}")
        try:
            blob = await self._found(generation) or await self._open_blobs.find(self.token(generation), generation)
        except sqlite3.Error as error:
            raise self._state.index_fails(error) from error
        if blob is None:
            yield None
            return
        with self._inspecting(blob):
            yield blob

    async def _found(self, generation: Generation) -> Blob | None:
        try:
            return self._unchanged(self.token(generation))
        except OSError as error:
            await self._fails(generation, error)

    @contextmanager
    def _inspecting(self, blob: Blob) -> Iterator[None]:
        blob.users += 1
        try:
            yield
        finally:
            blob.users -= 1
            self._open_blobs.released(blob)
