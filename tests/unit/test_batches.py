"""Neighbouring chunks in one request, from a store whose bytes are right at once."""

import errno
import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.parts import blob_files, content_of, fetching, fill, flip_byte, opened, recorded_bytes, states, until
from tests.support.stores import MemoryStore
from tests.support.tmpfs import tmpfs
from tests.unit.workshop import Bench, Workshop, break_writes, failure, fill_from
from trimsfs.checksums import crc32c
from trimsfs.errors import (
    CacheFullError,
    ObjectChangedError,
    StoreAccessError,
    StoreError,
    StoreSlowError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.fetch.flights import Flight
from trimsfs.fetch.scheduler import LINGER_S
from trimsfs.fetch.store_fetcher import BATCH_LIMIT
from trimsfs.tiers.blob import Blob, ChunkState

MISSING, UNVERIFIED, VERIFIED = ChunkState


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of ten bytes are kept, however slowly they come."""
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART", 10)
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART_RATE", 0)


def batches(store: MemoryStore, chunk_size: int, key: str | None = None) -> list[range]:
    """The chunks of each request so far."""
    return [
        range(request.offset // chunk_size, -(-(request.offset + request.length) // chunk_size))
        for request in store.requests
        if request.method == "read" and key in {None, request.key}
    ]


async def read_all(bench: Bench, blob: Blob, chunk_size: int) -> bytes:
    """What one reader gets who reads a file from its beginning to its end, a chunk at a time."""
    content = b""
    for start in range(0, blob.generation.size, chunk_size):
        content += await bench.read(blob, start, min(start + chunk_size, blob.generation.size))
    return content


async def fetch_batch(bench: Bench, blob: Blob, errors: list[Exception]) -> None:
    """Fetch all of a blob; an error is added to *errors*."""
    try:
        await bench.fetcher.fetch_all(blob)
    except (StoreError, CacheFullError) as error:
        errors.append(error)


# Fewer requests


async def test_one_request_brings_several_chunks(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(40.5, requests=2)
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    found = batches(bench.store, chunk_size)
    assert sorted(chunk for batch in found for chunk in batch) == list(range(41))
    assert max(len(batch) for batch in found) == BATCH_LIMIT
    assert len(found) <= 41 // BATCH_LIMIT + 3
    assert bench.fetcher.statistics().fetched_chunks == 41
    assert bench.tier.statistics().used_bytes == len(content) == await recorded_bytes(bench.tier)


@pytest.mark.parametrize(
    ("streams", "requests"),
    [
        pytest.param(False, 1, id="a store that tells at the end"),
        pytest.param(True, 8, id="a short file, sooner here by several requests than by one"),
    ],
)
async def test_a_request_is_for_one_chunk(workshop: Workshop, chunk_size: int, streams: bool, requests: int) -> None:
    workshop.store = MemoryStore(streaming=streams)
    bench, blob, _ = await workshop.opened(8, requests=requests)
    await bench.fetcher.fetch_all(blob)
    assert {len(batch) for batch in batches(bench.store, chunk_size)} == {1}


async def test_a_slow_request_that_is_broken_off_is_tried_again(streaming: Workshop, chunk_size: int) -> None:
    """Its deadline counts from the last chunk that came."""
    bench, blob, _ = await streaming.opened(4, requests=1, deadline_s=0.3)
    gate = bench.store.block(times=1, method="read", after=1)
    bench.store.fail(TransientStoreError("reset"), method="read", after=chunk_size + 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, blob)
        await bench.store.arrived(1)
        await trio.sleep(0.4)
        gate.set()
    assert blob.complete
    assert batches(bench.store, chunk_size) == [range(4), range(1, 4)]


async def test_readers_of_neighbouring_chunks_share_a_request(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(20, requests=1)
    gate = bench.store.block(times=1)

    async def read(chunk: int) -> None:
        start = chunk * chunk_size
        assert await bench.read(blob, start, start + 10) == content[start : start + 10]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 19)  # takes the only place
        await bench.store.arrived(1)
        for chunk in (3, 4, 5, 9, 10, 1):
            nursery.start_soon(read, chunk)
            await wait_all_tasks_blocked()
        gate.set()
    assert batches(bench.store, chunk_size) == [range(19, 20), range(3, 6), range(9, 11), range(1, 2)]


async def test_chunks_of_two_objects_never_share_a_request(streaming: Workshop, chunk_size: int) -> None:
    contents = {key: streaming.put(key, 12) for key in "ab"}
    bench = await streaming.bench(requests=2)
    blobs = {key: await bench.acquire(key) for key in "ab"}
    async with trio.open_nursery() as nursery:
        for blob in blobs.values():
            nursery.start_soon(bench.fetcher.fetch_all, blob)
    for key, content in contents.items():
        assert blobs[key].view(0, len(content)) == content
        assert sorted(chunk for batch in batches(bench.store, chunk_size, key) for chunk in batch) == list(range(12))


# Each chunk lands by itself


async def test_each_chunk_of_a_run_is_readable_as_soon_as_it_is_here(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(4, requests=1)
    gate = bench.store.block(after=2 * chunk_size + 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, blob)
        await until(lambda: states(blob) == [VERIFIED, VERIFIED, MISSING, MISSING])
        assert await bench.read(blob, 0, 2 * chunk_size) == content[: 2 * chunk_size]
        assert bench.tier.statistics().used_bytes == 4 * chunk_size  # reserved
        gate.set()
    assert blob.complete
    assert batches(bench.store, chunk_size) == [range(4)]


async def test_a_reader_joins_a_chunk_of_a_run_under_way(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(4, requests=1)
    gate = bench.store.block(after=chunk_size + 100)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await bench.read(blob, 3 * chunk_size, 3 * chunk_size + 50))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, blob)
        await until(lambda: states(blob)[0] == VERIFIED)
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert got == []
        gate.set()
    assert got == [content[3 * chunk_size : 3 * chunk_size + 50]]
    assert len(batches(bench.store, chunk_size)) == 1


async def test_a_reader_gets_its_bytes_before_their_chunk_is_whole(
    streaming: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size // 8)
    bench, blob, content = await streaming.opened(2, requests=1)
    gate = bench.store.block(after=chunk_size // 2)
    with trio.fail_after(5):
        assert await bench.read(blob, 0, 100) == content[:100]
        assert await bench.read(blob, 50, chunk_size // 4) == content[50 : chunk_size // 4]
    assert states(blob) == [MISSING, MISSING]
    later: list[bytes] = []

    async def read() -> None:
        later.append(await bench.read(blob, chunk_size // 2 - 10, chunk_size // 2 + 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked(0.01)
        assert later == []
        gate.set()
    assert later == [content[chunk_size // 2 - 10 : chunk_size // 2 + 10]]


async def test_bytes_that_came_before_a_request_broke_are_right_and_come_again(
    streaming: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size // 8)
    bench, blob, content = await streaming.opened(1, requests=1)
    bench.store.fail(TransientStoreError("reset"), times=2, after=chunk_size // 2)
    assert await bench.read(blob, 0, 100) == content[:100]
    assert await bench.read(blob, 0, chunk_size) == content
    assert await bench.read(blob, chunk_size - 10, chunk_size) == content[-10:]
    assert batches(bench.store, chunk_size) == [range(1)] * 3


async def test_the_first_reader_has_the_store_for_himself_for_a_moment(
    streaming: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.flights.LONGEST_HEAD_START_S", 2.0)  # longer than a busy host takes to look
    bench, blob, content = await streaming.opened(20, requests=8)
    bench.fetcher.hold(blob)
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, blob, 5 * chunk_size, 5 * chunk_size + 1)
        await bench.store.arrived(1)
        await wait_all_tasks_blocked()
        assert batches(bench.store, chunk_size) == [range(5, 6)]
        # But no longer than that: a store that is slow to answer is asked for the rest.
        with trio.fail_after(5):
            await bench.store.arrived(8)
        gate.set()
    await until(lambda: blob.complete)
    assert blob.view(0, len(content)) == content
    bench.fetcher.unhold(blob)


# Failures


async def test_a_request_that_breaks_is_resumed_at_the_first_chunk_that_has_not_landed(
    streaming: Workshop, chunk_size: int, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    bench, blob, content = await streaming.opened(4, requests=1)
    bench.store.fail(TransientStoreError("reset"), after=2 * chunk_size + chunk_size // 2)
    bench.store.fail(TransientStoreError("reset"), offset=2 * chunk_size)
    bench.store.fail(TransientStoreError("reset"), offset=2 * chunk_size, after=chunk_size)
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert batches(bench.store, chunk_size) == [range(4), range(2, 4), range(2, 4), range(3, 4)]
    statistics = bench.fetcher.statistics()
    assert (statistics.fetched_chunks, statistics.fetched_bytes, statistics.failed_chunks) == (4, 4 * chunk_size, 0)
    assert bench.tier.statistics().used_bytes == 4 * chunk_size == await recorded_bytes(bench.tier)


async def test_a_request_that_breaks_within_a_chunk_is_resumed_there(
    streaming: Workshop, chunk_size: int, mock_clock: MockClock, small_parts: None
) -> None:
    mock_clock.autojump_threshold = 0.05
    bench, blob, content = await streaming.opened(3, requests=1)
    stops = [10, 300, chunk_size - 1, chunk_size, 2 * chunk_size + 70, 3 * chunk_size - 1]
    for begin, stop in itertools.pairwise([0, *stops]):
        bench.store.fail(StoreSlowError("few bytes"), offset=begin, after=stop - begin)
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    asked = [(request.offset, request.length) for request in bench.store.requests if request.method == "read"]
    assert asked == [(begin, len(content) - begin) for begin in [0, *stops]]
    assert bench.fetcher.statistics().fetched_bytes == len(content)
    assert bench.tier.statistics().used_bytes == len(content) == await recorded_bytes(bench.tier)
    assert await bench.tier.damage.check_chunk(blob, 0, crc32c(content[:chunk_size]))


async def test_a_part_counts_no_more_once_its_file_was_truncated_or_its_request_fails_for_good(
    streaming: Workshop, chunk_size: int, mock_clock: MockClock, small_parts: None
) -> None:
    mock_clock.autojump_threshold = 0.05
    bench, blob, content = await streaming.opened(2, requests=1)
    bench.store.fail(TransientStoreError("reset"), after=chunk_size + 50)
    bench.store.fail(StoreAccessError("denied"), offset=chunk_size + 50)
    with pytest.raises(StoreAccessError):
        await bench.fetcher.fetch_all(blob)
    await until(bench.idle)
    assert states(blob) == [VERIFIED, MISSING]
    assert bench.tier.statistics().used_bytes == chunk_size == await recorded_bytes(bench.tier)
    bench.store.fail(TransientStoreError("reset"), offset=chunk_size, after=50)
    gate, asked = bench.store.block(offset=chunk_size + 50), len(bench.store.requests)
    bench.store.fail(TransientStoreError("reset"), offset=chunk_size + 50)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.fetcher.fetch_all, blob)
        await bench.store.arrived(asked + 2)
        assert bench.store.requests[-1].offset == chunk_size + 50
        blob.resizes += 1
        gate.set()
    assert bench.store.requests[-1].offset == chunk_size
    assert blob.view(0, len(content)) == content


async def test_a_request_that_fails_for_good_leaves_what_has_landed(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(4, requests=1)
    error = StoreAccessError("denied")
    bench.store.fail(error, after=chunk_size + 5)
    with pytest.raises(StoreAccessError) as caught:
        await bench.fetcher.fetch_all(blob)
    assert caught.value is error
    await until(bench.idle)
    assert states(blob) == [VERIFIED, MISSING, MISSING, MISSING]
    assert bench.fetcher.statistics().failed_chunks == 3
    # Room for the others is given back.
    assert bench.tier.statistics().used_bytes == chunk_size == await recorded_bytes(bench.tier)
    assert blob.users == 1
    assert await bench.read(blob, 0, len(content)) == content
    assert bench.tier.statistics().used_bytes == 4 * chunk_size


async def test_readers_of_a_run_that_fails_all_hear_of_it(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, _ = await streaming.opened(8, requests=1)
    error = StoreAccessError("denied")
    gate = bench.store.block(offset=7 * chunk_size)
    bench.store.fail(error, offset=0, after=2 * chunk_size)
    errors: list[StoreError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, blob, 7 * chunk_size, 7 * chunk_size + 1)  # takes the only place
        await bench.store.arrived(1)
        for chunk in range(4):
            start = chunk * chunk_size
            if chunk < 2:
                nursery.start_soon(bench.read, blob, start, start + 5)
            else:
                nursery.start_soon(failure, bench, blob, start, start + 5, errors)
            await wait_all_tasks_blocked()
        gate.set()
    assert batches(bench.store, chunk_size) == [range(7, 8), range(4)]
    assert errors == [error] * 2


async def test_an_object_replaced_between_two_requests_of_a_run_is_never_mixed(
    streaming: Workshop, chunk_size: int, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.05
    old = streaming.put("a", 4)
    bench = await streaming.bench(requests=1)
    blob = await bench.acquire("a")
    bench.store.fail(TransientStoreError("reset"), after=2 * chunk_size + 1)
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_batch, bench, blob, errors)
        await until(lambda: states(blob)[1] == VERIFIED)
        bench.store.put("a", content_of("other", 4 * chunk_size))
    assert [type(error) for error in errors] == [ObjectChangedError]
    assert states(blob) == [VERIFIED, VERIFIED, MISSING, MISSING]
    assert await bench.read(blob, 0, 2 * chunk_size) == old[: 2 * chunk_size]


async def test_a_version_learned_by_one_run_is_asked_for_by_the_next(streaming: Workshop, chunk_size: int) -> None:
    bench, blob, content = await streaming.opened(8, version_id="v1", requests=1)
    await bench.read(blob, 0, 1)
    streaming.put("a", 8, version_id="v2")
    streaming.store.purge("a", "v1")
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert [request.version_id for request in bench.store.requests[:3]] == [None, "v1", None]
    assert all(len(batch) <= BATCH_LIMIT for batch in batches(bench.store, chunk_size))


async def test_nothing_starts_once_the_server_stops(streaming: Workshop) -> None:
    """Commands and reads that are not cancelled yet, as what they do may not be, find nobody to carry them."""
    streaming.put("a", 4)
    async with opened(streaming.directory) as tier:
        async with fetching(streaming.store, tier, memory_limit=streaming.memory_for(4)) as fetcher:
            pass
        async with tier.blobs.using(streaming.store.generation("a")) as blob:
            for wait in (partial(fetcher.fetch_all, blob), partial(fetcher.read, blob, 0, 1)):
                with trio.fail_after(1), pytest.raises(StoreUnavailableError, match="server stopping"):
                    await wait()
    assert streaming.store.requests == []


# What an earlier server left


async def test_no_request_crosses_chunks_that_are_here(streaming: Workshop, chunk_size: int) -> None:
    content = streaming.put("a", 16)
    here = {2, 3, 7, 8, 12}
    async with (
        opened(streaming.directory) as tier,
        fetching(streaming.store, tier, memory_limit=streaming.memory_for(1)) as fetcher,
        tier.blobs.using(streaming.store.generation("a")) as blob,
    ):
        for chunk in here:
            await fetcher.read(blob, chunk * chunk_size, chunk * chunk_size + 1)
    streaming.store.requests.clear()
    bench = await streaming.bench(requests=1)
    blob = await bench.acquire("a")
    # Some are checked by now, and some are not.
    for chunk in (2, 8):
        await bench.read(blob, chunk * chunk_size, chunk * chunk_size + 1)
    assert states(blob)[7:9] == [UNVERIFIED, VERIFIED]
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert batches(bench.store, chunk_size) == [range(2), range(4, 7), range(9, 12), range(13, 16)]
    assert bench.fetcher.statistics().verified_chunks == len(here)


async def test_a_flight_that_is_given_up_while_its_chunk_is_verified_does_not_land_again(streaming: Workshop) -> None:
    bench, blob, _ = await streaming.opened(1)
    await bench.fetcher.fetch_all(blob)
    await until(bench.idle)
    flight, users = Flight(blob, 0, demanded=False), blob.users
    flight.done.set()
    assert await bench.fetcher._batches._is_here(flight)
    assert blob.users == users


async def test_a_damaged_chunk_is_fetched_by_itself(streaming: Workshop, chunk_size: int) -> None:
    content = streaming.put("a", 8)
    await fill_from(streaming, "a")
    for chunk in (1, 2, 6):
        flip_byte(blob_files(streaming.directory)[0], chunk * chunk_size + 9)
    bench = await streaming.bench(requests=1)
    blob = await bench.acquire("a")
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert sorted(batches(bench.store, chunk_size), key=lambda batch: batch[0]) == [
        range(1, 2),
        range(2, 3),
        range(6, 7),
    ]
    assert bench.tier.statistics().corrupt_chunks == 3
    assert bench.tier.statistics().used_bytes == len(content)


async def test_a_damaged_chunk_that_cannot_be_fetched_costs_no_reader_of_the_others(
    streaming: Workshop, chunk_size: int
) -> None:
    """What is here is served while the store is down."""
    content = streaming.put("a", 4)
    await fill_from(streaming, "a")
    flip_byte(blob_files(streaming.directory)[0], 9)
    streaming.put("other", 1)
    bench = await streaming.bench(requests=1)
    blob, other = await bench.acquire("a"), await bench.acquire("other")
    gate = bench.store.block(key="other")
    bench.store.fail(StoreUnavailableError("down"), times=float("inf"), key="a")
    errors: list[StoreError] = []
    got: list[int] = []

    async def read(chunk: int) -> None:
        start, stop = chunk * chunk_size, (chunk + 1) * chunk_size
        try:
            assert await bench.read(blob, start, stop) == content[start:stop]
        except StoreError as error:
            errors.append(error)
        else:
            got.append(chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, other, 0, 1)  # takes the only place, so that the others make a batch
        await bench.store.arrived(1)
        for chunk in range(4):
            nursery.start_soon(read, chunk)
            await wait_all_tasks_blocked()
        gate.set()
    assert sorted(got) == [1, 2, 3]
    assert len(errors) == 1


# No room


@pytest.mark.parametrize("budget", [0, 0.5, 1, 2.5, 4, 6, 11])
@pytest.mark.parametrize("held", [False, True])
async def test_an_object_larger_than_the_cache_is_read_exactly(
    streaming: Workshop, chunk_size: int, budget: float, held: bool
) -> None:
    bench, blob, content = await streaming.opened(12.3, requests=4, budget=budget)
    if held:
        bench.fetcher.hold(blob)
    with trio.fail_after(5):
        assert await read_all(bench, blob, chunk_size) == content
        assert await bench.read(blob, 0, len(content)) == content
    await until(bench.idle)
    used = bench.tier.statistics().used_bytes
    assert used == await recorded_bytes(bench.tier) <= budget * chunk_size
    assert used > (budget - BATCH_LIMIT) * chunk_size  # less room than for a batch may be left unused
    assert blob.users == 1


async def test_readers_of_a_run_without_room_are_served_from_memory_and_others_not_waited_for(
    streaming: Workshop, chunk_size: int
) -> None:
    bench, blob, content = await streaming.opened(4, requests=2, budget=0)
    got: dict[int, bytes] = {}

    async def read(chunk: int) -> None:
        got[chunk] = await bench.read(blob, chunk * chunk_size, (chunk + 1) * chunk_size)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for chunk in range(4):
                nursery.start_soon(read, chunk)
    assert b"".join(got[chunk] for chunk in range(4)) == content
    await until(bench.idle)
    assert bench.fetcher.statistics().uncached_chunks == 4
    assert bench.tier.statistics().used_bytes == 0


async def test_other_models_make_room_for_a_batch(streaming: Workshop, chunk_size: int) -> None:
    content = streaming.put("a", 8)
    bench = await streaming.bench(requests=1, budget=8)
    for number in range(8):
        await fill(bench.tier, f"old{number}", content_of(f"old{number}", chunk_size))
    blob = await bench.acquire("a")
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert bench.tier.statistics().used_bytes == 8 * chunk_size == await recorded_bytes(bench.tier)


async def test_a_disk_that_fills_up_within_a_run_keeps_what_has_landed(tmp_path: Path, chunk_size: int) -> None:
    store = MemoryStore({"a": content_of("a", 60 * chunk_size)}, streaming=True)
    with tmpfs(tmp_path / "disk", 40 * chunk_size) as cache:
        async with (
            opened(cache) as tier,
            fetching(store, tier, memory_limit=4 * chunk_size) as fetcher,
            tier.blobs.using(store.generation("a")) as blob,
        ):
            tier.budget._min_free = -(1 << 40)  # whatever statvfs says
            with trio.fail_after(10):
                with pytest.raises(CacheFullError):
                    await fetcher.fetch_all(blob)
                bench = Bench(store, tier, fetcher)
                assert await read_all(bench, blob, chunk_size) == content_of("a", 60 * chunk_size)
            await until(bench.idle)
            landed = states(blob).count(VERIFIED)
            assert 10 < landed < 60
            assert tier.statistics().used_bytes == landed * chunk_size


async def test_a_write_that_fails_within_a_run_is_tried_again_for_what_is_left(
    streaming: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size)
    content = streaming.put("a", 4)
    bench = await streaming.bench(requests=1)
    await fill(bench.tier, "old", content_of("old", chunk_size))
    blob = await bench.acquire("a")
    break_writes(monkeypatch, errno.ENOSPC, begin=2 * chunk_size, times=1)
    await bench.fetcher.fetch_all(blob)
    assert blob.view(0, len(content)) == content
    assert batches(bench.store, chunk_size) == [range(4), range(2, 4)]
    assert bench.tier.statistics().evictions == 1
    assert bench.tier.statistics().used_bytes == 4 * chunk_size == await recorded_bytes(bench.tier)


async def test_a_reader_may_leave_while_the_disk_makes_room(
    streaming: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench, blob, _ = await streaming.opened(4, requests=1)
    break_writes(monkeypatch, errno.ENOSPC, begin=2 * chunk_size, times=1)
    write_failed, reader = bench.tier.space.write_failed, trio.CancelScope()

    async def slowly(*arguments: Any, **options: Any) -> None:
        with trio.CancelScope(shield=True):  # as threads are
            await write_failed(*arguments, **options)
            reader.cancel()
            await trio.sleep(2 * LINGER_S)

    monkeypatch.setattr(bench.tier.space, "write_failed", slowly)
    with reader:
        await bench.fetcher.fetch_all(blob)
    await until(bench.idle)
    assert bench.tier.statistics().used_bytes == 2 * chunk_size
    assert batches(bench.store, chunk_size) == [range(4)]
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("bench_of", ["workshop", "streaming"])
async def test_a_disk_that_stays_full_costs_other_models_once(
    workshop: Workshop, chunk_size: int, monkeypatch: pytest.MonkeyPatch, bench_of: str
) -> None:
    """Somebody else has filled it, or a quota is reached: evicting does not help."""
    workshop.store = MemoryStore(streaming=bench_of == "streaming")
    content = workshop.put("a", 12)
    bench = await workshop.bench(requests=1)
    for number in range(40):
        await fill(bench.tier, f"old{number}", content_of(f"old{number}", chunk_size))
    blob = await bench.acquire("a")
    break_writes(monkeypatch, errno.ENOSPC)
    assert await read_all(bench, blob, chunk_size) == content
    # Room for a batch and the headroom of four, at most.
    assert bench.tier.statistics().evictions <= BATCH_LIMIT + 4


# It ends, one way or the other


@pytest.mark.parametrize("seed", range(12))
async def test_fetching_all_ends_whatever_happens(
    tmp_path: Path, chunk_size: int, seed: int, mock_clock: MockClock
) -> None:
    mock_clock.rate = 50
    draw = random.Random(seed)
    store = MemoryStore(
        {key: content_of(key, int(draw.uniform(0.5, 12) * chunk_size)) for key in "abc"}, streaming=draw.random() < 0.7
    )
    budget = draw.choice([0, 2, 5, 9, 20]) * chunk_size
    outcomes: list[str] = []

    async def use(bench: Bench) -> None:
        for _ in range(6):
            key = draw.choice("abc")
            async with bench.tier.blobs.using(store.generation(key)) as blob:
                try:
                    with trio.move_on_after(draw.choice([5, 1000])):
                        if draw.random() < 0.5:
                            await bench.fetcher.fetch_all(blob)
                            assert blob.complete
                        else:
                            start = draw.randrange(blob.generation.size)
                            got = await bench.read(blob, start, blob.generation.size)
                            assert got == store.contents[key, blob.generation.etag][start:]
                        outcomes.append("done")
                except (StoreError, CacheFullError) as error:
                    outcomes.append(type(error).__name__)

    async with (
        opened(tmp_path / "cache", budget=budget) as tier,
        fetching(store, tier, memory_limit=draw.choice([1, 4, 16]) * chunk_size // 2, deadline_s=2) as fetcher,
    ):
        for _ in range(draw.randrange(6)):
            error = draw.choice([TransientStoreError("reset"), StoreAccessError("denied")])
            store.fail(error, times=draw.randrange(1, 6), after=draw.randrange(3 * chunk_size), method="read")
        bench = Bench(store, tier, fetcher)
        with trio.fail_after(50 * 10):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(use, bench)
        await until(bench.idle)
        assert tier.statistics().open_blobs == 0
        assert tier.statistics().used_bytes == await recorded_bytes(tier) <= budget
    assert outcomes
