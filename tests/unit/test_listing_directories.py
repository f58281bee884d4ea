"""What the kernel gets when a program lists a directory."""

from itertools import pairwise
from typing import Any, cast

import pytest
import trio

from tests.support.served import OWNER, Serving
from tests.support.stores import MemoryStore
from trimsfs.fuse.operations import LISTED_AT_ONCE, NAME_ONLY_BIT, Operations
from trimsfs.namespace.inodes import ROOT_INODE

COUNT = 3 * LISTED_AT_ONCE


class Kernel:
    """Takes the replies to a reader of the root, *most* of them in a piece."""

    def __init__(self, operations: Operations, monkeypatch: pytest.MonkeyPatch, *, most: int = 10**9) -> None:
        self._operations = operations
        self._most = most
        self.entries: list[tuple[bytes, Any, int]] = []
        monkeypatch.setattr("trimsfs.fuse.operations.pyfuse3.readdir_reply", self._reply)

    def _reply(self, _token: object, name: bytes, entry: Any, position: int) -> bool:
        if len(self.entries) == self._most:
            return False
        self.entries.append((name, entry, position))
        return True

    async def list_root(self) -> None:
        handle = await self._operations._filesystem.open_directory(ROOT_INODE, lambda: OWNER)
        await self._operations.readdir(cast("Any", handle), 0, cast("Any", None))
        self._operations._filesystem.files.release(handle)

    def numbers(self, *, told: bool) -> set[int]:
        return {entry.st_ino for _, entry, _ in self.entries if bool(entry.st_ino & NAME_ONLY_BIT) != told}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({f"{number:05}": bytes(2 << 20) for number in range(COUNT)})


async def test_of_too_many_names_the_kernel_gets_no_inodes(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.filesystem.names.MANY_INODES", 40)
    async with serving() as server:
        kernel = Kernel(Operations(server.filesystem, trio.Event()), monkeypatch)
        await kernel.list_root()
        assert [name for name, *_ in kernel.entries] == [b"%05d" % number for number in range(COUNT)]
        assert len(kernel.numbers(told=True)) == 39  # and the root
        assert server.filesystem.known_files() == 40
        known = kernel.numbers(told=True)

        kernel.entries.clear()
        await kernel.list_root()  # what it has, it gets again
        assert kernel.numbers(told=True) == known
        found = await server.number("00149")
        assert found | NAME_ONLY_BIT in kernel.numbers(told=False)
        for number in known:
            server.filesystem.names.inodes.forget(number, 2)
        assert server.filesystem.known_files() == 2


async def test_of_many_inodes_the_kernel_may_give_up_those_that_nobody_opened(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.filesystem.names.MANY_INODES", 40)
    monkeypatch.setattr("trimsfs.filesystem.names.PRUNED", 10)
    async with serving() as server:
        names = server.filesystem.names

        async def look_up(first: int, stop: int) -> list[int]:
            found = []
            for number in range(first, stop):
                attributes = await names.lookup(ROOT_INODE, b"%05d" % number)
                names.count_lookup(attributes)
                found.append(attributes.inode.number)
            return found

        known = await look_up(0, 39)
        assert not server.pruned
        opened = names.inodes[known[2]]
        opened.opened = True
        known += await look_up(39, 59)
        assert server.pruned == [number for number in known[:39] if number != opened.number][: len(server.pruned)]
        assert len(server.pruned) == 38  # twice what came, but for the root and what is open
        known += await look_up(59, 64)
        assert server.pruned[38:43] == known[39:44]  # it goes on with the next


async def test_a_name_that_does_not_fit_is_not_counted(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        kernel = Kernel(Operations(server.filesystem, trio.Event()), monkeypatch, most=7)
        await kernel.list_root()
        assert server.filesystem.known_files() == 8


async def test_others_have_their_turn_while_a_directory_is_listed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as server:
        kernel, turns = Kernel(Operations(server.filesystem, trio.Event()), monkeypatch), list[int]()

        async def other() -> None:
            while True:
                turns.append(len(kernel.entries))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await kernel.list_root()
            nursery.cancel_scope.cancel()
        assert max(after - before for before, after in pairwise(turns)) <= 2 * LISTED_AT_ONCE
        assert turns[-1] > COUNT / 2


async def test_the_kernel_may_use_what_is_listed_as_long_as_what_is_looked_up(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(metadata_ttl=600) as server:
        kernel = Kernel(Operations(server.filesystem, trio.Event()), monkeypatch)
        await kernel.list_root()
        assert all(590 < entry.entry_timeout <= 600 for _, entry, _ in kernel.entries)
