"""Registering files with the kernel, by way of the keeper: many at a time, and none is lost."""

import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from mountctl.keeper.keeper import Keeper
from mountctl.keeper.servers import server_messages
from mountctl.linux import mounting
from tests.support.keeper_in_process import FakeServer, keeper_in_process
from tests.support.parts import until
from trimsfs.errors import FuseUnavailableError
from trimsfs.handover.keeper_client import KeeperClient, stand_by


class Kernel:
    """What the kernel would know of backing files: their names by their ids."""

    def __init__(self) -> None:
        self.registered: dict[int, str] = {}

    def open(self, _connection: int, file: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        if name == "refused":
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        number = len(self.registered) + 1
        self.registered[number] = name
        return number

    def close(self, _connection: int, number: int) -> None:
        self.registered[number] = "closed"


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@contextmanager
def mounted(kernel: Kernel) -> Iterator[tuple[Keeper, FakeServer]]:
    """A keeper whose server has had it mount."""
    with keeper_in_process([]) as (keeper, server), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounting, "open_backing", kernel.open)
        patch.setattr(mounting, "close_backing", kernel.close)
        server.say(b'{"type": "standing-by", "ledger": "2"}')
        keeper._crew.dispatcher.receive(server)
        keeper._crew.promote(server)
        for said, descriptors in ((b'{"type": "mount"}', ["device"]), (b'{"type": "ready", "resends": true}', [])):
            server.say(said, descriptors)
            keeper._crew.dispatcher.receive(server)
        yield keeper, server


@asynccontextmanager
async def answering(keeper: Keeper, server: FakeServer, heard: list[bytes]) -> AsyncIterator[None]:
    """Have the keeper answer; *heard* are the messages."""

    async def answer() -> None:
        while True:
            await trio.lowlevel.wait_readable(server.channel)
            heard.append(server.channel.recv(server_messages.MESSAGE_LIMIT, socket.MSG_PEEK))
            keeper._crew.dispatcher.receive(server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        yield
        nursery.cancel_scope.cancel()


def client_of(server: FakeServer) -> KeeperClient:
    while True:  # what the keeper has said so far
        try:
            server.end.recv(server_messages.MESSAGE_LIMIT, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return KeeperClient(server.end, backing_limit=server_messages.BACKING_LIMIT)


async def opened(client: KeeperClient, path: Path, found: dict[str, int | str]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        found[path.name] = await client.open(descriptor)
    except FuseUnavailableError as error:
        found[path.name] = str(error)
    finally:
        os.close(descriptor)


async def test_each_file_has_its_own_id(kernel: Kernel, tmp_path: Path) -> None:
    found: dict[str, int | str] = {}
    heard: list[bytes] = []
    names = [str(number) for number in range(40)]
    with mounted(kernel) as (keeper, server):
        client = client_of(server)
        async with answering(keeper, server, heard), trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(opened, client, tmp_path / name, found)
    assert {kernel.registered[int(number)]: number for number in found.values()} == {
        name: found[name] for name in names
    }
    assert len(heard) <= 3  # what comes first may wait for nobody


async def test_one_that_is_refused_keeps_no_other_from_being_registered(kernel: Kernel, tmp_path: Path) -> None:
    found: dict[str, int | str] = {}
    with mounted(kernel) as (keeper, server):
        client = client_of(server)
        async with answering(keeper, server, []), trio.open_nursery() as nursery:
            for name in ("first", "second", "refused", "third"):
                nursery.start_soon(opened, client, tmp_path / name, found)
    assert sorted(kernel.registered.values()) == ["first", "second", "third"]
    assert "stacked file system" in str(found["refused"])
    assert all(kernel.registered[int(found[name])] == name for name in ("first", "second", "third"))


async def test_who_is_cancelled_has_its_id_all_the_same(kernel: Kernel, tmp_path: Path) -> None:
    found: dict[str, int | str] = {}
    with mounted(kernel) as (keeper, server):
        client = client_of(server)
        async with answering(keeper, server, []), trio.open_nursery() as nursery:
            for name in ("first", "second", "third"):
                nursery.start_soon(opened, client, tmp_path / name, found)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert {kernel.registered[int(number)] for number in found.values()} == set(kernel.registered.values())


async def test_without_a_keeper_nobody_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    found: dict[str, int | str] = {}
    with ours:
        client = KeeperClient(ours, backing_limit=server_messages.BACKING_LIMIT)
        async with trio.open_nursery() as nursery:
            for name in ("first", "second", "third"):
                nursery.start_soon(opened, client, tmp_path / name, found)
    assert all("the keeper has ended: run `mountctl recover`" in str(why) for why in found.values())
    assert len(found) == 3
    assert not client.connected()
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # told once


async def test_a_keeper_that_does_not_answer_is_waited_for_once_until_it_does(
    kernel: Kernel, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.handover.keeper_client.LOOK_INTERVAL_S", 0.1)
    monkeypatch.setattr("trimsfs.handover.keeper_client.ALIVE_INTERVAL_S", 0.1)
    found: dict[str, int | str] = {}
    with mounted(kernel) as (keeper, server):
        client = client_of(server)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for name in ("first", "second", "third"):
                    nursery.start_soon(opened, client, tmp_path / name, found)
        with monkeypatch.context() as longer, trio.fail_after(5):
            longer.setattr("trimsfs.handover.keeper_client.LOOK_INTERVAL_S", 10.0)
            await opened(client, tmp_path / "fourth", found)
        assert all("the keeper does not answer: run `kill -CONT" in str(why) for why in found.values())
        assert (len(found), client.connected()) == (4, True)
        assert "does not answer" in (client.problem() or "")
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # told once
        async with trio.open_nursery() as nursery, answering(keeper, server, []):
            nursery.start_soon(client.run)
            # What nobody waited for any more is given back.
            await until(lambda: client.problem() is None and set(kernel.registered.values()) == {"closed"})
            await opened(client, tmp_path / "fifth", found)
            nursery.cancel_scope.cancel()
    assert kernel.registered.pop(int(found["fifth"])) == "fifth"
    assert set(kernel.registered.values()) == {"closed"}


@pytest.mark.parametrize("claimed", [False, True])
def test_the_next_server_hears_of_ids_that_the_last_may_not_have_heard_of(
    claimed: bool, kernel: Kernel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    files = [os.open(tmp_path / "file", os.O_RDONLY) for _ in range(3)]
    with mounted(kernel) as (keeper, server):
        socket.send_fds(server.end, [b'{"type": "backing-open", "count": 3}'], files)
        keeper._crew.dispatcher.receive(server)
        if claimed:
            server.say(b'{"type": "alive"}')
            keeper._crew.dispatcher.receive(server)
        server.terminate()
        keeper._crew.on_end(server)
        successor = FakeServer()
        keeper._crew.promote(successor)
        promotion = stand_by(successor.end)
        assert promotion is not None
        assert promotion.unclaimed == (() if claimed else (1, 2, 3))
        assert promotion.backing_limit == server_messages.BACKING_LIMIT
        successor.channel.close()
        successor.end.close()
    for file in files:
        os.close(file)
