"""What the contract tests need of a store's other side: put and delete objects, and open the store on them."""

import contextlib
import os
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.services import S3Server
from tests.services.ceph import missing_programs
from trimsfs.options import MountOptions
from trimsfs.stores import Retrying, RetryingStore, Store, open_store
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
WRITABLE = ["directory", pytest.param("ceph", marks=needs_ceph), "moto", "seaweed"]
"""Every kind of place that trimsfs can write to."""


def writable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MountOptions:
    """The options of an empty place, whose kind is the parameter of the fixture that asks."""
    if request.param == "directory":
        return MountOptions(store=str(tmp_path))
    server: S3Server = request.getfixturevalue(request.param)
    use_only(server, monkeypatch)
    with contextlib.closing(server.client()) as client:
        return s3_options(server.endpoint_url, shared_bucket(client), f"some/{uuid.uuid4().hex}")


def shared_bucket(client: "S3Client") -> str:
    """The bucket of all tests that have a prefix of their own: SeaweedFS has no room for very many buckets."""
    with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="shared")
    return "shared"
