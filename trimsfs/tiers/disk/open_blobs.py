"""Open blobs: opens the blobs of a disk tier, closes files that nobody reads through the server, forgets blobs."""

import logging
import resource
from collections.abc import Sequence
from functools import partial

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.space import DiskSpace
from trimsfs.tiers.disk.state import TierState
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

MOST_KNOWN = 1 << 17
"""Most blobs known at once. Each takes about 2 KiB here and as much in the kernel. An open of a forgotten one costs a
lookup in the index, checksums and a registration."""
MOST_IDLE = 1024
"""Most idle files kept open. A reopen takes microseconds."""
LOOKS = 8
"""Blobs to examine per release, to find one to close."""
SPARE_DESCRIPTORS = 256
"""Descriptors reserved for other purposes, if there are enough: without one, the server answers no request."""


class OpenBlobs:
    """Opens and closes the blobs of a tier. On a full disk, *space* evicts blobs for a new file."""

    def __init__(self, state: TierState, space: DiskSpace) -> None:
        self._state = state
        self._space = space
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_idle = min(MOST_IDLE, descriptors // 8)
        state.open_files.most = max(descriptors // 4, descriptors - SPARE_DESCRIPTORS)

    async def open(self, token: str, generation: Generation) -> Blob:
        """The blob of a generation, without a file if none can be made. The caller must hold it before it awaits."""
        state, key = self._state, generation.file
        if state.open_files.full:
            await self._close_some()
        blob, full = await self._load(token, generation)
        if full and not state.budget.full(key):
            await self._space.evict_for(key, 0)
            blob, full = await self._load(token, generation, again=True)
            if full:
                state.budget.found_full(key)
        return blob

    async def find(self, token: str, generation: Generation | None = None) -> Blob | None:
        """The blob of this token, or None if there is none; unlike `open`, makes none. Raises sqlite3.Error.

        Its generation is as the index has it, if none is given. The caller must hold it before it awaits.
        """
        state = self._state
        if state.open_files.full:
            await self._close_some()
        async with state.lock:
            known = state.blobs.get(token)
            if known is not None:
                return known
            loaded = await state.threads.run(state.index.load, token)
            if loaded is None:
                return None
            return (await self._load_unknown(token, generation or loaded[0].generation))[0]

    def reopen(self, blob: Blob) -> bool:
        """Open the file of a known blob again, unless only the kernel reads it; False if that fails."""
        if blob.opened or blob.backing_id or not blob.attached:
            return True
        self._close_files(most=self._most_idle, looks=LOOKS)
        if self._state.open_files.full:
            return False
        try:
            blob.fileno()
        except OSError as error:
            log.warning("%s: cannot open its file in the cache again: %s", blob.generation.key, error)
            return False
        return True

    async def _load(self, token: str, generation: Generation, *, again: bool = False) -> tuple[Blob, bool]:
        """The blob of a generation, and whether the disk was too full for its file.

        With *again*, a known blob that has neither file nor users is loaded once more.
        """
        state = self._state
        async with state.lock:
            known = state.blobs.get(token)
            if known is not None and (known.attached or known.users or not again):
                return known, False
            return await self._load_unknown(token, generation)

    async def _load_unknown(self, token: str, generation: Generation) -> tuple[Blob, bool]:
        """`_load` a blob that is not known. The caller holds the lock."""
        state = self._state
        if state.open_files.full:
            self.close_idle()  # others have opened files while the caller waited for the lock
        if state.open_files.full:
            log.error("%s: not cached: too many files are open: raise the limit (ulimit -n)", generation.key)
        gone = state.journal.gone(token)
        blob, lost, full = await state.threads.run(
            partial(state.files.load, token, generation, attach=not state.open_files.full)
        )
        self._loaded(blob, lost, gone)
        return blob, full

    def _loaded(self, blob: Blob, lost: Sequence[ChunkRecord], gone: set[int]) -> None:
        """Register a loaded blob, whose file lacks the *lost* chunks. *gone* chunks no longer count in the budget."""
        state = self._state
        blob.join(state.open_files)  # only now: a thread has used its file
        for chunk in gone:
            blob.forget(chunk)
            blob.health.digest = state.files.no_digest
        state.budget.add(blob.generation.file, -sum(record.length for record in lost if record.chunk not in gone))
        state.journal.lost(blob.token, [record.chunk for record in lost])
        state.journal.loaded(blob)
        state.blobs[blob.token] = blob

    async def recall(self, generations: Sequence[Generation], *, checked: bool) -> list[Blob]:
        """The blobs of generations, loaded together. If *checked*, chunks in the index count as verified."""
        state = self._state
        tokens = [generation.token(state.store) for generation in generations]
        async with state.lock:
            # Not to be looked up afterwards: a release may have it forgotten meanwhile.
            found = {token: state.blobs[token] for token in tokens if token in state.blobs}
            wanted = {
                token: generation for token, generation in zip(tokens, generations, strict=True) if token not in found
            }
            gone = {token: state.journal.gone(token) for token in wanted}
            loaded = await state.threads.run(state.files.load_all, wanted)
            for blob, lost, _ in loaded:
                self._loaded(blob, lost, gone[blob.token])
                found[blob.token] = blob
                if checked:
                    blob.trust()
                if not blob.complete:
                    state.unfinished.add(blob.token)  # the earlier server may have written parts of chunks
        return [found[token] for token in tokens]

    def released(self, blob: Blob) -> None:
        """Close files and forget blobs if too many are open or known, now that a blob has lost a user."""
        state = self._state
        if blob.users == 0:
            state.budget.found_room()
        if blob.users == 0 and not blob.attached and state.blobs.get(blob.token) is blob:
            del state.blobs[blob.token]  # the next open tries again to make its file
        else:
            self._close_files(most=self._most_idle, looks=LOOKS)
            self._forget(most=MOST_KNOWN, looks=LOOKS)

    def _close_files(self, *, most: int, looks: int) -> None:
        """Close files that nobody reads through the server, oldest open first, until *most* are open."""
        opened = self._state.open_files
        for _ in range(looks):
            if len(opened) <= most:
                break
            blob = next(iter(opened))
            if blob.users == blob.passed and self._state.journal.synced(blob):
                blob.close_file()
            else:
                opened.move_to_end(blob)  # the next search begins with others

    def _forget(self, *, most: int, looks: int) -> None:
        """Forget blobs that nobody uses, least recently used first, until *most* are known."""
        state = self._state
        for _ in range(looks):
            if len(state.blobs) <= most:
                break
            blob = next(iter(state.blobs.values()))
            if blob.users == 0 and not blob.pinned and state.journal.synced(blob):
                state.close(blob)
            else:
                state.blobs.move_to_end(blob.token)

    def close_idle(self) -> None:
        """Close files that nobody reads through the server, except for the allowed number."""
        self._close_files(most=self._most_idle, looks=len(self._state.open_files))

    async def _close_some(self) -> None:
        """Close files, as too many are open; sync if that is not enough, as only synced files can be closed."""
        self.close_idle()
        if self._state.open_files.full:
            await self._state.journal.flush()
            await self._state.journal.sync()
            self.close_idle()
