"""A host whose root is read-only: /run and /tmp in memory, the cache on a disk of its own.

A mount namespace stands in for the host. The store is S3. Containers with a read-only root are the subject of
`tests/kubernetes`.
"""

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trimsfs as package
from tests.services import put
from tests.services.seaweed import Seaweed
from tests.support.exporters import exporting
from tests.support.images import Image
from tests.support.mount_namespace import Apart, apart
from tests.support.mounts import MOUNTCTL, TRIMSFS, MountedStore, wait_until

REPOSITORY = Path(package.__file__).parents[1]
BUCKET = "read-only"
MODEL = os.urandom(7 << 20)  # less than most hosts let a server lock
SUM = hashlib.sha256(MODEL).hexdigest()
DISK_BYTES = 4 << 30
EMPTY, DISK = "/srv", "/media"
"""Directories of any root: one to mount at, and one where the disk of the cache is mounted."""
READ_ONLY = "Read-only file system"
_PREPARE = """
mount --bind "$2" "$4"  # first: it may lie below /tmp
mount --bind "$1" "$3"
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
case $1 in
/tmp/*) mkdir -p "$1" && mount --move "$3" "$1" ;;  # the programs stay where they are
*) umount "$3" ;;
esac
mount -o remount,bind,ro /
"""


@dataclass(frozen=True, slots=True)
class ReadOnlyHost:
    """Programs in a namespace whose root is read-only, and what reaches the store."""

    namespace: Apart
    store: dict[str, str]

    def run(self, *command: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        return self.namespace.run(*command, PYTHONPATH=str(REPOSITORY), **self.store, **variables)

    def refused(self, code: int, *command: str | Path) -> str:
        """What a command says, in one line, that fails with an exit code."""
        done = self.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        return done.stderr

    def succeed(self, *command: str | Path, **variables: str) -> str:
        done = self.run(*command, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What the keeper tells."""
        facts: dict[str, Any] = json.loads(self.run(MOUNTCTL, "status", "--json", EMPTY).stdout)[0]
        return facts


@pytest.fixture
def host(seaweed: Seaweed, tmp_path: Path) -> Iterator[ReadOnlyHost]:
    if any(Path(EMPTY).iterdir()):
        pytest.skip(f"{EMPTY} is not empty")
    with contextlib.closing(seaweed.client()) as client:
        if BUCKET not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
    put(seaweed, BUCKET, {"models/a": MODEL, "models/b": MODEL[::-1]})
    image = Image("ext4", tmp_path, size=DISK_BYTES)
    try:
        image.mount()  # outside, as the device of the loop has its file open for writing
        with apart(["sh", "-euc", _PREPARE, "sh", REPOSITORY, image.mountpoint, EMPTY, DISK]) as namespace:
            host = ReadOnlyHost(namespace, seaweed.environment())
            try:
                yield host
            finally:
                host.run(TRIMSFS, "umount", "--lazy", EMPTY)
    finally:
        image.remove()


def test_what_would_write_to_a_read_only_root_is_told_with_what_to_do(host: ReadOnlyHost) -> None:
    mount = (TRIMSFS, "mount", f"s3://{BUCKET}")
    assert READ_ONLY in host.run("touch", "/file").stderr
    told = host.refused(4, *mount, "/no-such-directory")
    assert f"/no-such-directory: {READ_ONLY}: choose a directory that exists" in told
    told = host.refused(9, *mount, EMPTY)
    assert f"log file /var/log/trimsfs/srv.log: {READ_ONLY}: set --log-file" in told
    told = host.refused(9, *mount, EMPTY, "--log-file", "/run/models.log")
    assert f"/var/cache/trimsfs/srv: {READ_ONLY}: set --cache-dir" in told


@pytest.mark.slow
def test_a_mount_needs_to_write_to_run_and_to_its_cache_alone(host: ReadOnlyHost) -> None:
    cache, log = f"{DISK}/cache", "/run/models.log"
    host.succeed(TRIMSFS, "mount", f"s3://{BUCKET}/models", EMPTY, "--cache-dir", cache, "--log-file", log)
    assert host.succeed("sha256sum", f"{EMPTY}/a").split()[0] == SUM
    host.succeed(TRIMSFS, "pin", f"{EMPTY}/a")
    killed = host.status()["server_pid"]
    os.kill(killed, 9)
    assert host.succeed("sha256sum", f"{EMPTY}/a").split()[0] == SUM
    wait_until(lambda: host.status().get("server_pid") not in {None, killed}, 30)
    host.succeed(MOUNTCTL, "restart", EMPTY)
    os.kill(host.status()["keeper_pid"], 9)
    wait_until(lambda: host.run(TRIMSFS, "status", EMPTY).returncode == 1, 30)
    host.succeed(MOUNTCTL, "recover", EMPTY)
    host.succeed(TRIMSFS, "status", EMPTY)
    host.succeed(TRIMSFS, "warm", EMPTY)
    assert "Traceback" not in host.succeed("cat", log)
    host.succeed(TRIMSFS, "umount", EMPTY)

    doctor = ("doctor", "--store", f"s3://{BUCKET}/models", "--cache-dir", cache)
    assert "FAIL" not in host.succeed(TRIMSFS, *doctor, TRIMSFS_GPU="off")
    declared = {"TRIMSFS_MOUNTS_DIR": "/run/mounts.d"}
    options = {"mountpoint": EMPTY, "store": f"s3://{BUCKET}/models", "cache_dir": cache, "log_file": log}
    lines = (f'{name} = "{value}"' for name, value in options.items())
    host.succeed("mkdir", "/run/mounts.d")
    host.succeed("sh", "-c", 'printf "%s\\n" "$@" > /run/mounts.d/models.toml', "sh", *lines)
    host.succeed(MOUNTCTL, "up", **declared)
    assert host.succeed("sha256sum", f"{EMPTY}/a").split()[0] == SUM
    host.succeed(MOUNTCTL, "down", **declared)


def test_an_exporter_whose_log_cannot_be_written_is_told_and_runs_by_itself(host: ReadOnlyHost) -> None:
    """That of a mount logs to the root."""
    places = ("--cache-dir", f"{DISK}/cache", "--log-file", "/run/models.log")
    metrics = ("--metrics-listen", "unix:/run/trimsfs/metrics.sock")
    done = host.run(TRIMSFS, "mount", f"s3://{BUCKET}/models", EMPTY, *places, *metrics)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert f"no metrics over HTTP: log file /var/log/trimsfs/exporter.log: {READ_ONLY}: " in done.stderr
    assert "run `trimsfs exporter`" in done.stderr
    with exporting(before=host.namespace.inside) as exporter:
        assert exporter.samples(MountedStore(Path(EMPTY), Path(DISK, "cache")))["trimsfs_up"] == 1
