"""Chunks that other hosts of a fleet wait for: their place among what this host fetches."""

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, fetching, fill, generation_of, opened, until
from tests.support.stores import MemoryStore
from tests.unit.workshop import Workshop
from trimsfs.errors import CacheFullError, StoreAccessError
from trimsfs.tiers.blob import ChunkState


async def test_they_are_fetched_and_nothing_beside_them(workshop: Workshop, chunk_size: int) -> None:
    content = workshop.put("a", 6)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    await bench.fetcher.fetch_for_others(blob, range(2, 4))
    assert blob.view(2 * chunk_size, 4 * chunk_size) == content[2 * chunk_size : 4 * chunk_size]
    await until(bench.idle)
    assert [state == ChunkState.VERIFIED for state in blob.states] == [chunk in {2, 3} for chunk in range(6)]
    assert blob.users == 1


async def test_they_share_a_flight_with_readers_of_this_host(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 2)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_for_others, blob, range(2))
        await wait_all_tasks_blocked()
        nursery.start_soon(bench.read, blob, 0, 10)
        nursery.start_soon(bench.fetcher.fetch_for_others, blob, range(1))
        await wait_all_tasks_blocked()
        gate.set()
    assert sorted(bench.store.reads()) == [0, chunk_size]


async def test_they_come_after_readers_and_before_the_prefetch(workshop: Workshop, chunk_size: int) -> None:
    workshop.put("a", 12)
    bench = await workshop.bench(requests=1)
    blob = await bench.acquire("a")
    gate, other_gate, last_gate = (bench.store.block(offset=chunk * chunk_size) for chunk in (1, 8, 10))
    bench.fetcher.hold(blob)
    await bench.read(blob, 0, 1)
    await bench.store.arrived(2)  # the prefetch of chunk 1 takes the only place
    async with trio.open_nursery() as nursery:
        for chunk in (8, 9, 10):
            nursery.start_soon(bench.fetcher.fetch_for_others, blob, range(chunk, chunk + 1))
            await wait_all_tasks_blocked()
        assert bench.store.reads() == [0, chunk_size, 8 * chunk_size]  # a place of their own, beside this host's
        with trio.fail_after(10):
            async with trio.open_nursery() as readers:  # a reader that joins chunk 9 does not wait for chunk 10
                readers.start_soon(bench.read, blob, 9 * chunk_size, 9 * chunk_size + 1)
                await wait_all_tasks_blocked()
                gate.set()
                other_gate.set()
        last_gate.set()
    await until(lambda: blob.complete)
    order = [offset // chunk_size for offset in bench.store.reads()]
    assert max(order.index(chunk) for chunk in (8, 9, 10)) < min(order.index(chunk) for chunk in (2, 3, 4))
    assert sorted(order) == list(range(12))


async def test_a_flight_goes_on_when_the_other_host_hangs_up(workshop: Workshop) -> None:
    workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_for_others, blob, range(1))
        await bench.store.arrived(1)
        nursery.cancel_scope.cancel()
    gate.set()
    await until(lambda: blob.complete)


async def test_a_reader_that_leaves_does_not_end_what_others_wait_for(workshop: Workshop) -> None:
    workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    gate = bench.store.block()
    bench.fetcher.hold(blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_for_others, blob, range(1))
        await bench.store.arrived(1)
        bench.fetcher.unhold(blob)
        await trio.sleep(0.3)
        gate.set()
    assert blob.complete
    assert len(bench.store.reads()) == 1


async def test_they_fail_as_the_store_does(workshop: Workshop) -> None:
    workshop.put("a", 1)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    bench.store.fail(StoreAccessError("no"), method="read")
    with pytest.raises(StoreAccessError):
        await bench.fetcher.fetch_for_others(blob, range(1))
    await bench.fetcher.fetch_for_others(blob, range(1))
    assert blob.complete


async def test_a_disk_without_room_is_told(workshop: Workshop) -> None:
    workshop.put("a", 4)
    bench = await workshop.bench(budget=2)
    blob = await bench.acquire("a")
    await bench.fetcher.fetch_for_others(blob, range(2))
    with pytest.raises(CacheFullError, match="a: no room in the cache"):
        await bench.fetcher.fetch_for_others(blob, range(2, 4))
    await until(bench.idle)
    assert bench.fetcher.statistics().uncached_chunks == 0


async def test_what_an_earlier_server_left_is_verified_once_however_many_ask(tmp_path: Path, chunk_size: int) -> None:
    content = content_of("a", 2 * chunk_size)
    async with opened(tmp_path / "cache", chunk_size=chunk_size) as tier:
        await fill(tier, "a", content)
    store, found = MemoryStore({"a": content}), list[bool]()
    async with (
        opened(tmp_path / "cache", chunk_size=chunk_size) as tier,
        fetching(store, tier, memory_limit=chunk_size) as fetcher,
        tier.blobs.using(generation_of("a", content)) as blob,
    ):

        async def ask() -> None:
            found.append(await fetcher.are_here(blob, range(2)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert fetcher.statistics().verified_chunks == 2
    assert found == [True] * 5
    assert store.reads() == []
