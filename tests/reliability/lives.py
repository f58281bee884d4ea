"""Lives of a server that are cut short, one at every point: ``python -m tests.reliability.lives DIRECTORY ORDER``.

Each is a process forked from this one, in which a whole server, all but FUSE, works on a cache directory. It is killed
at a point, and another process looks at what it has left: every byte is right, all space is accounted for, pins are
there, and the cache goes on. The outcomes are written as JSON.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.reliability.points import How, Plan
from tests.support.images import Image
from tests.support.parts import blob_files, content_of
from tests.support.served import FakeBacking, Server, served
from tests.support.stores import MemoryStore
from trimsfs.tiers.disk import budget, crash_recovery, maintenance
from trimsfs.tiers.index import index

CHUNK = 64 << 10
BLOCK = 4096
CHUNKS = {"a": 3.5, "b": 2, "c": 4, "d": 0.3, "e": 2.5}
CONTENTS = {key: content_of(key, int(size * CHUNK)) for key, size in CHUNKS.items()}
BUDGET = 10 * CHUNK
LIMIT_S = 60.0
"""A life that takes longer hangs."""


@dataclass(slots=True, kw_only=True)
class Order:
    """What is to be done: a life that goes on to its end, and as many as ``count`` that end at points drawn by
    ``seed``, or at every point.

    The cache is on a file system of this ``kind``, if it needs one of its own. ``synced`` is the share of the way to
    the point at which all was brought to the disk. ``cut`` tells that power fails once a successor has had time to do
    what was left to do.
    """

    count: int | None
    seed: int = 1
    how: How = How.KILL
    kind: str | None = None
    synced: float | None = None
    cut: bool = False


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Where a life ended, if it did not go on to its end, how many calls it made, and what was wrong with what it
    left."""

    at: int
    died: bool
    calls: int
    problem: str | None = None


@dataclass(slots=True, kw_only=True)
class Outcomes:
    """Of all lives of an order; ``calls`` is how many a whole life makes, ``looked_s`` the longest look at what was
    left."""

    lives: list[Outcome] = field(default_factory=list)
    calls: int = 0
    looked_s: float = 0.0


@asynccontextmanager
async def server_on(cache: Path) -> AsyncIterator[Server]:
    async with (
        served(
            MemoryStore(dict(CONTENTS)), cache, chunk_size=CHUNK, cache_size=BUDGET, backing=FakeBacking()
        ) as server,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.disk.run)
        yield server
        await server.idle()
        nursery.cancel_scope.cancel()


async def right(server: Server, *keys: str) -> None:
    """Files are as they are in the store."""
    for key in keys:
        assert await server.content(f"/{key}") == CONTENTS[key], f"{key}: wrong bytes"


async def done(server: Server, command: str, key: str) -> None:
    """A command succeeds, as soon as the server itself does not use what has to make way for it."""
    outcome: tuple[str, str | None] = ("", None)
    for _ in range(50):
        outcome = await server.outcome(command, f"/{key}")
        if outcome == ("done", None):
            return
        await trio.sleep(0.02)
    raise AssertionError(f"{command} {key}: {outcome}")


async def life(cache: Path, said: Callable[[str], None]) -> None:
    """What a server does: fill, pin, evict, sync, and all again upon what it has left itself."""
    async with server_on(cache) as server:
        await right(server, "a", "b")
        await done(server, "pin", "b")
        said("pinned b")
        await right(server, "c", "d")
        await trio.sleep(2 * maintenance.SYNC_INTERVAL_S)
        await right(server, "e")
        await done(server, "evict", "c")
        await right(server, "a", "e")
        await trio.sleep(2 * maintenance.SYNC_INTERVAL_S)
    async with server_on(cache) as server:
        await right(server, "b", "a", "c")
        await done(server, "pin", "d")
        said("pinned d")
        said("unpinned b")
        await done(server, "unpin", "b")
        await right(server, "e", "b", "c")


