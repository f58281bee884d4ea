"""The bytes that a cache takes are counted exactly, whatever fails."""

import os
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, failing, fill, opened, piece, recorded_bytes, store_chunk, until, written
from tests.unit.disk.common import small, store
from trimsfs.errors import CacheUnusableError, TrimsError
from trimsfs.tiers.quotas import Quotas
from trimsfs.types import Generation


async def test_a_chunk_given_up_before_it_is_recorded(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)  # not recorded yet
        async with tier.using(generation) as blob:
            assert not await tier.damage.check_chunk(blob, 0, None)
            assert tier.statistics().used_bytes == chunk_size
        await tier.flush()
        assert await recorded_bytes(tier) == tier.statistics().used_bytes
        await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_removal_that_cannot_be_recorded(cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        await tier.flush()

        async with tier.using(generation) as blob:
            with monkeypatch.context() as context:
                context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
                assert not await tier.damage.check_chunk(blob, 0, None)
        await tier.flush()
        await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_cut_off_removal_that_cannot_be_recorded(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        await tier.flush()

        (file,) = blob_files(cache)
        os.truncate(file, 10)
        with monkeypatch.context() as context:
            context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
            try:
                async with tier.using(generation):
                    pass
            except TrimsError:
                pass
        async with tier.using(generation) as blob:
            assert blob.verified_bytes == 0
        await tier.flush()
        assert tier.statistics().used_bytes == await recorded_bytes(tier)


async def test_refetched_while_its_removal_is_recorded(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        await tier.flush()
        began, gate = threading.Event(), threading.Event()
        real = tier.index.remove_chunks

        def slow(*arguments: object) -> None:
            began.set()
            assert gate.wait(20)
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(tier.index, "remove_chunks", slow)
        async with tier.using(generation) as blob, trio.open_nursery() as nursery:
            nursery.start_soon(tier.damage.check_chunk, blob, 0, None)
            await until(began.is_set)
            assert await store_chunk(tier, blob, 0, piece(a, 0))
            gate.set()
            await tier.flush()
        assert tier.statistics().used_bytes == len(a)
        assert await recorded_bytes(tier) == len(a)
        await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_written_twice_before_it_is_recorded(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        with monkeypatch.context() as context:
            context.setattr(tier.index, "add_chunks", failing(sqlite3.SQLITE_FULL))
            generation = await fill(tier, "a", a)
            await tier.flush()
            async with tier.using(generation) as blob:
                tier.damage.repaired(blob, written(blob, 0, piece(a, 0)))
            assert tier.statistics().used_bytes == len(a)
            await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_found_cut_off_while_the_index_cannot_be_written(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
    (file,) = blob_files(cache)
    os.truncate(file, 10)
    async with opened(cache) as tier:
        with monkeypatch.context() as context:
            context.setattr(tier.index, "remove_chunks", failing(sqlite3.SQLITE_FULL))
            async with tier.using(generation) as blob:
                assert await store(tier, blob, a, 0, 1) == [True, True]
        await tier.flush()
        assert tier.statistics().used_bytes == await recorded_bytes(tier) == len(a)
        await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_mended_and_evicted_before_it_is_recorded_again(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        await tier.flush()
        async with tier.using(generation) as blob:
            tier.damage.repaired(blob, written(blob, 0, piece(a, 0)))  # as a scrub does
        await tier.evictor.evict(blob.token, generation.key)  # one of several victims, chosen a moment ago
        assert tier.statistics().used_bytes == 0


async def test_an_eviction_that_fails_of_what_has_been_mended(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        await tier.flush()
        blob = tier.known(generation.token(tier.store))
        assert blob is not None

        with monkeypatch.context() as context:
            for name in ("add_chunks", "remove", "remove_chunks"):
                context.setattr(tier.index, name, failing(sqlite3.SQLITE_IOERR))
            tier.damage.repaired(blob, written(blob, 0, piece(a, 0)))
            with pytest.raises(CacheUnusableError):
                await tier.evict(generation)
        await tier.evict(generation)
        assert tier.statistics().used_bytes == 0


async def test_a_file_and_links_to_it_take_the_room_of_one(cache: Path, chunk_size: int) -> None:
    """It counts for the tenant that has the file, by whatever name it comes and goes."""
    quotas = Quotas({"a/": 4 * chunk_size, "b/": 4 * chunk_size})
    content = small("a/file", chunk_size, 2)
    async with opened(cache, quotas=quotas) as tier:
        file = Generation(key="a/file", etag='"1"', size=len(content), modified_ns=0)
        links = [replace(file, key=key, linked=file.key) for key in ("a/link", "b/link")]
        async with tier.using(links[1]) as blob, tier.using(links[0]) as same, tier.using(file) as itself:
            assert blob is same is itself
            assert await store(tier, blob, content, 0, 1) == [True, True]
            assert blob.generation == file
        assert tier.statistics().tenant_used_bytes == {"a/": len(content), "b/": 0}
        assert (await tier.residency(links[0])).generation == links[0]
    async with opened(cache, quotas=quotas) as tier:
        async with tier.using(links[1]) as blob:
            assert len(list(blob.records())) == 2
        assert [here.generation.key for here in await tier.residencies()] == [file.key]
        assert await tier.evict(links[1]) == len(content)
        assert tier.statistics().tenant_used_bytes == {"a/": 0, "b/": 0}
