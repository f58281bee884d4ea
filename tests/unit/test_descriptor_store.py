"""What a keeper keeps of GPU copies for its servers; a pipe, with what has been written to it, stands for a copy."""

import gc
import json
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mountctl.keeper import descriptor_store
from mountctl.keeper.descriptor_store import LISTENER, DescriptorStore
from mountctl.keeper.fuse_connection import Connection
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.server_messages import Hold, LetGo, Listen, Recall
from mountctl.linux import sockets
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import ListenError, gpu_path, listen_at, socket_path
from trimsfs.concurrency.channel import Channel, pair
from trimsfs.handover.keeper_client import KeeperClient

MOUNTPOINT = Path("/models")
Message = Hold | LetGo | Recall | Listen


class Manager(Notifier):
    """Remembers what a service manager is told to keep."""

    def __init__(self) -> None:
        super().__init__({})
        self.stored: set[str] = set()

    def tell(self, *lines: str, descriptors: tuple[int, ...] = ()) -> None:
        what, name = lines
        if what == "FDSTORE=1":
            self.stored.add(name.removeprefix("FDNAME="))
            assert descriptors
        else:
            self.stored.discard(name.removeprefix("FDNAME="))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the socket is to be."""
    found = tmp_path / "run/models.gpu"
    monkeypatch.setattr(descriptor_store, "gpu_path", lambda _: found)
    return found


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def keeping(path: Path, manager: Manager) -> Iterator[DescriptorStore]:
    before = open_descriptors()
    found = DescriptorStore(MOUNTPOINT, manager, {})
    yield found
    found.close()
    assert open_descriptors() == before
    assert not path.exists()


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> None:
    """What other tests have left and not closed is not closed while descriptors are counted here."""
    gc.collect()


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def ask(keeping: DescriptorStore, message: Message, *descriptors: int) -> tuple[dict[str, Any], list[int]]:
    """What is answered; all that has come and is not kept is closed, as the keeper does."""
    answers: list[tuple[dict[str, Any], list[int]]] = []
    left = list(descriptors)
    keeping.answer(message, left, lambda answer, given: answers.append((answer, list(given))))
    for descriptor in left:
        os.close(descriptor)
    assert len(answers) == (0 if isinstance(message, LetGo) else 1)
    return answers[0] if answers else ({}, [])


def copy(content: bytes) -> int:
    """A pipe that has this in it, as long as somebody has it open."""
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return read


# Descriptors


def test_no_server_can_use_up_what_its_keeper_may_open(
    keeping: DescriptorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptor_store, "HELD_LIMIT", 5)
    assert ask(keeping, Hold(1)) == ({"error": "Too many open files"}, []), "the kernel drops a descriptor without room"
    answers = [ask(keeping, Hold(number), copy(b""))[0] for number in range(1, 8)]
    assert answers == [{}] * 5 + [{"error": "5 descriptors are held already"}] * 2
    ask(keeping, LetGo(3))
    assert ask(keeping, Hold(6), copy(b"")) == ({}, [])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ask(keeping, LetGo(6))
    used = max(map(int, open_descriptors()))
    monkeypatch.setattr(descriptor_store, "HELD_LIMIT", 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * used, limits[1]))
    try:
        for number in range(10, 10 + 2 * used):
            read = os.open("/dev/null", os.O_RDONLY)
            if "error" in ask(keeping, Hold(number), read)[0]:
                break
        assert number - 10 + 4 == used  # half of the limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("what", ["file", "directory", "name", "socket", "connection", "memory"])
def test_what_could_do_harm_is_not_held(what: str, keeping: DescriptorStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    opened: dict[str, Callable[[], int]] = {
        "file": lambda: os.open(tmp_path / "file", os.O_RDWR),
        "directory": lambda: os.open(tmp_path, os.O_RDONLY),
        "name": lambda: os.open("/dev/null", os.O_PATH),
        "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
        "connection": lambda: os.open("/dev/fuse", os.O_RDWR),
        "memory": lambda: os.memfd_create("test"),
    }
    try:
        descriptor = opened[what]()
    except OSError as error:
        pytest.skip(f"no {what} here: {error}")
    assert ask(keeping, Hold(1), descriptor) == ({"error": "neither a device nor a pipe"}, [])
    assert ask(keeping, Hold(1), os.open("/dev/null", os.O_RDONLY)) == ({}, [])


@given(
    st.lists(
        st.builds(Hold, st.integers(1, 6)) | st.builds(LetGo, st.integers(1, 6)) | st.builds(Recall, st.integers(1, 6)),
        max_size=40,
    )
)
def test_it_holds_what_was_last_said(messages: list[Message]) -> None:
    before = open_descriptors()
    keeping = DescriptorStore(MOUNTPOINT, Manager(), {})
    held: dict[int, int] = {}
    for message in messages:
        match message:
            case Hold(number):
                content = copy(b"")
                inode = os.fstat(content).st_ino
                refusal = {"error": f"number {number} is held already"} if number in held else {}
                assert ask(keeping, message, content) == (refusal, [])
                held.setdefault(number, inode)
            case LetGo(number):
                ask(keeping, message)
                held.pop(number, None)
            case Recall(number):
                answer, recalled = ask(keeping, message)
                assert [os.fstat(each).st_ino for each in recalled] == [held[number] for _ in range(number in held)]
                assert answer == ({} if number in held else {"error": f"number {number} is not held"})
    assert len(open_descriptors() - before) == len(held)
    keeping.close()
    assert open_descriptors() == before


# The socket


def test_the_directory_of_a_user_goes_with_the_last_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "trimsfs-1000"
    monkeypatch.setattr(sockets, "_temporary_directory", lambda _: directory)
    listeners = [
        listen_at(directory / name, socket.SOCK_STREAM, mode=0o600, backlog=1) for name in ("a.sock", "b.sock")
    ]
    for listener, left in zip(listeners, (True, False), strict=True):
        with listener:
            sockets.BoundPath(listener).remove()
        assert directory.exists() == left


def test_a_directory_that_goes_while_a_socket_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, times = tmp_path / "trimsfs-1000/a.sock", iter((True, True, False))
    unlink = Path.unlink

    def removed_by_another(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if next(times):
            path.parent.rmdir()

    monkeypatch.setattr(Path, "unlink", removed_by_another)
    with listen_at(path, socket.SOCK_STREAM, mode=0o600, backlog=1):
        assert path.is_socket()


def test_the_socket_is_the_same_for_every_server_and_all_may_connect(keeping: DescriptorStore, path: Path) -> None:
    before = os.umask(0o077)
    try:
        answer, (descriptor,) = ask(keeping, Listen())
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert answer == {"path": str(path)}
    assert ask(keeping, Listen()) == (answer, [descriptor])
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    with connected(path) as client, socket.socket(fileno=os.dup(descriptor)) as listener:
        assert not os.get_inheritable(descriptor)
        assert not os.get_blocking(descriptor)
        assert listener.type & socket.SOCK_SEQPACKET == socket.SOCK_SEQPACKET
        client.send(b"hello")
        end, _ = listener.accept()
        with end:
            assert end.recv(64) == b"hello"
        with pytest.raises(BlockingIOError):
            listener.accept()


def connected(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(5)
    try:
        end.connect(str(path))
    except OSError:
        end.close()
        raise
    return end


def test_what_another_process_has_left_is_replaced(keeping: DescriptorStore, path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    with pytest.raises(ConnectionRefusedError):
        connected(path)
    assert "error" not in ask(keeping, Listen())[0]
    connected(path).close()


def test_where_there_can_be_no_socket_the_server_is_told_why(keeping: DescriptorStore, path: Path) -> None:
    path.parent.write_text("a file")
    answer, descriptors = ask(keeping, Listen())
    assert (answer, descriptors) == ({"error": f"{path}: File exists"}, [])
    path.parent.unlink()
    assert "error" not in ask(keeping, Listen())[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
@pytest.mark.parametrize("link", [False, True])
def test_no_socket_is_made_in_another_users_directory(link: bool, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    if link:
        (tmp_path / "ours").mkdir()
        theirs.symlink_to("ours")
    else:
        theirs.mkdir()
    os.chown(theirs, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ListenError, match="belongs to another user"):
        listen_at(theirs / "x.gpu", socket.SOCK_SEQPACKET, mode=0o666, backlog=1)
    assert list(theirs.iterdir()) == []


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=80))
def test_it_lies_beside_the_operators_socket(name: str) -> None:
    mountpoint = Path("/mnt") / name
    path = gpu_path(mountpoint)
    assert path.parent == socket_path(mountpoint).parent
    assert path.name.removesuffix(".gpu") == socket_path(mountpoint).name.removesuffix(".sock")
    assert len(os.fsencode(path)) < 108


def test_an_odd_path_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"odd-\xff.gpu")
    monkeypatch.setattr(descriptor_store, "gpu_path", lambda _: odd)
    keeping = DescriptorStore(MOUNTPOINT, Manager(), {})
    assert ask(keeping, Listen())[0] == {"path": str(odd)}
    keeping.close()
    assert not odd.exists()


@pytest.mark.parametrize("privileged", [False, True])
def test_the_socket_of_a_later_mount_is_left_alone(
    privileged: bool, keeping: DescriptorStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not privileged:
        monkeypatch.setattr(sockets, "_bound_to", lambda listener: None)
    ask(keeping, Listen())
    later = DescriptorStore(MOUNTPOINT, Manager(), {})
    ask(later, Listen())
    keeping.close()
    connected(path).close()
    later.close()
    assert not path.exists()


# Another keeper


def test_the_socket_outlives_a_keeper_that_the_service_manager_starts_again(
    keeping: DescriptorStore, path: Path, manager: Manager
) -> None:
    _, (descriptor,) = ask(keeping, Listen())
    assert manager.stored == set()
    keeping.store()
    assert manager.stored == {LISTENER}
    stored = {"fuse": os.open("/dev/null", os.O_RDWR), LISTENER: os.dup(descriptor)}
    connection = Connection(MOUNTPOINT, source="", allow_other=True, stored=stored)
    assert set(connection.stored(b"{}")) == {"ledger", "fuse", "order"}
    with connected(path):  # while there is no keeper
        successor = DescriptorStore(MOUNTPOINT, manager, stored)
        answer, (listener,) = ask(successor, Listen())
        assert answer == {"path": str(path)}
        with socket.socket(fileno=os.dup(listener)) as waited_for:
            waited_for.accept()[0].close()
    successor.close()
    connection.close()
    assert manager.stored == set()
    assert not path.exists()


def test_a_socket_that_is_made_later_is_stored_as_well(keeping: DescriptorStore, manager: Manager) -> None:
    keeping.store()
    assert manager.stored == set()
    for _ in range(2):
        ask(keeping, Listen())
        assert manager.stored == {LISTENER}
    keeping.close()
    assert manager.stored == set()


def test_a_stored_socket_that_nobody_can_reach_is_made_anew(
    keeping: DescriptorStore, path: Path, manager: Manager
) -> None:
    lost = listen_at(path, socket.SOCK_SEQPACKET, mode=0o666, backlog=1)
    path.unlink()
    manager.stored.add(LISTENER)
    successor = DescriptorStore(MOUNTPOINT, manager, {LISTENER: lost.detach()})
    assert manager.stored == set()
    ask(successor, Listen())
    connected(path).close()
    successor.close()


# The server's end


@asynccontextmanager
async def serving(keeping: DescriptorStore, *, delay_s: float = 0) -> AsyncIterator[KeeperClient]:
    """A server's end of a channel, at whose other end the rest of the keeper is stood in for."""
    ours, theirs = pair()
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            server = KeeperClient(ours)
            nursery.start_soon(answering, Channel(theirs), keeping, delay_s)
            nursery.start_soon(server.run)
            yield server
            nursery.cancel_scope.cancel()


