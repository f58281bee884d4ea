import gc
import random
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, fetching, opened, until
from tests.support.stores import MemoryStore
from tests.unit.workshop import Workshop, fill_from
from trimsfs.errors import CacheFullError, StoreAccessError, StoreThrottledError
from trimsfs.fetch.bypass import AccessPattern
from trimsfs.fetch.flights import Urgency
from trimsfs.fetch.scheduler import LINGER_S
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.fetch.store_requests import max_requests
from trimsfs.tiers.blob import Blob

PAGE = 4096

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
    bench, blob, content = await workshop.opened(3.5)
    assert await bench.read(blob, 0, len(content)) == content
    assert sorted(bench.store.reads()) == [0, chunk_size, 2 * chunk_size, 3 * chunk_size]
    assert blob.complete
    assert await bench.read(blob, 5, len(content) - 5) == content[5:-5]
    assert bench.store.count("read") == 4


async def test_only_the_chunks_that_are_read_are_fetched(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(5)
    start, stop = 2 * chunk_size + 10, 2 * chunk_size + 20
    assert await bench.read(blob, start, stop) == content[start:stop]
    await until(bench.idle)
    assert bench.store.reads() == [2 * chunk_size]
    assert bench.fetcher.statistics().fetched_bytes == chunk_size
    assert bench.fetcher.statistics().fetched_chunks == 1


async def test_many_readers_of_a_chunk_share_one_request(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(1)
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
    assert bench.store.count("read") == 1


# What an earlier server left


async def test_prefetch_verifies_what_is_on_disk(workshop: Workshop) -> None:
    content = workshop.put("a", 20)
    await fill_from(workshop, "a")
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.fetcher.hold(blob)
    assert await bench.read(blob, 0, 10) == content[:10]
    await until(lambda: blob.complete)
    assert blob.view(0, len(content)) == content
    assert bench.store.requests == []
    assert bench.fetcher.statistics().verified_chunks == 20


# Prefetch


async def test_the_whole_object_is_prefetched_after_the_first_read_from_there_and_round(
    workshop: Workshop, chunk_size: int
) -> None:
    bench, blob, content = await workshop.opened(5.5, requests=1)
    bench.fetcher.hold(blob)
    await wait_all_tasks_blocked()
    assert bench.store.requests == []
    await bench.read(blob, 3 * chunk_size, 3 * chunk_size + 1)
    await until(lambda: blob.complete)
    assert [offset // chunk_size for offset in bench.store.reads()] == [3, 4, 5, 0, 1, 2]
    assert blob.view(0, len(content)) == content
    await until(bench.idle)
    assert blob.users == 1


async def test_demanded_chunks_go_before_prefetched_ones(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(20, requests=1)
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


async def test_prefetch_ends_with_the_last_holder(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(10, requests=1)
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


async def test_a_failure_ends_the_prefetch_until_the_next_read(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(10, requests=1)
    bench.fetcher.hold(blob)
    bench.store.fail(StoreAccessError("denied"), offset=2 * chunk_size)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(3)
    await until(bench.idle)
    assert bench.store.count("read") == 3
    await bench.read(blob, 3 * chunk_size, 3 * chunk_size + 1)
    await until(lambda: blob.complete)


# Ahead of any reader


async def test_what_comes_ahead_is_given_up_while_the_disk_has_no_room(workshop: Workshop) -> None:
    for key in ("first", "second"):
        workshop.put(key, 2)
    bench = await workshop.bench(budget=0)
    for key in ("first", "second"):  # the second one while it is known that there is none
        blob = await bench.acquire(key)
        with trio.fail_after(5), pytest.raises(CacheFullError):
            await bench.fetcher.fetch_all(blob, Urgency.AHEAD)
    assert "second" not in [request.key for request in bench.store.requests]
    assert bench.idle()


async def test_what_nobody_wants_any_more_stops_under_way(workshop: Workshop) -> None:
    bench, blob, content = await workshop.opened(20, requests=4)
    gate = bench.store.block()
    with trio.move_on_after(1) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(bench.fetcher.fetch_all, blob, Urgency.AHEAD))
            await bench.store.arrived(2)
            scope.cancel()
    await until(bench.idle)
    assert not gate.is_set()
    assert (blob.users, blob.verified_bytes, bench.tier.statistics().used_bytes) == (1, 0, 0)
    gate.set()
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.tier.statistics().used_bytes == len(content)


async def test_what_is_wanted_again_in_a_moment_goes_on(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(3)
    bench.fetcher.hold(blob)
    await bench.read(blob, 0, 1)
    gate = bench.store.block()
    bench.fetcher.unhold(blob)
    bench.fetcher.hold(blob)
    await trio.sleep(2 * LINGER_S)
    gate.set()
    await bench.read(blob, 2 * chunk_size, 2 * chunk_size + 1)
    await until(lambda: blob.complete)
    assert all(bench.store.reads("a").count(offset) == 1 for _, offset in bench.store.fetched)


async def test_a_fetch_whose_caller_gives_up_and_comes_again_all_the_time_goes_on(
    workshop: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an open does that signals interrupt: one must not find it unwanted in the moments between."""
    linger_s = 2.0
    monkeypatch.setattr("trimsfs.fetch.scheduler.LINGER_S", linger_s)
    bench, blob, _ = await workshop.opened(3)
    gate = bench.store.block()
    for _ in range(100):
        with trio.move_on_after(linger_s / 200):
            await bench.fetcher.fetch_all(blob)
        await trio.sleep(linger_s / 66)
    gate.set()
    await bench.fetcher.fetch_all(blob)
    assert sorted(bench.store.reads("a")) == [0, chunk_size, 2 * chunk_size]


async def test_what_a_reader_at_random_has_paused_goes_on_for_who_wants_all_of_it(
    workshop: Workshop, chunk_size: int
) -> None:
    bench, blob, _ = await workshop.opened(3)
    bench.fetcher.hold(blob)
    gate = bench.store.block(offset=chunk_size)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(2)
    bench.fetcher._pause(blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, blob)
        await trio.sleep(2 * LINGER_S)
        gate.set()
    assert sorted(bench.store.reads("a")) == [0, chunk_size, 2 * chunk_size]


async def test_a_reader_of_what_is_given_up_is_served(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, content = await workshop.opened(20, requests=2)
    gate = bench.store.block()
    answers: list[bytes] = []

    async def read(chunk: int) -> None:
        answers.append(await bench.read(blob, chunk * chunk_size, (chunk + 1) * chunk_size))

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            async with trio.open_nursery() as ahead:
                ahead.start_soon(partial(bench.fetcher.fetch_all, blob, Urgency.AHEAD))
                await bench.store.arrived(2)
                nursery.start_soon(read, 0)
                await wait_all_tasks_blocked()
                scope.cancel()
        await trio.sleep(2 * LINGER_S)
        gate.set()
    assert answers == [content[:chunk_size]]


# At random


def scattered(workshop: Workshop, count: int, chunks: int = 64) -> list[int]:
    """Where pages begin that lie far from each other."""
    return random.Random(7).sample(range(0, chunks * workshop.chunk_size, max(PAGE, 3 * workshop.chunk_size)), count)


async def test_of_a_file_that_is_read_at_random_only_what_is_read_is_fetched(
    workshop: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.bypass.LEAST_GAP", PAGE)
    bench, blob, content = await workshop.opened(64)
    bench.fetcher.hold(blob)
    pattern = AccessPattern()
    gate = bench.store.block(offset=40 * chunk_size)
    first, later = scattered(workshop, 20)[:8], scattered(workshop, 20)[8:]
    for start in first[:-1]:
        pattern.record(start, start + PAGE)
    read = partial(bench.fetcher.read_once, pattern=pattern)
    await read(blob, first[-1], first[-1] + PAGE)
    gate.set()
    await until(bench.idle)
    before = bench.fetcher.statistics().fetched_bytes
    for start in later:
        data = await read(blob, start, start + PAGE)
        assert data is not None
        assert bytes(data) == content[start : start + PAGE]
    assert bench.fetcher.statistics().fetched_bytes - before == PAGE * len(later)
    assert blob.verified_bytes <= before
    data = await read(blob, 0, chunk_size)  # dense
    assert data is not None
    assert bytes(data) == content[:chunk_size]
    assert blob.readable(0, chunk_size)


async def test_after_a_jump_nothing_is_prefetched_until_reads_go_on_there(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(64)
    bench.fetcher.hold(blob)
    read = partial(bench.fetcher.read_once, pattern=AccessPattern())
    await read(blob, 30 * chunk_size, 30 * chunk_size + 1)
    await until(bench.idle)
    assert blob.verified_bytes == chunk_size
    await read(blob, 31 * chunk_size, 31 * chunk_size + 1)
    await until(lambda: blob.complete)


async def test_a_reader_that_comes_to_what_is_missing_past_what_is_here_has_not_jumped(
    workshop: Workshop, chunk_size: int
) -> None:
    bench, blob, _ = await workshop.opened(64, requests=2)
    bench.fetcher.hold(blob)
    read = partial(bench.fetcher.read_once, pattern=AccessPattern())
    gates = [bench.store.block(offset=chunk * chunk_size) for chunk in (40, 41)]
    await read(blob, 0, 1)
    await until(lambda: blob.verified_bytes == 40 * chunk_size)
    for start in range(0, 40 * chunk_size, chunk_size // 2):
        await read(blob, start, start + chunk_size // 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, blob, 40 * chunk_size, 40 * chunk_size + 1)
        await trio.sleep(2 * LINGER_S)
        for gate in gates:
            gate.set()
    await until(lambda: blob.complete)
    assert len(bench.store.reads("a")) == len(set(bench.store.reads("a")))


async def test_a_prefetch_stops_when_reads_turn_out_to_be_random(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(64, requests=2)
    bench.fetcher.hold(blob)
    await bench.read(blob, 0, 1)
    await until(lambda: bench.fetcher.statistics().in_flight > 0)
    pattern = AccessPattern()
    pattern.random = True
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.read_once, blob, 63 * chunk_size, 63 * chunk_size + 1, pattern)
        await trio.sleep(2 * LINGER_S)
        gate.set()
    await until(bench.idle)
    assert not blob.complete


# Bounds


async def test_requests_are_as_many_as_memory_allows_at_most(workshop: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await workshop.opened(30, requests=6)
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
    assert bench.store.most_under_way <= max_requests(3 * chunk_size, request_memory=chunk_size // 4) == 6


@pytest.mark.parametrize(
    ("memory", "requests"), [(1 << 20, 1), (4 << 20, 1), (8 << 20, 2), (32 << 20, 8), (128 << 20, 32), (1 << 40, 32)]
)
def test_half_of_the_memory_is_for_requests(memory: int, requests: int) -> None:
    assert max_requests(memory) == requests


@pytest.mark.parametrize("budget", [None, 0])
async def test_memory_stays_within_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: int | None
) -> None:
    chunk_size = 128 * 1024
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size // 4)  # all that a request takes
    memory_limit = 8 * chunk_size
    store = MemoryStore({key: content_of(key, 40 * chunk_size) for key in "ab"})
    most = 0

    async def read(fetcher: StoreFetcher, blob: Blob) -> None:
        nonlocal most
        for start in range(0, blob.generation.size, chunk_size // 2):
            await fetcher.read(blob, start, start + chunk_size // 2)
            most = max(most, in_memory())

    async with (
        opened(tmp_path / "cache", budget=budget, chunk_size=chunk_size) as tier,
        fetching(store, tier, memory_limit=memory_limit) as fetcher,
    ):
        blobs = [await tier.blobs.acquire(store.generation(key)) for key in "ab"]
        for blob in blobs:
            fetcher.hold(blob)
        gc.collect()  # what other tests have left is not counted
        tracemalloc.start()
        async with trio.open_nursery() as nursery:
            for blob in blobs:
                nursery.start_soon(read, fetcher, blob)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Besides, the fake store cuts pieces out of its objects, a few at a time. Of all there is, this is an eighth.
        assert peak < memory_limit + 2 * chunk_size
        assert most <= memory_limit
        assert (most > 0) == (budget == 0)


def in_memory() -> int:
    """Bytes of chunks that are kept in memory, by their mappings."""
    mapped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:trimsfs-chunk" in line:
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            mapped += stop - start
    return mapped


async def test_throttling_halves_the_requests(workshop: Workshop) -> None:
    bench = await workshop.bench(requests=16)
    before = bench.fetcher.statistics().request_limit
    bench.fetcher._speed.request_failed(StoreThrottledError("slow down"))
    assert bench.fetcher.statistics().request_limit == before // 2


async def test_a_command_for_a_file_that_a_program_reads_does_not_wait_for_a_full_disk(workshop: Workshop) -> None:
    workshop.put("read", 6)
    workshop.put("other", 6)
    bench = await workshop.bench(budget=1.5)
    blob, other = await bench.acquire("read"), await bench.acquire("other")
    bench.fetcher.hold(blob)
    await bench.read(blob, 0, 10)
    with trio.fail_after(5):
        with pytest.raises(CacheFullError):
            await bench.fetcher.fetch_all(other, Urgency.COMMAND)
        assert bench.tier.space.full(blob.generation)
        prefetch = bench.fetcher._scheduler.prefetch(blob)
        assert prefetch is not None
        prefetch.demand(0)  # as by a read of a chunk that is not here
        with pytest.raises(CacheFullError):
            await bench.fetcher.fetch_all(blob, Urgency.COMMAND)
        prefetch.demand(0)
        with pytest.raises(CacheFullError):
            await bench.fetcher.fetch_all(blob, Urgency.AHEAD)
