"""Fixtures for all tests. Those of services start the real thing once a session and stop it at its end."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.ceph import Ceph, start_ceph
from tests.services.moto import start_moto
from tests.support.mounts import MountedStore, let_in, mounted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real mounts by mount(2) need root; a developer without it runs the rest."""
    for item in items:
        if {"fuse", "containers", "gpu", "reliability", "security"} & set(item.path.parts) and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A directory of the test's own, that all users may enter: servers are not root."""
    let_in(tmp_path)
    return tmp_path


@pytest.fixture
def store_directory(tmp_path: Path) -> Path:
    """An empty directory to serve as a store."""
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


@pytest.fixture(params=["--passthrough", "--no-passthrough"])
def directory_mount(request: pytest.FixtureRequest, store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """The store directory, mounted in either mode; names are believed for a moment only, so that tests see changes."""
    with mounted(store_directory, tmp_path, "--metadata-ttl", "0.2", request.param) as mount:
        yield mount


@pytest.fixture
def streaming_mount(store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """As `directory_mount`, but opening never waits: bytes come as they are read."""
    with mounted(store_directory, tmp_path, "--metadata-ttl", "0.2", "--cold-open", "stream") as mount:
        yield mount


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A real S3 server."""
    with start_ceph() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An emulated S3 server, for what the real one here lacks."""
    with start_moto() as server:
        yield server


@pytest.fixture
def bucket(ceph: Ceph) -> str:
    """An empty bucket of the test's own."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(ceph.client()) as client:
        client.create_bucket(Bucket=name)
    return name
