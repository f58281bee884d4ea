"""Making space: which blobs are evicted for others."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.held import Held, begin
from tests.support.parts import blob_files, fill, generation_of, opened, recorded_bytes, states
from tests.unit.disk.common import MISSING, here, small, store
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex


async def test_the_least_recently_used_blobs_make_room(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=10 * chunk_size) as tier:
        for key in "abcde":
            await fill(tier, key, small(key, chunk_size, 2))
        async with tier.blobs.using(generation_of("a", small("a", chunk_size, 2))):
            pass
        await fill(tier, "f", small("f", chunk_size, 2))
        # Room for one chunk and the headroom of four: three blobs of two.
        assert await here(tier) == dict.fromkeys("aef", 2 * chunk_size)
        assert tier.statistics().used_bytes == 6 * chunk_size
        assert tier.statistics().evictions == 3
        assert tier.statistics().evicted_bytes == 6 * chunk_size
        assert len(blob_files(cache)) == 3


async def test_the_order_of_use_survives_a_restart(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        for key in "abc":
            await fill(tier, key, small(key, chunk_size, 3))
        async with tier.blobs.using(generation_of("a", small("a", chunk_size, 3))):
            pass
    async with opened(cache, budget=9 * chunk_size) as tier:
        await fill(tier, "d", small("d", chunk_size, 1))
        assert await here(tier) == {"a": 3 * chunk_size, "d": chunk_size}


async def test_blobs_in_use_and_pinned_ones_are_not_evicted(cache: Path, chunk_size: int) -> None:
    contents = {key: small(key, chunk_size, 2) for key in "abcd"}
    async with opened(cache, budget=6 * chunk_size) as tier:
        pinned = await fill(tier, "a", contents["a"])
        async with tier.blobs.using(pinned) as blob:
            await tier.residencies.pin(blob, True)
        await fill(tier, "b", contents["b"])
        await fill(tier, "c", contents["c"])
        async with tier.blobs.using(generation_of("b", contents["b"])) as in_use:
            await fill(tier, "d", contents["d"])
            assert await here(tier) == dict.fromkeys("abd", 2 * chunk_size)
            assert in_use.view(0, 2 * chunk_size) == contents["b"]


async def test_without_room_a_chunk_is_declined_and_nothing_evicted(cache: Path, chunk_size: int) -> None:
    """Evicting the little that may go would not make room."""
    a, b = small("a", chunk_size, 3.5), small("b", chunk_size, 3)
    async with opened(cache, budget=4 * chunk_size) as tier, tier.blobs.using(generation_of("a", a)) as in_use:
        assert await store(tier, in_use, a, 0, 1, 2, 3) == [True] * 4
        await fill(tier, "idle", small("idle", chunk_size, 0.25))
        async with tier.blobs.using(generation_of("b", b)) as other:
            assert await store(tier, other, b, 0) == [False]
            assert states(other) == [MISSING] * 3
            assert tier.space.full(generation_of("b", b))
        assert tier.statistics().evictions == 0
        assert tier.statistics().refused_chunks == 1
        assert tier.statistics().used_bytes == 3.75 * chunk_size == await recorded_bytes(tier)


@pytest.mark.parametrize("evicted", [False, True])
async def test_room_is_not_looked_for_again_and_again_but_used_at_once(
    cache: Path, chunk_size: int, mock_clock: MockClock, evicted: bool
) -> None:
    a, b = small("a", chunk_size, 2), small("b", chunk_size, 2)
    async with opened(cache, budget=2 * chunk_size) as tier:
        holding = await tier.blobs.acquire(generation_of("a", a))
        await store(tier, holding, a, 0, 1)
        async with tier.blobs.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
            assert tier.space.full(generation_of("b", b))
            mock_clock.jump(1.5)
            assert not tier.space.full(generation_of("b", b))
            assert await store(tier, blob, b, 0) == [False]
            assert tier.space.full(generation_of("b", b))
            tier.blobs.release(holding)
            assert not evicted or await tier.residencies.evict(holding.generation) == 2 * chunk_size
            assert not tier.space.full(generation_of("b", b))
            assert await store(tier, blob, b, 0) == [True]
        assert await here(tier) == {"b": chunk_size}


@pytest.mark.parametrize("limits", [{"budget": 0}, {"min_free": 1 << 60}])
async def test_limits_that_leave_nothing_keep_nothing(cache: Path, chunk_size: int, limits: dict[str, int]) -> None:
    a = small("a", chunk_size)
    async with opened(cache, **limits) as tier, tier.blobs.using(generation_of("a", a)) as blob:
        assert tier.space.sizes()[1] == 0
        assert await store(tier, blob, a, 0) == [False]
        assert tier.statistics().used_bytes == 0


async def test_free_bytes_are_what_the_budget_leaves(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=10 * chunk_size) as tier:
        await fill(tier, "a", small("a", chunk_size, 3))
        assert tier.space.sizes() == (10 * chunk_size, 7 * chunk_size)


async def test_a_budget_that_was_made_smaller_is_met_at_the_next_chunk(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        for number in range(20):
            await fill(tier, f"old{number}", small(f"old{number}", chunk_size))
    a = small("a", chunk_size)
    async with opened(cache, budget=8 * chunk_size) as tier, tier.blobs.using(generation_of("a", a)) as blob:
        assert await store(tier, blob, a, 0) == [True]
        assert tier.statistics().used_bytes <= 8 * chunk_size


@pytest.mark.parametrize(("budget", "most_evictions"), [(10, 10), (100, 8 + 4 + 4)])
async def test_chunks_stored_at_once_keep_to_the_budget_and_do_not_evict_more_than_they_need(
    cache: Path, chunk_size: int, budget: int, most_evictions: int
) -> None:
    """Eight are needed; the headroom is four, and may be searched for twice."""
    new = small("new", chunk_size, 10)
    async with opened(cache, budget=budget * chunk_size) as tier:
        for number in range(budget):
            await fill(tier, f"old{number}", small(f"old{number}", chunk_size))
        async with tier.blobs.using(generation_of("new", new)) as blob, trio.open_nursery() as nursery:
            for chunk in range(8):
                nursery.start_soon(store, tier, blob, new, chunk)
        assert tier.statistics().used_bytes == await recorded_bytes(tier) <= budget * chunk_size
        assert tier.statistics().evictions <= most_evictions


async def test_a_blob_evicted_by_two_commands_at_once_is_counted_once(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
        await fill(tier, "b", small("b", chunk_size))
        async with trio.open_nursery() as nursery:
            freed = [begin(nursery, tier.residencies.evict, generation) for _ in range(2)]
        assert tier.statistics().used_bytes == chunk_size
        assert sorted(freed) == [[0], [2 * chunk_size]]
        assert tier.statistics().evicted_bytes == 2 * chunk_size


async def test_a_blob_pinned_while_room_is_made_stays(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = small("a", chunk_size, 2), small("b", chunk_size, 2)
    async with opened(cache, budget=2 * chunk_size) as tier:
        await fill(tier, "a", a)
        choosing = Held(monkeypatch, BlobIndex, "evictable", after=True)
        async with tier.blobs.using(generation_of("b", b)) as blob, trio.open_nursery() as nursery:
            nursery.start_soon(store, tier, blob, b, 0)
            await choosing.reached()
            async with tier.blobs.using(generation_of("a", a)) as pinned:
                pinning = begin(nursery, tier.residencies.pin, pinned, True)
                with trio.move_on_after(0.05):
                    # The index may be in use by the search, and then this waits for it.
                    while not pinning:  # noqa: ASYNC110 - likewise
                        await trio.sleep(0.005)
            choosing.go.set()
        assert (await tier.residencies.of(generation_of("a", a))).disk_bytes == 2 * chunk_size


async def test_a_blob_makes_room_once_it_is_synced(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in use while its bytes are brought to the disk, and nothing else could be evicted."""
    syncing = Held(monkeypatch, Blob, "sync")
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.SYNC_INTERVAL_S", 0.0)
    async with opened(cache, budget=5 * chunk_size) as tier, trio.open_nursery() as nursery:
        await fill(tier, "a", small("a", chunk_size, 4))
        nursery.start_soon(tier.run)
        await syncing.reached()
        async with tier.blobs.using(generation_of("b", small("b", chunk_size, 4))) as blob:
            async with trio.open_nursery() as waiting:
                reserved = begin(waiting, tier.space.reserve, blob, 4 * chunk_size)
                await wait_all_tasks_blocked(0.05)
                assert not reserved
                syncing.go.set()
            assert reserved == [True]
            tier.space.unreserve(blob, 4 * chunk_size)
        assert await here(tier) == {}
        nursery.cancel_scope.cancel()
