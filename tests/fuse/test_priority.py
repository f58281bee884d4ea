"""The priority of fetch processes on a real mount: a command gives way to programs, until one waits for its file."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.support.keepers import roles
from tests.support.mounts import TRIMSFS, MountedStore, mounted, trimsfs, wait_until
from trimsfs.fetch.processes.workers import NICENESS, Role

MIB = 1 << 20
CONTENT = random.Random(39).randbytes(96 * MIB)
RATE = 2 * MIB
"""Bytes a second of each connection: a chunk takes four seconds."""

ROOT = ("--server-user", "root")
"""A server of another user may not raise priorities again where root may not raise that user's limit."""


@pytest.fixture(scope="module", params=["auto", "stream"])
def module_mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount of a slow store."""
    root = tmp_path_factory.mktemp("store")
    (root / "bucket").mkdir()
    for name in ("large", "other"):
        (root / "bucket" / name).write_bytes(CONTENT)
    options = ("--prefetch", "off", "--cold-open", request.param, *ROOT)
    with (
        start_fast(root, rate=RATE) as server,
        mounted("s3://bucket", tmp_path_factory.mktemp("mount"), *options, environment=server.environment()) as mount,
    ):
        yield mount


@pytest.fixture
def mount(module_mount: MountedStore) -> Iterator[MountedStore]:
    """The mount, of which nothing is cached or comes."""
    yield module_mount
    wait_until(lambda: not module_mount.metrics()["trimsfs_fetch_in_flight"], timeout_s=30)
    wait_until(lambda: trimsfs("evict", module_mount.path).returncode == 0)


@contextmanager
def warming(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A command that warms a file; it ends with the block."""
    command = subprocess.Popen([TRIMSFS, "warm", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield command
    finally:
        command.terminate()
        command.communicate()


def processes(mount: MountedStore, wanted: Role) -> set[int]:
    """The processes of a mount with a role."""
    return {pid for pid, role in roles(mount).items() if role == wanted}


def niceness(pid: int) -> set[int]:
    """The niceness of each thread of a process, and of its session where the kernel shares cores by session."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # it has ended
            found.add(os.getpriority(os.PRIO_PROCESS, int(thread)))
    autogroup = Path(f"/proc/{pid}/autogroup")
    return found | ({int(autogroup.read_text().split()[-1])} if autogroup.exists() else set())


def may_rise(pid: int) -> bool:
    """Whether the limit of a process lets it have the niceness of ordinary programs."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    return int(limits.partition("Max nice priority")[2].split()[0]) >= 20


def background(mount: MountedStore) -> set[int]:
    """The niceness of what fetches in the background."""
    return set[int]().union(*(niceness(pid) for pid in processes(mount, "background")))


def test_a_command_gives_way_until_a_program_waits_for_its_file(mount: MountedStore) -> None:
    path = mount.path / "large"
    with warming(path) as command:
        wait_until(lambda: bool(mount.metrics()["trimsfs_fetch_in_flight"]))
        wait_until(lambda: background(mount) == {NICENESS["background"]})
        with subprocess.Popen(["head", "--bytes=100", path], stdout=subprocess.PIPE) as reader:
            wait_until(lambda: background(mount) == {NICENESS["fetch"]}, timeout_s=5)
            assert command.poll() is None
            assert reader.communicate(timeout=60)[0] == CONTENT[:100]
        assert command.wait(60) == 0
    wait_until(lambda: background(mount) == {NICENESS["background"]})
    assert path.read_bytes() == CONTENT


def test_a_command_that_no_program_waits_for_stays_in_the_background(mount: MountedStore) -> None:
    with warming(mount.path / "large"):
        wait_until(lambda: bool(mount.metrics()["trimsfs_fetch_in_flight"]))
        wait_until(lambda: background(mount) == {NICENESS["background"]})
        with subprocess.Popen(["head", "--bytes=100", mount.path / "other"], stdout=subprocess.PIPE) as reader:
            wait_until(lambda: mount.info("other")["residency"]["disk"] > 0 or reader.poll() is not None, timeout_s=30)
            assert background(mount) == {NICENESS["background"]}
            foreground = processes(mount, "fetch")
            assert foreground
            assert set[int]().union(*map(niceness, foreground)) == {NICENESS["fetch"]}
            reader.kill()


def test_a_server_that_may_not_raise_priorities_again_lowers_only_that_of_the_session(tmp_path: Path) -> None:
    """As one that root starts in some containers; elsewhere, its processes give way as those of root do."""
    (tmp_path / "store/bucket").mkdir(parents=True)
    (tmp_path / "store/bucket/large").write_bytes(CONTENT)
    with (
        start_fast(tmp_path / "store", rate=RATE) as server,
        mounted("s3://bucket", tmp_path / "mount", environment=server.environment()) as mount,
        warming(mount.path / "large"),
    ):
        wait_until(lambda: bool(processes(mount, "background")))
        (pid, *_) = processes(mount, "background")
        session = {NICENESS["background"]} if Path(f"/proc/{pid}/autogroup").exists() else set()
        threads = NICENESS["background"] if may_rise(pid) else NICENESS["fetch"]
        wait_until(lambda: niceness(pid) == {threads} | session)
