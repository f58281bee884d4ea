"""Hosts in virtual machines; what each has shown of the features of its kernel is kept for the table in the docs."""

import datetime
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.machines.hosts import KINDS, Host, host_of
from tests.machines.images import KEPT, REPOSITORY
from tests.machines.kernel_table import RESULTS, Result


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with what was built to be installed."""
    directory = tmp_path_factory.mktemp("distribution")
    contents, disk = directory / "contents", directory / "disk"
    contents.mkdir()
    for file in (REPOSITORY / "dist").glob("trimsfs_*.deb"):
        shutil.copy(file, contents)
    shutil.copytree(KEPT / "wheelhouse", contents / "wheelhouse")
    shutil.copytree(REPOSITORY / "packaging/systemd", contents / "systemd")
    disk.touch()
    os.truncate(disk, 1 << 30)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", contents, disk], check=True, timeout=300)
    return disk


@pytest.fixture(scope="session", params=KINDS, ids=str)
def host(
    request: pytest.FixtureRequest, distribution: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A host of each kind, which all tests of this directory share."""
    with host_of(request.param, distribution, tmp_path_factory.mktemp("machine")) as host:
        yield host


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what a host has shown of a feature: the property ``cell`` of its test, or else ``yes``."""
    report = yield
    marker, host = item.get_closest_marker("feature"), getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and marker is not None and isinstance(host, Host):
        cell = str(dict(report.user_properties).get("cell", "yes")) if report.passed else "failed"
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = Result(str(host.kind), host.machine.release, today, marker.args[0], cell)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(result.line())
    return report
