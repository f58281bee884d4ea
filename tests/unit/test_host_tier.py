"""Blobs in memory: real files on a disk, whose pages the kernel tells of."""

import errno
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of, copier, generation_of, until, written
from tests.support.stores import MemoryStore
from trimsfs.errors import CacheFullError
from trimsfs.eviction_policies import POLICIES
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.host.memory_tier import HostTier

SIZE = 16 * mmap.PAGESIZE


class Shelf:
    """A host tier, and whole blobs to bring into it; it counts what it populates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs: dict[str, Blob] = {}
        self.populated: list[int] = []
        self.error: OSError | None = None
        self._copier = copier(MemoryStore())

    def tier(self, budget: float | None = None, policy: str = "lru") -> HostTier:
        """A tier with room for so many blobs of SIZE bytes."""
        size = None if budget is None else int(budget * SIZE)
        return HostTier(self.populate, budget=size, policy=POLICIES[policy])

    async def populate(self, descriptor: int, start: int, stop: int) -> None:
        self.populated.append(descriptor)
        if self.error is not None:
            raise self.error
        await self._copier.populate(descriptor, start, stop)

    def blob(self, name: str, size: int = SIZE) -> Blob:
        """A complete blob, in memory as all that has just been written."""
        if name not in self.blobs:
            content = content_of(name, size)
            blob = self.blobs[name] = Blob(name, generation_of(name, content))
            blob.attach(self.directory / name)
            for start in range(0, size, 8 << 20):
                blob.commit(written(blob, start // (8 << 20), content[start : start + (8 << 20)]))
        return self.blobs[name]

    def resident(self, name: str) -> int:
        """Bytes of a blob in the page cache, as the kernel has it."""
        resident = page_cache.resident_bytes(self.blobs[name].fileno())
        assert resident is not None
        return resident


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Path]:
    """A directory on a disk whose pages can be dropped."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    with (directory / "file").open("w+b") as file:
        file.write(bytes(SIZE))
        file.flush()
        page_cache.drop(file.fileno())
        if page_cache.resident_bytes(file.fileno()) != 0:
            pytest.skip("this kernel does not tell what is in its page cache, or /var/tmp is in memory")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def shelf(ordinary: Path) -> Iterator[Shelf]:
    shelf = Shelf(Path(tempfile.mkdtemp(dir=ordinary)))
    yield shelf
    for blob in shelf.blobs.values():
        blob.detach()


@asynccontextmanager
async def using(blob: Blob) -> AsyncIterator[Blob]:
    blob.users += 1
    try:
        yield blob
    finally:
        blob.users -= 1


async def bring(tier: HostTier, *blobs: Blob) -> None:
    """Open and close blobs, one after the other."""
    for blob in blobs:
        async with using(blob):
            await tier.load(blob)


def held(tier: HostTier, shelf: Shelf) -> str:
    return "".join(name for name, blob in sorted(shelf.blobs.items()) if tier.holds(blob))


