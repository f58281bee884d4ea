"""Mounts with few descriptors: refused, or enough for all; and a server that has none for a while."""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.fast import start_fast
from tests.support.mounts import MountedStore, mounted, trimsfs
from trimsfs.mountinfo import mount_at

LEAST = 128
FILES = 54
CONTENT = b"weights"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("descriptors")
    (directory / "bucket").mkdir()
    for number in range(FILES):
        (directory / f"bucket/{number}").write_bytes(CONTENT)
    with start_fast(directory) as server:
        yield server


def limit(pid: int, soft: int | str) -> None:
    """Set the soft limit of open files of a process, as its own user, who may."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    user, group = (int(line.split()[1]) for line in status if line.startswith(("Uid", "Gid")))
    command = ["prlimit", f"--pid={pid}", f"--nofile={soft}:"]
    subprocess.run(command, user=user, group=group, extra_groups=[], check=True)


@contextmanager
def without_descriptors(mount: MountedStore, for_s: float) -> Iterator[None]:
    """A server that can open no file for a while."""
    pid = mount.control()["server_pid"]
    limit(pid, len(os.listdir(f"/proc/{pid}/fd")) - 3)
    timer = threading.Timer(for_s, limit, [pid, 1024])
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_a_mount_with_too_few_descriptors_is_refused(store: S3Server, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    done = trimsfs(
        *("mount", mountpoint, "--store", "s3://bucket", "--cache-dir", tmp_path / "cache"),
        *("--log-file", tmp_path / "log"),
        environment=store.environment(),
        before=["prlimit", f"--nofile={LEAST - 1}"],
    )
    assert (done.returncode, mount_at(mountpoint)) == (2, None)
    assert f"limit of open files: it is {LEAST - 1}, and this mount needs {LEAST}: raise it" in done.stderr


def test_the_least_number_of_descriptors_is_enough(store: S3Server, tmp_path: Path) -> None:
    """Also if only the hard limit allows them."""
    before = ["prlimit", f"--nofile=40:{LEAST}"]
    with mounted("s3://bucket", tmp_path / "m", environment=store.environment(), before=before) as mount:
        assert [(mount.path / name).read_bytes() for name in os.listdir(mount.path)] == FILES * [CONTENT]
        assert " ERROR " not in mount.log()


def test_reads_wait_while_there_is_no_descriptor(store: S3Server, tmp_path: Path) -> None:
    with mounted("s3://bucket", tmp_path / "m", "--prefetch", "off", environment=store.environment()) as mount:
        assert (mount.path / "0").read_bytes() == CONTENT
        with without_descriptors(mount, for_s=1):
            assert (mount.path / "1").read_bytes() == CONTENT
            assert (mount.path / "2").read_bytes() == CONTENT
