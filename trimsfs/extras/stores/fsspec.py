"""The fsspec store: any URL that fsspec reads, such as sftp://. The only user of fsspec, an extra."""

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import trio

from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, absent, moment
from trimsfs.stores.digests import Digest
from trimsfs.stores.http.bodies import SLOWEST_RATE
from trimsfs.stores.stall_guard import STALL_S, StallGuard
from trimsfs.types import Generation

T = TypeVar("T")

LISTING_S = 300.0
"""How long a listing may take: it is of a whole directory each time."""
CONTENT_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "md5",
    "checksum",
    "crc32c",
    "generation",
    "oid",
    "sha",
    "hex",
)
TIME_FIELDS = (
    "mtime",
    "modify",
    "modificationTime",
    "last_write_time",
    "LastModified",
    "last_modified",
    "updated",
    "modified",
    "created",
)


class FsspecStore:
    """The files below a URL of fsspec.

    fsspec has no conditional reads. So each read ends with one more request, which compares the file's ETag, checksum
    or times, to notice a change.
    """

    streaming = False  # a change of the file is only noticed after the read
    forkable = False  # some implementations start threads at once
    links = False

    def __init__(self, url: str, options: MountOptions, *, max_requests: int) -> None:
        del options  # each implementation has settings of its own
        _check_scheme(url)
        try:
            import fsspec  # noqa: PLC0415 - an extra, wanted only here

            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            remedy = ": pip install 'trimsfs[fsspec]'" if error.name == "fsspec" else ""
            raise ConfigurationError(f"store {url}: {error}{remedy}") from error
        except ValueError as error:
            raise ConfigurationError(f"store {url}: {error}: write s3://BUCKET[/PREFIX] or a directory") from error
        self._root = self._root.rstrip("/")
        self._url = url.rstrip("/")
        self._limiter = trio.CapacityLimiter(max_requests)

    @property
    def identity(self) -> str:
        return self._url

    async def probe(self) -> None:
        await self._call(self._probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return await self._call(partial(self._list_page, prefix, token, limit), StallGuard(LISTING_S))

    async def stat(self, key: str) -> Generation:
        return await self._call(partial(self._stat, key))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        guard = StallGuard(STALL_S + length / SLOWEST_RATE)  # the bytes come all at once

        def read() -> None:
            sink(self._translated(partial(self._read, generation, offset, length)))

        await guard.call(read, self._limiter, self._url)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return None

    async def aclose(self) -> None:
        """Do nothing: fsspec keeps its connections until the process ends."""

    async def _call(self, function: Callable[[], T], guard: StallGuard | None = None) -> T:
        return await (guard or StallGuard()).call(partial(self._translated, function), self._limiter, self._url)

    def _translated(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except PermissionError as error:
            raise StoreAccessError(f"{self._url}: {error}") from error
        except StoreError:
            raise
        except Exception as error:
            # Each implementation raises the errors of its own client library.
            raise TransientStoreError(f"{self._url}: {type(error).__name__}: {error}") from error

    def _probe(self) -> None:
        try:
            self._files.ls(self._root, detail=False)
        except OSError as error:
            if not absent(error):
                raise
            raise BucketNotFoundError(f"store {self._url} does not exist") from None

    def _list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        nothing = Page(objects=(), prefixes=(), next_token=None)
        try:
            path = self._path(prefix).rstrip("/")
            listed = self._files.ls(path, detail=True)
        except (OSError, ObjectNotFoundError) as error:
            if not absent(error):
                raise
            self._probe()
            return nothing
        if len(listed) == 1 and listed[0]["type"] == "file" and listed[0]["name"].rstrip("/") == path:
            return nothing  # some implementations list a file as itself
        entries = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in listed}
        names = sorted(name for name in entries if name and (token is None or name > token))
        page = names[:limit]
        return Page(
            objects=tuple(
                _generation(prefix + name, entries[name]) for name in page if entries[name]["type"] == "file"
            ),
            prefixes=tuple(f"{prefix}{name}/" for name in page if entries[name]["type"] == "directory"),
            next_token=page[-1] if len(names) > limit else None,
            empty=not names,
        )

    def _stat(self, key: str) -> Generation:
        try:
            info = self._files.info(self._path(key))
        except OSError as error:
            if not absent(error):
                raise
            raise ObjectNotFoundError(f"{key}: no such file in {self._url}") from None
        if info["type"] != "file":
            raise ObjectNotFoundError(f"{key}: not a file in {self._url}")
        return _generation(key, info)

    def _read(self, generation: Generation, offset: int, length: int) -> bytes:
        try:
            data = self._files.cat_file(self._path(generation.key), start=offset, end=offset + length)
        except OSError as error:
            if not absent(error) and not isinstance(error, IsADirectoryError):
                raise
            raise ObjectNotFoundError(f"{generation.key}: removed from {self._url}") from None
        if self._stat(generation.key) != generation:
            raise ObjectChangedError(f"{generation.key}: the file in {self._url} has changed")
        if len(data) != length:
            raise TransientStoreError(f"asked for {length} bytes, got {len(data)}")
        return bytes(data)

    def _path(self, key: str) -> str:
        if not {".", ".."}.isdisjoint(key.split("/")):
            raise ObjectNotFoundError(f"{key}: not a key of {self._url}")
        return f"{self._root}/{key}" if key else self._root


def _check_scheme(url: str) -> None:
    """Refuse a URL that is most likely meant for S3. Raises ConfigurationError, which has what to write instead."""
    scheme, _, rest = url.partition("://")
    if scheme in {"http", "https"} and find_spec("fsspec") is None:
        host, _, path = rest.partition("/")
        bucket = path.rstrip("/") or "BUCKET[/PREFIX]"
        raise ConfigurationError(
            f"store {url}: a server of S3 is no store: write s3://{bucket} with --endpoint-url {scheme}://{host}; for "
            "files of a web server, pip install 'trimsfs[fsspec]'"
        )


def _generation(key: str, info: Mapping[str, Any]) -> Generation:
    identity = [(field, str(info[field])) for field in (*CONTENT_FIELDS, *TIME_FIELDS) if info.get(field) is not None]
    if not identity or info.get("size") is None:
        raise StoreUnavailableError(f"{key}: not cached: this store gives neither checksum nor time of its files")
    times = [info[field] for field in TIME_FIELDS if info.get(field) is not None]
    return Generation(
        key=key,
        etag=hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()[:32],
        size=int(info["size"]),
        modified_ns=moment(_nanoseconds(times[0])) if times else 0,
    )


def _nanoseconds(modified: object) -> int:
    if isinstance(modified, str):
        try:
            modified = datetime.fromisoformat(modified)
        except ValueError:
            return 0
    if isinstance(modified, datetime):
        return int(modified.timestamp() * 1e9)
    return int(modified * 1e9) if isinstance(modified, int | float) else 0
