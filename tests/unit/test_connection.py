"""What a keeper does for a server with its own privileges."""

import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from mountctl.keeper.fuse_connection import Connection
from mountctl.keeper.servers.server_messages import Mount
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.linux import logfile, mounting
from mountctl.linux.mounting import MountIdentity
from tests.support.tmpfs import tmpfs


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that the kernel was asked to register."""
    files: list[int] = []

    def open_backing(_fuse: int, file: int) -> int:
        files.append(file)
        return 7

    monkeypatch.setattr(mounting, "open_backing", open_backing)
    return files


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
def test_only_a_file_that_its_sender_can_read_is_registered(flags: int, tmp_path: Path, registered: list[int]) -> None:
    """A descriptor that only names a file can be had of any file; the kernel would read it for root."""
    path = tmp_path / "file"
    path.write_text("secret")
    held = Connection(tmp_path, source="", allow_other=True, stored={"fuse": os.open("/dev/null", os.O_RDWR)})
    good, bad = os.open(path, os.O_RDONLY), os.open(path, flags)
    pipe, other = os.pipe()
    ours, theirs = socket.socketpair()

    assert held.open_backings([good], 1) == [{"id": 7}]
    for file in (bad, pipe, ours.fileno()):
        assert held.open_backings([file], 1)[0]["errno"] == errno.EPERM
    some = held.open_backings([good], 2)
    assert some[0] == {"id": 7}
    assert some[1]["errno"] == errno.EMFILE
    assert registered == [good, good]
    for file in (good, bad, pipe, other):
        os.close(file)
    ours.close()
    theirs.close()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done to mounts and connections, by any way."""
    done: list[str] = []
    monkeypatch.setattr(mounting, "unmount", lambda mountpoint, lazy=False: done.append(f"unmount {mountpoint}"))
    monkeypatch.setattr(mounting, "abort_device", lambda device: done.append(f"abort {device}"))
    return done


OURS = MountIdentity("0:51", 7)


@pytest.mark.parametrize(
    ("there", "ours"),
    [
        (OURS, True),
        (None, False),
        (MountIdentity("0:52", 8), False),
        (MountIdentity("0:51", 8), False),  # the number was free again
        (MountIdentity("0:51", None), True),
    ],
)
def test_only_a_mount_of_its_own_is_unmounted(
    there: MountIdentity | None, ours: bool, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "identify", lambda mountpoint: there)
    held = Connection(
        Path("/m"), source="", allow_other=True, stored={"fuse": os.open("/dev/null", os.O_RDWR)}, identity=OURS
    )
    assert (held.unmount() is None) == ours
    held.close()
    assert done == (["unmount /m"] * 2 if ours else [])


@pytest.mark.parametrize("gone", [False, True])
def test_only_a_connection_that_lives_is_aborted(gone: bool, done: list[str]) -> None:
    """Afterwards the kernel gives its number to others."""
    read, write = os.pipe()
    held = Connection(Path("/nowhere"), source="", allow_other=True, stored={"fuse": write}, identity=OURS)
    if gone:
        os.close(read)  # an error is polled, as of a connection without a file system
    held.abort()
    assert done == ([] if gone else ["abort 0:51"])
    held.close()


def test_what_is_no_trimsfs_mount_is_not_taken_for_one(tmp_path: Path) -> None:
    assert mounting.identify(Path("/proc")) is None
    assert not OURS.is_at(Path("/proc"))
    assert not OURS.is_at(tmp_path)


def test_what_a_server_sends_is_not_for_programs_started_later() -> None:
    script = (
        "import socket, sys; end = socket.socket(fileno=int(sys.argv[2])); "
        'socket.send_fds(end, [b\'{"type": "mount"}\'], [0])'
    )
    server = ServerProcess({"server": [sys.executable, "-c", script]})
    try:
        server.channel.settimeout(30)
        message, (descriptor,) = server.receive()
        assert message == Mount()
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    finally:
        server.kill()
        server.wait(20)
        server.channel.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_spare_server_loads_in_idle_time_until_it_is_told_to_hurry() -> None:
    server = ServerProcess({"server": ["sleep", "60"]}, spare=True)
    try:
        assert os.sched_getscheduler(server.pid) == os.SCHED_IDLE
        server.hurry()
        assert os.sched_getscheduler(server.pid) == os.SCHED_OTHER
        assert os.getsid(server.pid) == server.pid
    finally:
        server.kill()
        server.wait(20)
        server.channel.close()


def test_a_server_that_hears_nothing_is_not_waited_for() -> None:
    server = ServerProcess({"server": ["sleep", "60"]})
    file = os.open("/dev/null", os.O_RDONLY)
    try:
        for _ in range(2000):  # more than a channel holds
            server.send({"id": 7}, [file])
            server.send({"id": 7})
    finally:
        os.close(file)
        server.kill()
        server.wait(20)
        server.channel.close()


def test_servers_are_given_no_order(tmp_path: Path) -> None:
    held = Connection(tmp_path, source="", allow_other=True)
    assert set(held.stored(b"{}")) == {"ledger", "order"}
    assert set(held.for_server()) == {"ledger"}
    assert os.pread(held.stored(b"new")["order"], 10, 0) == b"new"
    held.close()


def test_a_long_log_on_a_full_disk_stays_with_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "SIZE_LIMIT", 100)
    with tmpfs(tmp_path / "log", 16 << 10) as directory:
        path = directory / "trimsfs.log"
        path.with_name("trimsfs.log.1").write_bytes(b"earlier")
        path.write_bytes(b"x" * (8 << 10))
        with path.open("r+b") as file, pytest.raises(OSError, match="No space left"):
            logfile.rotate(file.fileno(), path)
        assert {each.name: each.stat().st_size for each in directory.iterdir()} == {
            "trimsfs.log": 8 << 10,
            "trimsfs.log.1": len(b"earlier"),
        }


def test_a_long_log_is_moved_and_its_writers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "SIZE_LIMIT", 100)
    path = tmp_path / "trimsfs.log"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    keeper, server = (os.open(path, flags, 0o600) for _ in range(2))
    os.write(server, b"x" * 100)
    logfile.rotate(keeper, path)
    assert path.stat().st_size == 100
    os.write(server, b"y")
    logfile.rotate(keeper, path)
    os.write(server, b"on")
    assert (path.read_bytes(), (tmp_path / "trimsfs.log.1").read_bytes()) == (b"on", b"x" * 100 + b"y")
    for file in (keeper, server):
        os.close(file)
