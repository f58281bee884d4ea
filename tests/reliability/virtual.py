"""A server without FUSE, driven from outside of its event loop: between two calls it stands still, and so does time."""

import errno
import json
import math
import os
import random
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fakes import MemoryStore
from tests.reliability.audit import check, check_at_rest
from tests.reliability.kernel import Kernel
from tests.reliability.scheduling import without_threads
from tests.unit.parts import blob_files, flip_byte
from tests.unit.served import FakeBacking, Server, served
from trimsfs.coldopen import ColdOpen
from trimsfs.errors import FuseUnavailableError, StoreAccessError, StoreError, StoreStalledError, TransientStoreError
from trimsfs.eviction import POLICIES
from trimsfs.ledger import Ledger

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE_S = 1000.0
"""In time that is not real: longer than all that a server waits for."""
FAILURES: dict[int, Callable[[], StoreError]] = {
    errno.EIO: lambda: TransientStoreError("the store is away"),
    errno.EACCES: lambda: StoreAccessError("not with these credentials"),
}


class Loop:
    """An event loop in a thread of its own. It does what it is called for, and what follows from that at once."""

    def __init__(self) -> None:
        self.clock = MockClock()
        self.nursery: trio.Nursery
        self._token: trio.lowlevel.TrioToken
        self._begun = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._begun.wait()

    def _run(self) -> None:
        try:
            with without_threads(random.Random(0)):
                trio.run(self._main, clock=self.clock)
        except BaseException as error:  # told to who calls
            self._error = error
        finally:
            self._begun.set()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._begun.set()
            await trio.sleep_forever()

    def call(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """Have something done, while time passes as it must; what it gives or raises."""
        try:
            return trio.from_thread.run(self._carry, function, *arguments, trio_token=self._token)
        except trio.RunFinishedError:
            self._thread.join()
            assert self._error is not None
            raise self._error from None

    async def _carry(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        self.clock.autojump_threshold = 0
        try:
            with trio.fail_after(PATIENCE_S):
                return await function(*arguments)
        finally:
            self.clock.autojump_threshold = math.inf
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()

    def stop(self) -> None:
        """End everything."""
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stop, trio_token=self._token)
        self._thread.join()

    def _stop(self) -> None:
        self.clock.autojump_threshold = 0
        self.nursery.cancel_scope.cancel()


class _Cut(FakeBacking):
    """The end of a channel to the keeper whose server has died."""

    async def open(self, descriptor: int) -> int:
        raise FuseUnavailableError("dead")

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        del backing_id, done


class VirtualDriver:
    """Serves a store in memory; a kernel that is simulated, and its backing files, outlive servers that are killed."""

    def __init__(
        self, directory: Path, chunk_size: int, *, cold_open: ColdOpen, streaming: bool, ttl_s: float, policy: str
    ) -> None:
        self.chunk_size = chunk_size
        self.budget = 6 * chunk_size
        self.most_restarts = 100
        self.ttl_s = ttl_s
        self.slack_s = 0.0
        self._directory = directory
        self._lives = 0
        self._damaged = False
        self._options: dict[str, Any] = {
            "chunk_size": chunk_size,
            "budget": self.budget,
            "host_budget": 4 * chunk_size,
            "ttl_s": ttl_s,
            "cold_open": cold_open,
            "policy": POLICIES[policy],
        }
        self._store = MemoryStore(streaming=streaming)
        self._loop = Loop()
        self._begin()

    @property
    def _server(self) -> Server:
        return self._kernel.server

    @property
    def _cache(self) -> Path:
        return self._directory / str(self._lives)

    # Servers

    def _begin(self) -> None:
        self._kernel, self._backing, self._ledger = Kernel(), FakeBacking(), Ledger()
        self._loop.call(self._start)

    async def _start(self) -> None:
        self._ended = trio.Event()
        self._scope: trio.CancelScope = await self._loop.nursery.start(self._serve, self._ended)

    async def _serve(self, ended: trio.Event, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with served(
                self._store, self._cache, backing=self._backing, ledger=self._ledger, **self._options
            ) as server:
                server.handles |= {file.handle for file in self._kernel.files.values() if self._held(file.handle)}
                self._kernel.server = server
                task_status.started(scope)
                await trio.sleep_forever()
        ended.set()

    def _held(self, handle: int) -> bool:
        return self._lives > 0 and handle in self._server.handles

    def kill(self) -> None:
        self._loop.call(self._kill)

    async def _kill(self) -> None:
        """What a server leaves that dies now is its cache directory and its ledger; another goes on with these."""
        dying, cache, ledger = self._server, self._cache, self._ledger
        self._lives += 1
        shutil.copytree(cache, self._cache)
        self._ledger = _copied(ledger)
        dying.residents._backing = _Cut()
        self._scope.cancel()
        await self._ended.wait()
        for hosted in list(dying.host._hosted.values()):
            dying.host.removed(hosted.blob)
        ledger.close()
        shutil.rmtree(cache)
        await self._start()

    def remount(self, draw: random.Random, *, damage: bool) -> None:
        self._loop.call(self._end)
        self._damaged |= damage
        if damage:
            damage_some(self._cache, draw)
        self._begin()

    async def _end(self) -> None:
        await self._server.idle()
        self._scope.cancel()
        await self._ended.wait()
        self._backing.dispose()
        self._ledger.close()

    def stop(self) -> None:
        self._loop.stop()
        self._backing.dispose()
        shutil.rmtree(self._directory, ignore_errors=True)

    # The store

    def now(self) -> float:
        return self._loop.clock.current_time()

    def write(self, path: str, content: bytes) -> None:
        self._store.put(path, content)

    def remove(self, path: str) -> None:
        self._store.delete(path)

    def fail(self, number: int) -> None:
        self._store.fail(FAILURES[number](), times=math.inf)

    def heal(self) -> None:
        self._store.heal()

    def hiccup(self) -> None:
        """Let one request fail, in a way that another attempt cures."""
        self._store.fail(StoreStalledError("no bytes"), times=1)

    # Programs

    def open(self, path: str) -> int:
        return self._loop.call(self._kernel.open, path)

    def size(self, token: int) -> int:
        return self._kernel.files[token].size

    def whole(self, token: int) -> bool:
        handle = self._kernel.files[token].handle
        return self._server.filesystem._handles.files[handle].blob.complete

    def read(self, token: int, offset: int, size: int) -> bytes:
        return self._loop.call(self._kernel.read, token, offset, size)

    def map(self, token: int) -> None:
        self._kernel.map(token)

    def read_mapped(self, token: int, offset: int, size: int) -> bytes:
        return self._loop.call(self._kernel.read_mapped, token, offset, size)

    def close(self, token: int) -> None:
        self._sync(self._kernel.close, token)

    def unmap(self, token: int) -> None:
        self._sync(self._kernel.unmap, token)

    def stat(self, path: str) -> int | None:
        found = self._loop.call(self._kernel.walk, path)
        return None if found.directory else found.size

    def listing(self, path: str) -> set[str]:
        return self._loop.call(self._kernel.listing, path)

    def attribute(self, path: str, name: str) -> str:
        return self._loop.call(self._kernel.attribute, path, name)

    def command(self, name: str, path: str) -> dict[str, Any]:
        async def give() -> dict[str, Any]:
            directory, slash, subject = path.rpartition("/")
            text = await self._kernel.content(f"{directory}{slash}.trims/{subject}/{name}")
            last: dict[str, Any] = json.loads(text.splitlines()[-1])
            return last

        return self._loop.call(give)

    def models(self) -> list[dict[str, Any]]:
        return self._loop.call(self._models)

    async def _models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = json.loads(await self._kernel.content(".trims/models"))["models"]
        return models

    # Time, memory, the end

    def forget(self) -> None:
        self._sync(self._kernel.forget)

    def wait(self, share: float) -> None:
        self._loop.call(trio.sleep, share * self.ttl_s)

    def check(self) -> list[dict[str, Any]]:
        async def look() -> list[dict[str, Any]]:
            check(self._server)
            return await self._models()

        return self._loop.call(look)

    def settle(self) -> None:
        async def settle() -> None:
            self._kernel.forget()
            await check_at_rest(self._server, damaged=self._damaged)

        self._loop.call(settle)

    def _sync(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        async def call() -> None:
            function(*arguments)

        self._loop.call(call)


def _copied(ledger: Ledger) -> Ledger:
    """The same memory, as a successor finds it."""
    descriptor = os.memfd_create("ledger")
    os.truncate(descriptor, len(ledger._memory))
    os.pwrite(descriptor, ledger._memory[: ledger._end], 0)
    return Ledger(descriptor)


def damage_some(cache: Path, draw: random.Random) -> None:
    """Do to some files of a cache what a disk, or a person, might do."""
    for path in blob_files(cache):
        size, kind = path.stat().st_size, draw.choice(("nothing", "nothing", "flip", "flip", "truncate", "remove"))
        if kind == "flip" and size:
            flip_byte(path, draw.randrange(size))
        elif kind == "truncate":
            os.truncate(path, size // 2)
        elif kind == "remove":
            path.unlink()
