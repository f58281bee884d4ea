"""Compares whole local copies with the digest that their object should have: match, refetch what differs, decide."""

import enum
import logging
import os
from collections.abc import Callable
from functools import partial

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, SignatureError, StoreError, TrimsError
from trimsfs.fetch.copier import Copier
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.integrity.repair import Repair, held
from trimsfs.stores.digests import TINY, Algorithm, Digest, compute, crc32c_of
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""How often a copy is refetched while that gives other bytes, and digested while its bytes are exchanged."""
SMALL = 128 << 10
"""Bytes up to which a digest takes less time than asking a fetch process for it."""
THREADS = 2
"""That compute such digests."""
MOST_FRUITLESS = 3
"""After so many objects whose parts have not the size that was guessed, none is refetched for such a digest."""


class Match(enum.Enum):
    """What a comparison has found."""

    SAME = enum.auto()
    """The copy has the digest."""
    DIFFERENT = enum.auto()
    """It has another one. Refetched: the store gives these same bytes, so that the digest may not be theirs."""
    UNSTABLE = enum.auto()
    """It has another one, and the store gives other bytes each time."""
    UNKNOWN = enum.auto()
    """It cannot be known: the parts of the object have no usual size."""


class DigestTrust:
    """How far digests count that may not be those of their objects' bytes, as some ETags and digests of parts."""

    def __init__(self) -> None:
        self.certain_only = False
        """An ETag that looked like a digest was none: the store is asked for digests that are certain."""
        self._fruitless = 0

    def exhausted(self, expected: Digest) -> bool:
        """Whether a copy that differs is not worth refetching: this store's parts are not of the usual sizes."""
        return expected.parts > 0 and expected.part_size is None and self._fruitless >= MOST_FRUITLESS

    def confirmed(self, expected: Digest) -> None:
        """A copy has its digest."""
        if expected.parts:
            self._fruitless = 0

    def refuted(self, expected: Digest) -> None:
        """The store gives bytes, twice alike, that have not this digest."""
        if expected.parts:
            self._fruitless += 1
        else:
            self.certain_only = True


