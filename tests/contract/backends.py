"""What the contract tests need of a store's other side: put and delete objects, and open the store on them."""

import os
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from tests.services import S3Server
from tests.services.ceph import missing_programs
from tests.services.registry import MODEL, Layer, Registry, packed, titled
from trimsfs.options import MountOptions
from trimsfs.stores import Retrying, RetryingStore, Store, open_store
from trimsfs.types import Buffer, Generation

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_REQUESTS = 16


class Backend(ABC):
    """A place for objects. One that ``keeps`` what is replaced or deleted still gives the bytes of a generation."""

    keeps: ClassVar[bool] = False

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
class OciBackend(Backend):
    """An artifact, for OciStore: each change is a push of the same tag. A file is a layer, or in one, a *tar*."""

    registry: Registry
    repository: str
    tar: bool
    layers: dict[str, Layer] = field(default_factory=dict)
    keeps: ClassVar[bool] = True

    def put(self, key: str, content: bytes) -> None:
        archive = Layer(packed({key: content}), f"{MODEL}.weight.v1.tar") if self.tar else None
        self.layers[key] = archive or titled(key, content)
        self.push()

    def delete(self, key: str) -> None:
        del self.layers[key]
        self.push()

    def make_directory(self, key: str) -> None:
        self.layers[f"{key}/"] = Layer(packed({key: None}), f"{MODEL}.weight.v1.tar")
        self.push()

    def push(self) -> None:
        """Push all there is."""
        created = {"org.opencontainers.image.created": datetime.now(UTC).isoformat()}
        self.registry.push(f"{self.repository}:v1", list(self.layers.values()), annotations=created)

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        repository = f"missing-{self.repository}" if missing else self.repository
        url = f"oci://{self.registry.address}/{repository}:v1/{prefix}"
        return open_store(MountOptions(store=url), max_requests=MAX_REQUESTS)


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


def new_artifact(registry: Registry, *, tar: bool) -> OciBackend:
    """A new artifact with nothing in it."""
    backend = OciBackend(registry, f"contract-{uuid.uuid4().hex[:12]}", tar)
    backend.push()
    return backend


needs_ceph = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")
