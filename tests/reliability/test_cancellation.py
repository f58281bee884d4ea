"""Every operation is given up at each of its awaits, one after the other: nothing stays in use, and it works again."""

import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import trio

from tests.reliability.audit import check, check_at_rest
from tests.reliability.scheduling import about, at, scheduled
from tests.support.parts import content_of
from tests.support.served import FakeBacking, Server, Signal, served
from tests.support.stores import MemoryStore
from tests.support.survival import Survived
from trimsfs.control.commands import Commands
from trimsfs.opening.cold_open import ColdOpen

PATH = "d/model"
MOST_STEPS = 2000
COMMANDS = ("warm-disk", "warm-host", "pin", "unpin", "evict")


def below(ancestor: trio.lowlevel.Task, task: trio.lowlevel.Task | None) -> bool:
    """Whether a task is another, or was started by it."""
    while task is not None and task is not ancestor:
        task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    return task is ancestor


def of_command(task: trio.lowlevel.Task | None) -> bool:
    """Whether a task carries out a command."""
    while task is not None and task.name != f"{Commands.__module__}.{Commands._carry.__qualname__}":
        task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    return task is not None


# Operations: what each gives when it is not disturbed


async def look_up(server: Server) -> object:
    return (await server.find(PATH)).size


async def listing(server: Server) -> object:
    return await server.listing("d")


async def open_and_close(server: Server) -> object:
    handle = await server.open(PATH)
    server.release(handle)
    return None


async def read(server: Server) -> object:
    return await server.content(PATH)


async def read_a_part(server: Server) -> object:
    handle = await server.open(PATH)
    try:
        return await server.read(handle, 1000, 40_000)
    finally:
        server.release(handle)


async def read_empty(server: Server) -> object:
    return await server.content("empty")


async def info(server: Server) -> object:
    return (await server.info(PATH))["size"]


async def xattr(server: Server) -> object:
    return await server.attribute(PATH, "pinned")


async def fetch_all(server: Server) -> object:
    async with server.disk.using(server.store.generation(PATH)) as blob:
        await server.fetcher.fetch_all(blob)
        return blob.complete


async def announce(server: Server) -> object:
    async with server.disk.using(server.store.generation(PATH)) as blob:
        await server.fetcher.fetch_all(blob)
        return await server.passthrough.register(blob)


async def make_room(server: Server) -> object:
    """Read something else: what is here has to go."""
    return await server.content("other")


OPERATIONS = [
    look_up,
    listing,
    open_and_close,
    read,
    read_a_part,
    read_empty,
    info,
    xattr,
    fetch_all,
    announce,
    make_room,
]


@dataclass(slots=True, kw_only=True)
class Scene:
    """A server, whose files are cold or whole before each attempt."""

    server: Server
    warm: bool

    async def prepare(self) -> None:
        assert await self.server.outcome("unpin", PATH) == ("done", None)
        if self.warm:
            assert await self.server.outcome("warm-host", PATH) == ("done", None)
        else:
            assert await self.server.outcome("evict", PATH) == ("done", None)
            assert await self.server.outcome("evict", "other") == ("done", None)
        self.server.namespace.replaced(self.server.store.generation(PATH))  # names are asked for anew
        self.server.forget()


async def settled(server: Server) -> None:
    """What was given up has left nothing in use."""
    await check_at_rest(server)
    opener = server.filesystem._opener
    assert opener._cold_opener._waiting == 0


async def given_up_everywhere(
    directory: Path, chunk_size: int, operation: Callable[[Server], Awaitable[object]], cold_open: ColdOpen, warm: bool
) -> int:
    """Cancel an operation at its first await, then at its second, and so on until it ends before; how often it was."""
    async with serving(directory, chunk_size, cold_open) as server:
        scene = Scene(server=server, warm=warm)
        await scene.prepare()
        wanted = await operation(server)
        for step in itertools.count(1):
            assert step < MOST_STEPS
            await scene.prepare()
            scope = trio.CancelScope()
            concerned = partial(below, trio.lowlevel.current_task())
            with scope, at(step, concerned, scope.cancel) as instrument:
                assert await operation(server) == wanted
            check(server)
            await settled(server)
            if not instrument.came:
                return step - 1
            assert await operation(server) == wanted
            await settled(server)
    raise AssertionError("unreachable")


