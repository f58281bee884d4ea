"""The files of a version before it is published: on this host, in memory, or in another store."""

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    NoSuchEntryError,
    ObjectChangedError,
    StoreError,
    TransientStoreError,
)
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import DIRECTORY, check_path
from trimsfs.prefetch.related_files import HINT, LARGEST_HINT, hinted
from trimsfs.stores.base import Page, Store
from trimsfs.stores.open import directory_of
from trimsfs.stores.retrying import Retrying
from trimsfs.types import Buffer, Generation

_MOST_FILES = 50_000
_DEEPEST = 32
_HINT = os.fsdecode(HINT)
"""The only hidden name that is not left out, at the top alone: mounts look for it in each version."""


class Content(Protocol):
    """The bytes of a file, ``size`` in all. They are read more than once, and must be the same each time."""

    size: int

    async def sha256(self) -> str | None:
        """The SHA-256 in hexadecimal digits, if it is known without reading the file."""
        return None

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range inside of the file. Raises StoreError and TrimsError."""


class Bytes(Content):
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    async def sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    async def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class LocalFile(Content):
    """A file of this host, as it is when this is made. Raises ObjectChangedError once somebody has written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self.size, self._modified_ns = status.st_size, status.st_mtime_ns

    async def read(self, offset: int, length: int) -> bytes:
        return await in_thread(partial(self.read_now, offset, length))

    def read_now(self, offset: int, length: int) -> bytes:
        """As `read`, in this thread."""
        try:
            with self.path.open("rb", buffering=0) as file:
                pieces, done = [], 0
                while done < length and (piece := os.pread(file.fileno(), length - done, offset + done)):
                    pieces.append(piece)
                    done += len(piece)
                status = os.fstat(file.fileno())
        except OSError as error:
            raise NoSuchEntryError(f"{self.path}: {error.strerror}") from None
        if done < length or (status.st_size, status.st_mtime_ns) != (self.size, self._modified_ns):
            raise ObjectChangedError(f"{self.path}: it changed while it was read: push again once nobody writes to it")
        return b"".join(pieces)


