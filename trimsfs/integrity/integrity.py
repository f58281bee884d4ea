"""Integrity: local copies are what the store says they are, and stay what they were when they came.

Each chunk has a checksum from the moment it comes. A whole copy is compared with the store's digest of the object,
which finds what went wrong on the way. The disk is read again from time to time (*scrubbed*), which finds what went
wrong there. Wrong bytes are refetched and overwritten (*repaired*). A copy that cannot be repaired goes to the
*quarantine*.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

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
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.repair import Repair, held
from trimsfs.integrity.scrub import Scrubber
from trimsfs.models.derived_blobs import model_key
from trimsfs.opening.passthrough import Passthrough
from trimsfs.options import MountOptions
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
RETRY_INTERVAL_S = 1.0
"""After which a store that could not tell a digest is asked again."""


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
        options: MountOptions,
        *,
        ask_digest: AskDigest,
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._disk = disk
        self._ask_digest = ask_digest
        self._mode = options.digests
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
            interval_s=options.scrub_interval,
            rate=options.scrub_rate,
            checked=self._checked,
        )
        self._later: dict[str, Blob] = {}
        self._comes_later = trio.Event()

    def statistics(self) -> IntegrityStatistics:
        return IntegrityStatistics(
            compared=self.comparer.compared,
            differing=self.comparer.differing,
            repaired_chunks=self.repair.repaired_chunks,
            scrubbed_bytes=self.repair.checked_bytes,
            doubtful=self.quarantine.count,
            to_compare=len(self._later),
        )

    async def run(self) -> None:
        """Compare what was put off, scrub, and repair what is in quarantine, for as long as the server runs."""
        for blob in self._disk.complete_blobs():
            if not blob.health.compared:  # an earlier server has not come to it
                self._put_off(blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._compare_later)
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
            self._not_yet(blob, error)
        self._put_off(blob)
        return True

    async def _expected(self, generation: Generation) -> Digest | None:
        """The digest that a file should have; None when there is nothing to compare it with."""
        if model_key(generation.key) is not None:
            return None  # no object of the store
        return await self._ask_digest(generation, certain=self.comparer.trust.certain_only)

    def compare_later(self, blob: Blob) -> None:
        """A blob is read that may not have been compared since bytes of it were lost."""
        if self._uncompared(blob) and not blob.health.quarantined and blob.token not in self._later:
            self._put_off(blob)

    def _uncompared(self, blob: Blob) -> bool:
        """Whether all of a blob is here and not compared."""
        return self.comparer.whole(blob) and not blob.health.compared

    def _checked(self, blob: Blob) -> None:
        """A blob was checked: it may have been repaired with other bytes."""
        if self._uncompared(blob) and self._mode != "off":
            self._put_off(blob)

    def _put_off(self, blob: Blob) -> None:
        self._later[blob.token] = blob
        self._comes_later.set()

    async def _compare_later(self) -> None:
        while True:
            await self._comes_later.wait()
            self._comes_later = trio.Event()
            for blob in list(self._later.values()):
                try:
                    if self._uncompared(blob):
                        await self._compare_now(blob)
                except (ObjectChangedError, ObjectNotFoundError, SignatureError):
                    self._done_with(blob)  # the object was replaced or deleted, or the file is not signed
                except TrimsError as error:
                    self._not_yet(blob, error)
                    await trio.sleep(RETRY_INTERVAL_S)
                    self._comes_later.set()
                else:
                    self._done_with(blob)

    def _not_yet(self, blob: Blob, error: TrimsError) -> None:
        log.warning("%s: not compared with the store yet: %s", blob.generation.key, error)

    def _done_with(self, blob: Blob) -> None:
        """A blob needs no comparing any more; another of its token, which has come meanwhile, may."""
        if self._later.get(blob.token) is blob:
            del self._later[blob.token]

    async def _compare_now(self, blob: Blob) -> None:
        known = blob.health.digest
        expected = await self._expected(blob.generation)
        if expected is None:
            if blob.health.digest == known:
                await self._disk.damage.set_digest(blob, "")
        elif self.comparer.whole(blob):
            await self.comparer.compare(blob, expected)

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
