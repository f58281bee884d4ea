"""The signature policy: with a signing key, programs may open only files that match a signed manifest."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

import trio
from cachetools import FIFOCache

from trimsfs.errors import BlobDamagedError, CacheFullError, SignatureError, StoreError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.manifests import Manifests, ReadManifest
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import Interruptible
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse
from trimsfs.types import Generation

MOST_ADMITTED = 10_000
"""Most admitted files to remember."""
PATIENCE_S = 1.0
"""How long an open of an admitted file waits to learn from the store whether it is still signed."""
COMPARED_WITHIN_S = 5.0
LOOK_INTERVAL_S = 0.02
"""How long a read waits for refetched bytes to be compared, and how often it checks."""
MOST_REFUSED = 256
"""Most refused files to remember."""
REFUSED_S = 30.0
"""How long a refused file is not refetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureStatistics:
    """Opens and commands refused since the server started."""

    refusals: int


class SignaturePolicy:
    """Admits files that match the manifest above them, or need none; with *required*, all need one.

    A file is fetched whole and compared before an open. *fetch* waits until it is whole. *compare* compares it, and
    refetches it on a mismatch. *compare_later* starts another comparison of an open file that lost bytes.
    """

    def __init__(
        self,
        namespace: Namespace,
        blobs: BlobUse,
        fetcher: Fetcher,
        read_manifest: ReadManifest,
        *,
        required: bool,
        fetch: Callable[[Blob, Interruptible], Awaitable[object]],
        compare: Callable[[Blob, Digest], Awaitable[object]],
        compare_later: Callable[[Blob], None],
    ) -> None:
        self._blobs = blobs
        self._fetcher = fetcher
        self._fetch = fetch
        self._compare = compare
        self._compare_later = compare_later
        self.manifests = Manifests(namespace, blobs, fetcher, read_manifest, required=required)
        self._admitted: FIFOCache[str, Digest | None] = FIFOCache(MOST_ADMITTED)
        """By the tokens of blobs, the digest by which each was admitted; None if it needed none."""
        self._refused: FIFOCache[tuple[str, Digest], float] = FIFOCache(MOST_REFUSED)
        self._turns = WeakValueDictionary[str, trio.Lock]()
        self._refusals = 0

    def statistics(self) -> SignatureStatistics:
        return SignatureStatistics(refusals=self._refusals)

    async def admit_file(self, generation: Generation, interruptible: Interruptible) -> None:
        """As `admit`, for a read without an open."""
        async with self._blobs.using(generation) as blob:
            await self.admit(blob, interruptible)

    async def admit(self, blob: Blob, interruptible: Interruptible) -> None:
        """Return once a blob that the caller holds matches its signed digest, or needs none.

        Raises SignatureError, and as opens do.
        """
        try:
            await self._admit(blob, interruptible)
        except SignatureError:
            self._refusals += 1
            raise

    async def _admit(self, blob: Blob, interruptible: Interruptible) -> None:
        digest = await self._signed_of(blob, interruptible)
        if digest is None or (blob.complete and blob.health.digest == str(digest)):
            self._admitted[blob.token] = digest
            return
        refused = blob.token, digest
        turn = self._turns.setdefault(blob.token, trio.Lock())
        with interruptible():
            await turn.acquire()  # else concurrent opens would each refetch it
        try:
            if trio.current_time() - self._refused.get(refused, float("-inf")) > REFUSED_S:
                with suppress(SignatureError):
                    if await self._has(blob, digest, interruptible):
                        self._admitted[blob.token] = digest
                        return
                self._refused[refused] = trio.current_time()
        finally:
            turn.release()
        raise SignatureError.other_content(blob.generation.key)

    async def _signed_of(self, blob: Blob, interruptible: Interruptible) -> Digest | None:
        """The signed digest of a blob; while the store does not answer, the one by which it was admitted."""
        if blob.token not in self._admitted or not blob.complete:
            with interruptible():
                return await self.manifests.signed(blob.generation)
        before = self._admitted[blob.token]
        with suppress(StoreError), trio.move_on_after(PATIENCE_S):  # a whole blob need not wait for the store
            return await self.manifests.signed(blob.generation)
        return before

    async def _has(self, blob: Blob, digest: Digest, interruptible: Interruptible) -> bool:
        """Fetch a whole blob; whether it has a digest."""
        if not blob.states:
            return digest.value == digest.of_nothing
        await self._fetch(blob, interruptible)
        before = self._admitted.get(blob.token)
        if before is not None and blob.health.digest == str(before) and before.algorithm == digest.algorithm:
            return before == digest  # its bytes match the earlier digest, and programs may have them open
        if blob.health.digest != str(digest):
            await self._compare(blob, digest)
        blob.health.check()
        if not blob.complete:
            raise BlobDamagedError(f"{blob.generation.key}: its file in the cache was damaged while it was compared")
        return blob.health.digest == str(digest)

    # While a file is open

    async def stands(self, blob: Blob) -> bool:
        """Whether an open file still has the digest by which this server, or the last one, admitted it.

        If so, no byte was lost or found wrong since the comparison. Raises StoreError and SignatureError.
        """
        if blob.token not in self._admitted:
            if blob.health.compared or not blob.states:
                return True
            digest = self._admitted[blob.token] = await self.manifests.signed(blob.generation)
            return digest is None  # a signed file may have been repaired since the read
        digest = self._admitted.get(blob.token)
        return digest is None or not blob.states or blob.health.digest == str(digest)

    def deadline(self) -> float:
        """The instant of trio's clock until which a read that starts to wait now may wait."""
        return trio.current_time() + COMPARED_WITHIN_S

    async def wait_until_it_stands(self, blob: Blob, deadline: float) -> None:
        """Refetch the lost bytes of an open file, and return once it `stands` again after a comparison.

        Raises the reason if the blob is in quarantine, BlobDamagedError at the *deadline* of trio's clock, and as
        `Fetcher.fetch_all` and `stands`.
        """
        with trio.move_on_at(deadline):
            while True:
                blob.health.check()
                with suppress(CacheFullError):  # eviction may soon make room
                    await self._fetcher.fetch_all(blob)
                    if await self.stands(blob):
                        return
                    self._compare_later(blob)
                await trio.sleep(LOOK_INTERVAL_S)
        raise not_compared_with_signature(blob)

    async def expected(self, generation: Generation) -> Digest | None:
        """The digest by which a file was admitted, else its signed digest. Raises SignatureError."""
        return self._admitted.get(self._blobs.token(generation)) or await self.manifests.signed(generation)


def not_compared_with_signature(blob: Blob) -> BlobDamagedError:
    """The error of a read when refetched bytes of a signed file are not compared in time."""
    return BlobDamagedError(f"{blob.generation.key}: refetched bytes not yet compared with the signed digest")


def signed_first(
    signed: Callable[[Generation], Awaitable[Digest | None]], stored: Callable[..., Awaitable[Digest | None]]
) -> Callable[..., Awaitable[Digest | None]]:
    """A function like ``Store.digest``: the *signed* digest of a file, else the *stored* one."""

    async def ask(generation: Generation, *, certain: bool = False) -> Digest | None:
        return await signed(generation) or await stored(generation, certain=certain)

    return ask
