"""Integrity: keeps local copies equal to the store's objects.

Each chunk has a checksum from the moment it arrives. Comparing a whole copy with the store's digest finds damage on the
way from the store. *Scrubbing*, reading the disk again from time to time, finds damage there. *Repair* refetches wrong
bytes and overwrites them. A copy that cannot be repaired goes into *quarantine*.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import trio

from trimsfs.errors import (
    BlobDamagedError,
    CacheError,
    CacheUnusableError,
    ObjectChangedError,
    ObjectNotFoundError,
    SignatureError,
    StoreError,
    TrimsError,
)
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.compare import MOST_ATTEMPTS, Comparer
from trimsfs.integrity.deferred import RETRY_INTERVAL_S, DeferredComparisons, Pace, Retries, not_yet
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.repair import Repair, held
from trimsfs.integrity.scrub import Scrubber
from trimsfs.namespace.derived import model_key
from trimsfs.opening.passthrough import Passthrough
from trimsfs.stores.digests import Digest
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.open_trace import spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.types import CHUNK_SIZE, Generation

log = logging.getLogger(__name__)

AskDigest = Callable[..., Awaitable[Digest | None]]
"""``Store.digest``, or a function that asks another source first."""

SMALL = CHUNK_SIZE
"""Bytes up to which every digest is compared before the first open."""
PATIENCE_S = 0.5
"""How long the open of a whole file may wait until the store tells its digest; then it is compared later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityStatistics:
    """Counts since the server started: copies that match the store's digest, digest mismatches, chunks overwritten and
    bytes scrubbed, and how long comparisons took. Counts of now: copies in quarantine (``doubtful``), and copies still
    ``to_compare``."""

    compared: int
    differing: int
    repaired_chunks: int
    scrubbed_bytes: int
    doubtful: int
    to_compare: int
    comparison_seconds: Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When copies are compared and scrubbed. ``digests`` is the option; ``scrub_rate`` is in bytes a second."""

    digests: Literal["auto", "wait", "off"]
    scrub_interval_s: float
    scrub_rate: int
    pace: Pace


class Integrity:
    """Decides when the blobs of a disk tier are compared, checked and scrubbed, and has them repaired.

    *ask_digest* returns the digest that a file should have. *repaired* hears of each file whose bytes were wrong.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        copier: Copier,
        retrying: Retrying,
        passthrough: Passthrough,
        schedule: Schedule,
        *,
        ask_digest: AskDigest,
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._disk = disk
        self._ask_digest = ask_digest
        self._mode = schedule.digests
        self.quarantine = Quarantine(disk, changed=passthrough.health_changed)
        self.repair = Repair(
            disk,
            fetcher,
            copier,
            retrying,
            self.quarantine,
            unregister=passthrough.unregister,
            repaired=repaired,
        )
        self.comparer = Comparer(disk, copier, retrying, self.repair, self.quarantine)
        self.scrubber = Scrubber(
            disk,
            self.repair,
            interval_s=schedule.scrub_interval_s,
            rate=schedule.scrub_rate,
            checked=self._checked,
        )
        self._deferred = DeferredComparisons(
            schedule.pace, quiet_s=fetcher.quiet_s, uncompared=self._uncompared, compare=self._compare_now
        )
        self._soon: dict[str, tuple[Blob, Retries]] = {}
        self._comes_soon = trio.Event()

    def statistics(self) -> IntegrityStatistics:
        return IntegrityStatistics(
            compared=self.comparer.compared,
            differing=self.comparer.differing,
            repaired_chunks=self.repair.repaired_chunks,
            scrubbed_bytes=self.repair.checked_bytes,
            doubtful=self.quarantine.count,
            to_compare=len(self._deferred.tokens | self._soon.keys()),
            comparison_seconds=self.comparer.seconds,
        )

    async def run(self) -> None:
        """Run deferred comparisons, scrubs and repairs from quarantine until the server stops."""
        for blob in self._disk.complete_blobs():
            if not blob.health.compared:  # the previous server did not compare it
                if self._mode == "wait":
                    self._compare_again(blob)
                else:
                    self._deferred.add(blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deferred.run)
            nursery.start_soon(self._compare_soon)
            nursery.start_soon(self.quarantine.run, self._repair_quarantined)
            nursery.start_soon(self.scrubber.run)

    # When blobs are compared with the store

    async def approve(self, blob: Blob) -> bool:
        """Whether programs may read a complete blob that the caller holds. Compares it now or later, if needed."""
        if blob.health.quarantined:
            return False
        if blob.health.compared:
            return True
        try:
            patience_s = math.inf if self._mode == "wait" else PATIENCE_S
            with spanning(blob, "ask digest"), trio.move_on_after(patience_s) as asking:
                expected = await self._expected(blob.generation)
            if asking.cancelled_caught:  # what is here does not wait for the store
                self._deferred.add(blob)
                return True
            if expected is None:
                await self._disk.damage.set_digest(blob, "")
                return True
            if self._mode == "wait" or expected.at_once or blob.generation.size <= SMALL:
                return await self.comparer.compare(blob, expected)
        except (StoreError, CacheError) as error:
            if self._mode == "wait":
                if not blob.health.quarantined:
                    self.quarantine.add(blob, error)
                return False
            not_yet(blob, error)
        self._deferred.add(blob)
        return True

    async def _expected(self, generation: Generation) -> Digest | None:
        """The digest that a file should have; None if there is none."""
        if model_key(generation.key) is not None:
            return None  # a derived blob: the store has no such object
        return await self._ask_digest(generation, certain=self.comparer.trust.certain_only)

    def compare_later(self, blob: Blob) -> None:
        """Compare a blob soon if it is whole and uncompared: it may have lost bytes since its last comparison."""
        if self._uncompared(blob) and not blob.health.quarantined and blob.token not in self._soon:
            self._compare_again(blob)

    def _uncompared(self, blob: Blob) -> bool:
        """Whether a blob is whole and not compared."""
        return self.comparer.whole(blob) and not blob.health.compared

    def _checked(self, blob: Blob) -> None:
        """Compare a blob after a check, which may have repaired it with other bytes."""
        if self._uncompared(blob) and self._mode != "off":
            self._compare_again(blob)

    def _compare_again(self, blob: Blob) -> None:
        """Compare a blob as soon as possible: its bytes are in doubt, or a program waits for it."""
        before = self._soon.get(blob.token)
        if before is None or before[0] is not blob:
            self._soon[blob.token] = blob, Retries()
        self._comes_soon.set()

    async def _compare_soon(self) -> None:
        while True:
            await self._comes_soon.wait()
            self._comes_soon = trio.Event()
            for blob, retries in list(self._soon.values()):
                try:
                    if self._uncompared(blob):
                        await self._compare_now(blob)
                except (ObjectChangedError, ObjectNotFoundError, SignatureError):
                    self._done_with(blob)  # the object was replaced or deleted, or the file is not signed
                except TrimsError as error:
                    retries.failed(blob, error)
                    await trio.sleep(RETRY_INTERVAL_S)
                    self._comes_soon.set()
                except Exception:  # a defect: it ends this comparison, not the server
                    log.exception("%s: not compared with the store: internal error", blob.generation.key)
                    self._done_with(blob)
                else:
                    self._done_with(blob)

    def _done_with(self, blob: Blob) -> None:
        """Forget a blob that needs no comparison, but not a newer one with the same token."""
        self._deferred.discard(blob)
        soon = self._soon.get(blob.token)
        if soon is not None and soon[0] is blob:
            del self._soon[blob.token]

    async def _compare_now(self, blob: Blob, idle_until: float | None = None) -> None:
        known = blob.health.digest
        expected = await self._expected(blob.generation)
        if expected is None:
            if blob.health.digest == known:
                await self._disk.damage.set_digest(blob, "")
        elif self.comparer.whole(blob):
            await self.comparer.compare(blob, expected, idle_until=idle_until)

    # Checking a blob on command, and one in quarantine

    async def verify(self, generation: Generation) -> int:
        """Check the local copy of a generation: on disk, in the page cache, and against the store.

        Returns the number of wrong chunks. Raises TrimsError when they cannot be repaired.
        """
        async with self._disk.inspecting_cached(generation) as blob:
            if blob is None:
                return 0
            if not blob.attached:
                if generation.size:
                    raise CacheUnusableError(f"{generation.key}: cannot be checked now: see the log")
                return 0
            before = self.repair.findings(blob).wrong_chunks
            self.repair.findings(blob).dropped = None
            await self._check(blob, in_memory=blob.backing_id != 0)
            findings = self.repair.findings(blob)
            found = findings.wrong_chunks - before
            if findings.dropped is not None:
                raise BlobDamagedError(
                    f"{generation.key}: {found} damaged chunks of its local copy were removed, "
                    f"and cannot be fetched now: {findings.dropped}"
                )
            return found

    async def _repair_quarantined(self, blob: Blob) -> None:
        with held(blob):
            try:
                await self._check(blob, in_memory=False)
            except TrimsError as error:
                log.warning("%s: still in quarantine: %s", blob.generation.key, error)
            except Exception:  # likewise
                log.exception("%s: still in quarantine: internal error", blob.generation.key)

    async def _check(self, blob: Blob, *, in_memory: bool) -> None:
        """Check and compare a blob that the caller holds; release it from quarantine if it is right.

        Raises TrimsError when it is wrong and cannot be repaired.
        """
        try:
            await self._check_and_compare(blob, in_memory=in_memory)
        finally:
            self._checked(blob)

    async def _check_and_compare(self, blob: Blob, *, in_memory: bool) -> None:
        self._remove_surplus(blob)
        quarantine, lost = blob.health.quarantine, bool(blob.health.lost)
        findings = self.repair.findings(blob)
        for _ in range(MOST_ATTEMPTS):  # the file may have been truncated again since its repair
            before = findings.wrong_chunks
            await self.repair.check(blob, in_memory=in_memory)
            if findings.wrong_chunks == before or blob.health.quarantine is not quarantine:
                break
        else:
            raise BlobDamagedError(f"{blob.generation.key}: damaged repeatedly in the cache: check the disk")
        if lost and blob.health.quarantine is quarantine:
            await self._disk.sync(blob)
        if blob.health.quarantine is quarantine and blob.complete and self._mode != "off":
            await self._compare_now(blob)
            self._done_with(blob)
        if blob.health.quarantine is not quarantine:
            blob.health.check()
        self.quarantine.release(blob)

    def _remove_surplus(self, blob: Blob) -> None:
        """Cut off bytes that somebody appended: the kernel may serve them, and a repair would leave them."""
        try:
            if blob.surplus > 0:
                blob.restore_size()
        except OSError as error:
            raise CacheUnusableError(
                f"{blob.generation.key}: its file in the cache cannot be repaired: {error}"
            ) from error
