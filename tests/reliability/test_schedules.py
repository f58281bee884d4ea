"""Random schedules of what programs and the kernel do at once: fetches, evictions, flips, closes, cancellations.

Each seed is one order of all steps, and can be tried again alone.
"""

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.reliability.audit import check, check_at_rest
from tests.reliability.scheduling import scheduled
from tests.support.parts import content_of
from tests.support.served import FakeBacking, Server, Signal, served
from tests.support.stores import MemoryStore
from tests.support.survival import Survived
from trimsfs.errors import (
    CacheFullError,
    FuseUnavailableError,
    NoSuchEntryError,
    ObjectChangedError,
    StoreStalledError,
)
from trimsfs.eviction_policies import POLICIES
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.opening.cold_open import ColdOpen
from trimsfs.options import Eviction

KEYS = ("a", "b", "d/c", "d/e")
COMMANDS = ("warm-disk", "warm-host", "pin", "unpin", "evict")
TASKS = 4
STEPS = 12


@dataclass(slots=True)
class Open:
    """An open file of a program, and what it was when it was opened."""

    path: str
    handle: int
    content: bytes
    reading: int = 0


@dataclass(slots=True, kw_only=True)
class Play:
    """One server, and programs that open, read, close, command and look up at once, and are interrupted.

    ``known`` are the inode numbers that the kernel has been told. Undisturbed, no object is replaced and the kernel
    takes every backing file: then a program meets no error at all but of its own making.
    """

    server: Server
    nursery: trio.Nursery
    draw: random.Random
    chunk_size: int
    disturbed: bool
    known: dict[int, str] = field(default_factory=dict)
    open: list[Open] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    async def program(self, thread: int) -> None:
        steps: list[Callable[[], Awaitable[None]]] = [partial(self.open_path, thread)] * 6
        steps += [partial(self.open_number, thread)] * 2 + [self.close] * 6 + [self.read] * 6 + [self.command] * 4
        steps += [partial(self.look_up, thread), self.listing, self.forget, self.xattr, self.hinder]
        steps += [self.replace, self.refuse] if self.disturbed else []
        for _ in range(STEPS):
            step = self.draw.choice(steps)
            if self.draw.random() < 0.2:
                await self.cancelled(step)
            else:
                await step()
            check(self.server)
            for _ in range(self.draw.randrange(4)):
                await trio.lowlevel.checkpoint()

    async def cancelled(self, step: Callable[[], Awaitable[None]]) -> None:
        """Begin a step, and give it up after a while."""
        with trio.CancelScope() as scope:
            self.nursery.start_soon(self.later, self.draw.randrange(40), scope.cancel)
            await step()
        self.totals["cancelled"] += scope.cancelled_caught

    async def later(self, turns: int, function: Callable[[], None]) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        function()

    # What programs do

    async def look_up(self, thread: int) -> None:
        await self.number(self.draw.choice(KEYS), thread)

    async def number(self, path: str, thread: int) -> int:
        attributes = await self.server.find(path, thread=thread)
        self.known[attributes.inode.number] = path
        return attributes.inode.number

    async def open_path(self, thread: int) -> None:
        """As the kernel does: by the name, and once more when the name leads elsewhere by then."""
        path = self.draw.choice(KEYS)
        try:
            await self.open_inode(await self.number(path, thread), path, thread)
        except ObjectChangedError:
            self.totals["looked up again"] += 1
            try:
                await self.open_inode(await self.number(path, thread), path, thread)
            except ObjectChangedError:
                self.totals["ESTALE"] += 1

    async def open_number(self, thread: int) -> None:
        """By a number from before, which the kernel may keep for as long as it likes, as of a bind mount."""
        if not self.known:
            return
        number = self.draw.choice(list(self.known))
        try:
            await self.open_inode(number, self.known[number], thread)
        except (ObjectChangedError, NoSuchEntryError):
            self.totals["looked up again"] += 1

    async def open_inode(self, number: int, path: str, thread: int) -> None:
        """Open an inode, and sometimes send the thread a signal meanwhile."""
        inode = self.server.namespace.inodes[number]
        assert inode.generation is not None
        content = self.server.store.contents[path, inode.generation.etag]
        signal = Signal()
        if self.draw.random() < 0.2:
            self.nursery.start_soon(self.later, self.draw.randrange(40), signal.send)
        try:
            handle = await self.server.open_inode(number, interruptible=signal.interruptible, thread=thread)
        except InterruptedError:
            self.totals["EINTR"] += 1
            return
        except CacheFullError:
            self.totals["ENOSPC"] += 1
            return
        self.open.append(Open(path, handle, content))
        self.totals["passed through" if handle >> BACKING_SHIFT else "cached"] += 1

    async def close(self) -> None:
        """Close a file, which the kernel does once its reads have ended."""
        idle = [file for file in self.open if not file.reading]
        if idle:
            file = self.draw.choice(idle)
            self.open.remove(file)
            self.server.release(file.handle)

    async def read(self) -> None:
        """One of the files that are open shows the content that it was opened with, or that it has been replaced."""
        if not self.open:
            return
        file = self.draw.choice(self.open)
        start, size = self.draw.randrange(len(file.content)), self.draw.choice((1, 1000, 2 * self.chunk_size))
        file.reading += 1
        try:
            piece = await self.server.read(file.handle, start, size)
        except ObjectChangedError:
            assert self.disturbed
            self.totals["ESTALE"] += 1
            return
        finally:
            file.reading -= 1
        assert piece == file.content[start : start + size], f"{file.path} at {start}"
        self.totals["read"] += 1

    async def listing(self) -> None:
        assert set(await self.server.listing(self.draw.choice(("", "d")))) in ({"a", "b", "d"}, {"c", "e"})

    async def xattr(self) -> None:
        etag = await self.server.attribute(self.draw.choice(KEYS), self.draw.choice(("etag", "residency", "pinned")))
        assert etag is not None

    async def forget(self) -> None:
        """Memory is short: the kernel gives up what no program uses."""
        self.server.forget()
        self.known.clear()

    async def command(self) -> None:
        outcome, kind = await self.server.outcome(self.draw.choice(COMMANDS), self.draw.choice(KEYS))
        assert outcome == "done" or kind in {"InUseError", "CacheFullError", "ObjectChangedError"}, kind
        self.totals[outcome] += 1

    # What happens to the server

    async def hinder(self) -> None:
        """Let the store fail in a way that another attempt cures, or take its time."""
        if self.draw.random() < 0.5:
            after = self.draw.choice((0, 100, self.chunk_size))
            self.server.store.fail(StoreStalledError("no bytes"), times=self.draw.randrange(1, 3), after=after)
        else:
            self.server.store.delay(self.draw.uniform(0, 0.3), key=self.draw.choice(KEYS))

    async def replace(self) -> None:
        key = self.draw.choice(KEYS)
        self.server.store.put(key, content_of(f"{key}{self.draw.random()}", self.draw.randint(1, 4 * self.chunk_size)))

    async def refuse(self) -> None:
        """Let the kernel refuse ids for a while."""
        assert self.server.backing is not None
        self.server.backing.error = FuseUnavailableError("no") if self.draw.random() < 0.3 else None


