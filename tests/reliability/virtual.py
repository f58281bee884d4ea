"""A server without FUSE, driven from outside of its event loop: between two calls it stands still, and so does time."""

import errno
import json
import math
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.reliability.audit import check, check_at_rest
from tests.reliability.kernel import Kernel
from tests.reliability.scheduling import without_threads
from tests.reliability.succession import Succession
from tests.support.parts import blob_files, flip_byte
from tests.support.served import Server
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreAccessError, StoreError, StoreStalledError, TransientStoreError
from trimsfs.fetch.fetcher import FetchStatistics
from trimsfs.opening.cold_open import ColdOpen
from trimsfs.options import Eviction
from trimsfs.tiers.disk.disk_tier import DiskStatistics

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE_S = 1000.0
"""In time that is not real: longer than all that a server waits for."""
BOOKS_S = 2.0
"""How long what is counted and what is recorded may differ."""
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
        except (trio.RunFinishedError, trio.Cancelled):  # the loop has ended, or ends just now
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
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stop, trio_token=self._token)
        self._thread.join()

    def _stop(self) -> None:
        self.clock.autojump_threshold = 0
        self.nursery.cancel_scope.cancel()


class VirtualDriver:
    """Serves a store in memory; a kernel that is simulated, and its backing files, outlive servers that are killed."""

    def __init__(
        self, directory: Path, chunk_size: int, *, cold_open: ColdOpen, streaming: bool, ttl_s: float, policy: str
    ) -> None:
        self.chunk_size = chunk_size
        self.budget = 4 * chunk_size
        self.keeps_idle = policy != "eager"
        self.most_restarts = 100
        self.ttl_s = ttl_s
        self.slack_s = 0.0
        self._directory = directory
        self._damaged = False
        self.counted: Counter[str] = Counter()
        self._store = MemoryStore(streaming=streaming)
        self._loop = Loop()
        self._lives = Succession(
            self._loop.nursery,
            self._store,
            directory,
            chunk_size=chunk_size,
            cache_size=self.budget,
            host_size=3 * chunk_size,
            metadata_ttl=ttl_s,
            cold_open=cold_open,
            eviction=Eviction(disk=policy),
        )
        self._loop.call(self._lives.mount)

    @property
    def _kernel(self) -> Kernel:
        return self._lives.kernel

    @property
    def _server(self) -> Server:
        return self._lives.server

    # Servers

    def kill(self) -> None:
        self._count()
        self._sync(self._lives.die)
        self._loop.call(self._lives.follow)

    def remount(self, draw: random.Random, *, damage: bool) -> None:
        self._count()
        self._loop.call(self._lives.unmount)
        self._damaged |= damage
        if damage:
            damage_some(self._lives.cache, draw)
        self._loop.call(self._lives.mount)

    def stop(self) -> None:
        self._loop.stop()
        self._lives.backing.dispose()
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

    @property
    def hiccuping(self) -> bool:
        """Whether a request is still to fail."""
        return any(rule.times for rule in self._store._rules)

    # Programs

    def open(self, path: str) -> int:
        return self._loop.call(self._kernel.open, path)

    def size(self, token: int) -> int:
        return self._kernel.files[token].size

    def whole(self, token: int) -> bool:
        handle = self._kernel.files[token].handle
        return self._server.filesystem.handles.files[handle].blob.complete

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
        return self._loop.call(self._read_models)

    async def _read_models(self) -> list[dict[str, Any]]:
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
            with trio.move_on_after(BOOKS_S):
                while not await self._books_agree():  # noqa: ASYNC110 - nobody tells
                    await trio.sleep(0.01)  # a blob is being opened, or filled
            assert await self._books_agree()
            return await self._read_models()

        return self._loop.call(look)

    async def _books_agree(self) -> bool:
        """Whether as much is counted as used as is recorded; of what comes or goes, nothing can be said."""
        before = self._counts()
        used = sum(model["residency"]["disk"] for model in await self._read_models())
        evicting = self._server.disk._state.lock.locked()
        quiet = before == self._counts() and not before[0].in_flight and not evicting
        return not quiet or used == self._server.disk.statistics().used_bytes

    def _counts(self) -> tuple[FetchStatistics, DiskStatistics]:
        return self._server.fetcher.statistics(), self._server.disk.statistics()

    def settle(self) -> None:
        async def settle() -> None:
            self._server.filesystem.handles.all_resent()
            self._kernel.forget()
            await check_at_rest(self._server, damaged=self._damaged)

        self._loop.call(settle)
        self._count()

    def _count(self) -> None:
        """Note what the server of the moment has done."""
        disk = self._server.disk.statistics()
        self.counted.update(evictions=disk.evictions, corrupt=disk.corrupt_chunks, refused=disk.refused_chunks)

    def _sync(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        async def call() -> None:
            function(*arguments)

        self._loop.call(call)


def damage_some(cache: Path, draw: random.Random) -> None:
    """Do to some files of a cache what a disk, or a person, might do."""
    draw = random.Random(draw.getrandbits(32))  # what there is differs from run to run: hypothesis draws once for it
    for path in blob_files(cache):
        size = path.stat().st_size
        kind = draw.choice(("nothing", "nothing", "flip", "flip", "flip", "truncate", "remove"))
        if kind == "flip" and size:
            flip_byte(path, draw.randrange(size))
        elif kind == "truncate":
            os.truncate(path, size // 2)
        elif kind == "remove":
            path.unlink()
