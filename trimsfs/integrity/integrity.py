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
    StoreError,
    TrimsError,
)
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.chunk_checks import Repair, held
from trimsfs.integrity.deferred import DeferredComparisons, Pace, not_yet
from trimsfs.integrity.digest_comparison import MOST_ATTEMPTS, Comparer
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.scrub import Scrubber
from trimsfs.namespace.derived import model_key
from trimsfs.opening.passthrough import Passthrough
from trimsfs.stores.digests import Digest
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.open_trace import spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.interfaces import Durability, Inspection, Retention
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


class Integrity:
    """Decides when the blobs of a disk tier are compared, checked and scrubbed, and has them repaired.

    *digests* is the option; *scrub_rate* is in bytes a second. *ask_digest* returns the digest that a file should have.
    *repaired* hears of each file whose bytes were wrong.
    """

    def __init__(
        self,
        blobs: Inspection,
        damage: Damage,
        durability: Durability,
        retention: Retention,
        fetcher: Fetcher,
        copier: Copier,
        retrying: Retrying,
        passthrough: Passthrough,
        *,
        digests: Literal["auto", "wait", "off"],
        scrub_interval_s: float,
        scrub_rate: int,
        pace: Pace,
        ask_digest: AskDigest,
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._blobs = blobs
        self._damage = damage
        self._durability = durability
        self._ask_digest = ask_digest
        self._mode = digests
        self.quarantine = Quarantine(blobs, retention, changed=passthrough.health_changed)
        self.repair = Repair(
            damage,
            fetcher,
            copier,
            retrying,
            self.quarantine,
            unregister=passthrough.unregister,
            repaired=repaired,
        )
        self.comparer = Comparer(blobs, damage, copier, retrying, self.repair, self.quarantine)
        self.scrubber = Scrubber(
            blobs, damage, self.repair, interval_s=scrub_interval_s, rate=scrub_rate, checked=self._checked
        )
        self._deferred = DeferredComparisons(
            pace, quiet_s=fetcher.quiet_s, uncompared=self._uncompared, compare=self._compare_now
        )

    def statistics(self) -> IntegrityStatistics:
        return IntegrityStatistics(
            compared=self.comparer.compared,
            differing=self.comparer.differing,
            repaired_chunks=self.repair.repaired_chunks,
            scrubbed_bytes=self.repair.checked_bytes,
            doubtful=self.quarantine.count,
            to_compare=self._deferred.count,
            comparison_seconds=self.comparer.seconds,
        )

    async def run(self) -> None:
        """Run deferred comparisons, scrubs and repairs from quarantine until the server stops."""
        for blob in self._blobs:
            if blob.attached and blob.complete and not blob.health.compared:  # the previous server did not compare it
                self._deferred.add(blob, at_once=self._mode == "wait")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deferred.run)
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
                await self._damage.set_digest(blob, "")
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
        if self._uncompared(blob) and not blob.health.quarantined:
            self._deferred.add(blob, at_once=True)

    def _uncompared(self, blob: Blob) -> bool:
        """Whether a blob is whole and not compared."""
        return self.comparer.whole(blob) and not blob.health.compared

    def _checked(self, blob: Blob) -> None:
        """Compare a blob after a check, which may have repaired it with other bytes."""
        if self._uncompared(blob) and self._mode != "off":
            self._deferred.add(blob, at_once=True)

    async def _compare_now(self, blob: Blob, idle_until: float | None = None) -> None:
        known = blob.health.digest
        expected = await self._expected(blob.generation)
        if expected is None:
            if blob.health.digest == known:
                await self._damage.set_digest(blob, "")
        elif self.comparer.whole(blob):
            await self.comparer.compare(blob, expected, idle_until=idle_until)

    # Checking a blob on command, and one in quarantine

    async def verify(self, generation: Generation) -> int:
        """Check the local copy of a generation: on disk, in the page cache, and against the store.

        Returns the number of wrong chunks. Raises TrimsError when they cannot be repaired.
        """
        async with self._blobs.inspecting_cached(generation) as blob:
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
            wrong_chunks = findings.wrong_chunks - before
            if findings.dropped is not None:
                raise BlobDamagedError(
                    f"{generation.key}: {wrong_chunks} damaged chunks of its local copy were removed, "
                    f"and cannot be fetched now: {findings.dropped}"
                )
            return wrong_chunks

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
        try:
            blob.cut_surplus()
        except OSError as error:
            message = f"{blob.generation.key}: its file in the cache cannot be repaired: {error}"
            raise CacheUnusableError(message) from error
        quarantine, lost = blob.health.quarantine, bool(blob.health.lost)
        findings = self.repair.findings(blob)
        for _ in range(MOST_ATTEMPTS):  # the file may have been truncated again since its repair
            before = findings.wrong_chunks
            await self.repair.check(blob, in_memory=in_memory)
            if findings.wrong_chunks == before or blob.health.quarantine is not quarantine:
                break
        else:
            raise BlobDamagedError(f"{blob.generation.key}: damaged repeatedly in the cache: check the disk")
        if lost and blob.health.quarantine is quarantine and not await self._durability.sync_blob(blob):
            raise BlobDamagedError(f"{blob.generation.key}: its chunks cannot be synced to the disk")
        if blob.health.quarantine is quarantine and blob.complete and self._mode != "off":
            await self._compare_now(blob)
            self._deferred.discard(blob)
        if blob.health.quarantine is not quarantine:
            blob.health.check()
        self.quarantine.release(blob)
