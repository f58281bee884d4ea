"""Servers without FUSE that follow each other: killed, their ledger and cache are what the next one goes on with."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from tests.reliability.kernel import Kernel
from tests.support.served import FakeBacking, Server, served
from tests.support.stores import MemoryStore
from trimsfs.errors import FuseUnavailableError
from trimsfs.handover.ledger import Ledger


class _Channel:
    """A server's end of the channel to the keeper; once it has died, what it has asked for is given back."""

    def __init__(self, backing: FakeBacking) -> None:
        self._backing = backing
        self.dead = False

    async def open(self, descriptor: int) -> int:
        number = await self._backing.open(descriptor)
        if self.dead:
            self._backing.close(number)
            raise FuseUnavailableError("dead")
        return number

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        if not self.dead:
            self._backing.close(backing_id, done)


class Succession:
    """One mount: its kernel, its backing files and the server of the moment. *options* are those of `served`."""

    def __init__(self, nursery: trio.Nursery, store: MemoryStore, directory: Path, **options: Any) -> None:
        self._nursery = nursery
        self._store = store
        self._directory = directory
        self._options = options
        self._number = 0
        self.kernel: Kernel
        self.backing: FakeBacking

    @property
    def cache(self) -> Path:
        """The cache directory; another after each death."""
        return self._directory / str(self._number)

    @property
    def server(self) -> Server:
        return self.kernel.server

    async def mount(self) -> None:
        """Begin anew, on what is in the cache."""
        self.kernel, self.backing, self._ledger = Kernel(), FakeBacking(), Ledger()
        await self._start()

    async def unmount(self) -> None:
        """End in order. Nothing may be open."""
        self.server.filesystem.handles.all_resent()
        await self.server.idle()
        self._scope.cancel()
        await self._ended.wait()
        _unlock(self.server)
        self.backing.dispose()
        self._ledger.close()

    def die(self) -> None:
        """Kill the server: what it leaves is what is in its cache directory and its ledger now."""
        self._dead, self._old_cache, self._old_ledger = self.server, self.cache, self._ledger
        self._number += 1
        shutil.copytree(self._old_cache, self.cache)
        self._ledger = _copied(self._ledger)
        self._channel.dead = True
        self._scope.cancel()
        self.kernel.lose()
        self.died.set()

    async def follow(self) -> None:
        await self._ended.wait()
        await self.kernel.lost()
        _unlock(self._dead)
        self._old_ledger.close()
        shutil.rmtree(self._old_cache)
        await self._start()

    async def _start(self) -> None:
        self._ended, self.died = trio.Event(), trio.Event()
        self._scope: trio.CancelScope = await self._nursery.start(self._serve, self._ended)

    async def _serve(self, ended: trio.Event, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with served(
                self._store, self.cache, backing=self.backing, ledger=self._ledger, **self._options
            ) as server:
                self._channel = server.passthrough._backing = _Channel(self.backing)
                self.kernel.serve(server)
                task_status.started(scope)
                await trio.sleep_forever()
        ended.set()


def _unlock(ended: Server) -> None:
    """Unmap what a server has locked in memory, as the end of its process does."""
    for hosted in list(ended.host._hosted.values()):
        ended.host.removed(hosted.blob)


def _copied(ledger: Ledger) -> Ledger:
    """The same memory, as a successor finds it."""
    descriptor = os.memfd_create("ledger")
    os.truncate(descriptor, len(ledger._memory))
    os.pwrite(descriptor, ledger._memory[: ledger._end], 0)
    return Ledger(descriptor)
