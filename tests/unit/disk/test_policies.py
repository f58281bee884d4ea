"""Eviction policies at work in the disk tier, and what it reports of evictions."""

from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of, fill, generation_of, opened, recorded_bytes, until
from tests.unit.disk.common import here
from trimsfs.eviction_policies import POLICIES, eager, fifo
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier


@pytest.fixture
def no_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.space.HEADROOM_CHUNKS", 0)


async def keys(tier: DiskTier) -> str:
    """The keys of which there is something on disk."""
    return "".join(await here(tier))


async def use(tier: DiskTier, key: str, size: int, times: int = 1) -> None:
    for _ in range(times):
        async with tier.blobs.using(generation_of(key, content_of(key, size))):
            pass


@pytest.mark.usefixtures("no_headroom")
@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("lru", "bcn"),
        ("fifo", "acn"),  # b came first
        ("lcu", "abn"),
        ("cost", "acn"),  # b is the largest: a byte of it costs the least
        ("flush", "n"),
        ("eager", "n"),
    ],
)
async def test_each_policy_chooses_for_itself(cache: Path, chunk_size: int, policy: str, kept: str) -> None:
    sizes = {"a": chunk_size, "b": 2 * chunk_size, "c": chunk_size}

    def load_cost(_key: str, size: int) -> float:
        return 1.0 + size / 1e9

    async with opened(cache, budget=4 * chunk_size, policy=POLICIES[policy], load_cost=load_cost) as tier:
        for key in "bac":
            await fill(tier, key, content_of(key, sizes[key]))
        await use(tier, "a", sizes["a"], 2)
        await use(tier, "b", sizes["b"], 2)
        await use(tier, "c", sizes["c"])
        await fill(tier, "n", content_of("n", chunk_size))
        assert await keys(tier) == kept
        assert tier.statistics().used_bytes == await recorded_bytes(tier)


async def test_never_keeps_what_is_here_and_takes_nothing_more(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=2 * chunk_size, policy=POLICIES["never"]) as tier:
        for key in "ab":
            await fill(tier, key, content_of(key, chunk_size))
        async with tier.blobs.using(generation_of("c", content_of("c", chunk_size))) as blob:
            assert not await tier.space.reserve(blob, chunk_size)
        assert await keys(tier) == "ab"
        assert tier.statistics().used_bytes == 2 * chunk_size
        # What is told to go, goes.
        assert await tier.residencies.evict(generation_of("a", content_of("a", chunk_size))) == chunk_size


@pytest.mark.usefixtures("no_headroom")
async def test_the_order_of_arrival_survives_a_restart(cache: Path, chunk_size: int) -> None:
    async with opened(cache, policy=fifo) as tier:
        for key in "cab":
            await fill(tier, key, content_of(key, chunk_size))
        await use(tier, "c", chunk_size)
    async with opened(cache, budget=3 * chunk_size, policy=fifo) as tier:
        await use(tier, "c", chunk_size)
        await fill(tier, "d", content_of("d", chunk_size))
        assert await keys(tier) == "abd"


async def test_eager_gives_up_what_nobody_uses_and_has_not_pinned(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.FLUSH_INTERVAL_S", 0.005)
    async with opened(cache, policy=eager) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        async with tier.blobs.using(generation_of("p", content_of("p", chunk_size))) as pinned:
            await tier.residencies.pin(pinned, True)
            await fill(tier, "p", content_of("p", chunk_size))
        async with tier.blobs.using(generation_of("a", content_of("a", chunk_size))) as blob:
            await fill(tier, "a", content_of("a", chunk_size))
            await trio.sleep(0.05)
            assert blob.complete
            assert await keys(tier) == "ap"
        await until(lambda: tier.statistics().evictions == 1)
        assert await keys(tier) == "p"
        nursery.cancel_scope.cancel()


async def test_who_asks_hears_of_each_blob_that_leaves_while_it_is_still_open(cache: Path, chunk_size: int) -> None:
    removed: list[tuple[str, bool, int]] = []

    def hear(blob: Blob) -> None:
        removed.append((blob.generation.key, blob.attached, blob.users))

    async with opened(cache, removed=hear) as tier:
        generations = [await fill(tier, key, content_of(key, chunk_size)) for key in "ab"]
        assert removed == []
        await tier.residencies.evict(generations[1])
        assert removed == [("b", True, 0)]
        await tier.residencies.evict(generations[1])
        assert len(removed) == 1


# Room that is reserved


async def test_room_is_counted_from_its_reservation_to_the_end(cache: Path, chunk_size: int) -> None:
    async with (
        opened(cache, budget=4 * chunk_size) as tier,
        tier.blobs.using(generation_of("a", content_of("a", 4 * chunk_size))) as blob,
    ):
        assert await tier.space.reserve(blob, 3 * chunk_size)
        assert tier.statistics().used_bytes == 3 * chunk_size
        assert not await tier.space.reserve(blob, 2 * chunk_size)
        assert tier.statistics().used_bytes == 3 * chunk_size
        tier.space.unreserve(blob, 3 * chunk_size)
        assert tier.statistics().used_bytes == 0
        tier.blobs.release(
            await tier.blobs.acquire(generation_of("b", b""))
        )  # something has been closed: room is looked for again
        assert await tier.space.reserve(blob, 4 * chunk_size)
        tier.space.unreserve(blob, 4 * chunk_size)


async def test_a_budget_that_was_lowered_is_kept_to_at_once(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        for key in "abc":
            await fill(tier, key, content_of(key, chunk_size))
    async with opened(cache, budget=2 * chunk_size) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        await until(lambda: tier.statistics().used_bytes <= 2 * chunk_size)
        assert tier.statistics().evictions == 1
        nursery.cancel_scope.cancel()
