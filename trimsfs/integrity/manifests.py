"""Manifests: finds the signed digest of each file, in the nearest directory above it that has a manifest."""

import weakref
from collections.abc import Callable, Iterator, Mapping

import trio
from cachetools import FIFOCache

from trimsfs.errors import ObjectChangedError, SignatureError, StoreUnavailableError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.derived import model_key
from trimsfs.namespace.tree import Namespace
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, KnownBlobs
from trimsfs.types import Generation

NAME = "model.sig"
"""The file of a model's directory that holds its manifest, as OpenSSF Model Signing names it."""
LARGEST = 16 << 20
"""Bytes of the longest manifest that is read: enough for about 100,000 files."""
MOST_KEPT = 256
"""Most manifests kept in memory."""
MOST_READS = 3
"""Most attempts to read a manifest that is replaced meanwhile."""
INVALID_FOR_S = 30.0
"""Seconds before an invalid manifest is read again."""

ReadManifest = Callable[[bytes], Mapping[str, Digest]]
"""The digests of files by their paths below the manifest's directory. Raises SignatureError."""


class Manifests:
    """Finds manifests and keeps them in memory. With *required*, it refuses files without one."""

    def __init__(
        self, namespace: Namespace, blobs: BlobUse, fetcher: Fetcher, read_manifest: ReadManifest, *, required: bool
    ) -> None:
        self._namespace = namespace
        self._blobs = blobs
        self._fetcher = fetcher
        self._read_manifest = read_manifest
        self._required = required
        self._kept: FIFOCache[str, Mapping[str, Digest] | _Invalid] = FIFOCache(MOST_KEPT)

    async def signed(self, generation: Generation) -> Digest | None:
        """The signed digest of a file; None for a file that needs none.

        Raises SignatureError for a file that needs one and has none.
        """
        key = generation.key
        if model_key(key) is not None or key.rpartition("/")[2] == NAME:
            return None  # a blob derived from an admitted model, or the manifest itself
        for directory in _above(key):
            manifest = await self._manifest_in(directory)
            if manifest is not None:
                digest = manifest.get(key[len(directory) :])
                if digest is None:
                    raise SignatureError(f"{key}: not in /{directory}{NAME}: sign the model again")
                return digest
        if self._required:
            raise SignatureError(f"{key}: no {NAME} in any directory above it: sign the model")
        return None

    async def _manifest_in(self, directory: str) -> Mapping[str, Digest] | None:
        """The manifest of a directory; None if it has none."""
        for _ in range(MOST_READS):
            entry, _ = await self._namespace.lookup(directory, NAME.encode())
            if not isinstance(entry, Generation):
                return None
            try:
                return await self._manifest(entry)
            except ObjectChangedError:  # of the manifest, not of the file
                self._namespace.replaced(entry)
        raise StoreUnavailableError(f"{directory}{NAME}: replaced repeatedly while being read: try again")

    async def _manifest(self, generation: Generation) -> Mapping[str, Digest]:
        token = self._blobs.token(generation)
        known = self._kept.get(token)
        if isinstance(known, _Invalid) and known.outdated(self._blobs):
            known = None
        if known is None:
            known = self._kept[token] = await self._read(generation)
        if isinstance(known, _Invalid):
            raise known.error.with_traceback(None)
        return known

    async def _read(self, generation: Generation) -> "Mapping[str, Digest] | _Invalid":
        if generation.size > LARGEST:
            raise SignatureError(f"{generation.key}: larger than {LARGEST} bytes, the largest manifest that is read")
        async with self._blobs.using(generation) as blob:
            revision = blob.health.revision
            content = bytes(await self._fetcher.read(blob, 0, generation.size)) if generation.size else b""
        try:
            return self._read_manifest(content)
        except SignatureError as error:
            return _Invalid(SignatureError(f"{generation.key}: {error}"), blob, revision)


class _Invalid:
    """Why a manifest is invalid. Its bytes may have been damaged on the way, and repaired later."""

    def __init__(self, error: SignatureError, blob: Blob, revision: int) -> None:
        self.error = error
        self._blob = weakref.ref(blob)
        self._token = blob.token
        self._revision = revision
        self._read_at = trio.current_time()

    def outdated(self, blobs: KnownBlobs) -> bool:
        """Whether the bytes of the manifest may have changed since."""
        blob = blobs.known(self._token)
        if blob is not None and blob is self._blob():
            return blob.health.revision != self._revision
        return trio.current_time() - self._read_at > INVALID_FOR_S


def _above(key: str) -> Iterator[str]:
    """The directories above a key, the nearest first."""
    directory = key
    while directory:
        directory = directory[: directory.rstrip("/").rfind("/") + 1]
        yield directory