async def inspect(cache: Path, said: list[str]) -> None:
    """What must hold of what was left, for a server that goes on with it."""
    async with server_on(cache) as server:
        pinned = {"b": "pinned b" in said and "unpinned b" not in said, "d": "pinned d" in said}
        residencies = {here.generation.key: here for here in await server.disk.residencies.all()}
        for key, wanted in pinned.items():
            here = residencies.get(key)
            assert not wanted or (here is not None and here.pinned), f"{key} is not pinned any more: {here}"
        await settled(server, cache)
        await right(server, *CONTENTS)
        await right(server, *reversed(CONTENTS))
        for key in CONTENTS:
            await done(server, "unpin", key)
            await done(server, "evict", key)
            await done(server, "warm-host", key)
            await right(server, key)
        await settled(server, cache)
    async with server_on(cache) as server:
        await settled(server, cache)
        await right(server, *CONTENTS)


async def take_up(cache: Path, kept: Path) -> None:
    """Go on with what was left until nothing is left to be done, and note what is here."""
    async with server_on(cache) as server:
        with trio.fail_after(5):
            while server.disk.index.unsynced():  # noqa: ASYNC110 - the server does not tell
                await trio.sleep(0.01)
        await server.disk.journal.sync()  # as it may be about to
        await trio.Path(kept).write_text(json.dumps(here(server)))
        os._exit(0)  # not brought to the disk by an orderly end


async def still_there(cache: Path, kept: Path) -> None:
    async with server_on(cache) as server:
        wanted, found = json.loads(await trio.Path(kept).read_text()), here(server)
        assert found == wanted, f"{wanted} were here, {found} are left"


def here(server: Server) -> dict[str, int]:
    """The bytes of each blob that are in the index."""
    records = server.disk.index.records(server.store.identity)
    return {record.generation.key: record.bytes for record in records if record.bytes}


async def settled(server: Server, cache: Path) -> None:
    """The index, the budget and the directory come to say the same."""
    problem: str | None = None
    with trio.move_on_after(2):
        while True:
            problem = await difference(server, cache)
            if problem is None:
                return
            await trio.sleep(0.01)
    raise AssertionError(problem)


