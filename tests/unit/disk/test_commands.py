"""What operators have the disk tier do, and how many files it has open."""

import gc
import os
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, fill, generation_of, opened, recorded_bytes, states, verify_chunk
from tests.unit.disk.common import MISSING, small, store
from trimsfs.errors import InUseError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.mapping import mapped

# Commands


async def test_eviction_removes_the_file_and_the_record(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
        assert await tier.residencies.evict(generation) == 2 * chunk_size
        assert await tier.residencies.evict(generation) == 0
        assert await tier.residencies.all() == []
        assert blob_files(cache) == []
        assert tier.statistics().used_bytes == 0
        async with tier.blobs.using(generation) as blob:
            assert states(blob) == [MISSING, MISSING]


async def test_what_is_open_or_pinned_is_not_evicted_by_command(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        async with tier.blobs.using(generation) as blob:
            with pytest.raises(InUseError, match="a is in use: it can be evicted once it is closed and unmapped"):
                await tier.residencies.evict(generation)
            await tier.residencies.pin(blob, True)
        with pytest.raises(InUseError, match="a is pinned: unpin it first"):
            await tier.residencies.evict(generation)
        async with tier.blobs.using(generation) as blob:
            await tier.residencies.pin(blob, False)
        assert await tier.residencies.evict(generation) == chunk_size


async def test_eviction_by_command_waits_for_a_file_that_is_open_for_a_moment(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server itself has, while it looks at what the page cache holds, and each process that it starts."""
    monkeypatch.setattr("trimsfs.tiers.disk.residency.COMMAND_PATIENCE_S", 5)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))

    async def close(descriptor: int, after_s: float) -> None:
        await trio.sleep(after_s)
        os.close(descriptor)

    async with opened(cache) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(close, os.open(blob_files(cache)[0], os.O_RDONLY), 0.05)
        assert await tier.residencies.evict(generation) == chunk_size


async def test_a_file_that_stays_mapped_is_not_evicted_by_command(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
    async with opened(cache) as tier:
        with blob_files(cache)[0].open("rb") as file:
            view = mapped(file.fileno(), chunk_size)
        with pytest.raises(InUseError, match="closed and unmapped"):
            await tier.residencies.evict(generation)
        del view
        assert await tier.residencies.evict(generation) == chunk_size


async def test_an_eviction_that_is_cancelled_leaves_the_blob_or_removes_it(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        with trio.CancelScope() as scope:
            detach = Blob.detach

            def cancel(blob: Blob) -> None:
                detach(blob)
                scope.cancel()

            monkeypatch.setattr(Blob, "detach", cancel)
            await tier.residencies.evict(generation)
        monkeypatch.undo()
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        assert bool(await recorded_bytes(tier)) == bool(blob_files(cache))


async def test_residency_tells_what_is_here(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2)
    generation = generation_of("a", content)
    async with opened(cache) as tier:
        nothing = await tier.residencies.of(generation)
        assert (nothing.disk_bytes, nothing.host_bytes, nothing.verified, nothing.users) == (0, 0, False, 0)
        async with tier.blobs.using(generation) as blob:
            await store(tier, blob, content, 0)
            half = await tier.residencies.of(generation)
            assert (half.disk_bytes, half.verified, half.pinned, half.users) == (chunk_size, False, False, 1)
            assert half.host_bytes in {None, chunk_size}
            await store(tier, blob, content, 1)
            assert (await tier.residencies.of(generation)).verified
        for _ in range(4):
            async with tier.blobs.using(generation):
                pass
        whole = await tier.residencies.of(generation)
        assert (whole.disk_bytes, whole.users, whole.uses) == (2 * chunk_size, 0, 5)
        assert whole.generation == generation
        assert await tier.residencies.all() == [whole]


async def test_objects_of_another_store_are_not_listed_and_their_pins_do_not_fill_the_cache_for_ever(
    cache: Path, chunk_size: int
) -> None:
    async with opened(cache, store="s3://one") as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        async with tier.blobs.using(generation) as blob:
            await tier.residencies.pin(blob, True)
    async with opened(cache, store="s3://other", budget=chunk_size) as tier:
        assert await tier.residencies.all() == []
        await fill(tier, "b", small("b", chunk_size))


async def test_a_store_whose_name_is_not_text_is_cached(cache: Path, chunk_size: int) -> None:
    async with opened(cache, store="file:///srv/\udcff") as tier:
        await fill(tier, "a", small("a", chunk_size))
        assert await recorded_bytes(tier) == chunk_size


async def test_an_open_with_a_newer_version_of_the_same_content_takes_it_over(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size)
    async with opened(cache) as tier:
        async with tier.blobs.using(generation_of("a", a, version_id="v1")):
            pass
        async with tier.blobs.using(generation_of("a", a, version_id="v2")) as blob:
            assert blob.generation.version_id == "v2"


# Open files


async def test_idle_blobs_are_closed_beyond_a_limit_and_found_again(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (32, 32))  # an eighth of which may be idle blobs
    before = len(os.listdir("/proc/self/fd"))
    async with opened(cache) as tier:
        generations = [await fill(tier, f"k{number}", small(f"k{number}", chunk_size)) for number in range(20)]
        await tier.journal.flush()
    async with opened(cache) as tier:
        for generation in generations:
            async with tier.blobs.using(generation):
                pass
        # The lock, three files of the index, and the blobs with a duplicate each, which Python makes for the mapping.
        assert len(os.listdir("/proc/self/fd")) <= before + 4 + 2 * 4
        for generation in generations:
            async with tier.blobs.using(generation) as blob:
                assert await verify_chunk(tier, blob, 0)
        assert tier.statistics().used_bytes == 20 * chunk_size == await recorded_bytes(tier)


async def test_a_blob_closed_right_after_it_was_written_keeps_its_chunks(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    async with opened(cache) as tier:
        for generation in [await fill(tier, f"k{number}", small(f"k{number}", chunk_size)) for number in range(10)]:
            async with tier.blobs.using(generation) as blob:
                assert states(blob) != [MISSING]


async def test_closing_leaves_no_descriptor_open(cache: Path, chunk_size: int) -> None:
    gc.collect()  # what other tests have left
    before = sorted(os.listdir("/proc/self/fd"))
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
        await fill(tier, "b", small("b", chunk_size))
    assert sorted(os.listdir("/proc/self/fd")) == before