class Comparer:
    """Compares blobs of a disk tier with digests. ``compared`` and ``differing`` count copies."""

    def __init__(
        self, disk: DiskTier, copier: Copier, retrying: Retrying, repair: Repair, quarantine: Quarantine
    ) -> None:
        self._disk = disk
        self._copier = copier
        self._retrying = retrying
        self._repair = repair
        self._quarantine = quarantine
        self._threads = Threads(THREADS)
        self.trust = DigestTrust()
        self.compared = 0
        self.differing = 0

    def whole(self, blob: Blob) -> bool:
        """Whether all of a blob is here, and it is still the one of its generation."""
        return self._disk.known(blob.token) is blob and blob.attached and blob.complete

    async def compare(self, blob: Blob, expected: Digest, *, idle_until: float | None = None) -> bool:
        """Compare a whole blob with the digest that it should have, and refetch what differs; whether it may be read.

        Until *idle_until* of trio's clock the digest is computed in idle time only. Raises CacheError and StoreError
        when it cannot be compared now.
        """
        quarantine, known = blob.health.quarantine, blob.health.digest

        def undisturbed() -> bool:
            return blob.health.quarantine is quarantine and self.whole(blob)

        match = await self._match(blob, expected, idle_until)
        if match is Match.DIFFERENT and not self.trust.exhausted(expected):
            match = await self._refetch(blob, expected, undisturbed)
        if not undisturbed():
            return False
        if not expected.signed and blob.health.digest not in {None, known, str(expected)}:
            return True  # meanwhile it was compared with the digest that is signed
        return await self._decide(blob, expected, match)

    # Match

    async def _match(self, blob: Blob, expected: Digest, idle_until: float | None = None) -> Match:
        """Whether a blob has a digest, by bytes none of which was exchanged meanwhile. Raises CacheError."""
        for _ in range(MOST_ATTEMPTS):
            revision = blob.health.revision
            match = await self._match_once(blob, expected, idle_until)
            if blob.health.revision == revision or not self.whole(blob):
                return match
        raise BlobDamagedError(f"{blob.generation.key}: repaired again and again while it is compared with the store")

    async def _match_once(self, blob: Blob, expected: Digest, idle_until: float | None) -> Match:
        size = blob.generation.size
        if expected.algorithm == "crc32c" and not expected.parts:
            return Match.SAME if crc32c_of(blob.records()) == expected.value else Match.DIFFERENT
        part_sizes = expected.part_sizes(size)
        try:
            descriptor = os.dup(blob.fileno())  # it may be evicted meanwhile
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be compared now: {error}") from error
        try:
            for part_size in part_sizes:
                found = await self._retrying.call_locally(
                    blob.generation.key,
                    partial(self._digest, descriptor, size, expected.algorithm, part_size, idle_until),
                )
                if found == expected.value:
                    return Match.SAME
        except OSError as error:
            self._quarantine.add(
                blob, BlobDamagedError(f"{blob.generation.key}: cannot be read from the cache: {error}")
            )
        finally:
            os.close(descriptor)
        return Match.DIFFERENT if part_sizes else Match.UNKNOWN

    async def _digest(
        self, descriptor: int, size: int, algorithm: Algorithm, part_size: int, idle_until: float | None
    ) -> bytes | None:
        """The digest of a file's bytes; computed in ordinary time if it is not known by *idle_until*."""
        if size <= TINY and (page_cache.resident_bytes(descriptor) or 0) >= size:
            return compute(descriptor, size, algorithm, part_size)
        if size <= SMALL:
            return await self._threads.run(compute, descriptor, size, algorithm, part_size)
        if idle_until is not None:
            with trio.move_on_at(idle_until):
                return await self._copier.digest(descriptor, size, algorithm, part_size, idle=True)
        return await self._copier.digest(descriptor, size, algorithm, part_size)

    # Refetch

    async def _refetch(self, blob: Blob, expected: Digest, undisturbed: Callable[[], bool]) -> Match:
        """Refetch a blob until it has its digest, or its bytes come twice alike. Raises CacheError and StoreError."""
        match = Match.DIFFERENT
        if await self._was_damaged_here(blob):
            match = await self._match(blob, expected)
        for _ in range(MOST_ATTEMPTS):
            if match in {Match.SAME, Match.UNKNOWN} or not undisturbed() or self.trust.exhausted(expected):
                break
            self.differing += 1
            revision = blob.health.revision
            log.warning("%s: digest mismatch, expected %s: refetching", blob.generation.key, expected)
            try:
                changed = await self._repair.refetch(blob)
            except (StoreError, OSError) as error:
                reason = f"digest mismatch, expected {expected}, and the refetch failed: {error}"
                self._quarantine.add(blob, BlobDamagedError(f"{blob.generation.key}: {reason}"))
                break
            if not changed and blob.health.revision == revision:
                return Match.DIFFERENT
            match = await self._match(blob, expected)
            if match is Match.DIFFERENT and changed:
                match = Match.UNSTABLE
        return match

    async def _was_damaged_here(self, blob: Blob) -> bool:
        """Whether bytes of a blob went wrong in the cache and were repaired: the store is not to blame for them."""
        revision = blob.health.revision
        if self.whole(blob):
            with held(blob):
                await self._repair.check(blob, in_memory=True)
        return blob.health.revision != revision and self.whole(blob)

    # Decide

    async def _decide(self, blob: Blob, expected: Digest, match: Match) -> bool:
        """Record what a comparison has found; whether the blob may be read."""
        key = blob.generation.key
        digest = ""
        if match is Match.SAME:
            self.compared += 1
            self.trust.confirmed(expected)
            digest = str(expected)
        elif match is Match.UNSTABLE or (match is Match.DIFFERENT and expected.binding):
            self._quarantine.add(blob, _mismatch(key, expected))
            return False
        elif match is Match.DIFFERENT:
            log.warning("%s: not compared: the store gives bytes, twice alike, without its digest %s", key, expected)
            self.trust.refuted(expected)
        await self._disk.damage.set_digest(blob, digest)
        return True


def _mismatch(key: str, expected: Digest) -> TrimsError:
    """The error of a file whose bytes, as the store gives them, have not the digest that they should."""
    if expected.signed:
        return SignatureError.other_content(key)
    return BlobDamagedError(f"{key}: digest mismatch: the store's bytes do not match its digest {expected}")
