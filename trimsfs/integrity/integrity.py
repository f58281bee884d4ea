"""Integrity: local copies are what the store says they are, and stay what they were when they came.

Each chunk has a checksum from the moment it comes. A whole copy is compared with the store's digest of the object,
which finds what went wrong on the way. The disk is read again from time to time (*scrubbed*), which finds what went
wrong there. Wrong bytes are refetched and overwritten (*repaired*). A copy that cannot be repaired goes to the
*quarantine*.
"""

import logging
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
from trimsfs.integrity.deferred import RETRY_INTERVAL_S, DeferredComparisons, Pace, not_yet
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.repair import Repair, held
from trimsfs.integrity.scrub import Scrubber
from trimsfs.models.derived_blobs import model_key
from trimsfs.opening.passthrough import Passthrough
from trimsfs.stores.digests import Digest
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import CHUNK_SIZE, Generation

log = logging.getLogger(__name__)

AskDigest = Callable[..., Awaitable[Digest | None]]
"""``Store.digest``, or what asks somebody else first."""

SMALL = CHUNK_SIZE
"""Bytes up to which any digest is computed before the file is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityStatistics:
    """Counts since the server started: copies that have the store's digest, that had not, and chunks written anew;
    bytes scrubbed; copies in quarantine now, and those that are still to be compared."""

    compared: int
    differing: int
    repaired_chunks: int
    scrubbed_bytes: int
    doubtful: int
    to_compare: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When what is compared and checked: *digests* is the option, the scrub has an interval and bytes a second."""

    digests: Literal["auto", "wait", "off"]
    scrub_interval_s: float
    scrub_rate: int
    pace: Pace


class Integrity:
    """Decides when the blobs of a disk tier are compared, checked and scrubbed, and has them repaired.

    *ask_digest* gives the digest that a file should have, *repaired* hears of files whose bytes were wrong.
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
        self._soon: dict[str, Blob] = {}
        self._comes_soon = trio.Event()

    def statistics(self) -> IntegrityStatistics:
        return IntegrityStatistics(
            compared=self.comparer.compared,
            differing=self.comparer.differing,
            repaired_chunks=self.repair.repaired_chunks,
            scrubbed_bytes=self.repair.checked_bytes,
            doubtful=self.quarantine.count,
            to_compare=len(self._deferred.tokens | self._soon.keys()),
        )

    async def run(self) -> None:
        """Compare what was put off, scrub, and repair what is in quarantine, for as long as the server runs."""
        for blob in self._disk.complete_blobs():
            if not blob.health.compared:  # an earlier server has not come to it
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
        """Whether a complete blob, which the caller uses, may be read from its file, as far as is known by now."""
        if blob.health.quarantined:
            return False
        if blob.health.compared:
            return True
        try:
            expected = await self._expected(blob.generation)
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
        """The digest that a file should have; None when there is nothing to compare it with."""
        if model_key(generation.key) is not None:
            return None  # no object of the store
        return await self._ask_digest(generation, certain=self.comparer.trust.certain_only)

    def compare_later(self, blob: Blob) -> None:
        """A blob is read that may not have been compared since bytes of it were lost."""
        if self._uncompared(blob) and not blob.health.quarantined and blob.token not in self._soon:
            self._compare_again(blob)

    def _uncompared(self, blob: Blob) -> bool:
        """Whether all of a blob is here and not compared."""
        return self.comparer.whole(blob) and not blob.health.compared

    def _checked(self, blob: Blob) -> None:
        """A blob was checked: it may have been repaired with other bytes."""
        if self._uncompared(blob) and self._mode != "off":
            self._compare_again(blob)

    def _compare_again(self, blob: Blob) -> None:
        """Have a blob compared now, as its bytes are in doubt or somebody waits for it."""
        self._soon[blob.token] = blob
        self._comes_soon.set()

    async def _compare_soon(self) -> None:
        while True:
            await self._comes_soon.wait()
            self._comes_soon = trio.Event()
            for blob in list(self._soon.values()):
                try:
                    if self._uncompared(blob):
                        await self._compare_now(blob)
                except (ObjectChangedError, ObjectNotFoundError, SignatureError):
                    self._done_with(blob)  # the object was replaced or deleted, or the file is not signed
                except TrimsError as error:
                    not_yet(blob, error)
                    await trio.sleep(RETRY_INTERVAL_S)
                    self._comes_soon.set()
                else:
                    self._done_with(blob)

    def _done_with(self, blob: Blob) -> None:
        """A blob needs no comparing any more; another of its token, which has come meanwhile, may."""
        self._deferred.discard(blob)
        if self._soon.get(blob.token) is blob:
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
        """Check what is here of a generation: on the disk, in the page cache, and with the store. How many chunks were
        wrong. Raises TrimsError when what is wrong cannot be repaired."""
        async with self._disk.inspecting(generation) as blob:
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

    async def _check(self, blob: Blob, *, in_memory: bool) -> None:
        """Check a blob that the caller keeps, compare it, and release it from quarantine if all is well. Raises
        TrimsError when something is wrong that cannot be repaired."""
        try:
            await self._check_and_compare(blob, in_memory=in_memory)
        finally:
            self._checked(blob)

    async def _check_and_compare(self, blob: Blob, *, in_memory: bool) -> None:
        self._remove_surplus(blob)
        quarantine, lost = blob.health.quarantine, bool(blob.health.lost)
        findings = self.repair.findings(blob)
        for _ in range(MOST_ATTEMPTS):  # what was repaired may have been truncated again since
            before = findings.wrong_chunks
            await self.repair.check(blob, in_memory=in_memory)
            if findings.wrong_chunks == before or blob.health.quarantine is not quarantine:
                break
        else:
            raise BlobDamagedError(f"{blob.generation.key}: is damaged in the cache again and again")
        if lost and blob.health.quarantine is quarantine:
            await self._disk.sync(blob)
        if blob.health.quarantine is quarantine and blob.complete and self._mode != "off":
            await self._compare_now(blob)
            self._done_with(blob)
        if blob.health.quarantine is not quarantine:
            blob.health.check()
        self.quarantine.release(blob)

    def _remove_surplus(self, blob: Blob) -> None:
        """What was truncated comes back as it is repaired; what was added has to go. The kernel may serve both."""
        try:
            if blob.surplus > 0:
                blob.restore_size()
        except OSError as error:
            raise CacheUnusableError(
                f"{blob.generation.key}: its file in the cache cannot be repaired: {error}"
            ) from error
