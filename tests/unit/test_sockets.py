"""Root asks the keepers of other users, and follows no socket of anybody else."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountctl.commands import mount_status
from mountctl.commands.declared_mounts import NamedMount
from mountctl.keeper import control_socket
from mountctl.keeper.control_socket import KeeperGoneError, KeeperRefusesError, ask
from mountctl.linux import sockets
from mountctl.linux.sockets import NotTheirsError, socket_of, socket_path
from trimsfs.mountinfo import Mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USER, OTHER = 3001, 3002
MODELS = Path("/nowhere/models")


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The control socket of a user's mount, in that user's directory."""

    def mounted(mountpoint: Path) -> Mount:
        kind = "fuse.trimsfs"
        return Mount(number=1, parent=0, mountpoint=mountpoint, device="0:51", kind=kind, source="s", user=USER)

    monkeypatch.setattr(sockets, "ROOTS_DIRECTORY", tmp_path / "roots")
    monkeypatch.setattr(sockets, "_temporary_directory", lambda user: tmp_path / f"trimsfs-{user}")
    monkeypatch.setattr(control_socket, "trimsfs_at", mounted)
    monkeypatch.setattr(mount_status, "trimsfs_at", mounted)
    path = socket_path(MODELS, USER)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))
        end.listen()
        for each in (path, path.parent):
            os.chown(each, USER, USER)
        yield end


def answer(listener: socket.socket, *pieces: bytes) -> None:
    """Answer the next request."""

    def work() -> None:
        end, _ = listener.accept()
        with end:
            end.recv(1 << 16)
            for piece in pieces:
                end.sendall(piece)

    threading.Thread(target=work, daemon=True).start()


def test_root_asks_the_keeper_of_the_user_who_mounted(listener: socket.socket) -> None:
    answer(listener, b'{"state": "ser', b'ving"}\n')
    assert ask(MODELS, {"do": "status"}, timeout_s=5) == {"state": "serving"}


@pytest.mark.parametrize("text", [b"[]\n", b"nonsense\n", b"[" * 60000 + b"\n", b"", b"x" * 70000])
def test_a_keeper_of_another_user_may_answer_anything(text: bytes, listener: socket.socket) -> None:
    answer(listener, text)
    with pytest.raises(KeeperGoneError):
        ask(MODELS, {"do": "status"}, timeout_s=5)


@pytest.mark.parametrize("change", [{}, {"restarts": "many"}, {"last_end_at": 10**400}, {"state": None}])
def test_a_status_that_is_none_is_not_believed(
    change: dict[str, object], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"state": "serving", "keeper_pid": 1, "server_pid": 2, "restarts": 0, "last_end": "x", "last_end_at": 1.5}
    facts |= {"log_file": "/l", "foreground": False}
    monkeypatch.setattr(mount_status, "public_status", lambda *_, **__: {"state": "serving"})
    answer(listener, json.dumps(facts | change).encode() + b"\n")
    found = mount_status.status_of(NamedMount("models", MODELS))
    assert found == ({"state": "serving", "hidden": found.get("hidden")} if change else facts)
    assert not change or "is no status" in found["hidden"]


@pytest.mark.parametrize(
    "attack", ["directory of another", "link for a directory", "socket of another", "root's socket", "link", "file"]
)
def test_root_follows_no_socket_of_anybody_else(attack: str, listener: socket.socket, tmp_path: Path) -> None:
    path = socket_path(MODELS, USER)
    real = path.rename(path.with_name("real"))
    match attack:
        case "directory of another":
            real.rename(path)
            os.chown(path.parent, OTHER, OTHER)
        case "link for a directory":
            real.rename(path)
            path.parent.rename(tmp_path / "moved")
            path.parent.symlink_to(tmp_path / "moved")
        case "socket of another" | "root's socket":
            real.rename(path)
            os.chown(path, OTHER if "another" in attack else 0, 0)
        case "link":
            path.symlink_to(real)
        case "file":
            path.touch()
            os.chown(path, USER, USER)
    with pytest.raises((NotTheirsError, NotADirectoryError)), socket_of(USER, path):
        pass
    with pytest.raises(KeeperGoneError):
        ask(MODELS, {"do": "status"}, timeout_s=5)


def test_root_looks_at_no_mount_of_the_user_for_a_socket(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might wait there for ever."""
    over = Mount(number=1, parent=0, mountpoint=Path("/m"), device="0:51", kind="fuse.x", source="s", user=USER)
    monkeypatch.setattr(sockets, "holding", lambda _: over)
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("touched"))
    with pytest.raises(KeeperRefusesError, match="lies on a mount of another user"):
        ask(MODELS, {"do": "status"}, timeout_s=5)
