"""What a keeper does for a server with its own privileges."""

import errno
import os
import socket
from pathlib import Path

import pytest

from mountctl import connection, logfile, mounting
from mountctl.connection import Connection, memory_of


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

    assert held.open_backing([good]) == {"id": 7}
    for file in (bad, pipe, ours.fileno()):
        assert held.open_backing([file])["errno"] == errno.EPERM
    assert held.open_backing([])["errno"] == errno.EMFILE
    assert registered == [good]
    for file in (good, bad, pipe, other):
        os.close(file)
    ours.close()
    theirs.close()


def test_servers_are_given_no_order(tmp_path: Path) -> None:
    held = Connection(tmp_path, source="", allow_other=True)
    assert set(held.stored(b"{}")) == {"ledger", "order"}
    assert set(held.held()) == {"ledger"}
    assert os.pread(held.stored(b"new")["order"], 10, 0) == b"new"
    held.close()


def test_memory_is_read_from_its_start() -> None:
    file = memory_of(b"order")
    assert os.read(file, 10) == b"order"
    os.close(file)
    assert connection.memory_of(b"") > 0


def test_a_long_log_is_moved_and_its_writers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "SIZE_LIMIT", 100)
    path = tmp_path / "trimsfs.log"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    keeper, server = (os.open(path, flags, 0o600) for _ in range(2))
    os.write(server, b"x" * 100)
    logfile.shorten(keeper, path)
    assert path.stat().st_size == 100
    os.write(server, b"y")
    logfile.shorten(keeper, path)
    os.write(server, b"on")
    assert (path.read_bytes(), (tmp_path / "trimsfs.log.1").read_bytes()) == (b"on", b"x" * 100 + b"y")
    for file in (keeper, server):
        os.close(file)
