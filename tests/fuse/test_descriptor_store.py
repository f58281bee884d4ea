"""What a keeper keeps for its servers, on real mounts whose servers are killed (``tests/support/holding.py``)."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from mountctl.linux.sockets import gpu_path
from tests.support import holding
from tests.support.keepers import have_serve, serving
from tests.support.mounts import MOUNTCTL, MountedStore, mountctl, mounted, wait_until
from tests.support.processes import alive
from tests.support.service_manager import Manager


def have_hold(mount: MountedStore, store: Path) -> None:
    """Have the server of a mount replaced by one that has its keeper hold a pipe."""
    have_serve(holding, mount, store)


def ended(pid: int) -> bool:
    return not alive(pid)


class Client:
    """Has connected, whether there is a server or not."""

    def __init__(self, path: Path) -> None:
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(30)
        self._end.connect(str(path))

    def answer(self) -> tuple[int, int]:
        """The process id of the server that has answered, and the pipe that it has given."""
        with self._end:
            data, descriptors, _, _ = socket.recv_fds(self._end, 4096, 1)
        return int(data), descriptors[0]


@pytest.fixture
def store(store_directory: Path) -> Path:
    (store_directory / "model").write_bytes(b"weights")
    return store_directory


def test_what_is_held_outlives_servers_that_are_killed(store: Path, tmp_path: Path) -> None:
    """The socket also outlives the keeper, which has what is held."""
    with mounted(store, tmp_path) as mount:
        have_hold(mount, store)
        path = gpu_path(mount.path)
        first = serving(mount)
        wait_until(path.exists)  # it serves before its keeper listens
        inode = path.stat().st_ino
        for _ in range(3):
            before = serving(mount)
            pid, pipe = Client(path).answer()
            assert pid == before
            os.close(pipe)
            os.kill(before, signal.SIGKILL)
            wait_until(partial(ended, before))
            pid, pipe = Client(path).answer()  # of the next, if it does not serve yet
            assert pid == serving(mount, not_by=before)
            os.close(pipe)
        _, pipe = Client(path).answer()
        assert os.read(pipe, 64) == f"of server {first}".encode()
        os.close(pipe)
        assert path.stat().st_ino == inode
        keeper = mount.control()["keeper_pid"]
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not alive(keeper))
        waiting = Client(path)
        done = mountctl("recover", mount.path)
        assert done.returncode == 0, done.stderr
        _, pipe = waiting.answer()
        os.close(pipe)
        pid, pipe = Client(path).answer()
        assert pid == serving(mount)
        assert os.read(pipe, 64) == f"of server {pid}".encode()
        os.close(pipe)
        assert path.stat().st_ino == inode
        assert (mount.path / "model").read_bytes() == b"weights"
    assert not path.exists()


def test_the_socket_outlives_a_keeper_that_is_killed_and_what_is_held_does_not(store: Path, tmp_path: Path) -> None:
    declared, mountpoint, cache = tmp_path / "mounts.d", tmp_path / "models", tmp_path / "cache"
    declared.mkdir()
    lines = [f'mountpoint = "{mountpoint}"', f'store = "{store}"', f'cache_dir = "{cache}"']
    (declared / "models.toml").write_text("\n".join(lines))
    mount = MountedStore(mountpoint, cache)
    manager = Manager(tmp_path)
    try:
        command = [MOUNTCTL, "run", "models", "--mounts-dir", str(declared)]
        manager.start(*command)
        manager.hear("FDNAME=order")
        have_hold(mount, store)
        manager.hear("FDSTOREREMOVE=1")  # of the order of before
        manager.said.clear()
        manager.hear("FDNAME=order")
        if "gpu-listener" not in manager.stored:
            manager.hear("FDNAME=gpu-listener")
        path = gpu_path(mountpoint)
        inode, first = path.stat().st_ino, serving(mount)
        manager.kill()
        waiting = Client(path)
        manager.said.clear()
        manager.start(*command)
        manager.hear("FDNAME=order")
        pid, pipe = waiting.answer()
        assert pid == serving(mount) != first
        assert os.read(pipe, 64) == f"of server {pid}".encode()
        os.close(pipe)
        assert path.stat().st_ino == inode
        assert "gpu-listener" in manager.stored
        assert manager.process is not None
        manager.process.send_signal(signal.SIGTERM)
        manager.hear("FDSTOREREMOVE=1")
        assert manager.process.wait(20) == 0
        wait_until(lambda: not path.exists())
    finally:
        manager.close()