async def answering(channel: Channel, keeping: DescriptorStore, delay_s: float) -> None:
    while True:
        said, descriptors = await channel.receive()
        message = server_messages.parse(json.dumps(said).encode())
        assert isinstance(message, Message)
        answers: list[tuple[dict[str, Any], list[int]]] = []
        keeping.answer(message, descriptors, lambda *answer: answers.append(answer))  # noqa: B023
        for descriptor in descriptors:
            os.close(descriptor)
        await trio.sleep(delay_s)
        for answer in answers:
            await channel.send(*answer)


async def test_a_server_has_back_what_the_one_before_had_held(keeping: DescriptorStore) -> None:
    async with serving(keeping) as server:
        content = copy(b"of the first server")
        assert await server.hold(5, content)
        os.close(content)
    async with serving(keeping) as server:
        recalled = await server.recall(5)
        assert recalled is not None
        assert os.read(recalled, 64) == b"of the first server"
        os.close(recalled)
        assert await server.recall(6) is None
        gone = trio.Event()
        server.let_go(5, gone.set)
        with trio.fail_after(5):
            await gone.wait()
        assert await server.recall(5) is None


async def test_a_server_is_told_when_it_is_not_held(keeping: DescriptorStore, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(keeping) as server:
        with socket.socket(socket.AF_UNIX) as other:
            assert not await server.hold(5, other.fileno())
    assert "GPU copy 5 will be lost when this server ends: neither a device nor a pipe" in caplog.text


async def test_without_a_socket_a_server_goes_on(
    keeping: DescriptorStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file")
    async with serving(keeping) as server:
        assert await server.listen() is None
    assert "GPU clients cannot connect" in caplog.text
    path.parent.unlink()


async def test_without_a_keeper_a_server_goes_on() -> None:
    ours, theirs = pair()
    theirs.close()
    with ours:
        server = KeeperClient(ours)
        content = copy(b"")
        assert not await server.hold(1, content)
        os.close(content)
        assert await server.recall(1) is None
        assert await server.listen() is None
        server.let_go(1, lambda: pytest.fail("nobody was told"))
        with trio.fail_after(10):
            await server.run()


async def test_who_stops_waiting_for_an_answer_leaves_it_to_nobody_else(keeping: DescriptorStore) -> None:
    async with serving(keeping, delay_s=0.05) as server:
        content = copy(b"content")
        with trio.move_on_after(0.01) as scope:
            await server.hold(1, content)
        assert scope.cancel_called
        os.close(content)
        recalled = await server.recall(1)
        assert recalled is not None
        os.close(recalled)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_a_stored_socket_whose_name_is_another_mounts_leaves_that_alone(
    keeping: DescriptorStore, path: Path, manager: Manager
) -> None:
    _, (descriptor,) = ask(keeping, Listen())
    stored = {LISTENER: os.dup(descriptor)}
    later = DescriptorStore(MOUNTPOINT, Manager(), {})
    ask(later, Listen())
    successor = DescriptorStore(MOUNTPOINT, manager, stored)
    assert len(ask(successor, Listen())[1]) == 1  # containers have the socket itself
    successor.close()
    connected(path).close()
    later.close()
    assert not path.exists()
