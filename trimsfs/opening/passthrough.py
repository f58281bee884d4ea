"""Passthrough: registers whole local files with the kernel, which then reads and maps them without the server.

A blob is registered when all of it is verified, recorded in the index and in memory. The server answers opens of its
inodes in passthrough mode from then on, until it is unregistered.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Protocol

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import BlobDamagedError, CacheFullError, TrimsError
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.telemetry.open_trace import spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, ChunkChecks, Durability
from trimsfs.tiers.host.memory_tier import HostTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)


_REGISTERED, _CLOSING, _QUARANTINED = 1, 2, 3
"""States of a backing id, as its count in the ledger: in use, being closed, in use by a blob in quarantine."""
MOST_ATTEMPTS = 3
"""Most attempts to register a blob that loses bytes meanwhile."""
REASONS_REMEMBERED = 256
"""Most failures to remember, so that each is logged once."""


class Backing(Protocol):
    """Registers files with the kernel as backing files of this mount."""

    async def open(self, descriptor: int) -> int:
        """Register a file; its backing id, a positive number. Raises FuseUnavailableError."""

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        """Unregister a backing id that no open file has, and call *done* then."""


class Passthrough:
    """Registers blobs as backing files, after `enable`; until then, the server answers all reads.

    ``blob.backing_id`` is 0 unless the blob is registered. *approve* returns whether programs may read a complete blob.
    Calls *registered* with each blob that is from now on, and *suspected* with each that was in quarantine under the
    last server. *compared*: no blob may be opened before it is compared with the store's digest.
    """

    def __init__(
        self,
        blobs: BlobUse,
        checks: ChunkChecks,
        durability: Durability,
        host: HostTier,
        ledger: Ledger,
        *,
        approve: Callable[[Blob], Awaitable[bool]],
        suspected: Callable[[Blob, TrimsError], None],
        registered: Callable[[Blob], None],
        compared: bool,
    ) -> None:
        self._blobs = blobs
        self._checks = checks
        self._durability = durability
        self._host = host
        self._ledger = ledger
        self._approve = approve
        self._suspected = suspected
        self._on_registered = registered
        self._slots: dict[int, int] = {}
        self._quarantined: dict[str, int] = {}
        self._names = set[tuple[str, str]]()  # keys and ETags: listings ask for each name, and tokens are hashes
        self._backing: Backing | None = None
        self._reason = "not known yet"
        self._registering: dict[str, trio.Event] = {}
        self._logged = LRUCache[str, None](maxsize=REASONS_REMEMBERED)
        self._background = Background()
        self._compared = compared

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Register blobs in the background until the server stops."""
        await self._background.run(task_status)

    def enable(self, backing: Backing) -> None:
        """Allow registering blobs: the kernel accepts backing files."""
        self._backing = backing

    def disable(self, reason: str) -> None:
        """Serve all files in cached mode, for this reason."""
        self._reason = reason
        log.info("files are served in cached mode: %s", reason)

    async def restore(self, unclaimed: Sequence[int]) -> None:
        """Take over the previous server's backing files; call `enable` first.

        *unclaimed* are backing ids that the keeper gave to that server, which may not have recorded them.
        """
        assert self._backing is not None
        known: list[tuple[Record, Generation]] = []
        for record in self._ledger.inherited(RecordKind.BACKING):
            self._slots[record.number] = record.slot
            if record.count in {_REGISTERED, _QUARANTINED}:
                known.append((record, Generation(**json.loads(record.content))))
            else:
                self._close(record.number)
        for number in unclaimed:
            if number not in self._slots:
                self._backing.close(number)
        blobs = await self._blobs.recall([generation for _, generation in known], checked=True)
        for (record, _), blob in zip(known, blobs, strict=True):
            if blob.complete and blob.attached:
                blob.backing_id = record.number
                self._names.add((blob.generation.file, blob.generation.etag))
                self._host.adopt(blob)
                if record.count == _QUARANTINED:
                    self._suspect_again(blob)
            else:  # somebody changed files in the cache directory
                self._close(record.number)

    async def restore_quarantine(self) -> None:
        """Put blobs into quarantine again that are no backing files and were in quarantine under the last server."""
        records = self._ledger.inherited(RecordKind.QUARANTINE)
        wanted = [Generation(**json.loads(record.content)) for record in records]
        for record, blob in zip(records, await self._blobs.recall(wanted, checked=True), strict=True):
            if blob.complete and not blob.backing_id:
                self._quarantined[blob.token] = record.slot
                self._suspect_again(blob)
            else:
                self._ledger.set_count(record.slot, 0)

    def _suspect_again(self, blob: Blob) -> None:
        self._suspected(blob, BlobDamagedError(f"{blob.generation.key}: was in quarantine when the last server ended"))

    @property
    def enabled(self) -> bool:
        """Whether the kernel accepts backing files, as far as is known."""
        return self._backing is not None

    def facts(self) -> dict[str, object]:
        """Whether this mount uses passthrough; if not, the reason."""
        return {"used": True} if self._backing is not None else {"used": False, "reason": self._reason}

    def has(self, generation: Generation) -> bool:
        """Whether opens of this generation are passed through."""
        return (generation.file, generation.etag) in self._names

    async def register(self, blob: Blob) -> bool:
        """Compare a complete blob, load it into memory, and register it; whether opens can be passed through now."""
        while (event := self._registering.get(blob.token)) is not None:
            await event.wait()
        if self.ready(blob):
            return True
        if not blob.complete or not blob.attached or self._served_in_cached_mode(blob):
            return False
        if not self._background.running:
            return False  # the server is stopping
        event = self._registering[blob.token] = trio.Event()
        blob.users += 1
        self._background.start(self._register_to_the_end, blob, event)
        await event.wait()
        return blob.backing_id != 0 and self._may_be_opened(blob)

    def resident(self, blob: Blob) -> bool:
        """Whether an open of a blob has nothing to wait for."""
        return self.ready(blob) or (blob.complete and self._served_in_cached_mode(blob))

    def _served_in_cached_mode(self, blob: Blob) -> bool:
        """Whether a blob needs nothing more: it is in memory and compared, and this mount has no passthrough."""
        return self._backing is None and self._host.holds(blob) and blob.health.compared

    async def _register_to_the_end(self, blob: Blob, event: trio.Event) -> None:
        """Register a blob even if no open waits for it any more."""
        try:
            await self._register(blob)
        finally:
            self._blobs.release(blob)
            del self._registering[blob.token]
            event.set()

    async def _register(self, blob: Blob) -> None:
        try:
            for _ in range(MOST_ATTEMPTS):
                revision = blob.health.revision
                if not await self._prepare(blob) or self._backing is None or blob.backing_id or not blob.complete:
                    return
                if blob.passed:
                    return  # handles of a file that was lost: the kernel refuses a second file for their inode
                # A cancelled call would lose the kernel's id.
                with spanning(blob, "announce"), trio.CancelScope(shield=True):
                    backing_id = await self._backing.open(blob.fileno())
                if blob.complete and blob.health.revision == revision:
                    self._registered(blob, backing_id)
                    return
                self._backing.close(backing_id)  # the bytes refetched meanwhile are not approved
        except (OSError, TrimsError) as error:
            if str(error) not in self._logged:
                self._logged[str(error)] = None
                log.warning("%s: served in cached mode: %s", blob.generation.key, error)

    async def _prepare(self, blob: Blob) -> bool:
        """Compare a blob and load it into memory; False if it may not be read. Raises OSError and TrimsError."""
        if not blob.backing_id:
            with spanning(blob, "check file"):
                await self._checks.check_holes(blob)
            if not blob.complete:
                return False
        try:
            with spanning(blob, "record"):
                await self._durability.wait_until_recorded(blob)
        finally:  # without registration, the blob is served in cached mode
            approved = await self._approve(blob)
        if not approved:
            return False
        with spanning(blob, "load"):
            await self._host.load(blob)
        if blob.pinned:
            await self._lock_again(blob)
        return True

    def _registered(self, blob: Blob, backing_id: int) -> None:
        """Record the backing id of a blob for the next server."""
        blob.backing_id = backing_id
        count = _QUARANTINED if blob.health.quarantined else _REGISTERED
        self._names.add((blob.generation.file, blob.generation.etag))
        self._slots[backing_id] = self._ledger.add(RecordKind.BACKING, backing_id, _packed(blob), count=count)
        self._on_registered(blob)

    async def _lock_again(self, blob: Blob) -> None:
        """Lock a pinned blob in memory again: a repair may have unregistered it."""
        with suppress(CacheFullError):
            await self._host.pin(blob)
        if not blob.pinned:  # unpinned meanwhile
            await self._host.unpin(blob)

    def health_changed(self, blob: Blob) -> None:
        """Record for the next server whether a blob is in quarantine."""
        quarantined, slot = blob.health.quarantined, self._slots.get(blob.backing_id)
        if slot is not None:
            self._ledger.set_count(slot, _QUARANTINED if quarantined else _REGISTERED)
        elif quarantined and blob.token not in self._quarantined:
            self._quarantined[blob.token] = self._ledger.add(RecordKind.QUARANTINE, 0, _packed(blob))
        if not quarantined:
            self._forget_quarantine(blob)

    def _forget_quarantine(self, blob: Blob) -> None:
        slot = self._quarantined.pop(blob.token, None)
        if slot is not None:
            self._ledger.set_count(slot, 0)

    def ready(self, blob: Blob) -> bool:
        """Whether an open of a blob can be passed through at once."""
        return blob.backing_id != 0 and self._host.holds(blob) and self._may_be_opened(blob)

    def _may_be_opened(self, blob: Blob) -> bool:
        return blob.health.compared or not self._compared

    def used(self, blob: Blob) -> None:
        """Record an open of a blob in passthrough mode."""
        self._host.used(blob)

    def unregister(self, blob: Blob) -> None:
        """Unregister a blob that nobody uses: it leaves the disk or is damaged. Its next open is in cached mode."""
        self._host.removed(blob)
        backing_id, blob.backing_id = blob.backing_id, 0
        if backing_id and self._backing is not None:
            self._names.discard((blob.generation.file, blob.generation.etag))
            self._close(backing_id)
        if blob.users:
            self.health_changed(blob)
        else:
            self._forget_quarantine(blob)

    def _close(self, backing_id: int) -> None:
        assert self._backing is not None
        self._ledger.set_count(self._slots[backing_id], _CLOSING)
        self._backing.close(backing_id, partial(self._closed, backing_id))

    def _closed(self, backing_id: int) -> None:
        self._ledger.set_count(self._slots.pop(backing_id), 0)


def _packed(blob: Blob) -> bytes:
    """The generation of a blob, for a record."""
    return json.dumps(asdict(blob.generation)).encode()
