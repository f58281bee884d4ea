"""Fixtures of the contract tests: a backend of every kind, and the store opened on it."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.contract.backends import (
    Backend,
    DirectoryBackend,
    FastGoogleBackend,
    RetryingBackend,
    RoutedBackend,
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
from tests.contract.promises import PROMISES, STORES, gathered, promised
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


@pytest.fixture(params=[CEPH, "moto"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    """An empty bucket of each S3 server, whose credentials are in the environment."""
    return _bucket(request, request.param, monkeypatch)


@pytest.fixture(
    params=["directory", CEPH, "moto", "fake-gcs", "azurite", "hub", "oci", "oci-tar", "fsspec", "retrying", "router"]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    """An empty backend of each kind."""
    return _backend(request, monkeypatch, tmp_path)


def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    if request.param in {"ceph", "moto"}:
        return _bucket(request, request.param, monkeypatch)
    if request.param == "hub":
        monkeypatch.setenv("NO_PROXY", HOST)
        return new_repository(request.getfixturevalue("hub"))
    if request.param == "fake-gcs":
        google: GoogleServer = request.getfixturevalue("fake_gcs")
        use_cloud(google, monkeypatch)
        return new_google_bucket(google)
    if request.param == "azurite":
        azure: Azurite = request.getfixturevalue("azurite")
        use_cloud(azure, monkeypatch)
        return new_container(azure)
    if request.param in {"oci", "oci-tar"}:
        return new_artifact(request.getfixturevalue("registry"), tar=request.param == "oci-tar")
    root = tmp_path / "root"
    root.mkdir()
    if request.param == "fsspec":
        return DirectoryBackend(root, "local://")
    directory = DirectoryBackend(root)
    wrapped: dict[str, Backend] = {"retrying": RetryingBackend(directory), "router": RoutedBackend(directory)}
    return wrapped.get(request.param, directory)


@pytest.fixture(
    params=["directory", CEPH, "moto", "fast-gcs", "azurite", "hub", "oci", "oci-tar", "fsspec", "retrying"]
)
def paged_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Backend]:
    """As `backend`, but an endpoint of ours in place of fake-gcs: that repeats all directories on every page."""
    if request.param != "fast-gcs":
        yield _backend(request, monkeypatch, tmp_path)
        return
    root = tmp_path / "root" / "bucket"
    root.mkdir(parents=True)
    with start_fast_cloud("gs", root.parent) as server:
        use_cloud(server, monkeypatch)
        yield FastGoogleBackend(root)


@pytest.fixture(params=["directory", CEPH, "moto", "fake-gcs", "azurite", "hub", "oci", "oci-tar"])
def forkable_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    """As `backend`, of those kinds whose stores work in forked processes."""
    return _backend(request, monkeypatch, tmp_path)


@pytest.fixture(autouse=True)
def _promises(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note which promises a test shows, for the table at the end of the run."""
    for promise in promised(request.node):
        record_property("promise", list(promise))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which promises have been shown, and which have not."""
    found: dict[bool, list[list[str]]] = {True: [], False: []}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and (report.when == "call" or report.failed):
                told = [value for name, value in report.user_properties if name == "promise"]
                found[report.passed] += [value for value in told if isinstance(value, list)]
    if not (found[True] or found[False]):
        return
    shown, failed = gathered(found[True]), gathered(found[False])
    drawn = Table("promise", *STORES)
    for promise in PROMISES:
        cells = []
        for store in STORES:
            broken = set(failed.get((store, promise), ()))
            passed = [server for server in shown.get((store, promise), ()) if server not in broken]
            cells.append(", ".join([*passed, *(f"{server} FAILED" for server in sorted(broken))]))
        drawn.add_row(promise, *cells)
    terminalreporter.section("promises that stores have kept")
    console = Console(width=140)
    with console.capture() as capture:
        console.print(drawn)
    terminalreporter.write(capture.get())


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
