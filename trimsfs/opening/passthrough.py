"""Which blobs are resident: announced to the kernel, which then serves their opens from the local file by itself.

A blob is announced when all of it is verified, recorded in the index and in memory. Its name then leads to another
inode number, so that the kernel never sees one inode opened both ways (it fails such opens). Withdrawing is the same
move backwards. The kernel is not told: an open by the number of before makes it look the name up again.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Protocol

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import BlobDamagedError, CacheFullError, TrimsError
from trimsfs.handover.ledger import Entry, Kind, Ledger
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.host.tier import HostTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)


_ANNOUNCED, _WITHDRAWN, _DOUBTFUL = 1, 2, 3
"""Counts of a backing id in the ledger: in use, about to be given up, or in use of a blob that is in doubt."""
MOST_ATTEMPTS = 3
"""How often a blob is announced that loses bytes meanwhile."""


class Backing(Protocol):
    """Registers files with the kernel as backing files of this mount."""

    async def open(self, descriptor: int) -> int:
        """The backing id, a positive number, of a file. Raises FuseUnavailableError."""

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        """Give a backing id up, and call *done* when that is certain. No open file may have it any more."""


class Residents:
    """The announced blobs: none before it is told what they are `backed_by`, so that all is served in cached mode.

    *compared* tells that nothing may be opened before it has been compared with the store's digest.
    """

    def __init__(self, disk: DiskTier, host: HostTier, *, ledger: Ledger | None = None, compared: bool = False) -> None:
        self._disk = disk
        self._host = host
        self._ledger = ledger or Ledger()
        self._slots: dict[int, int] = {}
        self._backing: Backing | None = None
        self._reason = "not known yet"
        self._announcing: dict[str, trio.Event] = {}
        self._announced: set[tuple[str, str]] = set()
        self._failed: set[str] = set()
        self._background = Background()
        self._compared = compared
        self.approve: Callable[[Blob], Awaitable[bool]] = _approved
        """Whether a blob, all of which is here, may be read from its file."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry announcements, for as long as the server runs."""
        await self._background.run(task_status)

    def backed_by(self, backing: Backing) -> None:
        """Blobs can be announced."""
        self._backing = backing

    async def restore(self, unclaimed: int | None) -> None:
        """Go on with what an earlier server announced, once it is told what blobs are `backed_by`.

        *unclaimed* is a backing id that was given to that server and that it may not have heard of.
        """
        assert self._backing is not None
        known: list[tuple[Entry, Generation]] = []
        for entry in self._ledger.taken(Kind.BACKING):
            self._slots[entry.number] = entry.slot
            if entry.count in {_ANNOUNCED, _DOUBTFUL}:
                known.append((entry, Generation(**json.loads(entry.content))))
            else:
                self._give_up(entry.number)
        if unclaimed is not None and unclaimed not in self._slots:
            self._backing.close(unclaimed)
        blobs = await self._disk.recall([generation for _, generation in known], checked=True)
        for (entry, _), blob in zip(known, blobs, strict=True):
            if blob.complete and blob.attached:
                blob.backing_id = entry.number
                self._announced.add((blob.generation.key, blob.generation.etag))
                self._host.adopt(blob)
                if entry.count == _DOUBTFUL:
                    error = BlobDamagedError(
                        f"{blob.generation.key}: was in doubt when the server before this one ended"
                    )
                    self._disk.damage.on_doubt(blob, error)
            else:  # somebody has been at the cache directory
                self._give_up(entry.number)

    def impossible(self, reason: str) -> None:
        """Blobs cannot be announced on this mount."""
        self._reason = reason
        log.info("files are served in cached mode: %s", reason)

    def facts(self) -> dict[str, object]:
        """Whether passthrough is used on this mount, and why not."""
        return {"used": True} if self._backing is not None else {"used": False, "reason": self._reason}

    def has(self, generation: Generation) -> bool:
        """Whether opens of this generation are passed through."""
        return (generation.key, generation.etag) in self._announced

    async def announce(self, blob: Blob) -> bool:
        """Announce a blob if it is complete, and bring it into memory; whether it is resident now."""
        while (event := self._announcing.get(blob.token)) is not None:
            await event.wait()
        if self.ready(blob):
            return True
        if not blob.complete or not blob.attached or self._served_in_cached_mode(blob):
            return False
        if not self._background.running:
            return False  # the server stops
        event = self._announcing[blob.token] = trio.Event()
        blob.users += 1
        self._background.start(self._carry, blob, event)
        await event.wait()
        return blob.backing_id != 0 and self._may_be_opened(blob)

    def _served_in_cached_mode(self, blob: Blob) -> bool:
        """Whether nothing is to be done for a blob, as it has been compared and brought, and cannot be announced."""
        return self._backing is None and self._host.holds(blob) and blob.health.compared

    async def _carry(self, blob: Blob, event: trio.Event) -> None:
        """Announce a blob, whoever still waits for it."""
        try:
            with trio.CancelScope(shield=True):
                await self._announce(blob)
        finally:
            self._disk.release(blob)
            del self._announcing[blob.token]
            event.set()

    async def _announce(self, blob: Blob) -> None:
        try:
            for _ in range(MOST_ATTEMPTS):
                revision = blob.health.revision
                if not await self._bring(blob) or self._backing is None or blob.backing_id or not blob.complete:
                    return
                backing_id = await self._backing.open(blob.fileno())
                if blob.complete and blob.health.revision == revision:
                    self._opened_as(blob, backing_id)
                    return
                self._backing.close(backing_id)  # what came for bytes that were lost meanwhile has not been approved
        except (OSError, TrimsError) as error:
            if str(error) not in self._failed:
                self._failed.add(str(error))
                log.warning("%s: served in cached mode: %s", blob.generation.key, error)

    async def _bring(self, blob: Blob) -> bool:
        """Have a blob compared and in memory; False if it may not be read. Raises OSError and TrimsError."""
        if not blob.backing_id:
            await self._disk.check_holes(blob)
            if not blob.complete:
                return False
        try:
            await self._disk.recorded(blob)
        finally:  # what cannot be announced is served, too
            approved = await self.approve(blob)
        if not approved:
            return False
        await self._host.bring(blob)
        if blob.pinned:
            await self._lock_again(blob)
        return True

    def _opened_as(self, blob: Blob, backing_id: int) -> None:
        """The kernel knows the file of a blob by this number: the next server is to know."""
        blob.backing_id = backing_id
        content = json.dumps(asdict(blob.generation)).encode()
        count = _DOUBTFUL if blob.health.quarantined else _ANNOUNCED
        self._slots[backing_id] = self._ledger.add(Kind.BACKING, backing_id, content, count=count)
        self._announced.add((blob.generation.key, blob.generation.etag))

    async def _lock_again(self, blob: Blob) -> None:
        """What is pinned has been withdrawn to be mended, and is back."""
        with suppress(CacheFullError):
            await self._host.pin(blob)
        if not blob.pinned:  # nor is it any more
            await self._host.unpin(blob)

    def doubted(self, blob: Blob) -> None:
        """A blob is in doubt, or no longer: the next server is to know."""
        slot = self._slots.get(blob.backing_id)
        if slot is not None:
            self._ledger.set(slot, _DOUBTFUL if blob.health.quarantined else _ANNOUNCED)

    def ready(self, blob: Blob) -> bool:
        """Whether an open of a blob can be passed through at once."""
        return blob.backing_id != 0 and self._host.holds(blob) and self._may_be_opened(blob)

    def _may_be_opened(self, blob: Blob) -> bool:
        return blob.health.compared or not self._compared

    def opened(self, blob: Blob) -> None:
        """A blob was opened in passthrough mode."""
        self._host.used(blob)

    def withdraw(self, blob: Blob) -> None:
        """A blob that nobody uses leaves the disk tier: its next open is served in cached mode."""
        self._host.removed(blob)
        backing_id, blob.backing_id = blob.backing_id, 0
        if backing_id and self._backing is not None:
            self._announced.discard((blob.generation.key, blob.generation.etag))
            self._give_up(backing_id)

    def _give_up(self, backing_id: int) -> None:
        assert self._backing is not None
        self._ledger.set(self._slots[backing_id], _WITHDRAWN)
        self._backing.close(backing_id, partial(self._given_up, backing_id))

    def _given_up(self, backing_id: int) -> None:
        self._ledger.set(self._slots.pop(backing_id), 0)


async def _approved(_blob: Blob) -> bool:
    """Nothing is known against it."""
    return True
