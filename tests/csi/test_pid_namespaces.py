"""Pods that follow an alias inside of their volume, by a server that sees their processes and by one that does not.

FUSE numbers the threads of a request as in the PID namespace of who mounted: the keeper, which has that of the node.
A server with another one cannot tell which process asks.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.csi.driver import Driver, needs_root, newest, running, take_away
from tests.support.mount_namespace import own_mounts
from tests.support.mounts import wait_until
from tests.support.nodes import a_node
from tests.support.versions import in_directory, move, publish

pytestmark = needs_root

_POD = """
import subprocess, sys
for line in sys.stdin:
    if line == "child\\n":
        print(subprocess.check_output(["cat", "prod/params"], text=True), flush=True)
    else:
        print(open("prod/params").read(), flush=True)
"""


@contextmanager
def pod(driver: Driver, name: str) -> Iterator["subprocess.Popen[str]"]:
    """A process in PID and mount namespaces of its own, in a volume that holds the alias."""
    script = 'mount --bind "$0" /mnt && cd /mnt && exec "$@"'
    spaces = ("unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--mount-proc", "--kill-child")
    volume = driver.publish(name, path="llama")
    command = [*spaces, *own_mounts(volume), "sh", "-ec", script, str(volume), sys.executable, "-c", _POD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def reads(process: "subprocess.Popen[str]", what: str = "itself") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("host_pid", [True, False], ids=["hostPID", "own"])
def test_a_pod_keeps_the_version_of_an_alias_in_its_volume_if_the_server_sees_its_processes(
    host_pid: bool, tmp_path: Path
) -> None:
    put = in_directory(tmp_path / "store")
    for version in ("v1", "v2"):
        publish(put, "llama", version, {"params": version.encode()})
    move(put, "llama", "prod", "v1")
    (tmp_path / "pods").mkdir()
    (tmp_path / "mounts").symlink_to("shared")
    with a_node(tmp_path, {}) as node:
        node.keeper()
        node.server("--metadata-ttl", "0.2", host_pid=host_pid)
        node.serving()
        try:
            with running(tmp_path) as driver, pod(driver, "a") as first:
                assert reads(first) == "v1"
                move(put, "llama", "prod", "v2")
                wait_until(lambda: newest(node.mountpoint / "llama/prod") == "v2")
                with pod(driver, "b") as second:
                    assert reads(second) == "v2"
                    assert [reads(first), reads(first, "child")] == (["v1"] * 2 if host_pid else ["v2"] * 2)
        finally:
            take_away(tmp_path / "pods")
