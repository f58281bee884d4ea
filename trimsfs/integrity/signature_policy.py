"""Which files may be opened at all: those that a manifest signed with a key has the digest of, where that is wanted."""

import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import trio

from trimsfs.errors import (
    BlobDamagedError,
    CacheFullError,
    ObjectChangedError,
    SignatureError,
    StoreError,
    StoreUnavailableError,
)
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.models.derived_blobs import model_key
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import Interruptible
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

NAME = "model.sig"
"""The file of a model's directory that holds its manifest, as OpenSSF Model Signing names it."""
LARGEST = 16 << 20
"""Bytes of the longest manifest that is read: about 100,000 files."""
REMEMBERED = 256
"""Manifests that are kept, and files that were refused."""
MOST_ADMITTED = 10_000
"""Files that are remembered to have been admitted."""
PATIENCE_S = 1.0
"""How long one of them waits for the store to say whether it is signed still."""
MOST_READS = 3
"""How often a manifest is read that is replaced meanwhile."""
COMPARED_WITHIN_S = 5.0
LOOK_INTERVAL_S = 0.02
"""How long, and how often, a read looks whether what came for lost bytes has been compared."""
REFUSED_S = 30.0
"""For how long a file that was refused is not fetched again."""

ReadManifest = Callable[[bytes], Mapping[str, Digest]]
"""The digests of files by their paths below the manifest's directory. Raises SignatureError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureStatistics:
    """Counts since the server started: opens and commands that were refused."""

    refusals: int


class SignaturePolicy:
    """Checks files against the manifest in the nearest directory above them that has one.

    *required* tells that a file of which there is none is refused. All of a file is fetched and compared before it is
    opened: *fetch* waits for it, *compare* mends it once more if it differs,
    *compare_later* has one that lost bytes while it was open compared again.
    """

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        fetcher: Fetcher,
        read_manifest: ReadManifest,
        *,
        required: bool,
        fetch: Callable[[Blob, Interruptible], Awaitable[object]],
        compare: Callable[[Blob, Digest], Awaitable[object]],
        compare_later: Callable[[Blob], None],
    ) -> None:
        self._namespace = namespace
        self._disk = disk
        self._fetcher = fetcher
        self._read_manifest = read_manifest
        self._required = required
        self._fetch = fetch
        self._compare = compare
        self._compare_later = compare_later
        self._known: OrderedDict[tuple[str, str], Mapping[str, Digest] | _Wrong] = OrderedDict()
        self._admitted: OrderedDict[str, Digest | None] = OrderedDict()
        self._refused: OrderedDict[tuple[str, Digest], float] = OrderedDict()
        self._turns = WeakValueDictionary[str, trio.Lock]()
        self._refusals = 0

    def statistics(self) -> SignatureStatistics:
        return SignatureStatistics(refusals=self._refusals)

    async def admit(self, blob: Blob, interruptible: Interruptible) -> None:
        """Return when a blob that the caller uses is what has been signed. Raises SignatureError, and as opens do."""
        try:
            await self._admit(blob, interruptible)
        except SignatureError:
            self._refusals += 1
            raise

    async def _admit(self, blob: Blob, interruptible: Interruptible) -> None:
        digest = await self._signed_of(blob, interruptible)
        if digest is None or (blob.complete and blob.health.digest == str(digest)):
            self._remember(blob, digest)
            return
        refused = blob.token, digest
        turn = self._turns.setdefault(blob.token, trio.Lock())
        with interruptible():
            await turn.acquire()  # else all who open it fetch it again at once
        try:
            if trio.current_time() - self._refused.get(refused, float("-inf")) > REFUSED_S:
                try:
                    if await self._is(blob, digest, interruptible):
                        self._remember(blob, digest)
                        return
                except SignatureError:
                    pass
                self._refused[refused] = trio.current_time()
                _shorten(self._refused, REMEMBERED)
        finally:
            turn.release()
        raise SignatureError.other_content(blob.generation.key)

    async def stands(self, blob: Blob) -> bool:
        """Whether an open file still is what it was admitted as, by this server or the one before: nothing of it was
        lost, or found wrong, that has not been compared again. Raises StoreError and SignatureError."""
        if blob.token not in self._admitted:
            if blob.health.compared or not blob.states:
                return True
            digest = await self.signed(blob.generation)
            self._remember(blob, digest)
            return digest is None  # what was read before may have been compared, and mended, since
        digest = self._admitted.get(blob.token)
        return digest is None or not blob.states or blob.health.digest == str(digest)

    async def wait_until_it_stands(self, blob: Blob) -> None:
        """Return once an open file `stands` again, which lost bytes: others compare what comes for them.

        Raises why the blob is in quarantine, BlobDamagedError after COMPARED_WITHIN_S, and as `Fetcher.fetch_all` and
        `stands`.
        """
        with trio.move_on_after(COMPARED_WITHIN_S):
            while True:
                blob.health.check()
                with suppress(CacheFullError):  # there may be room in a moment
                    await self._fetcher.fetch_all(blob)
                    if await self.stands(blob):
                        return
                    self._compare_later(blob)
                await trio.sleep(LOOK_INTERVAL_S)
        raise BlobDamagedError(f"{blob.generation.key}: what came for bytes that were lost is still to be compared")

    async def expected(self, generation: Generation) -> Digest | None:
        """The digest that a file has been admitted by, else as `signed`."""
        return self._admitted.get(generation.token(self._disk.store)) or await self.signed(generation)

    def _remember(self, blob: Blob, digest: Digest | None) -> None:
        """A blob has been admitted, as what has this digest, or as one that needs none."""
        self._admitted[blob.token] = digest
        self._admitted.move_to_end(blob.token)
        _shorten(self._admitted, MOST_ADMITTED)

    async def _signed_of(self, blob: Blob, interruptible: Interruptible) -> Digest | None:
        """As `signed`; for one that has been admitted before, what was signed then, while the store cannot be asked."""
        if blob.token not in self._admitted or not blob.complete:
            with interruptible():
                return await self.signed(blob.generation)
        before = self._admitted[blob.token]
        try:
            with trio.move_on_after(PATIENCE_S):  # what is here does not wait for the store
                return await self.signed(blob.generation)
        except StoreError:
            pass
        return before

    async def _is(self, blob: Blob, digest: Digest, interruptible: Interruptible) -> bool:
        """Whether a blob has a digest, once all of it is here."""
        if not blob.states:
            return digest.value == digest.of_nothing
        await self._fetch(blob, interruptible)
        before = self._admitted.get(blob.token)
        if before is not None and blob.health.digest == str(before) and before.algorithm == digest.algorithm:
            return before == digest  # its bytes are what has been signed before, which others may have open
        if blob.health.digest != str(digest):
            await self._compare(blob, digest)
        blob.health.check()
        if not blob.complete:
            raise BlobDamagedError(f"{blob.generation.key}: its file in the cache has been damaged meanwhile")
        return blob.health.digest == str(digest)

    async def admit_file(self, generation: Generation, interruptible: Interruptible) -> None:
        """`admit`, for what is read of a file without opening it."""
        async with self._disk.using(generation) as blob:
            await self.admit(blob, interruptible)

    async def signed(self, generation: Generation) -> Digest | None:
        """The digest that has been signed for a file; None for one that may be opened without.

        Raises SignatureError for one that may not.
        """
        key = generation.key
        if model_key(key) is not None or key.rpartition("/")[2] == NAME:
            return None  # of a model that has been admitted, or the manifest itself
        for directory in _above(key):
            manifest = await self._manifest_in(directory)
            if manifest is not None:
                digest = manifest.get(key[len(directory) :])
                if digest is None:
                    raise SignatureError(f"{key}: is not in /{directory}{NAME}: sign the model anew")
                return digest
        if self._required:
            raise SignatureError(f"{key}: no {NAME} in any directory above it: sign the model")
        return None

    async def _manifest_in(self, directory: str) -> Mapping[str, Digest] | None:
        """The manifest of a directory, if it has one."""
        for _ in range(MOST_READS):
            found, _ = await self._namespace.lookup(directory, NAME.encode())
            if not isinstance(found, Generation):
                return None
            try:
                return await self._manifest(found)
            except ObjectChangedError:  # the manifest, not the file that it tells of
                self._namespace.replaced(found.key)
        raise StoreUnavailableError(f"{directory}{NAME}: is replaced again and again")

    async def _manifest(self, generation: Generation) -> Mapping[str, Digest]:
        name = generation.key, generation.etag
        known = self._known.get(name)
        if isinstance(known, _Wrong) and known.changed(self._disk):
            known = None
        if known is None:
            if generation.size > LARGEST:
                raise SignatureError(f"{generation.key}: is larger than a manifest may be, {LARGEST} bytes")
            async with self._disk.using(generation) as blob:
                revision = blob.health.revision
                content = bytes(await self._fetcher.read(blob, 0, generation.size)) if generation.size else b""
            try:
                known = self._read_manifest(content)
            except SignatureError as error:
                known = _Wrong(SignatureError(f"{generation.key}: {error}"), blob, revision)
            self._known[name] = known
            _shorten(self._known, REMEMBERED)
        if isinstance(known, _Wrong):
            raise known.error.with_traceback(None)
        return known


def signed_first(
    signed: Callable[[Generation], Awaitable[Digest | None]], stored: Callable[..., Awaitable[Digest | None]]
) -> Callable[..., Awaitable[Digest | None]]:
    """Asks for a digest as ``Store.digest`` does: the *signed* one, and the *stored* one of a file without it."""

    async def ask(generation: Generation, *, certain: bool = False) -> Digest | None:
        return await signed(generation) or await stored(generation, certain=certain)

    return ask


class _Wrong:
    """What is wrong with a manifest: its bytes may have gone wrong on the way, and be right soon."""

    def __init__(self, error: SignatureError, blob: Blob, revision: int) -> None:
        self.error = error
        self._blob = weakref.ref(blob)
        self._token = blob.token
        self._revision = revision
        self._found_at = trio.current_time()

    def changed(self, disk: DiskTier) -> bool:
        """Whether there may be other bytes by now."""
        blob = disk.known(self._token)
        if blob is not None and blob is self._blob():
            return blob.health.revision != self._revision
        return trio.current_time() - self._found_at > REFUSED_S


def _shorten(known: OrderedDict[Any, Any], most: int) -> None:
    """Forget what has been remembered for longest."""
    while len(known) > most:
        known.popitem(last=False)


def _above(key: str) -> Iterator[str]:
    """The directories above a key, the nearest first."""
    directory = key
    while directory:
        directory = directory[: directory.rstrip("/").rfind("/") + 1]
        yield directory
