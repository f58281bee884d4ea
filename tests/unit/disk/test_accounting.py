"""The bytes that a cache takes are counted exactly, whatever fails."""

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.support.held import Held
from tests.support.parts import blob_files, failing, fill, opened, piece, recorded_bytes, written
from tests.unit.disk.common import small, store
from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.quotas import Quotas
from trimsfs.types import Generation


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return small("a", chunk_size, 2)


@asynccontextmanager
async def counting(cache: Path, content: bytes, *, recorded: bool = True) -> AsyncIterator[tuple[DiskTier, Blob]]:
    """A tier with the object ``a``, which is in use in the block.

    At the end, what is counted is what is recorded, and nothing once it is evicted.
    """
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        if recorded:
            await tier.journal.flush()
        async with tier.blobs.using(generation) as blob:
            yield tier, blob
        await tier.journal.flush()
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        await tier.residencies.evict(generation)
        assert tier.statistics().used_bytes == 0


def repair(tier: DiskTier, blob: Blob, content: bytes) -> None:
    """Write the first chunk again, as a scrub does."""
    tier.damage.repaired(blob, written(blob, 0, piece(content, 0)))


async def test_a_chunk_given_up_before_it_is_recorded(cache: Path, content: bytes, chunk_size: int) -> None:
    async with counting(cache, content, recorded=False) as (tier, blob):
        assert not await tier.damage.check_chunk(blob, 0, None)
        assert tier.statistics().used_bytes == chunk_size


async def test_removal_that_cannot_be_recorded(cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with counting(cache, content) as (tier, blob):
        with monkeypatch.context() as context:
            context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
            assert not await tier.damage.check_chunk(blob, 0, None)


async def test_cut_off_removal_that_cannot_be_recorded(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counting(cache, content) as (tier, blob):
        os.truncate(blob_files(cache)[0], 10)
        with monkeypatch.context() as context:
            context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
            async with tier.blobs.using(blob.generation) as again:
                assert again.verified_bytes == 0


async def test_refetched_while_its_removal_is_recorded(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counting(cache, content) as (tier, blob):
        removing = Held(monkeypatch, tier.index, "remove_chunks")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.damage.check_chunk, blob, 0, None)
            await removing.reached()
            assert await store(tier, blob, content, 0) == [True]
            removing.go.set()
        await tier.journal.flush()
        assert tier.statistics().used_bytes == len(content)


async def test_written_twice_before_it_is_recorded(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        monkeypatch.setattr(tier.index, "add_chunks", failing(sqlite3.SQLITE_FULL))
        generation = await fill(tier, "a", content)
        await tier.journal.flush()
        async with tier.blobs.using(generation) as blob:
            repair(tier, blob, content)
        assert tier.statistics().used_bytes == len(content)
        await tier.residencies.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_found_cut_off_while_the_index_cannot_be_written(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
    os.truncate(blob_files(cache)[0], 10)
    async with opened(cache) as tier:
        with monkeypatch.context() as context:
            context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
            async with tier.blobs.using(generation) as blob:
                assert await store(tier, blob, content, 0, 1) == [True, True]
        await tier.journal.flush()
        assert tier.statistics().used_bytes == await recorded_bytes(tier) == len(content)
        await tier.residencies.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_mended_and_evicted_before_it_is_recorded_again(cache: Path, content: bytes) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.journal.flush()
        async with tier.blobs.using(generation) as blob:
            repair(tier, blob, content)
        await tier.evictor.evict(blob.token, generation.key)  # one of several victims, chosen a moment ago
        assert tier.statistics().used_bytes == 0


async def test_an_eviction_that_fails_of_what_has_been_mended(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.journal.flush()
        async with tier.blobs.using(generation) as blob:
            pass
        with monkeypatch.context() as context:
            for name in ("add_chunks", "remove", "remove_chunks"):
                context.setattr(tier.index, name, failing(sqlite3.SQLITE_IOERR))
            repair(tier, blob, content)
            with pytest.raises(CacheUnusableError):
                await tier.residencies.evict(generation)
        await tier.residencies.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_a_file_and_links_to_it_take_the_room_of_one(cache: Path, chunk_size: int) -> None:
    """It counts for the tenant that has the file, by whatever name it comes and goes."""
    quotas = Quotas({"a/": 4 * chunk_size, "b/": 4 * chunk_size})
    content = small("a/file", chunk_size, 2)
    async with opened(cache, quotas=quotas) as tier:
        file = Generation(key="a/file", etag='"1"', size=len(content), modified_ns=0)
        links = [replace(file, key=key, linked=file.key) for key in ("a/link", "b/link")]
        async with (
            tier.blobs.using(links[1]) as blob,
            tier.blobs.using(links[0]) as same,
            tier.blobs.using(file) as itself,
        ):
            assert blob is same is itself
            assert await store(tier, blob, content, 0, 1) == [True, True]
            assert blob.generation == file
        assert tier.statistics().tenant_used_bytes == {"a/": len(content), "b/": 0}
        assert (await tier.residencies.of(links[0])).generation == links[0]
    async with opened(cache, quotas=quotas) as tier:
        async with tier.blobs.using(links[1]) as blob:
            assert len(list(blob.records())) == 2
        assert [here.generation.key for here in await tier.residencies.all()] == [file.key]
        assert await tier.residencies.evict(links[1]) == len(content)
        assert tier.statistics().tenant_used_bytes == {"a/": 0, "b/": 0}
