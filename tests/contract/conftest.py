"""Fixtures of the contract tests: a backend of every kind, and the store opened on it."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.backends import (
    Backend,
    DirectoryBackend,
    FastGoogleBackend,
    S3Backend,
    needs_ceph,
    new_artifact,
    new_bucket,
    new_container,
    new_google_bucket,
    new_repository,
    use_cloud,
    use_only,
)
from tests.services import HOST, S3Server
from tests.services.azurite import Azurite
from tests.services.ceph import Ceph
from tests.services.fake_gcs import GoogleServer
from tests.services.fast_clouds import start_fast_cloud
from trimsfs.stores.base import Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CEPH = pytest.param("ceph", marks=needs_ceph)


@pytest.fixture(scope="session")
def ceph_client(ceph: Ceph) -> Iterator["S3Client"]:
    with contextlib.closing(ceph.client()) as client:
        yield client


@pytest.fixture(scope="session")
def moto_client(moto: S3Server) -> Iterator["S3Client"]:
    with contextlib.closing(moto.client()) as client:
        yield client


@pytest.fixture
def fast_gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    root = tmp_path / "root" / "bucket"
    root.mkdir(parents=True)
    with start_fast_cloud("gs", root.parent) as server:
        use_cloud(server, monkeypatch)
        yield FastGoogleBackend(root)


def _bucket(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    use_only(request.getfixturevalue(name), monkeypatch)
    return new_bucket(request.getfixturevalue(f"{name}_client"))


def _google(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    server: GoogleServer = request.getfixturevalue("fake_gcs")
    use_cloud(server, monkeypatch)
    return new_google_bucket(server)


def _azure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    server: Azurite = request.getfixturevalue("azurite")
    use_cloud(server, monkeypatch)
    return new_container(server)


def _hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("NO_PROXY", HOST)
    return new_repository(request.getfixturevalue("hub"))


def _artifact(request: pytest.FixtureRequest, _monkeypatch: pytest.MonkeyPatch, *, tar: bool = False) -> Backend:
    return new_artifact(request.getfixturevalue("registry"), tar=tar)


def _directory(request: pytest.FixtureRequest, _monkeypatch: pytest.MonkeyPatch, *, scheme: str = "") -> Backend:
    root: Path = request.getfixturevalue("tmp_path") / "root"
    root.mkdir()
    return DirectoryBackend(root, scheme)


BACKENDS: dict[str, Callable[[pytest.FixtureRequest, pytest.MonkeyPatch], Backend]] = {
    "directory": _directory,
    "ceph": partial(_bucket, "ceph"),
    "moto": partial(_bucket, "moto"),
    "fake-gcs": _google,
    "azurite": _azure,
    "hub": _hub,
    "oci": _artifact,
    "oci-tar": partial(_artifact, tar=True),
    "fsspec": partial(_directory, scheme="local://"),
}
"""What makes an empty place of each kind: the suite tries the store of every one."""


def _but(*others: str) -> list[Any]:
    """The names of all BACKENDS but some, as parameters."""
    return [CEPH if name == "ceph" else name for name in BACKENDS if name not in others]


@pytest.fixture(params=[CEPH, "moto"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    """An empty bucket of each S3 server, whose credentials are in the environment."""
    return _bucket(request.param, request, monkeypatch)


@pytest.fixture(params=_but())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """An empty backend of each kind."""
    return BACKENDS[request.param](request, monkeypatch)


@pytest.fixture(params=["fast-gcs", *_but("fake-gcs")])
def paged_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """As `backend`, but an endpoint of ours in place of fake-gcs: that repeats all directories on every page."""
    if request.param == "fast-gcs":
        backend: Backend = request.getfixturevalue("fast_gcs")
        return backend
    return BACKENDS[request.param](request, monkeypatch)


@pytest.fixture(params=_but("fsspec"))
def forkable_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """As `backend`, of those kinds whose stores work in forked processes."""
    return BACKENDS[request.param](request, monkeypatch)


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[Store]:
    """The store of a backend."""
    store = backend.open()
    yield store
    await store.aclose()


@pytest.fixture
async def s3_store(s3: S3Backend) -> AsyncIterator[Store]:
    """The store of a bucket."""
    store = s3.open()
    yield store
    await store.aclose()


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the SDK that stands still: requests that say the same have the same signature."""
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def now(*, remove_tzinfo: bool = True) -> datetime:
        return moment.replace(tzinfo=None) if remove_tzinfo else moment

    for module in ("botocore.auth", "botocore.crt.auth"):
        monkeypatch.setattr(f"{module}.get_current_datetime", now)