class StoredFile(Content):
    """An object of another store, in one generation. Its SHA-256 is what that store tells, if it tells one."""

    def __init__(self, store: Store, generation: Generation, retrying: Retrying) -> None:
        self._store = store
        self._generation = generation
        self._retrying = retrying
        self.size = generation.size

    async def sha256(self) -> str | None:
        digest = await self._retrying.call("no digest", partial(self._store.digest, self._generation, certain=True))
        if digest is not None and digest.algorithm == "sha256" and digest.binding:
            return digest.value.hex()
        return None

    async def read(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        key = self._generation.key

        async def attempt() -> bytes:
            received = bytearray()

            def sink(piece: Buffer) -> None:
                received.extend(piece)

            await self._store.read(self._generation, offset, length, sink)
            if len(received) != length:
                raise TransientStoreError(f"{key}: {len(received)} bytes instead of {length}")
            return bytes(received)

        return await self._retrying.call(f"{key}: not read", attempt)


def files_of_directory(directory: Path) -> tuple[dict[str, LocalFile], list[str]]:
    """The files of a model on this host, by path below its directory, and the hidden paths that are left out.

    Links are followed. Raises ConfigurationError and NoSuchEntryError.
    """
    files: dict[str, LocalFile] = {}
    hidden = list[str]()
    if directory.is_file():
        raise ConfigurationError(f"{directory}: is a file: name the directory that it is in")
    if not directory.is_dir():
        raise NoSuchEntryError(f"{directory}: no such directory: check the spelling")
    for parent, directories, names in os.walk(directory, followlinks=True, onerror=_fail):
        if len(files) > _MOST_FILES or len(Path(parent).relative_to(directory).parts) > _DEEPEST:
            raise ConfigurationError(f"{directory}: too many files, or links that lead round")
        below = Path(parent).relative_to(directory)
        hidden += [path for name in (*directories, *names) if _left_out(path := str(below / name))]
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if _left_out(str(below / name)):
                continue
            if not file.is_file():
                kind = "a link that leads nowhere" if file.is_symlink() else "neither a file nor a directory"
                raise ConfigurationError(f"{file}: {kind}: remove it")
            files[checked(str(file.relative_to(directory)))] = LocalFile(file)
    if not files.keys() - {_HINT}:
        raise ConfigurationError(f"{directory}: there are no files in it")
    return files, hidden


def _left_out(path: str) -> bool:
    """Whether a version does not get what has this path, by its name."""
    return path.rpartition("/")[2].startswith(".") and path != _HINT


async def check_hint(contents: Mapping[str, Content]) -> None:
    """Raises ConfigurationError for a hint that no mount would understand, or that names a file which is not there."""
    hint = contents.get(_HINT)
    if hint is None:
        return
    named = None if hint.size > LARGEST_HINT else hinted(await hint.read(0, hint.size))
    if named is None:
        raise ConfigurationError(
            f'{_HINT}: not understood: write {{"prefetch": [FILE, ...]}} or {{"prefetch": false}}, in {LARGEST_HINT} '
            "bytes at most, or remove it"
        )
    missing = next((name for name in named if name not in contents), None)
    if missing is not None:
        raise ConfigurationError(f"{_HINT}: names {missing}, which is not there: name files of the model, or remove it")


def _fail(error: OSError) -> None:
    raise NoSuchEntryError(f"{error.filename}: {error.strerror}") from None


async def files_of_store(store: Store, retrying: Retrying, url: str) -> tuple[dict[str, StoredFile], list[str]]:
    """The files of a store by key, and the hidden keys that are left out.

    Raises StoreError, NoSuchEntryError, and ConfigurationError, also for a model that has versions: one is to be named.
    """
    files: dict[str, StoredFile] = {}
    hidden = list[str]()
    prefixes = [""]
    while prefixes:
        prefix, token = prefixes.pop(), None
        while True:
            page = await _page(store, retrying, url, prefix, token)
            if len(files) > _MOST_FILES:
                raise ConfigurationError(f"{url}: more than {_MOST_FILES} files")
            for generation in page.objects:
                if _left_out(generation.key):
                    hidden.append(generation.key)
                else:
                    files[checked(generation.key)] = StoredFile(store, generation, retrying)
            for name in page.prefixes:
                _check_unversioned(url, name)
                if name.rstrip("/").rpartition("/")[2].startswith("."):
                    hidden.append(name)
                else:
                    prefixes.append(name)
            if page.unreadable:
                raise StoreError(f"{url}: {page.unreadable[0]}: not readable")
            token = page.next_token
            if token is None:
                break
    if not files.keys() - {_HINT}:
        version = _with_slash(url)
        remedy = f"a version is {version}" if version else "check the spelling"
        raise NoSuchEntryError(f"{url}: there are no files under it: {remedy}")
    return files, hidden


async def _page(store: Store, retrying: Retrying, url: str, prefix: str, token: str | None) -> Page:
    """A page of a listing. Says so if a directory does not exist because it is written as a version to be pushed."""
    try:
        return await retrying.call(f"{url}: not listed", partial(store.list_page, prefix, token=token))
    except BucketNotFoundError:
        version = _with_slash(url)
        if version is None or directory_of(url) is None:
            raise
        raise BucketNotFoundError(f"{url}: no such directory: a version of another store is {version}") from None


def _check_unversioned(url: str, directory: str) -> None:
    """Raises ConfigurationError for the directory that a model with versions has."""
    if f"/{directory}".endswith(f"/{DIRECTORY}/"):
        model = f"{url.rstrip('/')}/{directory.removesuffix(f'{DIRECTORY}/')}"
        raise ConfigurationError(f"{model.rstrip('/')} has versions: import one of them: {model}VERSION")


def _with_slash(url: str) -> str | None:
    """``STORE/NAME/VERSION`` for ``STORE/NAME:VERSION``; None for anything else."""
    model, colon, version = url.rpartition(":")
    return f"{model}/{version}" if colon and "/" not in version else None


def checked(path: str) -> str:
    """A path that a file of a version may have. Raises ConfigurationError."""
    try:
        return check_path(path)
    except FormatError as error:
        raise ConfigurationError(str(error)) from None


def total(contents: Mapping[str, Content]) -> int:
    """Bytes of all files."""
    return sum(content.size for content in contents.values())