def serving(directory: Path, chunk_size: int, cold_open: ColdOpen) -> AbstractAsyncContextManager[Server]:
    store = MemoryStore(
        {
            PATH: content_of("model", 3 * chunk_size - 100),
            "other": content_of("other", 3 * chunk_size - 200),
            "empty": b"",
            "d/small": b"small",
        },
        streaming=True,
    )
    return served(
        store,
        directory,
        chunk_size=chunk_size,
        backing=FakeBacking(),
        cold_open=cold_open,
        metadata_ttl=60,
        cache_size=4 * chunk_size,
        host_size=4 * chunk_size,
    )


async def signalled_everywhere(directory: Path, chunk_size: int, cold_open: ColdOpen) -> int:
    """As `given_up_everywhere`, but by a signal to the opening thread, which ends what waits and nothing else."""
    async with serving(directory, chunk_size, cold_open) as server:
        scene = Scene(server=server, warm=False)
        for step in itertools.count(1):
            assert step < MOST_STEPS
            await scene.prepare()
            signal = Signal()
            concerned = partial(below, trio.lowlevel.current_task())
            with at(step, concerned, signal.send) as instrument, suppress(InterruptedError):
                server.release(await server.open(PATH, interruptible=signal.interruptible))
            await settled(server)
            if not instrument.came:
                return step - 1
            assert await server.content(PATH) == server.store.contents[PATH, server.store.generation(PATH).etag]
    raise AssertionError("unreachable")


async def closed_everywhere(directory: Path, chunk_size: int, name: str, warm: bool) -> int:
    """Close a command at each of its awaits, as a program that is killed does."""
    async with serving(directory, chunk_size, "wait") as server:
        scene = Scene(server=server, warm=warm)
        for step in itertools.count(1):
            assert step < MOST_STEPS
            await scene.prepare()
            if name == "unpin":
                assert await server.outcome("pin", PATH) == ("done", None)
            path = await server.control_file(PATH, name)
            closed = trio.Event()
            with at(step, of_command, closed.set) as instrument:
                handle = await server.open(path)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(closed_when, server, handle, closed)
                    nursery.start_soon(read_to_end, server, handle, closed)
            await settled(server)
            here = await server.disk.residency(server.store.generation(PATH))
            assert not here.pinned or here.disk_bytes == here.generation.size
            if not instrument.came:
                return step - 1
            assert await server.outcome(name, PATH) == ("done", None)
            assert await server.content(PATH) == server.store.contents[PATH, server.store.generation(PATH).etag]
    raise AssertionError("unreachable")


async def closed_when(server: Server, handle: int, closed: trio.Event) -> None:
    await closed.wait()
    server.release(handle)


async def read_to_end(server: Server, handle: int, closed: trio.Event) -> None:
    offset = 0
    while not closed.is_set() and (piece := await server.read(handle, offset)):
        offset += len(piece)
    closed.set()


# Tests

WAYS: list[tuple[ColdOpen, bool]] = [("stream", False), ("wait", False), ("wait", True)]


def test_operations_can_be_given_up_at_every_await(tmp_path: Path, chunk_size: int, survived: Survived) -> None:
    given_up = 0
    for operation, (cold_open, warm) in itertools.product(OPERATIONS, WAYS):
        with about(operation.__name__):
            directory = tmp_path / f"{operation.__name__}-{cold_open}-{warm}"
            given_up += scheduled(1, given_up_everywhere, directory, chunk_size, operation, cold_open, warm)
    survived("operations cancelled at each await", injected=given_up, operations=given_up)


def test_a_signal_can_come_at_every_await_of_an_open(tmp_path: Path, chunk_size: int, survived: Survived) -> None:
    given_up = 0
    for cold_open in get_args(ColdOpen):
        with about(cold_open):
            given_up += scheduled(1, signalled_everywhere, tmp_path / cold_open, chunk_size, cold_open)
    survived("opens signalled at each await", injected=given_up, operations=given_up)


def test_commands_can_be_closed_at_every_await(tmp_path: Path, chunk_size: int, survived: Survived) -> None:
    given_up = 0
    for name, warm in itertools.product(COMMANDS, (False, True)):
        with about(name):
            given_up += scheduled(1, closed_everywhere, tmp_path / f"{name}-{warm}", chunk_size, name, warm)
    survived("commands closed at each await", injected=given_up, operations=given_up)
