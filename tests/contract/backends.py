"""What the contract tests need of a store's other side: put and delete objects, and open the store on them."""

import base64
import contextlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote, urlencode

import pytest
import urllib3

from tests.services import S3Server, azurite
from tests.services.azurite import Azurite
from tests.services.ceph import missing_programs
from tests.services.fake_gcs import GoogleServer
from tests.services.fast_clouds import FastCloud
from tests.services.hub import Hub
from tests.services.registry import MODEL, Layer, Registry, packed, titled
from trimsfs.extras.stores.cloud.azure import API_VERSION
from trimsfs.extras.stores.cloud.azure_credentials import Account, signer
from trimsfs.extras.stores.cloud.connections import Request
from trimsfs.options import MountOptions
from trimsfs.stores.base import Page, Store
from trimsfs.stores.open import open_store
from trimsfs.types import Buffer, Generation

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_REQUESTS = 16
ACCOUNT = Account(
    name=azurite.ACCOUNT, endpoint=f"http://127.0.0.1/{azurite.ACCOUNT}", key=base64.b64decode(azurite.KEY)
)
"""Azurite's only account."""


class Backend(ABC):
    """A place for objects. One that ``keeps`` what is replaced or deleted still gives the bytes of a generation."""

    keeps: ClassVar[bool] = False

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Make or replace an object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object."""

    def make_directory(self, key: str) -> None:
        """Make a directory with nothing in it."""
        self.put(f"{key}/", b"")

    def holds(self, name: str) -> bool:
        """Whether an object may have this name."""
        return True

    @abstractmethod
    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        """Options for the store below a prefix (none, or a path without slashes at its ends), or a missing store."""

    def open(self, prefix: str = "", *, missing: bool = False) -> Store:
        """The store of these options."""
        return open_store(self.options(prefix, missing=missing), max_requests=MAX_REQUESTS)


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

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        root = self.root.with_name("missing") if missing else self.root
        return MountOptions(store=f"{self.scheme}{root / prefix}")


@dataclass(frozen=True, slots=True)
class S3Backend(Backend):
    """A bucket, for S3Store. The environment must hold the server's credentials."""

    client: "S3Client"
    bucket: str

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def keep_versions(self) -> None:
        """From now on, keep what is replaced or deleted."""
        self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        bucket = f"missing-{self.bucket}" if missing else self.bucket
        return s3_options(self.client.meta.endpoint_url, bucket, prefix)


@dataclass(frozen=True, slots=True)
class GoogleBackend(Backend):
    """A bucket of a stand-in of Google Cloud Storage, named by STORAGE_EMULATOR_HOST."""

    endpoint_url: str
    bucket: str

    def put(self, key: str, content: bytes) -> None:
        query = urlencode({"uploadType": "media", "name": key}, quote_via=quote)
        headers = {"Content-Type": "application/octet-stream"}
        self.request("POST", f"/upload/storage/v1/b/{self.bucket}/o?{query}", content, headers)

    def delete(self, key: str) -> None:
        self.request("DELETE", f"/storage/v1/b/{self.bucket}/o/{quote(key, safe='')}")

    def request(self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """Send a request. Raises AssertionError unless it succeeds."""
        answer = urllib3.request(method, self.endpoint_url + target, body=body, headers=headers)
        assert 200 <= answer.status < 300, (method, target, answer.status, answer.data[:500])
        return answer.data

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        return MountOptions(store=f"gs://{'missing-' if missing else ''}{self.bucket}/{prefix}")


@dataclass(frozen=True, slots=True)
class FastGoogleBackend(DirectoryBackend):
    """A directory that an endpoint of the tests' own serves as a bucket of Google Cloud Storage."""

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        return MountOptions(store=f"gs://{'missing' if missing else self.root.name}/{prefix}")


@dataclass(frozen=True, slots=True)
class AzureBackend(Backend):
    """A container of Azurite, named by AZURE_STORAGE_CONNECTION_STRING."""

    endpoint_url: str
    container: str

    def holds(self, name: str) -> bool:
        """Azure takes a backslash for a slash, and allows no control characters."""
        return name.isprintable() and "\\" not in name

    def create(self) -> None:
        """Make the container."""
        self._request("PUT", "", {"restype": "container"})

    def put(self, key: str, content: bytes) -> None:
        headers = {"x-ms-blob-type": "BlockBlob", "Content-Type": "application/octet-stream"}
        self._request("PUT", f"/{quote(key, safe='/~')}", {}, content, headers)

    def delete(self, key: str) -> None:
        self._request("DELETE", f"/{quote(key, safe='/~')}", {})

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request that the store's own code signs. Raises AssertionError unless it succeeds."""
        length = {"Content-Length": str(len(body))} if body else {}
        request = signer(ACCOUNT, "", "", 1)(
            Request(
                method=method,  # type: ignore[arg-type]  # a store only reads
                path=f"{ACCOUNT.path}/{self.container}{path}",
                query=query,
                headers={**API_VERSION, **(headers or {}), **length},
            )
        )
        url = self.endpoint_url.removesuffix(ACCOUNT.path) + request.target
        answer = urllib3.request(method, url, body=body, headers=request.headers)
        assert 200 <= answer.status < 300, (method, url, answer.status, answer.data[:500])

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        return MountOptions(store=f"az://{'missing-' if missing else ''}{self.container}/{prefix}")


@dataclass(frozen=True, slots=True)
class HubBackend(Backend):
    """A repository of a hub, for HubStore: what it has are the files of its last commit."""

    hub: Hub
    repository: str
    keeps: ClassVar[bool] = True

    def put(self, key: str, content: bytes) -> None:
        self.hub.put(self.repository, key, content)

    def delete(self, key: str) -> None:
        self.hub.delete(self.repository, key)

    def make_directory(self, key: str) -> None:
        pytest.skip("git has no directories with nothing in them")

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        name = self.repository.removeprefix("model/")
        return MountOptions(
            store=f"hf://{name}{'-missing' if missing else ''}/{prefix}", endpoint_url=self.hub.endpoint
        )


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

    def options(self, prefix: str = "", *, missing: bool = False) -> MountOptions:
        repository = f"missing-{self.repository}" if missing else self.repository
        return MountOptions(store=f"oci://{self.registry.address}/{repository}:v1/{prefix}")


async def pages(store: Store, prefix: str = "", *, limit: int = 1000) -> list[Page]:
    """All pages of a directory."""
    found = [await store.list_page(prefix, limit=limit)]
    while (token := found[-1].next_token) is not None:
        found.append(await store.list_page(prefix, token=token, limit=limit))
        assert len(found) < 1000, "the pages do not end"
    return found


def names(page: Page) -> list[str]:
    """All keys and prefixes of a page."""
    return [generation.key for generation in page.objects] + list(page.prefixes)


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
        store=f"s3://{bucket}/{prefix}", endpoint_url=endpoint_url, addressing_style="path", stall_timeout=stall_timeout
    )