def locked_bytes() -> int:
    """Bytes of this process that are locked in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck"))
    return int(line.split()[1]) * 1024


# Coming in


async def test_what_is_not_in_memory_is_brought_in_once_however_many_want_it(shelf: Shelf) -> None:
    tier, blob = shelf.tier(), shelf.blob("a")
    page_cache.drop(blob.fileno())
    assert shelf.resident("a") == 0
    assert not tier.holds(blob)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(bring, tier, blob)
    assert shelf.resident("a") == SIZE
    assert tier.holds(blob)
    assert tier.statistics().used_bytes == SIZE
    await bring(tier, blob, shelf.blob("b"))  # which is in memory, as it has just been written
    assert len(shelf.populated) == 1


async def test_a_blob_that_cannot_be_read_does_not_come_in(shelf: Shelf) -> None:
    tier, blob = shelf.tier(), shelf.blob("a")
    page_cache.drop(blob.fileno())
    shelf.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error"):
        await bring(tier, blob)
    assert not tier.holds(blob)
    shelf.error = None
    await bring(tier, blob)
    assert tier.holds(blob)


async def test_a_kernel_that_does_not_tell_is_made_to_read(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: None)
    await bring(shelf.tier(), shelf.blob("a"))
    assert len(shelf.populated) == 1


# Leaving


async def test_without_a_budget_nothing_leaves(shelf: Shelf) -> None:
    tier = shelf.tier()
    await bring(tier, *(shelf.blob(name) for name in "abcdefgh"))
    assert held(tier, shelf) == "abcdefgh"
    statistics = tier.statistics()
    assert (statistics.used_bytes, statistics.budget_bytes, statistics.evictions) == (8 * SIZE, None, 0)


async def test_what_leaves_really_leaves_memory_and_stays_on_disk(shelf: Shelf) -> None:
    tier = shelf.tier(2)
    await bring(tier, *(shelf.blob(name) for name in "abc"))
    assert held(tier, shelf) == "bc"
    assert [shelf.resident(name) for name in "abc"] == [0, SIZE, SIZE]
    statistics = tier.statistics()
    assert (statistics.used_bytes, statistics.evictions, statistics.evicted_bytes) == (2 * SIZE, 1, SIZE)
    assert bytes(shelf.blob("a").view(0, SIZE)) == content_of("a", SIZE)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("lru", "bcn"),
        ("fifo", "acn"),  # b came before a
        ("lcu", "abn"),
        ("cost", "acn"),  # b is the largest: a byte of it costs the least
        ("flush", "n"),
        ("never", "abcn"),  # it does not leave it to others to make room, but what is opened comes in
        ("eager", "n"),
    ],
)
async def test_each_policy_chooses_for_itself(shelf: Shelf, policy: str, kept: str) -> None:
    tier = shelf.tier(4, policy)
    a, b, c = shelf.blob("a"), shelf.blob("b", 2 * SIZE), shelf.blob("c")
    await bring(tier, b, a, c)
    for blob in (a, a, b, b, c):
        tier.used(blob)
    await bring(tier, shelf.blob("n"))
    assert held(tier, shelf) == kept


async def test_what_is_in_use_stays_and_what_is_opened_comes_in_even_so(shelf: Shelf) -> None:
    tier = shelf.tier(2)
    async with using(shelf.blob("a")) as a, using(shelf.blob("b")) as b:
        await tier.load(a)
        await tier.load(b)
        await bring(tier, shelf.blob("c"))
        assert held(tier, shelf) == "abc"
        assert [shelf.resident(name) for name in "abc"] == [SIZE] * 3
        # Too many by one; the one that may go, goes.
        await bring(tier, shelf.blob("d"))
        assert held(tier, shelf) == "abd"
    await bring(tier, shelf.blob("e"))
    assert tier.statistics().used_bytes == 2 * SIZE


async def test_the_budget_is_kept_to_again_once_files_are_closed(shelf: Shelf) -> None:
    tier = shelf.tier(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        async with using(shelf.blob("a")) as a, using(shelf.blob("b")) as b:
            await tier.load(a)
            await tier.load(b)
            assert tier.statistics().used_bytes == 2 * SIZE
        await bring(tier, a)
        await until(lambda: tier.statistics().used_bytes == SIZE)
        nursery.cancel_scope.cancel()
    assert tier.statistics().used_bytes == SIZE


async def test_what_is_opened_while_room_is_made_stays(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy chooses all victims at once, and dropping each takes its time."""
    tier = shelf.tier(2, "flush")
    a, b = shelf.blob("a"), shelf.blob("b")
    await bring(tier, a, b)
    drop = page_cache.drop

    def open_the_other(descriptor: int) -> None:
        other = b if descriptor == a.fileno() else a
        other.users += 1
        drop(descriptor)

    monkeypatch.setattr(page_cache, "drop", open_the_other)
    await bring(tier, shelf.blob("c"))
    assert held(tier, shelf) in {"ac", "bc"}
    assert tier.statistics().evictions == 1
    assert a.users + b.users == 1


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "Input/output error")])
async def test_a_blob_is_in_use_while_it_is_dropped_and_no_longer_counts(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """Nobody may close its file meanwhile."""
    tier, a = shelf.tier(1), shelf.blob("a")
    users: list[int] = []

    def drop(_descriptor: int) -> None:
        users.append(a.users)
        if error is not None:
            raise error

    await bring(tier, a)
    monkeypatch.setattr(page_cache, "drop", drop)
    await bring(tier, shelf.blob("b"))
    assert (users, a.users) == ([1], 0)
    assert (held(tier, shelf), tier.statistics().used_bytes) == ("b", SIZE)


async def test_eager_drops_what_nobody_uses_any_more(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.host.memory_tier.CHECK_INTERVAL_S", 0.005)
    tier = shelf.tier(policy="eager")
    pinned = shelf.blob("p")
    pinned.pinned = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        await bring(tier, pinned)
        async with using(shelf.blob("a")) as a:
            await tier.load(a)
            await trio.sleep(0.05)
            assert held(tier, shelf) == "ap"
        await until(lambda: held(tier, shelf) == "p")
        nursery.cancel_scope.cancel()
    await until(lambda: shelf.resident("a") == 0)
    assert shelf.resident("p") == SIZE


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"eager"}))
async def test_other_policies_wait_until_room_is_needed(
    shelf: Shelf, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.host.memory_tier.CHECK_INTERVAL_S", 0.005)
    tier = shelf.tier(1, policy)
    await bring(tier, shelf.blob("a"))
    with trio.move_on_after(0.1):
        await tier.run()
    assert held(tier, shelf) == "a"


# Pins


async def test_a_pin_locks_memory_and_unpinning_unlocks_it(shelf: Shelf) -> None:
    tier, before = shelf.tier(4), locked_bytes()
    async with using(shelf.blob("a")) as a, using(shelf.blob("b", 2 * SIZE)) as b:
        page_cache.drop(a.fileno())
        for blob in (a, b, a):
            await tier.pin(blob)
        assert locked_bytes() - before == 3 * SIZE == tier.statistics().locked_bytes
        page_cache.drop(a.fileno())
        assert shelf.resident("a") == SIZE
        await tier.unpin(a)
        assert locked_bytes() - before == 2 * SIZE == tier.statistics().locked_bytes
        assert held(tier, shelf) == "ab"
        await tier.unpin(a)
        await tier.unpin(b)
        assert locked_bytes() == before
        page_cache.drop(a.fileno())
        assert shelf.resident("a") == 0


async def test_a_pinned_blob_does_not_leave(shelf: Shelf) -> None:
    tier, before = shelf.tier(2, "flush"), locked_bytes()
    async with using(shelf.blob("p")) as pinned:
        pinned.pinned = True
        await tier.pin(pinned)
    await bring(tier, *(shelf.blob(name) for name in "abc"))
    assert held(tier, shelf) == "cp"
    assert shelf.resident("p") == SIZE
    pinned.pinned = False
    await tier.unpin(pinned)
    await bring(tier, shelf.blob("d"))
    assert held(tier, shelf) == "d"
    assert locked_bytes() == before


async def test_a_blob_that_leaves_the_disk_is_unlocked_and_no_longer_counted(shelf: Shelf) -> None:
    tier, before = shelf.tier(), locked_bytes()
    async with using(shelf.blob("a")) as blob:
        await tier.pin(blob)
    for _ in range(2):
        tier.removed(blob)
        assert locked_bytes() == before
        assert not tier.holds(blob)
        statistics = tier.statistics()
        assert (statistics.used_bytes, statistics.locked_bytes, statistics.evictions) == (0, 0, 0)


async def test_no_more_is_locked_than_the_budget(shelf: Shelf) -> None:
    tier, before = shelf.tier(2), locked_bytes()
    for name in "ab":
        async with using(shelf.blob(name)) as blob:
            blob.pinned = True
            await tier.pin(blob)
    async with using(shelf.blob("c")) as blob:
        with pytest.raises(CacheFullError, match="c: no room in memory: unpin models or raise --host-size"):
            await tier.pin(blob)
        assert locked_bytes() - before == 2 * SIZE == tier.statistics().locked_bytes
        await tier.unpin(shelf.blob("a"))
        await tier.pin(blob)
    assert tier.statistics().locked_bytes == 2 * SIZE
    for name in "bc":
        await tier.unpin(shelf.blob(name))
    assert locked_bytes() == before


async def test_no_more_is_locked_than_the_budget_by_pins_at_once(shelf: Shelf) -> None:
    """As when a directory is pinned."""
    tier, before = shelf.tier(2), locked_bytes()
    refused: list[str] = []

    async def pin(name: str) -> None:
        async with using(shelf.blob(name)) as blob:
            try:
                await tier.pin(blob)
            except CacheFullError:
                refused.append(name)

    for name in "abcdef":
        shelf.blob(name).pinned = True
        await bring(tier, shelf.blob(name))
    async with trio.open_nursery() as nursery:
        for name in "abcdef":
            nursery.start_soon(pin, name)
    locked = locked_bytes() - before
    for name in "abcdef":
        await tier.unpin(shelf.blob(name))
    assert locked == 2 * SIZE
    assert len(refused) == 4
    assert locked_bytes() == before


async def test_a_blob_that_is_pinned_twice_at_once_is_locked_once(shelf: Shelf) -> None:
    """As when a file and its directory are pinned: one unpin must undo it."""
    tier, before = shelf.tier(), locked_bytes()
    async with using(shelf.blob("a")) as blob:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.pin, blob)
            nursery.start_soon(tier.pin, blob)
        assert locked_bytes() - before == SIZE
        await tier.unpin(blob)
    assert locked_bytes() == before


