"""Pods that follow an alias inside of their volume, by a server that sees their processes and by one that does not.

FUSE numbers the threads of a request as in the PID namespace of who mounted. With ``hostPID`` that has all pods.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.csi.driver import MODELS, Driver, is_dead, needs_root, node, running, take_away
from tests.support.mounts import TRIMSFS, unmount, wait_until
from tests.support.versions import Put, in_directory, move, publish
from trimsfs.mountinfo import mount_at

pytestmark = needs_root

_POD = """
import subprocess, sys
for line in sys.stdin:
    if line == "child\\n":
        print(subprocess.check_output(["cat", "prod/params"], text=True), flush=True)
    else:
        print(open("prod/params").read(), flush=True)
"""
MOVES_S = 1.0
"""After this, a process that has not followed an alias sees that it has moved."""


@contextmanager
def server(directory: Path, *, host_pid: bool) -> Iterator[None]:
    """The node's mount by a container, with or without the PID namespace of the host."""
    mounts = directory / "mounts"
    subprocess.run(["mount", "--bind", mounts, mounts], check=True)
    subprocess.run(["mount", "--make-shared", mounts], check=True)
    (mounts / "models").mkdir()
    own = ("--pid", "--fork", "--kill-child")
    script = 'mount --make-private /proc && mount -t proc proc /proc && exec "$@"'
    options = ("--store", directory / "store", "--cache-dir", directory / "cache", "--metadata-ttl", "0.2")
    spaces = ("--mount", "--propagation", "unchanged", *(() if host_pid else own))
    process = subprocess.Popen(
        [
            *("unshare", *spaces, "sh", "-ec", script, "sh"),
            *(TRIMSFS, "mount", mounts / "models", "--foreground", *options),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: bool((mounts / "models/.trims/control").read_text()), timeout_s=30, tolerate=OSError)
        yield
    finally:
        take_away(directory / "pods")
        if mount_at(mounts / "models") is not None and not is_dead(mounts / "models"):
            unmount(mounts / "models")
        process.kill()
        process.wait(timeout=20)
        take_away(mounts)
        subprocess.run(["umount", "--lazy", mounts], check=True)


@contextmanager
def pod(driver: Driver, name: str) -> Iterator["subprocess.Popen[str]"]:
    """A process in PID and mount namespaces of its own, in a volume that holds the alias."""
    script = 'mount --bind "$0" /mnt && cd /mnt && exec "$@"'
    process = subprocess.Popen(
        [
            *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-ec", script),
            *(driver.publish(name, path="llama"), sys.executable, "-c", _POD),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=20)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def reads(process: "subprocess.Popen[str]", what: str = "itself") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def store(directory: Path) -> Put:
    node(directory)
    for model in MODELS:
        shutil.rmtree(directory / "store" / model.partition("/")[0], ignore_errors=True)
    put = in_directory(directory / "store")
    for version in ("v1", "v2"):
        publish(put, "llama", version, {"params": version.encode()})
    move(put, "llama", "prod", "v1")
    return put


@pytest.mark.parametrize("host_pid", [True, False], ids=["hostPID", "own"])
def test_a_pod_keeps_the_version_of_an_alias_in_its_volume_if_the_server_sees_its_processes(
    host_pid: bool, tmp_path: Path
) -> None:
    put = store(tmp_path)
    with server(tmp_path, host_pid=host_pid), running(tmp_path) as driver, pod(driver, "a") as first:
        assert reads(first) == "v1"
        move(put, "llama", "prod", "v2")
        time.sleep(MOVES_S)
        with pod(driver, "b") as second:
            assert reads(second) == "v2"
            assert [reads(first), reads(first, "child")] == (["v1"] * 2 if host_pid else ["v2"] * 2)