async def play(directory: Path, chunk_size: int, seed: int, cold_open: ColdOpen, disturbed: bool) -> Counter[str]:
    draw = random.Random(seed)
    contents = {key: content_of(key, draw.randint(1, 4 * chunk_size)) for key in KEYS}
    async with served(
        MemoryStore(contents, streaming=seed % 2 == 0),
        directory,
        chunk_size=chunk_size,
        backing=FakeBacking(),
        cold_open=cold_open,
        metadata_ttl=draw.choice((0, 0.1, 60)),
        cache_size=draw.choice((None, 3 * chunk_size, 6 * chunk_size, 12 * chunk_size)),
        host_size=draw.choice((None, 3 * chunk_size)),
        eviction=Eviction(disk=draw.choice(sorted(POLICIES)), host=draw.choice(sorted(POLICIES))),
    ) as server:
        async with trio.open_nursery() as nursery:
            plays = Play(
                server=server, nursery=nursery, draw=random.Random(seed), chunk_size=chunk_size, disturbed=disturbed
            )
            for thread in range(1, TASKS + 1):
                nursery.start_soon(plays.program, thread)
        plays.totals["evictions"] += server.disk.statistics().evictions
        await check_at_rest(server)
    return plays.totals


@pytest.mark.parametrize(
    "cold_open", ["auto", *(pytest.param(how, marks=pytest.mark.slow) for how in ("wait", "stream"))]
)
@pytest.mark.parametrize("disturbed", [False, True], ids=["", "replaced and refused"])
@pytest.mark.parametrize("seeds", [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_whatever_the_schedule_reads_are_right_and_nothing_is_left_in_use(
    tmp_path: Path, chunk_size: int, cold_open: ColdOpen, disturbed: bool, seeds: int, survived: Survived
) -> None:
    totals: Counter[str] = Counter()
    for seed in range(seeds):
        totals += scheduled(seed, play, tmp_path / str(seed), chunk_size, seed, cold_open, disturbed)
    # The schedules came to where it matters.
    expected = ["passed through", "cached", "read", "done", "failed", "cancelled", "evictions"]
    if cold_open != "stream":
        expected.append("EINTR")
    assert [name for name in expected if totals[name] < 5] == []
    # The kernel looks a name up again once an open; a program would meet what fails then.
    assert disturbed or totals["ESTALE"] == 0
    errors = Counter({name: totals[name] for name in ("EINTR", "ESTALE", "ENOSPC") if totals[name]})
    survived(
        f"{seeds} schedules, cold opens {cold_open}" + (", objects replaced" if disturbed else ""),
        injected=totals["cancelled"] + totals["evictions"] + totals["EINTR"],
        operations=totals["read"] + totals["passed through"] + totals["cached"] + totals["done"],
        errors=errors,
        allowed=["EINTR", "ESTALE", "ENOSPC"],
    )
