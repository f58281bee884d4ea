"""Comparison of whole local copies with their objects' digests, in three steps: match, refetch, decide."""

import enum
import logging
import os
import time
from collections.abc import Callable
from functools import partial

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, SignatureError, StoreError, TrimsError
from trimsfs.fetch.copier import Copier
from trimsfs.integrity.chunk_checks import Repair, held
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.stores.digests import TINY, Algorithm, Digest, compute, crc32c_of
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.open_trace import spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.interfaces import KnownBlobs
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.threads import Threads

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
"""Most refetches of a copy if each gives other bytes; most digests of a copy whose bytes change meanwhile."""
SMALL = 128 << 10
"""Bytes up to which a thread computes a digest: it is quicker than a fetch process."""
THREADS = 2
"""Threads that compute such digests."""
REMEDY = "put the right bytes back, or push the version anew under another name; then `trimsfs refresh`"
"""What to do if the store's bytes do not match its digest."""
MOST_FRUITLESS = 3
"""Multipart mismatches in a row after which the comparer refetches no more of them: it cannot guess the part size."""


class Match(enum.Enum):
    """The result of a comparison."""

    SAME = enum.auto()
    """The copy matches the digest."""
    DIFFERENT = enum.auto()
    """The copy does not match. After a refetch: the store gives the same bytes, so the digest itself may be wrong."""
    UNSTABLE = enum.auto()
    """The copy does not match, and each refetch gives other bytes."""
    UNKNOWN = enum.auto()
    """The digest cannot be computed: the object's part size is unknown and unusual."""


class DigestTrust:
    """How far to trust uncertain digests, which may not match their objects' bytes: some ETags, digests of parts."""

    def __init__(self) -> None:
        self.certain_only = False
        """Whether to ask the store only for certain digests: an ETag that looked like a digest was none."""
        self._fruitless = 0

    def exhausted(self, expected: Digest) -> bool:
        """Whether a mismatch is not worth a refetch: this store's parts do not have the usual sizes."""
        return expected.parts > 0 and expected.part_size is None and self._fruitless >= MOST_FRUITLESS

    def confirmed(self, expected: Digest) -> None:
        """Record that a copy matches its digest."""
        if expected.parts:
            self._fruitless = 0

    def refuted(self, expected: Digest) -> None:
        """Record that two fetches of an object agree with each other, but not with its digest."""
        if expected.parts:
            self._fruitless += 1
        else:
            self.certain_only = True


class Comparer:
    """Compares blobs of a disk tier with digests. ``compared`` counts matches, ``differing`` mismatches; ``seconds`` is
    how long comparisons took, with refetches."""

    def __init__(
        self,
        blobs: KnownBlobs,
        damage: Damage,
        copier: Copier,
        retrying: Retrying,
        repair: Repair,
        quarantine: Quarantine,
    ) -> None:
        self._blobs = blobs
        self._damage = damage
        self._copier = copier
        self._retrying = retrying
        self._repair = repair
        self._quarantine = quarantine
        self._threads = Threads(THREADS)
        self.trust = DigestTrust()
        self.compared = 0
        self.differing = 0
        self.seconds = Histogram("outcome", [*(match.name.lower() for match in Match), "failed"])

    def whole(self, blob: Blob) -> bool:
        """Whether a blob is complete, in its file, and still the one of its token."""
        return self._blobs.known(blob.token) is blob and blob.attached and blob.complete

    async def compare(self, blob: Blob, expected: Digest, *, idle_until: float | None = None) -> bool:
        """Compare a whole blob with its *expected* digest and refetch chunks that differ; whether it may be read.

        Until *idle_until* of trio's clock, the digest is computed in idle time only. Raises CacheError and StoreError
        when the blob cannot be compared now.
        """
        quarantine, known = blob.health.quarantine, blob.health.digest

        def undisturbed() -> bool:
            return blob.health.quarantine is quarantine and self.whole(blob)

        began, outcome = time.perf_counter(), "failed"
        try:
            with spanning(blob, "compare digest"):
                match = await self._match(blob, expected, idle_until)
                if match is Match.DIFFERENT and not self.trust.exhausted(expected):
                    match = await self._refetch(blob, expected, undisturbed)
            outcome = match.name.lower()
        finally:
            self.seconds.observe(time.perf_counter() - began, outcome)
        if not undisturbed():
            return False
        if not expected.signed and blob.health.digest not in {None, known, str(expected)}:
            return True  # meanwhile it was compared with a signed digest
        return await self._decide(blob, expected, match)

    # Match

    async def _match(self, blob: Blob, expected: Digest, idle_until: float | None = None) -> Match:
        """Match a blob against a digest, again if its bytes change meanwhile. Raises CacheError."""
        for _ in range(MOST_ATTEMPTS):
            revision = blob.health.revision
            match = await self._match_once(blob, expected, idle_until)
            if blob.health.revision == revision or not self.whole(blob):
                return match
        raise BlobDamagedError(f"{blob.generation.key}: repaired repeatedly while compared with the store: try again")

    async def _match_once(self, blob: Blob, expected: Digest, idle_until: float | None) -> Match:
        size = blob.generation.size
        if expected.algorithm == "crc32c" and not expected.parts:
            return Match.SAME if crc32c_of(blob.records()) == expected.value else Match.DIFFERENT
        part_sizes = expected.part_sizes(size)
        try:
            descriptor = os.dup(blob.fileno())  # the blob may be evicted meanwhile
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be compared now: {error}") from error
        try:
            for part_size in part_sizes:
                digest = await self._retrying.call_locally(
                    blob.generation.key,
                    partial(self._digest, descriptor, size, expected.algorithm, part_size, idle_until),
                )
                if digest == expected.value:
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
        """Compute the digest of a file: in idle time only until *idle_until*, then at any time."""
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
        """Refetch a blob until it matches its digest or a refetch changes nothing. Raises CacheError and StoreError."""
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
        """Whether a check found and repaired damage in the cache: then the store is not to blame for the mismatch."""
        revision = blob.health.revision
        if self.whole(blob):
            with held(blob):
                await self._repair.check(blob, in_memory=True)
        return blob.health.revision != revision and self.whole(blob)

    # Decide

    async def _decide(self, blob: Blob, expected: Digest, match: Match) -> bool:
        """Record the result of a comparison; whether the blob may be read."""
        key = blob.generation.key
        digest = ""
        if match is Match.SAME:
            self.compared += 1
            self.trust.confirmed(expected)
            digest = str(expected)
        elif match is Match.UNSTABLE or (match is Match.DIFFERENT and expected.binding):
            refuted = match is Match.DIFFERENT and not expected.signed  # a manifest may be replaced at any time
            self._quarantine.add(blob, _mismatch(key, expected), refuted=refuted)
            return False
        elif match is Match.DIFFERENT:
            log.warning("%s: not compared: two fetches agree, but not with the store's digest %s", key, expected)
            self.trust.refuted(expected)
        await self._damage.set_digest(blob, digest)
        return True


def _mismatch(key: str, expected: Digest) -> TrimsError:
    """The error of a file whose bytes do not match its digest, although they come from the store."""
    if expected.signed:
        return SignatureError.other_content(key)
    return BlobDamagedError(f"{key}: digest mismatch: the store's bytes do not match its digest {expected}: {REMEDY}")
