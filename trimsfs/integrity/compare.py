"""Integrity: local copies are what the store says they are, and stay what they were when they came.

Each chunk has a checksum from the moment it came. A whole copy is compared with the digest that the store tells of the
object, which finds what has gone wrong on the way. What is on the disk is read again from time to time (*scrubbed*),
which finds what has gone wrong there. What is wrong is fetched again, and written over the wrong bytes. A copy that
cannot be mended is *in doubt*: nobody gets any more of it.
"""

import logging
import os
import time
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
from trimsfs.fetch.copier import Transfer
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.repair import Repair, held
from trimsfs.models.derived_blobs import model_key
from trimsfs.opening.passthrough import Passthrough
from trimsfs.options import MountOptions
from trimsfs.stores.digests import Digest, crc32c_of
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import CHUNK_SIZE, Generation

log = logging.getLogger(__name__)

AskDigest = Callable[..., Awaitable[Digest | None]]
"""``Store.digest``, or what asks somebody else first."""

SMALL = CHUNK_SIZE
"""Bytes up to which any digest is computed at once."""
MOST_ATTEMPTS = 3
"""How often a copy that differs from the store's digest is fetched again, while that gives other bytes."""
MOST_FRUITLESS = 3
"""How many objects in parts of a size that is guessed are fetched again in vain, before such are not any more."""
AGAIN_S = 1.0
"""After which a store that could not tell a digest is asked again."""
SCRUB_LOOK_S = 30.0
"""How often there is a look at what is to be scrubbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityStatistics:
    """Counts since the server started: copies that have the store's digest, that had not, and chunks written anew;
    bytes scrubbed; copies in doubt now, and those that are still to be compared."""

    compared: int
    differing: int
    repaired_chunks: int
    scrubbed_bytes: int
    doubtful: int
    to_compare: int


class Integrity:
    """Compares and scrubs the blobs of a disk tier, and has its ``repair`` repair them.

    *ask_digest* gives the digest that a file should have, *repaired* hears of files whose bytes were wrong.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        transfer: Transfer,
        retrying: Retrying,
        passthrough: Passthrough,
        options: MountOptions,
        *,
        ask_digest: AskDigest,
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._disk = disk
        self._transfer = transfer
        self._retrying = retrying
        self._ask_digest = ask_digest
        self._mode = options.digests
        self._scrub_interval_s: float = options.scrub_interval
        self._scrub_rate: int = options.scrub_rate
        self.quarantine = Quarantine(disk, self._try_again, changed=passthrough.health_changed)
        self.repair = Repair(
            disk,
            fetcher,
            transfer,
            retrying,
            quarantine=self.quarantine.add,
            unregister=passthrough.unregister,
            repaired=repaired,
        )
        self._later: dict[str, Blob] = {}
        self._comes_later = trio.Event()
        self._misled, self._fruitless = False, 0
        self._compared = self._differing = 0

    def statistics(self) -> IntegrityStatistics:
        return IntegrityStatistics(
            compared=self._compared,
            differing=self._differing,
            repaired_chunks=self.repair.repaired_chunks,
            scrubbed_bytes=self.repair.checked_bytes,
            doubtful=self.quarantine.count,
            to_compare=len(self._later),
        )

    async def run(self) -> None:
        """Compare what was put off, scrub, and see to what is in doubt, for as long as the server runs."""
        for blob in self._disk.whole():
            if not blob.health.compared:  # an earlier server has not come to it
                self._put_off(blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._compare_later)
            nursery.start_soon(self.quarantine.run)
            if self._scrub_interval_s:
                nursery.start_soon(self._scrub)

    # Comparing with the store

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
                return await self.compare(blob, expected)
        except (StoreError, CacheError) as error:
            if self._mode == "wait":
                if not blob.health.quarantined:
                    self.quarantine.add(blob, error)
                return False
            log.warning("%s: not yet compared with the store: %s", blob.generation.key, error)
        self._put_off(blob)
        return True

    async def _expected(self, generation: Generation) -> Digest | None:
        if model_key(generation.key) is not None:
            return None
        return await self._ask_digest(generation, certain=self._misled)

    def compare_later(self, blob: Blob) -> None:
        """A blob is read that has not been compared with what was signed."""
        if (
            not blob.health.compared
            and not blob.health.quarantined
            and self._here(blob)
            and blob.token not in self._later
        ):
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
                    if self._here(blob) and not blob.health.compared:
                        await self._compare_now(blob)
                except (ObjectChangedError, ObjectNotFoundError, SignatureError):
                    self._done_with(blob)  # the store knows it no more, or nobody may open it, and will not
                except TrimsError as error:
                    log.warning("%s: not yet compared with the store: %s", blob.generation.key, error)
                    await trio.sleep(AGAIN_S)
                    self._comes_later.set()
                else:
                    self._done_with(blob)

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
        elif self._here(blob):
            await self.compare(blob, expected)

    def _here(self, blob: Blob) -> bool:
        """Whether a blob is still that of its generation, and whole."""
        return self._disk.known(blob.token) is blob and blob.attached and blob.complete

    async def compare(self, blob: Blob, expected: Digest) -> bool:
        """Compare a whole blob with the digest that it should have, and mend it; whether it may be read."""
        key, changed, before, known = blob.generation.key, 0, blob.health.quarantine, blob.health.digest
        same = await self._has_now(blob, expected)
        if same is False and not self._in_vain(expected) and await self._was_damaged(blob):
            same = await self._has_now(blob, expected)
        for _ in range(MOST_ATTEMPTS):
            if (
                same is not False
                or blob.health.quarantine is not before
                or not self._here(blob)
                or self._in_vain(expected)
            ):
                break
            self._differing += 1
            revision = blob.health.revision
            log.warning("%s: has not the digest %s: fetching it again", key, expected)
            try:
                changed = await self.repair.refetch(blob)
            except (StoreError, OSError) as error:
                self.quarantine.add(
                    blob, BlobDamagedError(f"{key}: has not the digest {expected}, and cannot be had: {error}")
                )
                break
            if not changed and blob.health.revision == revision:
                break  # nor has another comparison mended it meanwhile
            same = await self._has_now(blob, expected)
        if blob.health.quarantine is not before or not self._here(blob):
            return False
        if not expected.signed and blob.health.digest not in {None, known, str(expected)}:
            return True  # it has been compared with what was signed meanwhile
        if same:
            self._compared += 1
            self._fruitless = 0 if expected.parts else self._fruitless
            await self._disk.damage.set_digest(blob, str(expected))
            return True
        if same is False:
            if changed or expected.binding:
                self.quarantine.add(blob, _wrong(key, expected))
                return False
            self._believe_less(expected, key)
        await self._disk.damage.set_digest(blob, "")
        return True

    async def _was_damaged(self, blob: Blob) -> bool:
        """Whether bytes of a blob had gone wrong here, which says nothing of what the store gives, and were mended."""
        revision = blob.health.revision
        if self._here(blob):
            with held(blob):
                await self.repair.check(blob, in_memory=True)
        return blob.health.revision != revision and self._here(blob)

    def _in_vain(self, expected: Digest) -> bool:
        """Whether such a digest that differs says little: the parts of this store's objects are not what they usually
        are."""
        return expected.parts > 0 and expected.part_size is None and self._fruitless >= MOST_FRUITLESS

    def _believe_less(self, expected: Digest, key: str) -> None:
        """What has come twice alike has not a digest that may be another's."""
        log.warning("%s: cannot be compared: %s is not the digest of its bytes, which came twice alike", key, expected)
        if expected.parts:
            self._fruitless += 1
        else:
            self._misled = True

    async def _has_now(self, blob: Blob, expected: Digest) -> bool | None:
        """`_has`, of bytes none of which was exchanged meanwhile. Raises CacheError when they are again and again."""
        for _ in range(MOST_ATTEMPTS):
            revision = blob.health.revision
            same = await self._has(blob, expected)
            if blob.health.revision == revision or not self._here(blob):
                return same
        raise BlobDamagedError(f"{blob.generation.key}: is mended while it is compared with the store, again and again")

    async def _has(self, blob: Blob, expected: Digest) -> bool | None:
        """Whether a blob has a digest; None where it cannot be known, as the parts of the object are unusual."""
        size = blob.generation.size
        if expected.algorithm == "crc32c" and not expected.parts:
            return crc32c_of(blob.records()) == expected.value
        try:
            descriptor = os.dup(blob.fileno())  # it may be evicted meanwhile
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be compared now: {error}") from error
        try:
            for part_size in expected.part_sizes(size):
                found = await self._retrying.call(
                    blob.generation.key,
                    lambda part_size=part_size: self._transfer.digest(  # type: ignore[misc]
                        descriptor, size, expected.algorithm, part_size
                    ),
                )
                if found == expected.value:
                    return True
        except OSError as error:
            self.quarantine.add(
                blob, BlobDamagedError(f"{blob.generation.key}: cannot be read from the cache: {error}")
            )
        finally:
            os.close(descriptor)
        return False if expected.part_sizes(size) else None

    async def _try_again(self, blob: Blob) -> None:
        with held(blob):
            try:
                await self._check_all(blob)
            except TrimsError as error:
                log.warning("%s: still in doubt: %s", blob.generation.key, error)

    async def _check_all(self, blob: Blob, *, in_memory: bool = False) -> None:
        """Check a blob that the caller keeps, and mend it: the disk, the memory, the store's digest. If all is well, it
        is in doubt no longer. Raises TrimsError when something is wrong that cannot be mended."""
        try:
            await self._check_and_compare(blob, in_memory=in_memory)
        finally:
            if self._here(blob) and not blob.health.compared and self._mode != "off":
                self._put_off(blob)  # it may have been mended with other bytes

    async def _check_and_compare(self, blob: Blob, *, in_memory: bool) -> None:
        self._remove_surplus(blob)
        before = blob.health.quarantine
        lost = bool(blob.health.lost)
        for _ in range(MOST_ATTEMPTS):  # what was repaired may have been truncated again since
            wrong = self.repair.wrong[blob.token]
            await self.repair.check(blob, in_memory=in_memory)
            if self.repair.wrong[blob.token] == wrong or blob.health.quarantine is not before:
                break
        else:
            raise BlobDamagedError(f"{blob.generation.key}: is damaged in the cache again and again")
        if lost and blob.health.quarantine is before:
            await self._disk.sync(blob)
        if blob.health.quarantine is before and blob.complete and self._mode != "off":
            await self._compare_now(blob)
            self._done_with(blob)
        if blob.health.quarantine is not before:
            blob.health.check()
        self.quarantine.release(blob)

    def _remove_surplus(self, blob: Blob) -> None:
        """What was truncated comes back as it is repaired; what was added has to go. The kernel may serve both."""
        try:
            if blob.surplus > 0:
                blob.restore_size()
        except OSError as error:
            raise CacheUnusableError(
                f"{blob.generation.key}: its file in the cache cannot be mended: {error}"
            ) from error

    # Checking what is on the disk

    async def verify(self, generation: Generation) -> int:
        """Check all that is here of a generation, on the disk and in memory, and with the store; how many chunks were
        wrong. Raises TrimsError when what is wrong cannot be mended."""
        async with self._disk.looked_at(generation) as blob:
            if not blob.attached:
                if generation.size:
                    raise CacheUnusableError(f"{generation.key}: cannot be checked now: see the log")
                return 0
            before = self.repair.wrong[blob.token]
            self.repair.dropped.pop(blob.token, None)
            await self._check_all(blob, in_memory=blob.backing_id != 0)
            found, reason = self.repair.wrong[blob.token] - before, self.repair.dropped.pop(blob.token, None)
            if reason is not None:
                raise BlobDamagedError(
                    f"{generation.key}: {found} damaged chunks of its local copy were removed, "
                    f"and cannot be fetched now: {reason}"
                )
            return found

    async def _scrub(self) -> None:
        while True:
            generation = await self._disk.damage.to_scrub(time.time() - self._scrub_interval_s)
            if generation is None or not await self._scrub_one(generation):
                await trio.sleep(min(SCRUB_LOOK_S, self._scrub_interval_s))

    async def _scrub_one(self, generation: Generation) -> bool:
        """Check what is on the disk of a generation, unless it leaves meanwhile; False if that cannot be recorded."""
        async with self._disk.looked_at(generation) as blob:
            if not blob.attached:
                return False
            try:
                whole = await self.repair.check(blob, rate=self._scrub_rate)
            except TrimsError as error:
                log.warning("%s: cannot be scrubbed now: %s", generation.key, error)
                return False
            finally:
                if self._here(blob) and not blob.health.compared and self._mode != "off":
                    self._put_off(blob)  # it may have been mended with other bytes
            return not whole or await self._disk.damage.scrubbed(blob)


def _wrong(key: str, expected: Digest) -> TrimsError:
    """What speaks against bytes that the store gives and that have not the digest that they should."""
    if expected.signed:
        return SignatureError.other_content(key)
    return BlobDamagedError(f"{key}: what the store gives has not the digest that it should: {expected}")
