"""Fixtures for all tests. Those of services start the real thing once a session and stop it at its end."""

import contextlib
import functools
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.session
import hypothesis
import pytest
from rich.console import Console
from rich.table import Table

from tests.services.azurite import Azurite, start_azurite
from tests.services.azurite import program as azurite_program
from tests.services.ceph import Ceph, start_ceph
from tests.services.fake_gcs import start_fake_gcs
from tests.services.hub import start_hub
from tests.services.moto import start_moto
from tests.services.registry import start_registry
from tests.services.seaweed import start_seaweed
from tests.support.chunks import SMALL_CHUNK
from tests.support.mounts import MountedStore, OwnDirectory, let_in, mounted, unmount_dead, wait_until
from tests.support.survival import COLUMNS, Survived

pytest_plugins = ["tests.support.leftovers", "tests.support.parallel"]

NEED_ROOT = {"containers", "fleet", "fuse", "gpu", "reliability", "security"}
"""The directories of tests that mount."""
MODES = ["passthrough=yes", "passthrough=no"]

hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime would leave a file in the temporary directory


def pytest_sessionstart(session: pytest.Session) -> None:
    """Some tests look at all mounts of the host; some interrupt programs, which jobs in the background would ignore."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        unmount_dead()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real mounts by mount(2) need root; a developer without it runs the rest."""
    for item in items:
        if NEED_ROOT & set(item.path.parts) and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """All clients of boto3 in this process share what it reads of its data: for each, that takes a quarter second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.loaders.create_loader))
        yield


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


@pytest.fixture(scope="module", params=MODES)
def module_mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnDirectory]:
    """A directory, mounted in either mode for all tests of a module."""
    directory = tmp_path_factory.mktemp("module")
    store = directory / "store"
    store.mkdir()
    with mounted(store, directory, "--metadata-ttl", "0.2", request.param) as mount:
        yield OwnDirectory(store, mount.path, mount)


@pytest.fixture
def own_directory(module_mount: OwnDirectory) -> OwnDirectory:
    """An empty directory of the test's own below the mount of its module, which takes no mount of its own."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    own = OwnDirectory(module_mount.store / name, module_mount.path / name, module_mount.mount)
    own.store.mkdir()
    wait_until(own.path.exists)
    return own


@pytest.fixture(params=MODES)
def directory_mount(request: pytest.FixtureRequest, store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """The store directory, mounted in either mode; names are believed for a moment only, so that tests see changes."""
    with mounted(store_directory, tmp_path, "--metadata-ttl", "0.2", request.param) as mount:
        yield mount


@pytest.fixture
def streaming_mount(store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """As `directory_mount`, but opening never waits: bytes come as they are read."""
    with mounted(store_directory, tmp_path, "--metadata-ttl", "0.2", "--cold-open", "stream") as mount:
        yield mount


@pytest.fixture
def chunk_size() -> int:
    """Bytes in a chunk, made few, so that objects of many chunks stay small."""
    return SMALL_CHUNK


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Survived:
    """Adds a line to the table of what was survived, and checks it."""
    return Survived(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of what was survived."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    rows = [
        row
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, row in report.user_properties
        if name == "survived" and isinstance(row, list)
    ]
    if not rows:
        return
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    terminalreporter.section("survived")
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write(capture.get())


def service(start: Callable[[], AbstractContextManager[Any]]) -> Any:
    """A fixture that starts a service once a session, and stops it at its end."""

    @pytest.fixture(scope="session")
    def running() -> Iterator[Any]:
        with start() as server:
            yield server

    return running


@contextlib.contextmanager
def azurite_if_installed() -> Iterator[Azurite]:
    if not azurite_program().exists():
        pytest.skip("npm could not install azurite")
    with start_azurite() as server:
        yield server


ceph = service(start_ceph)  # a real S3 server
seaweed = service(start_seaweed)  # a real one that heeds conditions and checksums of parts, too
moto = service(start_moto)  # an emulated one, for what the real ones here lack
hub = service(start_hub)  # fakes a Hugging Face hub: no real one can be reached from here
fake_gcs = service(start_fake_gcs)  # stands in for Google Cloud Storage
azurite = service(azurite_if_installed)  # stands in for Azure Blob Storage
registry = service(start_registry)  # an OCI registry that asks for no credentials


@pytest.fixture
def bucket(ceph: Ceph) -> str:
    """An empty bucket of the test's own."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(ceph.client()) as client:
        client.create_bucket(Bucket=name)
    return name
