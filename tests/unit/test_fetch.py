import errno
import os
import random
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fakes import MemoryStore, as_store
from tests.unit.conftest import set_chunk_size
from tests.unit.parts import blob_files, content_of, fetching, fill, flip_byte, opened, until
from trimsfs.errors import (
    CacheFullError,
    ObjectChangedError,
    StoreAccessError,
    StoreError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.fetch import Fetcher, max_requests
from trimsfs.stores.retrying import LONGEST_WAIT_S, RetryingStore
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk import DiskTier

DEADLINE_S = 15.0


class Bench:
    """A store, a disk tier and a fetcher between them."""

    def __init__(self, store: MemoryStore, tier: DiskTier, fetcher: Fetcher) -> None:
        self.store = store
        self.tier = tier
        self.fetcher = fetcher

    async def acquire(self, key: str) -> Blob:
        return await self.tier.acquire(self.store.generation(key))

    async def read(self, blob: Blob, start: int, stop: int) -> bytes:
        return bytes(await self.fetcher.read(blob, start, stop))

    def idle(self) -> bool:
        statistics = self.fetcher.statistics()
        return statistics.in_flight == 0 and statistics.waiting == 0


class Workshop:
    """Makes the bench of a test, once its store is filled."""

    def __init__(self, nursery: trio.Nursery, directory: Path, chunk_size: int) -> None:
        self._nursery = nursery
        self.directory = directory
        self.chunk_size = chunk_size
        self.store = MemoryStore()
        self.tier: DiskTier | None = None

    def put(self, key: str, chunks: float, *, version_id: str | None = None) -> bytes:
        content = content_of(key, int(chunks * self.chunk_size))
        self.store.put(key, content, version_id=version_id)
        return content

    async def bench(self, *, chunks: int = 16, budget: int | None = None) -> Bench:
        """A bench with memory for so many chunks and room on disk for *budget* chunks."""
        limit = None if budget is None else budget * self.chunk_size
        self.tier = DiskTier(self.directory, store=self.store.identity, budget=limit)
        fetcher = Fetcher(
            as_store(self.store), self.tier, memory_limit=chunks * self.chunk_size, retry_deadline_s=DEADLINE_S
        )
        await self._nursery.start(fetcher.run)
        return Bench(self.store, self.tier, fetcher)


@pytest.fixture
async def workshop(tmp_path: Path, chunk_size: int) -> AsyncIterator[Workshop]:
    async with trio.open_nursery() as nursery:
        workshop = Workshop(nursery, tmp_path / "cache", chunk_size)
        yield workshop
        nursery.cancel_scope.cancel()
    if workshop.tier is not None:
        await workshop.tier.aclose()


async def failure(bench: Bench, blob: Blob, start: int, stop: int, errors: list[StoreError]) -> None:
    with pytest.raises(StoreError) as caught:
        await bench.read(blob, start, stop)
    errors.append(caught.value)


def break_writes(monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOSPC) -> None:
    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", fail)


# The right bytes


async def test_every_byte_is_right_for_random_reads_at_once(workshop: Workshop, chunk_size: int) -> None:
    contents = {key: workshop.put(key, chunks) for key, chunks in {"a": 10.3, "b": 4, "c": 0.01}.items()}
    bench = await workshop.bench()
    blobs = {key: await bench.acquire(key) for key in contents}
    generator = random.Random(1)

    async def read_some() -> None:
        for _ in range(20):
            key = generator.choice("abc")
            size = len(contents[key])
            start = generator.randrange(size)
            stop = min(size, start + generator.randint(1, 3 * chunk_size))
            assert await bench.read(blobs[key], start, stop) == contents[key][start:stop]

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(read_some)
    assert all(bench.store.reads(key).count(offset) == 1 for key, offset in bench.store.fetched)


async def test_a_read_across_chunks_is_one_answer(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 3.5)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    assert await bench.read(blob, 0, len(content)) == content
    assert sorted(bench.store.reads()) == [0, chunk_size, 2 * chunk_size, 3 * chunk_size]
    assert blob.complete
    assert await bench.read(blob, 5, len(content) - 5) == content[5:-5]
    assert bench.store.count("read_into") == 4


async def test_only_the_chunks_that_are_read_are_fetched(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 5)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    start, stop = 2 * chunk_size + 10, 2 * chunk_size + 20
    assert await bench.read(blob, start, stop) == content[start:stop]
    assert bench.store.reads() == [2 * chunk_size]
    assert bench.fetcher.statistics().fetched_bytes == chunk_size
    assert bench.fetcher.statistics().fetched_chunks == 1


async def test_many_readers_of_a_chunk_share_one_request(workshop: Workshop) -> None:
    content = workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    gate = bench.store.block()
    answers: list[bool] = []

    async def read(start: int) -> None:
        answers.append(await bench.read(blob, start, start + 100) == content[start : start + 100])

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(read, number * 50)
        await bench.store.arrived(1)
        await wait_all_tasks_blocked()
        gate.set()
    assert answers == [True] * 30
    assert bench.store.count("read_into") == 1


# What an earlier server left


async def test_what_is_on_disk_after_a_restart_is_verified_and_not_fetched(
    workshop: Workshop, tmp_path: Path, chunk_size: int
) -> None:
    content = workshop.put("a", 3.5)
    async with opened(tmp_path / "cache") as tier:
        await fill_from(tier, workshop, "a")
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.store.requests == []
    assert bench.fetcher.statistics().verified_chunks == 4


async def test_a_chunk_that_was_damaged_is_fetched_again_and_no_other(
    workshop: Workshop, tmp_path: Path, chunk_size: int
) -> None:
    content = workshop.put("a", 3.5)
    async with opened(tmp_path / "cache") as tier:
        await fill_from(tier, workshop, "a")
    flip_byte(blob_files(tmp_path / "cache")[0], chunk_size + 7)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.store.reads() == [chunk_size]
    assert bench.tier.statistics().corrupt_chunks == 1
    assert bench.tier.statistics().used_bytes == len(content)


async def test_prefetch_verifies_what_is_on_disk(workshop: Workshop, tmp_path: Path) -> None:
    content = workshop.put("a", 20)
    async with opened(tmp_path / "cache") as tier:
        await fill_from(tier, workshop, "a")
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    assert await bench.read(blob, 0, 10) == content[:10]
    await until(lambda: blob.complete)
    assert bench.store.requests == []


async def fill_from(tier: DiskTier, workshop: Workshop, key: str) -> None:
    """Have an earlier server cache an object of the store."""
    async with (
        fetching(as_store(workshop.store), tier, memory_limit=16 * workshop.chunk_size) as fetcher,
        tier.using(workshop.store.generation(key)) as blob,
    ):
        await fetcher.fetch_all(blob)
    workshop.store.requests.clear()


# Prefetch


async def test_opening_fetches_nothing(workshop: Workshop) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    await wait_all_tasks_blocked()
    assert bench.store.requests == []


async def test_the_whole_object_is_prefetched_after_the_first_read(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 10.5)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    await bench.read(blob, 4 * chunk_size, 4 * chunk_size + 1)
    await until(lambda: blob.complete)
    assert sorted(bench.store.reads()) == [chunk * chunk_size for chunk in range(11)]
    assert blob.view(0, len(content)) == content
    await until(bench.idle)
    assert blob.users == 1


async def test_an_object_that_nobody_holds_is_not_prefetched(workshop: Workshop) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    await bench.read(blob, 0, 1)
    await until(bench.idle)
    assert bench.store.reads() == [0]


async def test_prefetch_goes_on_from_the_last_chunk_demanded_and_round(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 6)
    bench = await workshop.bench(chunks=1)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    await bench.read(blob, 3 * chunk_size, 3 * chunk_size + 1)
    await until(lambda: blob.complete)
    assert [offset // chunk_size for offset in bench.store.reads()] == [3, 4, 5, 0, 1, 2]


async def test_demanded_chunks_go_before_prefetched_ones(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 20)
    bench = await workshop.bench(chunks=1)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    gate = bench.store.block(offset=chunk_size)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(2)  # the prefetch of chunk 1 takes the only place

    async def read(chunk: int) -> None:
        start = chunk * chunk_size
        assert await bench.read(blob, start, start + 10) == content[start : start + 10]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 10)
        await wait_all_tasks_blocked()
        nursery.start_soon(read, 15)
        await wait_all_tasks_blocked()
        assert bench.fetcher.statistics().waiting == 2
        gate.set()
    await until(lambda: blob.complete)
    assert [offset // chunk_size for offset in bench.store.reads()[:6]] == [0, 1, 10, 15, 16, 17]


async def test_a_reader_joins_a_prefetch_under_way(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 2)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    gate = bench.store.block(offset=chunk_size)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, blob, chunk_size, chunk_size + 1)
        await wait_all_tasks_blocked()
        gate.set()
    assert bench.store.count("read_into") == 2
    assert blob.view(chunk_size, 2 * chunk_size) == content[chunk_size:]


async def test_prefetch_ends_with_the_last_holder(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench(chunks=1)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    bench.fetcher.hold(blob)
    first, second = (bench.store.block(offset=chunk * chunk_size) for chunk in (1, 2))
    await bench.read(blob, 0, 1)
    await bench.store.arrived(2)
    bench.fetcher.unhold(blob)
    first.set()
    await bench.store.arrived(3)
    bench.fetcher.unhold(blob)
    second.set()
    await until(bench.idle)
    assert bench.store.reads() == [0, chunk_size, 2 * chunk_size]
    assert blob.users == 1


async def test_objects_being_read_are_prefetched_in_turns(workshop: Workshop) -> None:
    workshop.put("a", 6)
    workshop.put("b", 6)
    bench = await workshop.bench(chunks=1)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    gate = bench.store.block()
    bench.fetcher.hold(a)
    bench.fetcher.hold(b)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, a, 0, 1)
        nursery.start_soon(bench.read, b, 0, 1)
        await wait_all_tasks_blocked()
        gate.set()
    await until(lambda: a.complete and b.complete)
    keys = "".join(request.key for request in bench.store.requests)
    assert keys[2:] in {"ab" * 5, "ba" * 5}


async def test_a_failure_ends_the_prefetch_until_the_next_read(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench(chunks=1)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    bench.store.fail(StoreAccessError("denied"), offset=2 * chunk_size)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(3)
    await until(bench.idle)
    assert bench.store.count("read_into") == 3
    await bench.read(blob, 3 * chunk_size, 3 * chunk_size + 1)
    await until(lambda: blob.complete)


# Bounds


async def test_requests_are_as_many_as_memory_allows_at_most(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 30)
    bench = await workshop.bench(chunks=8)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    # Answers that take longer than a moment let the limit rise to its maximum.
    gates = [bench.store.block(times=1) for _ in range(30)]
    async with trio.open_nursery() as nursery:
        for chunk in range(30):
            nursery.start_soon(bench.read, blob, chunk * chunk_size, chunk * chunk_size + 1)
        for gate in gates:
            await wait_all_tasks_blocked()
            gate.set()
    assert blob.complete
    assert bench.store.most_under_way <= max_requests(8 * chunk_size) == 6


@pytest.mark.parametrize(("chunks", "requests"), [(1, 1), (2, 1), (4, 3), (16, 12), (1024, 768)])
def test_most_of_the_memory_is_for_requests(chunks: int, requests: int) -> None:
    assert max_requests(chunks * (8 << 20)) == requests


@pytest.mark.parametrize("budget", [None, 0])
async def test_memory_stays_within_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: int | None
) -> None:
    chunk_size = set_chunk_size(monkeypatch, 128 * 1024)
    memory_limit = 16 * chunk_size
    store = MemoryStore({key: content_of(key, 40 * chunk_size) for key in "ab"})

    async def read(fetcher: Fetcher, blob: Blob) -> None:
        for start in range(0, blob.generation.size, chunk_size // 2):
            await fetcher.read(blob, start, start + chunk_size // 2)

    async with (
        opened(tmp_path / "cache", budget=budget) as tier,
        fetching(as_store(store), tier, memory_limit=memory_limit) as fetcher,
    ):
        blobs = [await tier.acquire(store.generation(key)) for key in "ab"]
        for blob in blobs:
            fetcher.hold(blob)
        tracemalloc.start()
        async with trio.open_nursery() as nursery:
            for blob in blobs:
                nursery.start_soon(read, fetcher, blob)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # The fake store cuts a copy of each chunk it serves: one at a time.
    assert peak < memory_limit + 3 * chunk_size


async def test_throttling_halves_the_requests(workshop: Workshop) -> None:
    bench = await workshop.bench(chunks=16)
    before = bench.fetcher.statistics().request_limit
    bench.fetcher.store_failed(StoreThrottledError("slow down"))
    assert bench.fetcher.statistics().request_limit == before // 2


# No room on disk


async def test_without_room_bytes_are_served_from_memory(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 12.5)
    bench = await workshop.bench(budget=0)
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    step = chunk_size // 4
    for start in range(0, len(content), step):
        assert await bench.read(blob, start, min(start + step, len(content))) == content[start : start + step]
    assert bench.tier.statistics().used_bytes == 0
    assert blob_files(workshop.directory)[0].stat().st_blocks == 0
    # Once each, and perhaps a few for a prefetch before it was known that there is no room.
    assert bench.store.count("read_into") <= 13 + 4
    assert bench.fetcher.statistics().uncached_chunks == bench.store.count("read_into")


async def test_what_fits_is_kept_and_the_rest_served_from_memory(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 10)
    bench = await workshop.bench(budget=4)
    blob = await bench.acquire("a")
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.tier.statistics().used_bytes == 4 * chunk_size
    assert await bench.read(blob, 0, len(content)) == content


async def test_a_blob_without_a_file_is_served_from_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Blob, "attach", fail)
    content = workshop.put("a", 3.5)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    assert await bench.read(blob, 0, len(content)) == content
    assert await bench.read(blob, 10, 20) == content[10:20]
    await until(bench.idle)
    assert bench.store.count("read_into") == 4


async def test_views_of_uncached_chunks_stay_right(workshop: Workshop, chunk_size: int) -> None:
    """Nothing is written into a buffer that a reader may still be sending."""
    content = workshop.put("a", 12)
    bench = await workshop.bench(chunks=2, budget=0)
    blob = await bench.acquire("a")
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
    assert bench.store.count("read_into") <= 2 * 40


# Failures


async def test_all_who_wait_get_the_error_and_the_next_read_tries_again(workshop: Workshop) -> None:
    content = workshop.put("a", 2)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
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
    assert bench.store.count("read_into") == 1
    assert bench.fetcher.statistics().failed_chunks == 1
    assert await bench.read(blob, 0, len(content)) == content
    await until(bench.idle)
    assert blob.users == 1


async def test_an_error_of_one_chunk_leaves_the_others_alone(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 3)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
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

    content = workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "read_into", fail)
        with pytest.raises(StoreUnavailableError, match="internal error"):
            await bench.read(blob, 0, 10)
    assert await bench.read(blob, 0, 10) == content[:10]


@pytest.mark.parametrize("change", ["replace", "delete"])
async def test_an_object_that_is_no_longer_the_one_opened_is_said_to_have_changed(
    workshop: Workshop, chunk_size: int, change: str
) -> None:
    content = workshop.put("a", 2)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
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
    workshop.put("a", 4)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    gate = bench.store.block(offset=3 * chunk_size)
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failure, bench, blob, 0, 4 * chunk_size, errors)
        await bench.store.arrived(4)
        bench.store.put("a", content_of("other", 4 * chunk_size))
        gate.set()
    assert isinstance(errors[0], ObjectChangedError)


