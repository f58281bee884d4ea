"""Recovery after killed servers and power losses: files and index agree again."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.parts import (
    blob_files,
    content_of,
    fill,
    generation_of,
    opened,
    piece,
    recorded_bytes,
    store_chunk,
    until,
    written,
)
from tests.unit.disk.common import at_work, left, settling
from trimsfs.tiers import extents

BLOCK = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    """Less than a chunk is worth giving back, and what is written is synced soon."""
    monkeypatch.setattr("trimsfs.tiers.disk.crash_recovery.SLACK", BLOCK)
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.SYNC_INTERVAL_S", 0.01)


def allocated(cache: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in blob_files(cache))


async def test_chunks_that_nobody_recorded_take_no_space(cache: Path, chunk_size: int) -> None:
    content = content_of("a", 4 * chunk_size)
    async with opened(cache) as tier, tier.blobs.using(generation_of("a", content)) as blob:
        assert await store_chunk(tier, blob, 1, piece(content, 1))
        await tier.journal.flush()
        written(blob, 3, piece(content, 3))
        written(blob, 0, piece(content, 0)[: chunk_size // 2])
        os.fsync(blob.fileno())
        assert allocated(cache) == 2 * chunk_size + chunk_size // 2
        kept = left(cache)
    async with at_work(kept) as tier:
        assert tier.statistics().used_bytes == chunk_size == await recorded_bytes(tier)
        assert allocated(kept) == chunk_size


async def test_a_blob_that_is_opened_first_gives_back_as_much(cache: Path, chunk_size: int) -> None:
    content = content_of("a", 4 * chunk_size)
    generation = generation_of("a", content)
    async with opened(cache) as tier, tier.blobs.using(generation) as blob:
        written(blob, 3, piece(content, 3))
        os.fsync(blob.fileno())
        kept = left(cache)
    async with opened(kept) as tier, tier.blobs.using(generation) as blob:
        assert allocated(kept) == 0
        assert await store_chunk(tier, blob, 3, piece(content, 3))
        assert blob.view(3 * chunk_size, 4 * chunk_size) == piece(content, 3)


async def test_a_blob_of_which_nothing_is_recorded_is_removed_unless_it_is_pinned(cache: Path, chunk_size: int) -> None:
    a, b = (generation_of(key, content_of(key, 2 * chunk_size)) for key in "ab")
    async with opened(cache) as tier, tier.blobs.using(a) as blob, tier.blobs.using(b) as pinned:
        written(blob, 0, bytes(chunk_size))
        await tier.residencies.pin(pinned, True)
        kept = left(cache)
    async with at_work(kept) as tier:
        (here,) = await tier.residencies.all()
        assert (here.generation.key, here.pinned) == ("b", True)
        assert [path.name for path in blob_files(kept)] == [here.token]


@pytest.mark.parametrize("size", [None, 0, 100])
async def test_records_of_a_file_that_is_gone_or_cut_off_are_not_counted(
    cache: Path, chunk_size: int, size: int | None
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content_of("a", 3 * chunk_size))
        await fill(tier, "b", content_of("b", chunk_size))
    path = cache / "blobs" / generation.token("memory://test")[:2] / generation.token("memory://test")
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    async with at_work(cache) as tier:
        assert tier.statistics().used_bytes == chunk_size == await recorded_bytes(tier)
        assert len(blob_files(cache)) == 1


async def test_records_of_a_file_that_was_made_anew_before_power_was_lost_are_not_counted(
    cache: Path, chunk_size: int
) -> None:
    contents = {key: content_of(key, 4 * chunk_size) for key in ("a", "b")}
    contents["zeros"] = bytes(4 * chunk_size)
    async with opened(cache) as tier:
        generations = {key: await fill(tier, key, content) for key, content in contents.items()}
        paths = {key: tier.files.path(tier.blobs.token(generation)) for key, generation in generations.items()}
    for key, start, length in (
        ("a", 0, 4 * chunk_size),
        ("b", chunk_size + BLOCK, BLOCK),
        ("zeros", 0, 4 * chunk_size),
    ):
        with paths[key].open("r+b") as file:
            extents.punch_hole(file.fileno(), start, length)
    async with at_work(cache) as tier:
        kept = {here.generation.key: here.disk_bytes for here in await tier.residencies.all()}
        assert kept == {"b": 3 * chunk_size, "zeros": 4 * chunk_size}
        assert tier.statistics().used_bytes == 7 * chunk_size
        assert not paths["a"].exists()


async def test_what_an_open_blob_has_is_left_alone(cache: Path, chunk_size: int) -> None:
    content = content_of("a", 2 * chunk_size)
    async with opened(cache) as tier, tier.blobs.using(generation_of("a", content)) as blob:
        record = written(blob, 0, piece(content, 0))  # has landed, and is about to be told
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.run)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        tier.space.wrote(blob, record)
        assert blob.view(0, chunk_size) == piece(content, 0)


async def test_what_a_killed_server_had_not_synced_is_synced_by_the_next(
    cache: Path, chunk_size: int, reboot: Callable[[], object]
) -> None:
    async with opened(cache) as tier:
        generations = [await fill(tier, key, content_of(key, 2 * chunk_size)) for key in "ab"]
        await tier.journal.flush()
        kept = left(cache)
    async with opened(kept) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        await until(lambda: not tier.index.unsynced())
        again = left(kept, "left again")
        nursery.cancel_scope.cancel()
    reboot()
    async with opened(again) as tier:
        assert tier.statistics().used_bytes == 4 * chunk_size
        for generation in generations:
            async with tier.blobs.using(generation) as blob:
                assert blob.present_bytes == 2 * chunk_size


async def test_a_blob_that_is_evicted_while_its_sync_begins_stays_gone(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content_of("a", 2 * chunk_size))
        await tier.journal.flush()
        kept = left(cache)
    async with opened(kept) as tier, trio.open_nursery() as nursery:
        load, asked = tier.index.load, list[str]()

        def loaded_and_evicted(token: str) -> object:
            found = load(token)
            asked.append(token)
            if len(asked) == 1:
                trio.from_thread.run_sync(nursery.start_soon, tier.residencies.evict, generation)
                time.sleep(0.1)  # long enough for an eviction that nothing holds up
            return found

        monkeypatch.setattr(tier.index, "load", loaded_and_evicted)
        settled = settling(tier)
        nursery.start_soon(tier.run)
        await settled.wait()
        await until(lambda: tier.evictor.evictions > 0)
        assert blob_files(kept) == []
        assert not tier.index.has(tier.blobs.token(generation))
        nursery.cancel_scope.cancel()