def use_only(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name this server's credentials, and nothing else the SDK would look at."""
    forget(monkeypatch, "AWS_")
    nothing = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    for name, value in (nothing | server.environment()).items():
        monkeypatch.setenv(name, value)


def forget(monkeypatch: pytest.MonkeyPatch, *beginnings: str) -> None:
    """Let the environment name no proxy, and nothing that begins so."""
    for name in [name for name in os.environ if name.startswith(beginnings) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def new_repository(hub: Hub) -> HubBackend:
    """A new repository with nothing in it."""
    repository = f"model/org/contract-{uuid.uuid4().hex[:12]}"
    hub.new(repository)
    return HubBackend(hub, repository)


def use_cloud(server: GoogleServer | Azurite | FastCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name this server, and nothing else that Google's or Azure's clients would look at."""
    forget(monkeypatch, "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def new_google_bucket(server: GoogleServer, *, versions: bool = False) -> GoogleBackend:
    """A new bucket with nothing in it, which keeps what is replaced or deleted if *versions*."""
    backend = GoogleBackend(server.endpoint_url, f"contract-{uuid.uuid4().hex[:12]}")
    about = {"name": backend.bucket, "versioning": {"enabled": versions}}
    backend.request("POST", "/storage/v1/b", json.dumps(about).encode(), {"Content-Type": "application/json"})
    return backend


def new_container(server: Azurite) -> AzureBackend:
    """A new container with nothing in it."""
    backend = AzureBackend(server.endpoint_url, f"contract-{uuid.uuid4().hex[:12]}")
    backend.create()
    return backend


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
ENCRYPTED = "-sse-c"
WRITABLE = [
    "directory",
    *(pytest.param(f"ceph{end}", marks=needs_ceph) for end in ("", ENCRYPTED)),
    "moto",
    *(f"seaweed{end}" for end in ("", ENCRYPTED)),
]
"""Every kind of place that trimsfs can write to; some with a key of the customer's."""


def writable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MountOptions:
    """The options of an empty place, whose kind is the parameter of the fixture that asks."""
    if request.param == "directory":
        return MountOptions(store=str(tmp_path))
    server: S3Server = request.getfixturevalue(request.param.removesuffix(ENCRYPTED))
    use_only(server, monkeypatch)
    with contextlib.closing(server.client()) as client:
        options = s3_options(server.endpoint_url, shared_bucket(client), f"some/{uuid.uuid4().hex}")
    if not request.param.endswith(ENCRYPTED):
        return options
    key_file = tmp_path / "key"
    key_file.write_bytes(os.urandom(32))
    return options.model_copy(update={"sse_c_key_file": key_file})


def shared_bucket(client: "S3Client") -> str:
    """The bucket of all tests that have a prefix of their own: SeaweedFS has no room for very many buckets."""
    with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="shared")
    return "shared"