async def test_a_version_once_learned_is_asked_for_and_outlives_a_replacement(
    workshop: Workshop, chunk_size: int
) -> None:
    content = workshop.put("a", 3, version_id="v1")
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    await bench.read(blob, 0, 1)
    bench.store.put("a", b"new", version_id="v2")
    assert await bench.read(blob, 0, len(content)) == content
    assert [request.version_id for request in bench.store.requests] == [None, "v1", "v1"]


async def test_the_same_content_under_another_version_will_do(workshop: Workshop) -> None:
    content = workshop.put("a", 3, version_id="v1")
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    await bench.read(blob, 0, 1)
    workshop.put("a", 3, version_id="v2")
    workshop.store.purge("a", "v1")
    assert await bench.read(blob, 0, len(content)) == content


# A store that is down


async def test_who_has_waited_for_the_deadline_fails_with_the_first(
    workshop: Workshop, chunk_size: int, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    workshop.put("a", 8)
    async with opened(workshop.directory) as tier:
        store = RetryingStore(as_store(workshop.store), deadline_s=15)
        async with fetching(store, tier, memory_limit=chunk_size) as fetcher:
            bench = Bench(workshop.store, tier, fetcher)
            blob = await bench.acquire("a")
            workshop.store.fail(TransientStoreError("connection refused"), times=float("inf"))
            errors: list[StoreError] = []
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                for chunk in range(8):
                    nursery.start_soon(failure, bench, blob, chunk * chunk_size, chunk * chunk_size + 1, errors)
            assert trio.current_time() - began <= 15 + LONGEST_WAIT_S + 1
            assert len(errors) == 8
            assert all(isinstance(error, StoreUnavailableError) for error in errors)
            assert bench.idle()
            assert blob.users == 1


async def test_who_came_later_has_a_deadline_of_his_own(
    workshop: Workshop, chunk_size: int, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    content = workshop.put("a", 2)
    async with opened(workshop.directory) as tier:
        store = RetryingStore(as_store(workshop.store), deadline_s=15)
        async with fetching(store, tier, memory_limit=chunk_size) as fetcher:
            bench = Bench(workshop.store, tier, fetcher)
            blob = await bench.acquire("a")
            workshop.store.fail(TransientStoreError("connection refused"), times=float("inf"), offset=0)
            errors: list[StoreError] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(failure, bench, blob, 0, 1, errors)
                await trio.sleep(10)
                assert await bench.read(blob, chunk_size, chunk_size + 9) == content[chunk_size : chunk_size + 9]
            assert len(errors) == 1


async def test_other_failures_fail_nobody_else(workshop: Workshop, chunk_size: int, mock_clock: MockClock) -> None:
    content = workshop.put("a", 2)
    bench = await workshop.bench(chunks=1)
    blob = await bench.acquire("a")
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
    content = workshop.put("a", 20.5)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    await bench.fetcher.fetch_all(blob)
    assert blob.complete
    assert blob.view(0, len(content)) == content
    assert bench.store.count("read_into") == 21
    await bench.fetcher.fetch_all(blob)
    assert bench.store.count("read_into") == 21


async def test_fetching_all_of_an_empty_object_does_nothing(workshop: Workshop) -> None:
    workshop.put("a", 0)
    bench = await workshop.bench()
    await bench.fetcher.fetch_all(await bench.acquire("a"))
    assert bench.store.requests == []


async def test_fetching_all_leaves_places_to_readers(workshop: Workshop, chunk_size: int) -> None:
    """A whole model in the queue would make every reader wait for all of it."""
    workshop.put("a", 100)
    workshop.put("b", 1)
    bench = await workshop.bench(chunks=4)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, a)
        await bench.store.arrived(5)
        await bench.read(b, 0, 1)
        assert bench.store.count("read_into", "a") < 50
    assert a.complete


async def test_fetching_all_raises_what_the_store_raises(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.store.fail(StoreAccessError("denied"), offset=7 * chunk_size)
    with pytest.raises(StoreAccessError):
        await bench.fetcher.fetch_all(blob)
    await bench.fetcher.fetch_all(blob)
    assert blob.complete


async def test_fetching_all_without_room_says_so(workshop: Workshop) -> None:
    workshop.put("a", 10)
    bench = await workshop.bench(budget=4)
    blob = await bench.acquire("a")
    with pytest.raises(CacheFullError, match="a: no room in the cache: evict or unpin models, raise --cache-size"):
        await bench.fetcher.fetch_all(blob)


async def test_fetching_all_succeeds_once_there_is_room(workshop: Workshop, mock_clock: MockClock) -> None:
    content = workshop.put("a", 2)
    workshop.put("b", 4)
    bench = await workshop.bench(budget=4)
    a, b = await bench.acquire("a"), await bench.acquire("b")
    await bench.fetcher.fetch_all(b)
    assert await bench.read(a, 0, len(content)) == content
    bench.tier.release(b)
    await bench.tier.evict(b.generation)
    mock_clock.jump(10)
    await bench.fetcher.fetch_all(a)
    assert a.complete


# Readers that go away


async def test_a_reader_that_goes_away_harms_nobody(workshop: Workshop) -> None:
    content = workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
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
    assert bench.store.count("read_into") == 1
    await until(bench.idle)
    assert blob.users == 1


async def test_readers_that_all_go_away_leave_nothing_behind(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 10)
    bench = await workshop.bench(chunks=2)
    blob = await bench.acquire("a")
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


async def test_a_blob_that_a_queued_request_is_for_stays(workshop: Workshop, chunk_size: int, tmp_path: Path) -> None:
    workshop.put("a", 1)
    content = workshop.put("b", 1)
    async with opened(tmp_path / "cache") as tier:
        await fill_from(tier, workshop, "b")
    bench = await workshop.bench(chunks=1)
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
        bench.tier.release(b)
        generation = b.generation
        try:
            await bench.tier.evict(generation)
        except Exception as error:  # refusing is right, too
            assert "in use" in str(error)  # noqa: PT017
        again = await bench.tier.acquire(generation)
        nursery.start_soon(bench.read, again, 0, 9)
        await wait_all_tasks_blocked()
        gate.set()
    assert await bench.read(again, 0, chunk_size) == content
    assert bench.fetcher.statistics().failed_chunks == 0


async def test_who_waits_when_the_server_stops_gets_an_error(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 10)
    async with opened(workshop.directory) as tier:
        blob = await tier.acquire(workshop.store.generation("a"))
        errors: list[StoreError] = []
        workshop.store.block()
        async with (
            trio.open_nursery() as readers,
            fetching(as_store(workshop.store), tier, memory_limit=4 * chunk_size) as fetcher,
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
        fetcher = Fetcher(as_store(workshop.store), tier, memory_limit=chunk_size, retry_deadline_s=1)
        async with tier.using(generation) as blob:
            assert await fetcher.read(blob, 3, 9) == content[3:9]