async def difference(server: Server, cache: Path) -> str | None:
    """What index, budget and directory do not agree about."""
    recorded = {here.token: here for here in await server.disk.residencies.all()}
    total = sum(here.disk_bytes for here in recorded.values())
    used = server.disk.statistics().used_bytes
    if used != total:
        return f"the budget counts {used} bytes, the index has {total}"
    if used > BUDGET:
        return f"{used} bytes are more than {BUDGET}"
    files = {}
    for path in blob_files(cache):
        with contextlib.suppress(FileNotFoundError):  # it has been evicted since
            files[path.name] = path.stat()
    if files.keys() != recorded.keys():
        return f"files {sorted(files)}, rows {sorted(recorded)}"
    for token, status in files.items():
        here = recorded[token]
        if status.st_size != here.generation.size:
            return f"{here.generation.key} has a file of {status.st_size} bytes"
        allocated, wanted = status.st_blocks * 512, -(-here.disk_bytes // BLOCK) * BLOCK
        if not wanted <= allocated <= wanted + BLOCK:
            return f"{here.generation.key} takes {allocated} bytes on disk, {here.disk_bytes} are recorded"
    return None


# Processes


def hurry() -> None:
    """Little time between the steps of the disk tier, and no bytes to spare."""
    vars(budget)["HEADROOM_CHUNKS"] = 0
    vars(crash_recovery)["SLACK"] = BLOCK
    vars(maintenance)["FLUSH_INTERVAL_S"] = 0.002
    vars(maintenance)["SYNC_INTERVAL_S"] = 0.02


def forked(function: Callable[[], None]) -> int:
    """Run a function in a process of its own; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + LIMIT_S
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
            os.waitpid(pid, 0)
            return -signal.SIGABRT
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(ended[1])


class Explorer:
    """Has lives end at points, and looks at what they leave."""

    def __init__(self, directory: Path, order: Order, image: Image | None) -> None:
        self._directory = directory
        self._order = order
        self._image = image
        self._plan = Plan(Path(os.environ["CRASH_PLAN"]))
        self._said = directory / "said"
        self._boot = directory / "boot_id"
        vars(index)["BOOT_ID"] = self._boot

    def explore(self) -> Outcomes:
        outcomes = Outcomes()
        outcomes.lives.append(self._explore(outcomes, 0))
        points = list(range(1, outcomes.calls + 1))
        if self._order.count is not None:
            points = sorted(random.Random(self._order.seed).sample(points, min(self._order.count, len(points))))
        for at in points:
            outcome = self._explore(outcomes, at)
            if not outcome.died and outcome.problem is None:  # it took fewer calls than the first life
                outcome = self._explore(outcomes, outcome.calls)
            outcomes.lives.append(outcome)
        return outcomes

    def _explore(self, outcomes: Outcomes, at: int) -> Outcome:
        """A life that ends at a point, 0: that goes on to its end."""
        order = self._order
        self._said.write_text("")
        self._boot.write_text(f"boot {at}")
        with self._place(at) as place:
            synced_at = 0 if order.synced is None else max(1, int(at * order.synced))
            self._plan.set(at, order.how, synced_at=synced_at, directory=place)
            fate, report = self._forked(partial(trio.run, life, place / "cache", self._say))
            calls = self._plan.calls
            outcomes.calls = outcomes.calls or calls
            self._plan.set(0)
            # It may come to a mapped page of the file system that has stopped before it is killed.
            ends = {0, -signal.SIGKILL, -signal.SIGBUS} if order.how is How.POWER else {0, -signal.SIGKILL}
            if fate not in ends:
                return Outcome(at=at, died=False, calls=calls, problem=f"{fate}: {report}")
            problem = None
            if order.cut:
                problem = self._cut_short(place / "cache", at)
            elif order.how is How.POWER and fate != 0:
                self._restart(f"boot {at} again")
            began = time.monotonic()
            said = self._said.read_text().splitlines()
            problem = problem or self._look(partial(trio.run, inspect, place / "cache", said))
            outcomes.looked_s = max(outcomes.looked_s, time.monotonic() - began)
            return Outcome(at=at, died=fate != 0, calls=calls, problem=problem)

    def _cut_short(self, cache: Path, at: int) -> str | None:
        """Power fails once a successor has had time; another one finds what that had."""
        assert self._image is not None
        kept = self._directory / "kept"
        problem = self._look(partial(trio.run, take_up, cache, kept))
        if problem is None:
            self._image.power_off()
            self._restart(f"boot {at} again")
            problem = self._look(partial(trio.run, still_there, cache, kept))
        return problem

    def _look(self, function: Callable[[], None]) -> str | None:
        fate, report = self._forked(function)
        return None if fate == 0 else f"{fate}: {report}"

    def _forked(self, function: Callable[[], None]) -> tuple[int, str]:
        """How a function has ended in a process of its own, and what it has said."""
        report = self._directory / "report"

        def call() -> None:
            descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 2)
            function()

        return forked(call), report.read_text()

    def _say(self, what: str) -> None:
        with self._said.open("a") as file:
            file.write(f"{what}\n")

    @contextmanager
    def _place(self, at: int) -> Iterator[Path]:
        """A directory for a life, on the file system that it needs."""
        directory = (self._directory if self._image is None else self._image.mountpoint) / f"life-{at}"
        directory.mkdir()
        above = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(above)  # that it is there is not what is looked at
        os.close(above)
        yield directory
        try:
            shutil.rmtree(directory)
        except OSError:
            if self._image is None:
                raise
            self._restart("after a life that went on to its end without power")
            shutil.rmtree(directory)

    def _restart(self, boot_id: str) -> None:
        assert self._image is not None
        self._image.restart()
        self._boot.write_text(boot_id)


def main() -> None:
    directory, order = Path(sys.argv[1]), Order(**json.loads(sys.argv[2]))
    order.how = How(order.how)
    hurry()
    try:
        image = None if order.kind is None else Image(order.kind, directory)
        outcomes = explored(directory, order, image)
    except pytest.skip.Exception as error:
        sys.exit(f"skipped: {error}")
    with contextlib.closing(sys.stdout):
        json.dump(asdict(outcomes), sys.stdout)


def explored(directory: Path, order: Order, image: Image | None) -> Outcomes:
    """Do as told, and take the file system down whatever happens."""
    if image is None:
        return Explorer(directory, order, None).explore()
    image.mount()
    try:
        return Explorer(directory, order, image).explore()
    finally:
        image.remove()


if __name__ == "__main__":
    main()
