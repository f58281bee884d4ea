"""Announcing whole blobs, so that the kernel reads them by itself, and taking that back."""

import errno
import logging
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, nothing, until
from tests.support.served import FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of
from trimsfs.errors import FuseUnavailableError, StoreUnavailableError, TransientStoreError
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.handover.ledger import Ledger
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host import page_cache

CHUNKS = 5


@pytest.fixture
def contents(chunk_size: int) -> dict[str, bytes]:
    return {key: content_of(key, CHUNKS * chunk_size - 100) for key in ("dir/a", "b")}


@pytest.fixture
def store(contents: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({**contents, "empty": b""})


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server that passes opens through; always with the same cache."""
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing)


async def warm(server: Server, *paths: str) -> None:
    """Have files resident."""
    for path in paths:
        assert await server.outcome("warm-host", path) == ("done", None)


def backing_id(handle: int) -> int:
    return handle >> BACKING_SHIFT


async def resident(server: Server, path: str) -> bool:
    """Whether opens of a file are passed through."""
    return bool((await server.info(path))["passthrough"])


async def blob_of(server: Server, path: str) -> Blob:
    """A blob, in use until the test releases it."""
    return await server.disk.blobs.acquire(server.store.generation(path))


# Announcing


async def test_a_file_is_announced_once_all_of_it_is_here(
    server: Server, store: MemoryStore, backing: FakeBacking, contents: dict[str, bytes], chunk_size: int
) -> None:
    gate = store.block(offset=3 * chunk_size)
    before = await server.number("dir/a")
    handle = await server.open("dir/a")
    await server.read(handle, 0, chunk_size)
    await until(lambda: sum(store.fetched.values()) == len(contents["dir/a"]) - chunk_size)
    assert backing.opened == []
    assert not await server.passthrough.register(
        server.disk._state.blobs[store.generation("dir/a").token(store.identity)]
    )
    gate.set()
    await until(lambda: backing.opened == [1])
    # The handle from before reads on as it did, and others share the kernel's pages with it.
    assert await server.read(handle) == contents["dir/a"]
    shared = await server.open("dir/a")
    assert (backing_id(handle), backing_id(shared)) == (0, 0)
    server.release(handle)
    server.release(shared)
    assert backing_id(await server.open("dir/a")) == 1
    assert await server.number("dir/a") == before


async def test_a_file_is_recorded_and_in_memory_before_it_is_announced(
    server: Server, store: MemoryStore, backing: FakeBacking, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    gate = backing.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(warm, server, "b")
        await until(lambda: gate.statistics().tasks_waiting == 1)
        assert server.host.statistics().used_bytes == len(contents["b"])
        with closing(sqlite3.connect(tmp_path / "cache/index.sqlite")) as index:
            assert index.execute("SELECT sum(bytes) FROM chunks").fetchone() == (len(contents["b"]),)
        assert not server.passthrough.has(store.generation("b"))
        backing.gate.set()
    assert server.passthrough.has(store.generation("b"))


async def test_a_file_is_announced_once_however_many_ask_for_it(
    server: Server, store: MemoryStore, backing: FakeBacking
) -> None:
    backing.gate = trio.Event()
    blob = await blob_of(server, "b")
    await server.fetcher.fetch_all(blob)
    answers: list[bool] = []

    async def announce() -> None:
        answers.append(await server.passthrough.register(blob))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(announce)
        await wait_all_tasks_blocked()
        backing.gate.set()
    server.disk.blobs.release(blob)
    assert answers == [True] * 5
    assert backing.opened == [1]


async def test_an_announcement_outlives_who_asked_for_it(server: Server, backing: FakeBacking) -> None:
    """An id that the kernel has given out would be lost."""
    backing.gate = trio.Event()
    server.fetcher._batches._completed = nothing
    blob = await blob_of(server, "b")
    await server.fetcher.fetch_all(blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.passthrough.register, blob)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        backing.gate.set()
    await until(lambda: blob.backing_id == 1)
    server.disk.blobs.release(blob)
    assert await server.outcome("evict", "b") == ("done", None)
    assert backing.open_ids == set()


async def test_the_end_of_a_server_waits_for_no_comparison(
    serving: Serving, store: MemoryStore, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in ("SMALL", "TINY"):  # or the server computes it itself
        monkeypatch.setattr(f"trimsfs.integrity.digest_comparison.{most}", 1000)
    store.digests["b"] = digest_of(contents["b"], "sha256")
    compares = trio.Event()

    async def digest(*_: object) -> bytes:
        compares.set()
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async with serving(ledger=Ledger(), digests="wait") as server:
        monkeypatch.setattr(server.integrity.comparer._copier, "digest", digest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.outcome, "warm-host", "b")
            await compares.wait()
            nursery.cancel_scope.cancel()


# Where it cannot be


async def test_without_a_backing_opens_of_what_is_in_memory_do_no_work_twice(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(backing=None) as server:
        await warm(server, "b")

        async def load(_blob: Blob) -> None:
            raise AssertionError("it is in memory")

        monkeypatch.setattr(server.host, "load", load)
        await server.open("b")


async def test_a_refused_id_leaves_the_file_served_in_cached_mode_and_is_told_once(
    server: Server, backing: FakeBacking, contents: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    backing.error = FuseUnavailableError("no more ids")
    with caplog.at_level(logging.WARNING):
        await warm(server, "dir/a", "b", "b")
    assert caplog.text.count("served in cached mode: no more ids") == 1
    assert await server.content("b") == contents["b"]
    assert not await resident(server, "b")
    backing.error = None
    await warm(server, "b")
    assert await resident(server, "b")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        TransientStoreError("the process has ended"),
        StoreUnavailableError("a defect"),
    ],
)
async def test_a_file_that_cannot_be_brought_into_memory_is_served_in_cached_mode(
    server: Server, backing: FakeBacking, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """`WorkerPool.populate` raises errors of a store, too, and nobody waits for what `Fetcher.completed` does."""

    async def fail(_descriptor: int, _start: int, _stop: int) -> None:
        raise error

    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
    server.host._populate = fail
    assert await server.outcome("warm-disk", "b") == ("done", None)
    await until(lambda: server.users() == 0)
    assert backing.opened == []
    assert await server.content("b") == contents["b"]


# Withdrawing


async def test_making_room_closes_ids(serving: Serving, backing: FakeBacking, chunk_size: int) -> None:
    async with serving(cache_size=(CHUNKS + 1) * chunk_size) as server, server.without_syncs():
        for _ in range(3):
            await warm(server, "dir/a")
            await warm(server, "b")
            assert len(backing.open_ids) == 1
            assert await resident(server, "b")
            assert not await resident(server, "dir/a")
    assert len(backing.opened) == 6


async def test_a_file_that_left_memory_is_brought_back_by_its_next_open_with_the_same_id(
    serving: Serving, backing: FakeBacking, contents: dict[str, bytes], chunk_size: int
) -> None:
    async with serving(host_size=CHUNKS * chunk_size) as server:
        await warm(server, "dir/a")
        number = await server.number("dir/a")
        await warm(server, "b")
        assert server.host.statistics().evictions == 1
        assert await server.number("dir/a") == number
        handle = await server.open("dir/a")
        assert await server.read(handle) == contents["dir/a"]
        assert backing_id(handle) == 1
        assert server.host.statistics().evictions == 2
    assert backing.opened == [1, 2]


async def test_a_pinned_file_stays_in_memory_however_many_others_are_opened(
    serving: Serving, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (32, 32))
    for number in range(10):
        store.put(f"many/{number}", b"model %d" % number)
    async with serving() as server:
        assert await server.outcome("pin", "b") == ("done", None)
        locked = server.host.statistics().locked_bytes
        assert locked > 0
        for number in range(10):
            await warm(server, f"many/{number}")
            await server.disk.journal.flush()
            await server.disk.journal.sync()
        assert server.host.statistics().locked_bytes == locked
        assert await server.outcome("unpin", "b") == ("done", None)


# From one server, and one generation, to the next


async def test_a_file_that_is_evicted_while_another_announces_it_is_left_alone(
    server: Server, backing: FakeBacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Fetcher.completed` announces blobs that nobody may use any more by then."""
    server.fetcher._batches._completed = nothing
    commit_lock = server.disk.journal.recording

    async def write_index(free: trio.Event, task_status: trio.TaskStatus[None]) -> None:
        async with commit_lock:
            task_status.started()
            await free.wait()

    async def refuse(_descriptor: int) -> int:
        # The index is being written from here on: an eviction waits for that before it looks at the blob.
        await nursery.start(write_index, free)
        nursery.start_soon(server.disk.evictor.remove, blob.token, "b")
        nursery.start_soon(server.passthrough.register, blob)
        await wait_all_tasks_blocked(0.01)
        failing.undo()
        raise FuseUnavailableError("no more ids")

    for _ in range(10):  # trio chooses by chance which of the two goes on first
        assert await server.outcome("warm-disk", "b") == ("done", None)
        blob = await blob_of(server, "b")
        with monkeypatch.context() as failing:
            failing.setattr(backing, "open", refuse)
            free = trio.Event()
            async with trio.open_nursery() as nursery:
                assert not await server.passthrough.register(blob)
                server.disk.blobs.release(blob)
                free.set()
        assert await server.outcome("evict", "b") == ("done", None)
    assert backing.open_ids == set()