async def test_a_limit_of_locked_memory_does_not_keep_a_blob_from_being_pinned(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_descriptor: int, _size: int) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(page_cache, "lock", refuse)
    tier = shelf.tier(1, "flush")
    async with using(shelf.blob("p")) as pinned:
        pinned.pinned = True
        await tier.pin(pinned)
    assert "p: not locked in memory: Cannot allocate memory: raise the server's limit" in caplog.text
    await bring(tier, shelf.blob("a"))
    assert held(tier, shelf) == "ap"
    assert tier.statistics().locked_bytes == 0


# Whatever happens


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"never"}))
async def test_beyond_the_budget_is_only_what_may_not_leave(shelf: Shelf, policy: str) -> None:
    draw, before = random.Random(1), locked_bytes()
    tier = shelf.tier(5, policy)
    blobs = [shelf.blob(name, draw.choice([1, 2, 3]) * SIZE) for name in "abcdefgh"]
    opened: list[Blob] = []
    for _ in range(150):
        step = draw.choice(["open", "open", "close", "pin", "unpin", "remove"])
        blob = draw.choice(blobs)
        if step == "open" and len(opened) < 3:
            blob.users += 1
            opened.append(blob)
            there = tier.holds(blob)
            await tier.load(blob)
            tier.used(blob)
            within = tier.statistics().used_bytes <= 5 * SIZE
            assert there or within or all(other.users or other.pinned for other in blobs if tier.holds(other))
        elif step == "close" and opened:
            opened.pop(draw.randrange(len(opened))).users -= 1
        elif step == "pin":
            async with using(blob):
                try:
                    await tier.pin(blob)
                except CacheFullError:
                    assert tier.statistics().locked_bytes + blob.generation.size > 5 * SIZE
                else:
                    blob.pinned = True
        elif step == "unpin":
            blob.pinned = False
            await tier.unpin(blob)
        elif step == "remove" and not blob.users and not blob.pinned:
            tier.removed(blob)
        statistics = tier.statistics()
        assert statistics.used_bytes == sum(other.generation.size for other in blobs if tier.holds(other))
        assert statistics.locked_bytes == locked_bytes() - before
        assert statistics.locked_bytes <= 5 * SIZE
        assert all(tier.holds(other) for other in opened)
    for blob in blobs:
        tier.removed(blob)
    assert tier.statistics().evictions > 0
    assert locked_bytes() == before
