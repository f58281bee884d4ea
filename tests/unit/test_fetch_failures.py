"""What the fetcher makes of a full disk, a failing store and readers that go away; and fetching all of an object."""

import errno
import gc
import os
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.parts import blob_files, content_of, fetcher_of, fetching, fill, opened, until
from tests.support.stores import MemoryStore
from tests.unit.workshop import DEADLINE_S, Bench, Workshop, break_writes, failure, fill_from
from trimsfs.errors import (
    CacheFullError,
    ObjectChangedError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.stores.retrying import LONGEST_WAIT_S
from trimsfs.tiers.blob import Blob


def opened_files() -> set[str]:
    """What this process has open."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
    return found


async def test_a_read_that_fails_half_way_keeps_no_file_that_is_evicted(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(4)
    await bench.read(blob, 0, chunk_size)
    workshop.store.fail(StoreAccessError("no"), times=float("inf"))
    gc.disable()  # else what is kept may be let go just in time
    try:
        with suppress(StoreAccessError):
            await bench.read(blob, 0, 2 * chunk_size)
        await until(bench.idle)
        (path,) = blob_files(workshop.directory)
        bench.tier.blobs.release(blob)
        await bench.tier.residencies.evict(blob.generation)
        assert f"{path} (deleted)" not in opened_files()
    finally:
        gc.enable()


# No room on disk


async def test_chunks_that_did_not_come_in_the_end_take_no_room(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.crash_recovery.SLACK", 0)
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", 8192)
    chunk_size = workshop.chunk_size = 64 << 10
    content = content_of("a", 8 * chunk_size)
    workshop.store.put("a", content)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    assert await bench.read(blob, 0, chunk_size) == content[:chunk_size]
    workshop.store.fail(StoreAccessError("no"), after=chunk_size // 2, times=float("inf"))
    for start in range(chunk_size, len(content), chunk_size):
        with pytest.raises(StoreAccessError):
            await bench.read(blob, start, start + chunk_size)
    (file,) = blob_files(workshop.directory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.tier.run)
        await trio.sleep(0.2)
        assert file.stat().st_blocks * 512 > 4 * chunk_size  # somebody may be reading what came first
        bench.tier.blobs.release(blob)
        await until(lambda: file.stat().st_blocks * 512 == chunk_size)
        nursery.cancel_scope.cancel()
    workshop.store.heal()
    again = await bench.acquire("a")
    assert again is blob
    assert await bench.read(blob, 0, len(content)) == content


async def test_without_room_bytes_are_served_from_memory(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(12.5, budget=0)
    bench.fetcher.hold(blob)
    step = chunk_size // 4
    for start in range(0, len(content), step):
        assert await bench.read(blob, start, min(start + step, len(content))) == content[start : start + step]
    assert bench.tier.statistics().used_bytes == 0
    assert blob_files(workshop.directory)[0].stat().st_blocks == 0
    # Once each, and perhaps a few for a prefetch before it was known that there is no room.
    assert bench.store.count("read") <= 13 + 4
    assert bench.fetcher.statistics().uncached_chunks == bench.store.count("read")


async def test_what_fits_is_kept_and_the_rest_served_from_memory(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(10, budget=4)
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.tier.statistics().used_bytes == 4 * chunk_size
    assert await bench.read(blob, 0, len(content)) == content


async def test_a_blob_without_a_file_is_served_from_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Blob, "attach", fail)
    bench, blob, content = await workshop.opened(3.5, requests=16)
    bench.fetcher.hold(blob)
    assert await bench.read(blob, 0, len(content)) == content
    assert await bench.read(blob, 10, 20) == content[10:20]
    await until(bench.idle)
    assert bench.store.count("read") == 4


async def test_views_of_uncached_chunks_stay_right(workshop: Workshop, chunk_size: int) -> None:
    """Nothing is written into a buffer that a reader may still be sending."""
    bench, blob, content = await workshop.opened(12, requests=4, budget=0)
    views = [await bench.fetcher.read(blob, start, start + chunk_size) for start in range(0, len(content), chunk_size)]
    assert b"".join(views) == content


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_cannot_be_written_costs_no_extra_requests(
    workshop: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    content = workshop.put("a", 40)
    break_writes(monkeypatch, error)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    for start in range(0, len(content), chunk_size):
        assert await bench.read(blob, start, start + chunk_size) == content[start : start + chunk_size]
    await until(bench.idle)
    assert bench.store.count("read") <= 2 * 40


# Failures


async def test_all_who_wait_get_the_error_and_the_next_read_tries_again(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(2)
    error = StoreUnavailableError("a at 0: connection refused")
    gate = bench.store.block(times=1)
    bench.store.fail(error)
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        for start in range(5):
            nursery.start_soon(failure, bench, blob, start, start + 10, errors)
        await bench.store.arrived(1)
        await wait_all_tasks_blocked()
        gate.set()
    assert errors == [error] * 5
    assert bench.store.count("read") == 1
    assert bench.fetcher.statistics().failed_chunks == 1
    assert await bench.read(blob, 0, len(content)) == content
    await until(bench.idle)
    assert blob.users == 1


async def test_an_error_of_one_chunk_leaves_the_others_alone(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(3)
    bench.store.fail(StoreUnavailableError("no"), offset=chunk_size)
    with pytest.raises(StoreUnavailableError):
        await bench.read(blob, 0, len(content))
    await until(bench.idle)
    assert blob.readable(0, chunk_size)
    assert blob.readable(2 * chunk_size, 3 * chunk_size)
    assert not blob.readable(chunk_size, chunk_size + 1)


async def test_an_error_that_nobody_foresaw_is_one_of_the_store(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    bench, blob, content = await workshop.opened(1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "read", fail)
        with pytest.raises(StoreUnavailableError, match="internal error"):
            await bench.read(blob, 0, 10)
    assert await bench.read(blob, 0, 10) == content[:10]


@pytest.mark.parametrize("change", ["replace", "delete"])
async def test_an_object_that_is_no_longer_the_one_opened_is_said_to_have_changed(
    workshop: Workshop, chunk_size: int, change: str
) -> None:
    bench, blob, content = await workshop.opened(2)
    assert await bench.read(blob, 0, 10) == content[:10]
    if change == "replace":
        bench.store.put("a", b"new" * chunk_size)
    else:
        bench.store.delete("a")
    with pytest.raises(ObjectChangedError):
        await bench.read(blob, chunk_size - 10, chunk_size + 10)
    # What is here is still served.
    assert await bench.read(blob, 0, chunk_size) == content[:chunk_size]


async def test_bytes_of_two_contents_are_never_mixed(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(4)
    gate = bench.store.block(offset=3 * chunk_size)
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failure, bench, blob, 0, 4 * chunk_size, errors)
        await bench.store.arrived(4)
        bench.store.put("a", content_of("other", 4 * chunk_size))
        gate.set()
    assert isinstance(errors[0], ObjectChangedError)


async def test_a_version_once_learned_is_asked_for_and_outlives_a_replacement(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(3, version_id="v1")
    await bench.read(blob, 0, 1)
    bench.store.put("a", b"new", version_id="v2")
    assert await bench.read(blob, 0, len(content)) == content
    assert [request.version_id for request in bench.store.requests] == [None, "v1", "v1"]


# A store that is down


async def test_who_has_waited_for_the_deadline_fails_with_the_first(
    workshop: Workshop, chunk_size: int, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    bench, blob, _ = await workshop.opened(8, requests=1)
    workshop.store.fail(TransientStoreError("connection refused"), times=float("inf"))
    errors: list[StoreError] = []
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for chunk in range(8):
            nursery.start_soon(failure, bench, blob, chunk * chunk_size, chunk * chunk_size + 1, errors)
    assert trio.current_time() - began <= DEADLINE_S + LONGEST_WAIT_S + 1
    assert len(errors) == 8
    assert all(isinstance(error, StoreUnavailableError) for error in errors)
    assert bench.idle()
    assert blob.users == 1


async def test_who_came_later_has_a_deadline_of_his_own(workshop: Workshop, mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.05
    bench, blob, _ = await workshop.opened(1, requests=1)
    content = workshop.put("b", 1)
    other = await bench.acquire("b")
    workshop.store.fail(TransientStoreError("connection refused"), times=float("inf"), key="a")
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failure, bench, blob, 0, 1, errors)
        await trio.sleep(10)
        bench.fetcher._batches._retrying.breaker.answered()  # the store is probed meanwhile
        assert await bench.read(other, 0, 9) == content[:9]
    assert len(errors) == 1


async def test_other_failures_fail_nobody_else(workshop: Workshop, chunk_size: int, mock_clock: MockClock) -> None:
    bench, blob, content = await workshop.opened(2, requests=1)
    gate = bench.store.block(offset=0)
    bench.store.fail(ObjectChangedError("changed"), offset=0)
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failure, bench, blob, 0, 1, errors)
        await bench.store.arrived(1)

        async def read() -> None:
            assert await bench.read(blob, chunk_size, chunk_size + 9) == content[chunk_size : chunk_size + 9]

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        mock_clock.jump(100)
        gate.set()
    assert len(errors) == 1


# Whole objects


async def test_fetching_all_makes_the_object_complete(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(20.5)
    await bench.fetcher.fetch_all(blob)
    assert blob.complete
    assert blob.view(0, len(content)) == content
    assert bench.store.count("read") == 21
    await bench.fetcher.fetch_all(blob)
    assert bench.store.count("read") == 21
    workshop.put("empty", 0)
    await bench.fetcher.fetch_all(await bench.acquire("empty"))
    assert bench.store.count("read") == 21


async def test_fetching_all_leaves_places_to_readers(workshop: Workshop) -> None:
    """A whole model in the queue would make every reader wait for all of it."""
    workshop.put("a", 100)
    workshop.put("b", 1)
    bench = await workshop.bench(requests=3)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, a)
        await bench.store.arrived(5)
        await bench.read(b, 0, 1)
        assert bench.store.count("read", "a") < 50
    assert a.complete


async def test_fetching_all_without_room_says_so(workshop: Workshop) -> None:
    bench, blob, _ = await workshop.opened(10, budget=4)
    with pytest.raises(CacheFullError, match="a: no room in the cache: evict or unpin models, raise --cache-size"):
        await bench.fetcher.fetch_all(blob)


async def test_fetching_all_succeeds_once_there_is_room(workshop: Workshop, mock_clock: MockClock) -> None:
    content = workshop.put("a", 2)
    workshop.put("b", 4)
    bench = await workshop.bench(budget=4)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    await bench.fetcher.fetch_all(b)
    assert await bench.read(a, 0, len(content)) == content
    bench.tier.blobs.release(b)
    await bench.tier.residencies.evict(b.generation)
    mock_clock.jump(10)
    await bench.fetcher.fetch_all(a)
    assert a.complete


# Readers that go away


async def test_a_reader_that_goes_away_harms_nobody(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(1)
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(3)]

        async def read(scope: trio.CancelScope) -> None:
            with scope:
                await bench.read(blob, 0, 10)

        for scope in scopes:
            nursery.start_soon(read, scope)
        await bench.store.arrived(1)
        await wait_all_tasks_blocked()
        scopes[0].cancel()
        scopes[2].cancel()
        await wait_all_tasks_blocked()
        gate.set()
    assert [scope.cancelled_caught for scope in scopes] == [True, False, True]
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.store.count("read") == 1
    await until(bench.idle)
    assert blob.users == 1


async def test_readers_that_all_go_away_leave_nothing_behind(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(10, requests=2)
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        for chunk in range(10):
            nursery.start_soon(bench.read, blob, chunk * chunk_size, chunk * chunk_size + 1)
        await bench.store.arrived(1)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    gate.set()
    await until(bench.idle)
    assert blob.users == 1
    assert await bench.read(blob, 0, len(content)) == content


async def test_a_blob_that_a_queued_request_is_for_stays(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 1)
    content = workshop.put("b", 1)
    await fill_from(workshop, "b")
    bench = await workshop.bench(requests=1)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    gate = bench.store.block(key="a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, a, 0, 1)
        await bench.store.arrived(1)
        with trio.CancelScope() as scope:
            nursery.start_soon(bench.read, a, 0, 1)
            async with trio.open_nursery() as impatient:
                impatient.start_soon(bench.read, b, 0, 1)
                await wait_all_tasks_blocked()
                scope.cancel()
        bench.tier.blobs.release(b)
        generation = b.generation
        try:
            await bench.tier.residencies.evict(generation)
        except Exception as error:  # refusing is right, too
            assert "in use" in str(error)  # noqa: PT017
        again = await bench.tier.blobs.acquire(generation)
        nursery.start_soon(bench.read, again, 0, 9)
        await wait_all_tasks_blocked()
        gate.set()
    assert await bench.read(again, 0, chunk_size) == content
    assert bench.fetcher.statistics().failed_chunks == 0


@pytest.mark.parametrize("streaming", [False, True])
async def test_who_waits_when_the_server_stops_gets_an_error(
    workshop: Workshop, chunk_size: int, streaming: bool
) -> None:
    workshop.store = MemoryStore(streaming=streaming)  # if so, some wait for a batch
    workshop.put("a", 10)
    async with opened(workshop.directory) as tier:
        blob = await tier.blobs.acquire(workshop.store.generation("a"))
        errors: list[StoreError] = []
        workshop.store.block()
        async with (
            trio.open_nursery() as readers,
            fetching(workshop.store, tier, memory_limit=workshop.memory_for(3)) as fetcher,
        ):
            bench = Bench(workshop.store, tier, fetcher)
            fetcher.hold(blob)
            for chunk in range(8):
                readers.start_soon(failure, bench, blob, chunk * chunk_size, chunk * chunk_size + 1, errors)
            await workshop.store.arrived(3)
        assert len(errors) == 8
        assert {str(error) for error in errors} == {"a: server stopping"}
        assert bench.idle()
        assert blob.users == 1


async def test_a_hit_needs_no_fetcher_at_work(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 1)
    async with opened(workshop.directory) as tier:
        generation = await fill(tier, "a", content)
        fetcher = fetcher_of(workshop.store, tier, memory_limit=chunk_size)
        async with tier.blobs.using(generation) as blob:
            assert await fetcher.read(blob, 3, 9) == content[3:9]
