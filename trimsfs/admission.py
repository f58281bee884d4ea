"""Which files may be opened at all: those that a manifest signed with a key has the digest of, where that is wanted."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping

import trio

from trimsfs.coldopen import Interruptible
from trimsfs.derived import model_key
from trimsfs.digests import Digest
from trimsfs.errors import BlobDamagedError, SignatureError
from trimsfs.fetch import Fetcher
from trimsfs.namespace import Namespace
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk import DiskTier
from trimsfs.types import Generation

NAME = "model.sig"
"""The file of a model's directory that holds its manifest, as OpenSSF Model Signing names it."""
LARGEST = 16 << 20
"""Bytes of the longest manifest that is read: about 100,000 files."""
REMEMBERED = 256
"""Manifests that are kept, and files that were refused."""
REFUSED_S = 30.0
"""For how long a file that was refused is not fetched again."""

ReadManifest = Callable[[bytes], Mapping[str, Digest]]
"""The digests of files by their paths below the manifest's directory. Raises SignatureError."""


class Admission:
    """Checks files against the manifest in the nearest directory above them that has one.

    *required* tells that a file of which there is none is refused. All of a file is fetched and compared before it is
    opened: *fetch* waits for it, *compare* mends it once more if it differs.
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
    ) -> None:
        self._namespace = namespace
        self._disk = disk
        self._fetcher = fetcher
        self._read_manifest = read_manifest
        self._required = required
        self._fetch = fetch
        self._compare = compare
        self._known: OrderedDict[tuple[str, str], Mapping[str, Digest]] = OrderedDict()
        self._refused: OrderedDict[tuple[str, Digest], float] = OrderedDict()

    async def admit(self, blob: Blob, interruptible: Interruptible) -> None:
        """Return when a blob that the caller uses is what has been signed. Raises SignatureError, and as opens do."""
        digest = await self.signed(blob.generation)
        if digest is None or blob.digest == str(digest):
            return
        refused = blob.token, digest
        if trio.current_time() - self._refused.get(refused, float("-inf")) > REFUSED_S:
            try:
                if await self._is(blob, digest, interruptible):
                    return
            except BlobDamagedError:
                pass
            self._refused[refused] = trio.current_time()
            while len(self._refused) > REMEMBERED:
                self._refused.popitem(last=False)
        raise SignatureError(
            f"{blob.generation.key}: is not the file that has been signed: look at who can write to the store"
        )

    async def _is(self, blob: Blob, digest: Digest, interruptible: Interruptible) -> bool:
        """Whether a blob has a digest, once all of it is here."""
        if not blob.states:
            return digest.value == digest.of_nothing
        await self._fetch(blob, interruptible)
        if blob.digest != str(digest):
            await self._compare(blob, digest)
        return blob.digest == str(digest)

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
            found, _ = await self._namespace.lookup(directory, NAME.encode())
            if isinstance(found, Generation):
                digest = (await self._manifest(found)).get(key[len(directory) :])
                if digest is None:
                    raise SignatureError(f"{key}: is not in /{found.key}: sign the model anew")
                return digest
        if self._required:
            raise SignatureError(f"{key}: no {NAME} in any directory above it: sign the model")
        return None

    async def _manifest(self, generation: Generation) -> Mapping[str, Digest]:
        known = self._known.get((generation.key, generation.etag))
        if known is None:
            if generation.size > LARGEST:
                raise SignatureError(f"{generation.key}: is larger than a manifest may be, {LARGEST} bytes")
            async with self._disk.using(generation) as blob:
                content = bytes(await self._fetcher.read(blob, 0, generation.size)) if generation.size else b""
            try:
                known = self._read_manifest(content)
            except SignatureError as error:
                raise SignatureError(f"{generation.key}: {error}") from None
            self._known[generation.key, generation.etag] = known
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return known


def _above(key: str) -> Iterator[str]:
    """The directories above a key, the nearest first."""
    directory = key
    while directory:
        directory = directory[: directory.rstrip("/").rfind("/") + 1]
        yield directory
