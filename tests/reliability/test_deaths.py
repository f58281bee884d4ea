"""A server is killed after each of its steps while something is asked of it: the next one answers, and all is right."""

import errno
import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.reliability.audit import check, check_at_rest
from tests.reliability.kernel import Kernel
from tests.reliability.scheduling import about, at, scheduled
from tests.reliability.succession import Succession
from tests.support.parts import content_of
from tests.support.stores import MemoryStore
from tests.support.survival import Survived
from trimsfs.opening.cold_open import ColdOpen

PATH = "d/model"
OTHER = "other"
MOST_STEPS = 5000

Operation = Callable[[Kernel], Awaitable[object]]


async def stat(kernel: Kernel) -> object:
    return (await kernel.walk(PATH)).size


async def open_and_close(kernel: Kernel) -> object:
    kernel.close(await kernel.open(PATH))
    return None


OPERATIONS: dict[str, Operation] = {
    "stat": stat,
    "listing": lambda kernel: kernel.listing("d"),
    "open and close": open_and_close,
    "read": lambda kernel: kernel.content(PATH),
    "read another": lambda kernel: kernel.content(OTHER),  # for which what is here has to go
    "attribute": lambda kernel: kernel.attribute(PATH, "etag"),
}
COMMANDS = ["warm-disk", "warm-host", "pin", "unpin", "evict"]
WAYS: list[tuple[ColdOpen, bool]] = [("stream", False), ("wait", False), ("wait", True)]


async def command(kernel: Kernel, name: str, path: str = PATH) -> object:
    """Give a command; one that has died with its server is given again."""
    directory, _, subject = path.rpartition("/")
    text = b""
    while not text:
        try:
            text = await kernel.content(f"{directory}/.trims/{subject}/{name}")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return b'"state": "done"' in text.splitlines()[-1]


async def prepare(kernel: Kernel, *, warm: bool) -> None:
    """Make a file cold, or whole, whatever has been done to it."""
    assert await command(kernel, "unpin")
    assert await command(kernel, "evict", OTHER)
    assert await command(kernel, "warm-host" if warm else "evict")
    kernel.forget()


async def killed_everywhere(
    directory: Path, chunk_size: int, operation: Operation, cold_open: ColdOpen, warm: bool, stride: int
) -> int:
    """Kill the server after its first step, then after a later one, and so on until all is done before; how often."""
    contents = {
        PATH: content_of("model", 3 * chunk_size - 100),
        OTHER: content_of("other", 3 * chunk_size - 200),
        "d/small": b"small",
    }
    async with trio.open_nursery() as nursery:
        lives = Succession(
            nursery,
            MemoryStore(contents, streaming=True),
            directory,
            chunk_size=chunk_size,
            cold_open=cold_open,
            cache_size=4 * chunk_size,
            host_size=4 * chunk_size,
        )
        await lives.mount()
        await prepare(lives.kernel, warm=warm)
        wanted = await operation(lives.kernel)
        killed = 0
        for step in itertools.count(1, stride):
            assert step < MOST_STEPS
            await prepare(lives.kernel, warm=warm)
            done = trio.CancelScope()
            with at(step, lambda _: True, lives.die) as instrument:
                async with trio.open_nursery() as meanwhile:
                    meanwhile.start_soon(follow, lives, done)
                    assert await operation(lives.kernel) == wanted
                    done.cancel()
            if not lives.kernel.served:  # it has died when all was done
                await lives.follow()
            check(lives.server)
            if not instrument.came:
                break
            killed += 1
            assert await operation(lives.kernel) == wanted
            lives.server.filesystem.handles.all_resent()
            lives.kernel.forget()
            await check_at_rest(lives.server)
        await lives.unmount()
        nursery.cancel_scope.cancel()
    return killed


async def follow(lives: Succession, done: trio.CancelScope) -> None:
    with done:
        await lives.died.wait()
        with trio.CancelScope(shield=True):
            await lives.follow()


STRIDES = [
    pytest.param(7, 1, id="some"),
    pytest.param(1, 8, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]


@pytest.mark.parametrize(("stride", "seeds"), STRIDES)
def test_a_server_can_die_after_any_step(
    tmp_path: Path, chunk_size: int, stride: int, seeds: int, survived: Survived
) -> None:
    killed = 0
    for seed, (name, operation), (cold_open, warm) in itertools.product(range(seeds), OPERATIONS.items(), WAYS):
        with about(name):
            directory = tmp_path / f"{seed}-{name}-{cold_open}-{warm}"
            killed += scheduled(seed, killed_everywhere, directory, chunk_size, operation, cold_open, warm, stride)
    survived("server killed at any step while asked", injected=killed, operations=2 * killed)


@pytest.mark.parametrize(("stride", "seeds"), STRIDES)
def test_a_server_can_die_after_any_step_of_a_command(
    tmp_path: Path, chunk_size: int, stride: int, seeds: int, survived: Survived
) -> None:
    killed = 0
    for seed, name, warm in itertools.product(range(seeds), COMMANDS, (False, True)):
        with about(name):
            directory = tmp_path / f"{seed}-{name}-{warm}"
            operation = partial(command, name=name)
            killed += scheduled(seed, killed_everywhere, directory, chunk_size, operation, "wait", warm, stride)
    survived("server killed at any step of a command", injected=killed, operations=2 * killed)
