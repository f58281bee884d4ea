"""Shares of tenants: what one loads never takes what another has."""

from pathlib import Path

import pytest
from pydantic import ByteSize

from tests.support.parts import content_of, copier, fill, generation_of, opened
from tests.support.served import served
from tests.support.stores import MemoryStore
from trimsfs.errors import CacheFullError
from trimsfs.eviction_policies import lru
from trimsfs.options.schema import Tenant
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.host.memory_tier import HostTier
from trimsfs.tiers.quotas import REST, Quotas


@pytest.fixture(autouse=True)
def no_headroom(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.space.HEADROOM_CHUNKS", 0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


async def keys(tier: DiskTier) -> set[str]:
    """What is on disk whole."""
    return {here.generation.key for here in await tier.residencies.all() if here.disk_bytes == here.generation.size}


def test_the_longest_directory_decides_whose_an_object_is() -> None:
    quotas = Quotas({"a/": 1, "a/b/": 2, "c/": None})

    assert [quotas.pool(key) for key in ("a/x", "a/b/x", "ab/x", "a", "c/x")] == ["a/", "a/b/", REST, REST, REST]
    assert [quotas.limit(pool, 10) for pool in quotas.pools()] == [1, 2, 7]
    assert quotas.limit(REST, None) is None


@pytest.mark.parametrize("budget", [8, None])
async def test_a_tenant_makes_room_among_its_own(budget: int | None, cache: Path, chunk_size: int) -> None:
    limit = None if budget is None else budget * chunk_size
    async with opened(cache, budget=limit, quotas=Quotas({"a/": 2 * chunk_size, "b/": 2 * chunk_size})) as tier:
        for key in ("b/1", "b/2", "rest", "a/1", "a/2", "a/3"):
            await fill(tier, key, content_of(key, chunk_size))

        assert await keys(tier) == {"b/1", "b/2", "rest", "a/2", "a/3"}
        assert tier.statistics().tenant_used_bytes == {"a/": 2 * chunk_size, "b/": 2 * chunk_size}
        assert tier.statistics().used_bytes == 5 * chunk_size


async def test_the_rest_makes_room_among_the_rest(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=4 * chunk_size, quotas=Quotas({"a/": 2 * chunk_size})) as tier:
        for key in ("a/1", "x", "y", "z"):
            await fill(tier, key, content_of(key, chunk_size))

        assert await keys(tier) == {"a/1", "y", "z"}


async def test_what_is_larger_than_a_share_is_not_kept(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=9 * chunk_size, quotas=Quotas({"a/": 2 * chunk_size})) as tier:
        await fill(tier, "a/1", content_of("a/1", chunk_size))
        big = generation_of("a/big", content_of("a/big", 4 * chunk_size))
        async with tier.blobs.using(big) as blob:
            assert not await tier.space.reserve(blob, 4 * chunk_size)
            # That a tenant's share is full keeps nobody else from anything.
            other = generation_of("other", content_of("other", chunk_size))
            async with tier.blobs.using(other) as another:
                assert await tier.space.reserve(another, chunk_size)
                tier.space.unreserve(another, chunk_size)
        assert await keys(tier) == {"a/1"}


async def test_shares_that_were_made_smaller_are_kept_to_after_a_restart(cache: Path, chunk_size: int) -> None:
    async with opened(cache, quotas=Quotas({"a/": 3 * chunk_size})) as tier:
        for key in ("a/1", "a/2", "a/3", "rest"):
            await fill(tier, key, content_of(key, chunk_size))
    async with opened(cache, quotas=Quotas({"a/": chunk_size})) as tier:
        assert tier.statistics().tenant_used_bytes == {"a/": 3 * chunk_size}
        await tier.space.keep()
        assert await keys(tier) == {"a/3", "rest"}


async def test_memory_is_shared_out_as_the_disk_is(cache: Path, chunk_size: int) -> None:
    quotas = Quotas({"a/": 2 * chunk_size, "b/": 2 * chunk_size})
    async with opened(cache) as tier:
        host = HostTier(copier(MemoryStore()).populate, budget=5 * chunk_size, policy=lru, quotas=quotas)
        blobs = {}
        for key in ("b/1", "b/2", "x", "a/1", "a/2", "a/3", "y"):
            generation = await fill(tier, key, content_of(key, chunk_size))
            async with tier.blobs.using(generation) as blob:
                await host.load(blob)
            blobs[key] = blob

        assert {key for key, blob in blobs.items() if host.holds(blob)} == {"b/1", "b/2", "a/2", "a/3", "y"}
        assert host.statistics().tenant_used_bytes == {"a/": 2 * chunk_size, "b/": 2 * chunk_size}


@pytest.mark.parametrize("command", ["warm-disk", "pin"])
async def test_a_full_tenant_is_named_with_its_limit_and_the_remedy(
    command: str, tmp_path: Path, chunk_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore({"team/a/params": content_of("a", 3 * chunk_size), "rest": content_of("rest", chunk_size)})
    tenants = (Tenant(path="team/a", cache_size=ByteSize(2 * chunk_size)),)
    async with served(store, tmp_path / "cache", chunk_size=chunk_size, tenants=tenants) as server:
        failed = (await server.command(command, "team/a"))[-1]
        assert failed["kind"] == "CacheFullError"
        told = f"tenant team/a is full (cache_size {2 * chunk_size} bytes): evict or unpin its models, or raise it"
        assert told in failed["error"]
        assert told in caplog.text
        assert (await server.command(command, "rest"))[-1]["state"] == "done"


async def test_a_tenant_without_memory_is_named(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        quotas = Quotas({"a/": chunk_size})
        host = HostTier(copier(MemoryStore()).populate, budget=None, policy=lru, quotas=quotas)
        generation = await fill(tier, "a/1", content_of("a/1", 2 * chunk_size))
        async with tier.blobs.using(generation) as blob:
            with pytest.raises(CacheFullError, match=r"a/1: no room in memory: tenant a is full \(host_size"):
                await host.pin(blob)
