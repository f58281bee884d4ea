"""Every operation is given up at each of its awaits, one after the other: nothing stays in use, and it works again."""

import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
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


async def open_and_close(server: Server) -> object:
    server.release(await server.open(PATH))
    return None


async def read_a_part(server: Server) -> object:
    handle = await server.open(PATH)
    try:
        return await server.read(handle, 1000, 40_000)
    finally:
        server.release(handle)


async def info(server: Server) -> object:
    return (await server.info(PATH))["size"]


async def fetch_all(server: Server) -> object:
    async with server.disk.blobs.using(server.store.generation(PATH)) as blob:
        await server.fetcher.fetch_all(blob)
        return blob.complete


async def announce(server: Server) -> object:
    async with server.disk.blobs.using(server.store.generation(PATH)) as blob:
        await server.fetcher.fetch_all(blob)
        return await server.passthrough.register(blob)


OPERATIONS: dict[str, Callable[[Server], Awaitable[object]]] = {
    "look up": look_up,
    "listing": lambda server: server.listing("d"),
    "open and close": open_and_close,
    "read": lambda server: server.content(PATH),
    "read a part": read_a_part,
    "read an empty file": lambda server: server.content("empty"),
    "info": info,
    "xattr": lambda server: server.attribute(PATH, "pinned"),
    "fetch all": fetch_all,
    "announce": announce,
    "make room": lambda server: server.content("other"),  # what is here has to go
}


async def prepare(server: Server, *, warm: bool) -> None:
    """Make files cold, or one whole, whatever has been done."""
    assert await server.outcome("unpin", PATH) == ("done", None)
    if warm:
        assert await server.outcome("warm-host", PATH) == ("done", None)
    else:
        assert await server.outcome("evict", PATH) == ("done", None)
        assert await server.outcome("evict", "other") == ("done", None)
    server.namespace.replaced(server.store.generation(PATH))  # names are asked for anew
    server.forget()


async def settled(server: Server) -> None:
    """What was given up has left nothing in use, and pinned only what is whole."""
    check(server)
    await check_at_rest(server)
    assert server.filesystem._opener._cold_opener._waiting == 0
    here = await server.disk.residencies.of(server.store.generation(PATH))
    assert not here.pinned or here.disk_bytes == here.generation.size


def serving(directory: Path, chunk_size: int, cold_open: ColdOpen) -> AbstractAsyncContextManager[Server]:
    contents = {
        PATH: content_of("model", 3 * chunk_size - 100),
        "other": content_of("other", 3 * chunk_size - 200),
        "empty": b"",
        "d/small": b"small",
    }
    return served(
        MemoryStore(contents, streaming=True),
        directory,
        chunk_size=chunk_size,
        backing=FakeBacking(),
        cold_open=cold_open,
        metadata_ttl=60,
        cache_size=4 * chunk_size,
        host_size=4 * chunk_size,
    )


Attempt = Callable[[Server, int, object], Awaitable[bool]]
"""Ends an operation at its await of a number, and tells whether it had so many; else it gives what is wanted."""


async def everywhere(
    directory: Path,
    chunk_size: int,
    attempt: Attempt,
    again: Callable[[Server], Awaitable[object]],
    cold_open: ColdOpen,
    warm: bool,
) -> int:
    """Make an *attempt* that ends at its first await, then at its second, and so on until it is over before; how often.

    What is done *again* after each attempt gives the same as before.
    """
    async with serving(directory, chunk_size, cold_open) as server:
        await prepare(server, warm=warm)
        wanted = await again(server)
        for step in itertools.count(1):
            assert step < MOST_STEPS
            await prepare(server, warm=warm)
            ended = await attempt(server, step, wanted)
            await settled(server)
            assert await again(server) == wanted
            await settled(server)
            if not ended:
                return step - 1
    raise AssertionError("unreachable")


def here() -> Callable[[trio.lowlevel.Task], bool]:
    """Whether a task is this one, or was started by it."""
    return partial(below, trio.lowlevel.current_task())


def cancelled(operation: Callable[[Server], Awaitable[object]]) -> Attempt:
    """Cancel an operation at an await."""

    async def attempt(server: Server, step: int, wanted: object) -> bool:
        scope = trio.CancelScope()
        with scope, at(step, here(), scope.cancel) as instrument:
            assert await operation(server) == wanted
        return instrument.came

    return attempt


async def signalled(server: Server, step: int, _wanted: object) -> bool:
    """Send the opening thread a signal at an await, which ends what waits and nothing else."""
    signal = Signal()
    with at(step, here(), signal.send) as instrument, suppress(InterruptedError):
        server.release(await server.open(PATH, interruptible=signal.interruptible))
    return instrument.came


def closed(name: str) -> Attempt:
    """Close a command at an await, as a program that is killed does."""

    async def attempt(server: Server, step: int, _wanted: object) -> bool:
        if name == "unpin":
            assert await server.outcome("pin", PATH) == ("done", None)
        path = await server.control_file(PATH, name)
        closed = trio.Event()
        with at(step, of_command, closed.set) as instrument:
            handle = await server.open(path)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closed_when, server, handle, closed)
                nursery.start_soon(read_to_end, server, handle, closed)
        return instrument.came

    return attempt


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
    for (name, operation), (cold_open, warm) in itertools.product(OPERATIONS.items(), WAYS):
        with about(name):
            directory, attempt = tmp_path / f"{name}-{cold_open}-{warm}", cancelled(operation)
            given_up += scheduled(1, everywhere, directory, chunk_size, attempt, operation, cold_open, warm)
    survived("operations cancelled at each await", injected=given_up, operations=given_up)


def test_a_signal_can_come_at_every_await_of_an_open(tmp_path: Path, chunk_size: int, survived: Survived) -> None:
    given_up = 0
    for cold_open in get_args(ColdOpen):
        with about(cold_open):
            read, directory = OPERATIONS["read"], tmp_path / cold_open
            given_up += scheduled(1, everywhere, directory, chunk_size, signalled, read, cold_open, False)
    survived("opens signalled at each await", injected=given_up, operations=given_up)


def test_commands_can_be_closed_at_every_await(tmp_path: Path, chunk_size: int, survived: Survived) -> None:
    given_up = 0
    for name, warm in itertools.product(COMMANDS, (False, True)):

        async def again(server: Server, name: str = name) -> object:
            return await server.outcome(name, PATH), await server.content(PATH)

        with about(name):
            directory, attempt = tmp_path / f"{name}-{warm}", closed(name)
            given_up += scheduled(1, everywhere, directory, chunk_size, attempt, again, "wait", warm)
    survived("commands closed at each await", injected=given_up, operations=given_up)
