"""What the contract tests need of a store's other side: put and delete objects, and open the store on them."""

import os
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.services import S3Server
from tests.services.ceph import missing_programs
from trimsfs.options import MountOptions
from trimsfs.stores import DirectoryStore, Retrying, RetryingStore, Store, StoreRouter, open_store
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink
from trimsfs.stores.digests import Digest
from trimsfs.types import Buffer, Generation

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_REQUESTS = 16


class Backend(ABC):
    """A place for objects."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Make or replace an object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object."""

    @abstractmethod
    def make_directory(self, key: str) -> None:
        """Make a directory with nothing in it."""

    @abstractmethod
    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        """The store below a prefix (none, or a path without a slash at either end), or one that does not exist."""


@dataclass(frozen=True, slots=True)
class DirectoryBackend(Backend):
    """A directory, for DirectoryStore, or as another kind of store by a URL that begins with *scheme*."""

    root: Path
    scheme: str = ""

    def put(self, key: str, content: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.root.with_name(uuid.uuid4().hex)
        new.write_bytes(content)
        new.replace(path)

    def delete(self, key: str) -> None:
        (self.root / key).unlink()

    def make_directory(self, key: str) -> None:
        (self.root / key).mkdir()

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        root = self.root.with_name("missing") if missing else self.root
        return open_store(MountOptions(store=f"{self.scheme}{root / prefix}"), max_requests=MAX_REQUESTS)


@dataclass(frozen=True, slots=True)
class S3Backend(Backend):
    """A bucket, for S3Store. The environment must hold the server's credentials."""

    client: "S3Client"
    bucket: str

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def make_directory(self, key: str) -> None:
        self.put(f"{key}/", b"")

    def keep_versions(self) -> None:
        """From now on, keep what is replaced or deleted."""
        self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        bucket = f"missing-{self.bucket}" if missing else self.bucket
        return open_store(s3_options(self.client.meta.endpoint_url, bucket, prefix), max_requests=MAX_REQUESTS)


PATH = "deep/path/"
"""Where a store is beside others."""


class AtItsPath:
    """What is at a path of a router, as a store of its own: keys are without the path."""

    def __init__(self, router: StoreRouter) -> None:
        self._router = router
        self.identity, self.streaming = router.identity, router.streaming
        self.forkable, self.links = router.forkable, router.links
        self.probe, self.aclose = router.probe, router.aclose

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        page = await self._router.list_page(PATH + prefix, token=token, limit=limit)
        return replace(
            page,
            objects=tuple(map(_without_path, page.objects)),
            prefixes=tuple(below.removeprefix(PATH) for below in page.prefixes),
            unreadable=tuple(key.removeprefix(PATH) for key in page.unreadable),
        )

    async def stat(self, key: str) -> Generation:
        return _without_path(await self._router.stat(PATH + key))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        return await self._router.read(_with_path(generation), offset, length, sink)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return await self._router.digest(_with_path(generation), certain=certain)


def _with_path(generation: Generation) -> Generation:
    linked = None if generation.linked is None else PATH + generation.linked
    return replace(generation, key=PATH + generation.key, linked=linked)


def _without_path(generation: Generation) -> Generation:
    linked = None if generation.linked is None else generation.linked.removeprefix(PATH)
    assert generation.key.startswith(PATH)
    return replace(generation, key=generation.key.removeprefix(PATH), linked=linked)


@dataclass(frozen=True, slots=True)
class RoutedBackend(Backend):
    """Another backend, its stores beside another one in a router."""

    inner: Backend

    def put(self, key: str, content: bytes) -> None:
        self.inner.put(key, content)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def make_directory(self, key: str) -> None:
        self.inner.make_directory(key)

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        store, beside = self.inner.open(prefix, missing=missing), DirectoryStore(Path("/usr/share"))
        return AtItsPath(StoreRouter({PATH: store, "deep/pat/": beside}))


@dataclass(frozen=True, slots=True)
class RetryingBackend(Backend):
    """Another backend, its stores wrapped in RetryingStore."""

    inner: Backend

    def put(self, key: str, content: bytes) -> None:
        self.inner.put(key, content)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def make_directory(self, key: str) -> None:
        self.inner.make_directory(key)

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        return RetryingStore(self.inner.open(prefix, missing=missing), Retrying(deadline_s=5, on_failure=None))


async def read(store: Store, generation: Generation, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a generation, from one read."""
    received = bytearray()

    def sink(piece: Buffer) -> None:
        received.extend(piece)

    await store.read(generation, start, (generation.size if stop is None else stop) - start, sink)
    return bytes(received)


def s3_options(endpoint_url: str, bucket: str, prefix: str = "", *, stall_timeout: float = 5) -> MountOptions:
    """Options for a bucket of a server that is named by its address."""
    return MountOptions(
        store=f"s3://{bucket}/{prefix}",
        endpoint_url=endpoint_url,
        addressing_style="path",
        stall_timeout=stall_timeout,
    )


def use_only(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name this server's credentials, and nothing else the SDK would look at."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def new_bucket(client: "S3Client") -> S3Backend:
    """A new bucket with nothing in it."""
    bucket = f"contract-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    return S3Backend(client, bucket)


needs_ceph = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")
