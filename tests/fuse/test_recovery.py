"""A keeper that is killed while its server lives: everybody is told, and `mountctl recover` gives the mount another."""

import json
import mmap
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.keepers import keeper, kill, roles, serving
from tests.support.mounts import MOUNTCTL, MountedStore, mountctl, mounted, trimsfs, wait_until
from tests.support.processes import alive
from trimsfs import __version__
from trimsfs.processes import title_of
from trimsfs.text import title

CONTENT = random.Random(1).randbytes(9 << 20)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount of one model. It has a keeper after each test."""
    directory = tmp_path_factory.mktemp("recovery")
    store = directory / "store"
    store.mkdir()
    (store / "model").write_bytes(CONTENT)
    environment = {"CREDENTIALS_OF_A_TEST": "of the mount"}
    with mounted(store, directory, "fetch_processes=2", environment=environment) as mount:
        (mount.path / "model").read_bytes()
        yield mount


def kill_keeper(mount: MountedStore) -> tuple[int, int]:
    """Kill the keeper; its pid, and that of the server, which lives."""
    pid, server = (int(str(keeper(mount)[name])) for name in ("keeper_pid", "server_pid"))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    return pid, server


def keepers(mount: MountedStore) -> list[int]:
    """The keepers of a mount that live."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return [pid for pid in pids if title_of(pid) == title("keeper", mount.path) and alive(pid)]


def test_a_killed_keeper_is_told_and_followed_by_another(mount: MountedStore) -> None:
    device = (mount.path / "model").stat().st_dev
    with (
        (mount.path / "model").open("rb", buffering=0) as file,
        closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as mapping,
    ):
        killed, left = kill_keeper(mount)
        wait_until(lambda: mount.metrics()["trimsfs_keeper_connected"] == 0)
        done = trimsfs("status", mount.path)
        assert done.returncode == 1
        assert f"run `mountctl recover {mount.path}`" in done.stdout
        assert mount.control()["keeper_pid"] is None
        assert f"ERROR trimsfs.handover.keeper_client: the keeper, pid {killed}, has ended" in mount.log()
        done = mountctl("status", mount.path)
        assert (done.returncode, "not kept" in done.stdout) == (1, True)
        assert f"run `mountctl recover {mount.path}`" in done.stdout
        assert (mount.path / "model").read_bytes() == CONTENT

        done = mountctl("recover", mount.path)
        assert done.returncode == 0, done.stderr
        assert trimsfs("status", mount.path).returncode == mountctl("status", mount.path).returncode == 0
        assert mount.metrics()["trimsfs_keeper_connected"] == 1
        facts = keeper(mount)
        assert facts["server_pid"] == mount.control()["server_pid"] != left
        assert f"keeper is now pid {facts['keeper_pid']}, the server pid {facts['server_pid']}" in done.stdout
        assert not alive(left)
        held = {os.readlink(path) for path in Path(f"/proc/{facts['keeper_pid']}/fd").iterdir()}
        assert {"/dev/fuse", f"{mount.cache}/lock", "/memfd:trimsfs-ledger (deleted)"} <= held
        order = json.loads(Path(f"/proc/{facts['server_pid']}/fd/0").read_bytes())
        assert order["environment"]["CREDENTIALS_OF_A_TEST"] == "of the mount"
        kill(mount)  # another follows, as before
        assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT == mapping[:]
    assert (mount.path / "model").stat().st_dev == device
    assert trimsfs("evict", mount.path / "model").returncode == 0
    assert (mount.path / "model").read_bytes() == CONTENT
    done = mountctl("recover", mount.path)
    assert (done.returncode, "is alive" in done.stderr, done.stderr.count("\n")) == (1, True, 1)
    assert f"its keeper, pid {keeper(mount)['keeper_pid']}" in done.stderr


def test_of_two_that_recover_a_mount_whose_server_stands_still_one_does(mount: MountedStore) -> None:
    _, left = kill_keeper(mount)
    os.kill(left, signal.SIGSTOP)
    both = [subprocess.Popen([MOUNTCTL, "recover", mount.path], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], told
    wait_until(lambda: keepers(mount) == [keeper(mount)["keeper_pid"]])
    assert (mount.path / "model").read_bytes() == CONTENT


def test_descriptors_and_processes_are_counted(mount: MountedStore) -> None:
    server = serving(mount)

    def told() -> tuple[dict[str, Any], dict[str, float], str, int]:
        with (mount.path / "model").open("rb"):
            there = len(os.listdir(f"/proc/{server}/fd"))
        return mount.control(), mount.metrics(), trimsfs("status", mount.path).stdout, there

    def agree() -> bool:
        """Whether all tell the same: a fetch process that nobody needs may end between two looks."""
        facts, metrics, shown, there = told()
        found = Counter(roles(mount).values())
        return (
            facts["processes"].keys() - {"fetch"} == {"keeper", "server", "spawner", "standby", "broker"}
            and facts["processes"] == found
            and metrics["trimsfs_server_processes"] == found.total()
            and abs(facts["descriptors"]["open"] - there) <= 2
            and abs(metrics["trimsfs_server_open_descriptors"] - there) <= 2
            and f"processes   {found.total()}: " in shown
        )

    wait_until(agree, timeout_s=30)
    facts, metrics, shown, there = told()
    assert f'trimsfs_server_info{{version="{__version__}"}} 1.0' in (mount.path / ".trims/metrics").read_text()
    assert metrics["trimsfs_server_descriptor_limit"] == facts["descriptors"]["limit"] > there
    assert f"descriptors open of at most {facts['descriptors']['limit']}" in shown
