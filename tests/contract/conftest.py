"""Fixtures of the contract tests: a backend of every kind, and the store opened on it."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.backends import (
    Backend,
    DirectoryBackend,
    RetryingBackend,
    RoutedBackend,
    S3Backend,
    needs_ceph,
    new_bucket,
    use_only,
)
from tests.services import S3Server
from tests.services.ceph import Ceph
from trimsfs.stores import Store

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


@pytest.fixture(params=[CEPH, "moto"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    """An empty bucket of each S3 server, whose credentials are in the environment."""
    return _bucket(request, request.param, monkeypatch)


@pytest.fixture(params=["directory", CEPH, "moto", "fsspec", "retrying", "router"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    """An empty backend of each kind."""
    if request.param in {"ceph", "moto"}:
        return _bucket(request, request.param, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    if request.param == "fsspec":
        return DirectoryBackend(root, "local://")
    directory = DirectoryBackend(root)
    wrapped: dict[str, Backend] = {"retrying": RetryingBackend(directory), "router": RoutedBackend(directory)}
    return wrapped.get(request.param, directory)


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


def _bucket(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    server: S3Server = request.getfixturevalue(name)
    use_only(server, monkeypatch)
    client: Any = request.getfixturevalue(f"{name}_client")
    return new_bucket(client)
