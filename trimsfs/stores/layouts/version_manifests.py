"""What versions tell of their files: the SHA-256 of each, by the manifest, and those of its chunks, by fingerprints."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar
from weakref import WeakValueDictionary

import trio
from cachetools import LRUCache

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreAccessError
from trimsfs.formats import fingerprints
from trimsfs.formats.fingerprints import Fingerprint
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import DIRECTORY, FINGERPRINTS, MOST_BYTES, Manifest
from trimsfs.stores.base import Store
from trimsfs.types import Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_DIGESTS_BYTES = 2 * MOST_BYTES
"""Most bytes of the manifests whose digests are remembered, as the store has them."""
MOST_FINGERPRINTS = 4
"""Most versions whose fingerprints are kept in memory: 5 MB each for a model of 1 TB."""
RECHECK_S = 1.0
"""How long a manifest counts that does not know a file's ETag: the version may have been published anew. Also how long
a directory without versions counts as one for names that are no directories."""
IN_THREAD = 256 << 10
"""Bytes from which an object is parsed in a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOfVersion:
    """A file of a version: the directory of its model, empty or with a closing slash, and its path in the version."""

    model: str
    version: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Digests:
    """The ETag and SHA-256 of each file, by a manifest of this *etag* and *size* that was current when *asked* for."""

    etag: str
    size: int
    asked: float
    files: Mapping[str, tuple[str, bytes]]


class VersionManifests:
    """Reads manifests and fingerprints of a *store*, and remembers those used last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._manifests: LRUCache[str, _Digests] = LRUCache(
            MOST_DIGESTS_BYTES, getsizeof=lambda one: 1000 + min(one.size, MOST_BYTES)
        )
        self._fingerprints: LRUCache[str, Mapping[str, Fingerprint]] = LRUCache(MOST_FINGERPRINTS)
        self._loading = WeakValueDictionary[str, trio.Lock]()
        """Held by who reads an object, by its key: a store that is slow holds up nothing else."""

    async def sha256(self, file: FileOfVersion, etag: str) -> bytes | None:
        """A file's SHA-256; None if the manifest does not name it. Raises StoreError."""
        key = f"{file.model}{DIRECTORY}/{file.version}.json"
        async with self._loading.setdefault(key, trio.Lock()):
            known = self._manifests.get(key)
            known_etag, value = known.files.get(file.path, ("", b"")) if known is not None else ("", b"")
            if known is None or (known_etag != etag and trio.current_time() - known.asked > RECHECK_S):
                self._fingerprints.pop(_fingerprints_key(file), None)
                known = await self._load(key, known)
                _, value = known.files.get(file.path, ("", b""))
        return value or None

    async def fingerprint(self, file: FileOfVersion) -> Fingerprint | None:
        """The CRCs and SHA-256s of a file's chunks; None if the version has none of it. Raises StoreError."""
        key = _fingerprints_key(file)
        async with self._loading.setdefault(key, trio.Lock()):
            known = self._fingerprints.get(key)
            if known is None:
                known = self._fingerprints[key] = await self._load_fingerprints(key)
        return known.get(file.path)

    async def _load(self, key: str, known: _Digests | None) -> _Digests:
        """The digests in a manifest, read again if it is not the one that is *known*."""
        asked = trio.current_time()
        generation = await find(self._store, key)
        etag, size = (generation.etag, generation.size) if generation is not None else ("", 0)
        files: Mapping[str, tuple[str, bytes]] = known.files if known is not None and known.etag == etag else {}
        if generation is not None and (known is None or known.etag != etag):
            try:
                files = await self._parsed(generation, _digests_of)
            except FormatError as error:
                log.warning("/%s: not a manifest, so the store's own digests count: %s", key, error)
        self._manifests[key] = loaded = _Digests(etag=etag, size=size, asked=asked, files=files)
        return loaded

    async def _load_fingerprints(self, key: str) -> Mapping[str, Fingerprint]:
        """What a push has left; nothing if there is nothing that can be used."""
        try:
            generation = await find(self._store, key)
            return {} if generation is None else await self._parsed(generation, _chunks_of)
        except FormatError as error:
            log.warning("/%s: no fingerprints, so its version's chunks all come from the store: %s", key, error)
        except (ObjectChangedError, ObjectNotFoundError, StoreAccessError):
            pass  # removed with its version, or not for this reader
        return {}

    async def _parsed(self, generation: Generation, parse: Callable[[bytes], T]) -> T:
        """An object, as *parse* has it. Raises FormatError and StoreError."""
        if generation.size > MOST_BYTES:
            raise FormatError(f"larger than {MOST_BYTES} bytes")
        content = await content_of(self._store, generation)
        if len(content) < IN_THREAD:
            return parse(content)
        return await in_thread(parse, content)


def _fingerprints_key(file: FileOfVersion) -> str:
    return f"{file.model}{DIRECTORY}/{FINGERPRINTS}/{file.version}.json"


def _digests_of(content: bytes) -> dict[str, tuple[str, bytes]]:
    """The ETag and SHA-256 of each file of a manifest. Raises FormatError."""
    files = Manifest.parse(content).files
    return {path: (file.etag, bytes.fromhex(file.sha256)) for path, file in files.items()}


def _chunks_of(content: bytes) -> dict[str, Fingerprint]:
    """The fingerprints of files, without those of tensors. Raises FormatError."""
    return {path: replace(fingerprint, tensors={}) for path, fingerprint in fingerprints.parse(content).items()}


async def find(store: Store, key: str) -> Generation | None:
    """The newest generation of an object; None if there is none."""
    try:
        return await store.stat(key)
    except ObjectNotFoundError:
        return None


async def content_of(store: Store, generation: Generation) -> bytes:
    """All bytes of a small object."""
    data = bytearray()
    if generation.size:
        await store.read(generation, 0, generation.size, data.extend)
    return bytes(data)
