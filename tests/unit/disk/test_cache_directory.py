"""Cache directories that cannot be used, or no longer, and files in them that were damaged."""

import errno
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
import trio

from tests.support.chunks import SMALL_CHUNK
from tests.support.held import begin
from tests.support.parts import (
    blob_files,
    content_of,
    disk_tier,
    fail_to_sync,
    failing,
    fill,
    generation_of,
    opened,
    piece,
    recorded_bytes,
    states,
    until,
    written,
)
from tests.support.tmpfs import tmpfs
from tests.unit.disk.common import MISSING, here, remove_index, store
from trimsfs.errors import BlobDamagedError, CacheInUseError, CacheUnusableError, TrimsError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.cache_directory import CacheDirectory
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.disk.lock import is_lock_of, lock_directory
from trimsfs.tiers.index.index import BlobIndex


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier does at once what it does from time to time."""
    for name, seconds in {"FLUSH": 0.01, "SYNC": 0.02, "LOOK": 0.01}.items():
        monkeypatch.setattr(f"trimsfs.tiers.disk.maintenance.{name}_INTERVAL_S", seconds)
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.PATIENCE_S", 0.1)


@asynccontextmanager
async def taken_over(cache: Path, lock: int) -> AsyncIterator[DiskTier]:
    """A tier that goes on with what an earlier server had."""
    async with opened(cache, lock=os.dup(lock)) as tier:
        yield tier


@contextmanager
def locked(cache: Path) -> Iterator[int]:
    """The lock of a directory, which the keeper holds."""
    descriptor = lock_directory(cache)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def taken_over_directory(cache: Path, lock: int) -> Iterator[CacheDirectory]:
    with closing(CacheDirectory(cache, os.dup(lock), chunk_size=SMALL_CHUNK)) as directory:
        yield directory


def make_unusable(cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    remove_index(cache)
    (cache / "index.sqlite").mkdir()


async def test_who_goes_on_with_a_mount_does_without_a_cache_that_cannot_be_used(cache: Path, chunk_size: int) -> None:
    content = content_of("a", 2 * chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", content)
    files = blob_files(cache)
    make_unusable(cache)
    with locked(cache) as lock:
        async with taken_over(cache, lock) as tier, tier.blobs.using(generation_of("a", content)) as blob:
            assert str(cache) in (tier.unusable or "")
            assert not blob.attached
            assert await store(tier, blob, content, 0) == [False]
            assert await tier.residencies.all() == []
            assert tier.statistics().used_bytes == 0
    assert blob_files(cache) == files


async def test_who_begins_a_mount_is_told(cache: Path) -> None:
    make_unusable(cache)
    with pytest.raises(CacheUnusableError, match=str(cache)):
        disk_tier(cache)
    with locked(cache):
        pass  # nobody holds it


async def ended(tier: DiskTier) -> str:
    """Run a tier until its directory cannot be used any longer, or again: what it says."""
    with trio.fail_after(60), pytest.raises(CacheUnusableError) as raised:
        await tier.run()
    return str(raised.value)


async def test_a_cache_that_can_be_used_again_is_told_of(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        await fill(tier, "a", content_of("a", chunk_size))
    make_unusable(cache)
    with locked(cache) as lock:
        async with taken_over(cache, lock) as tier, trio.open_nursery() as nursery:
            endings = begin(nursery, ended, tier)
            await trio.sleep(0.1)
            assert endings == []
            (cache / "index.sqlite").rmdir()
        assert "can be used again" in endings[0]
        async with taken_over(cache, lock) as tier:
            assert tier.unusable is None


def test_another_directory_at_its_place_is_for_another_server_to_try(cache: Path) -> None:
    make_unusable(cache)
    with locked(cache) as lock, taken_over_directory(cache, lock) as directory:
        assert directory.problem is not None
        assert not directory.usable()
        shutil.rmtree(cache)
        assert not directory.usable()
        cache.mkdir()
        assert directory.usable()


def test_a_directory_that_was_made_anew_is_locked_again(cache: Path) -> None:
    with locked(cache) as lock:
        with taken_over_directory(cache, lock) as directory:
            assert not directory.removed()
            shutil.rmtree(cache)
            assert directory.removed()
        with taken_over_directory(cache, lock) as directory:
            assert directory.problem is None
            assert not is_lock_of(lock, cache)
            with pytest.raises(CacheInUseError):
                lock_directory(cache)
        with locked(cache), taken_over_directory(cache, lock) as directory:
            assert "in use by another server" in (directory.problem or "")


async def test_an_index_that_cannot_be_written_for_long_is_given_up(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        monkeypatch.setattr(tier.index, "used", failing(sqlite3.SQLITE_IOERR))
        async with tier.blobs.using(generation_of("a", content_of("a", chunk_size))):
            pass
        assert "cannot be used any longer" in await ended(tier)


async def test_an_index_on_a_full_disk_is_not_given_up(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(cache) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(tier.index, "add_chunks", failing(sqlite3.SQLITE_FULL))
            await fill(tier, "a", content_of("a", chunk_size))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tier.run)
                await until(lambda: "cannot write the cache index" in caplog.text)
                await trio.sleep(0.5)
                nursery.cancel_scope.cancel()
        assert len([one for one in caplog.records if "cannot write the cache index" in one.message]) == 1
        await tier.journal.flush()
        assert await recorded_bytes(tier) == chunk_size


async def test_a_directory_that_is_removed_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.REST_S", 0.2)  # it is looked at even while nothing happens
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        endings = begin(nursery, ended, tier)
        await trio.sleep(0.1)
        assert endings == []
        shutil.rmtree(cache)


async def test_damage_that_is_found_while_it_runs_is_mended_for_the_next(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content_of("a", chunk_size))
        await tier.journal.flush()
        tier.index._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        monkeypatch.setattr(tier.index, "used", failing(sqlite3.SQLITE_CORRUPT))
        with (cache / "index.sqlite").open("r+b") as file:
            file.seek(4096 * 2)
            file.write(b"\xa5" * 4096)
        async with tier.blobs.using(generation):
            pass
        await ended(tier)
    with closing(BlobIndex(cache / "index.sqlite")) as index:
        assert not index.rebuilt


# Files that are not what they were


@asynccontextmanager
async def doubting(cache: Path) -> AsyncIterator[tuple[DiskTier, list[Blob]]]:
    """A tier, and the blobs that it doubts."""
    doubted: list[Blob] = []

    def doubt(blob: Blob, error: TrimsError) -> None:
        assert isinstance(error, BlobDamagedError)
        doubted.append(blob)

    async with opened(cache, suspected=doubt) as tier:
        yield tier, doubted


async def test_a_file_that_was_cut_off_is_fetched_again_when_it_is_opened(cache: Path, chunk_size: int) -> None:
    content = content_of("a", 3 * chunk_size)
    async with doubting(cache) as (tier, doubted):
        generation = await fill(tier, "a", content)
        (path,) = blob_files(cache)
        os.truncate(path, chunk_size)
        async with tier.blobs.using(generation) as blob:
            assert blob.present_bytes == 0
            assert await store(tier, blob, content, 2) == [True]
            os.truncate(path, 10)
            assert await tier.blobs.acquire(generation) is blob  # in use
            assert states(blob) == [MISSING] * 3
            assert blob_files(cache)[0].stat().st_size == len(content)
            assert await store(tier, blob, content, 0, 1, 2) == [True] * 3
            assert blob.view(0, len(content)) == content
            tier.blobs.release(blob)
        assert tier.statistics().used_bytes == len(content) == await recorded_bytes(tier)
        assert doubted == []


async def test_a_file_that_was_cut_off_while_the_kernel_reads_it_is_doubted(cache: Path, chunk_size: int) -> None:
    async with doubting(cache) as (tier, doubted):
        generation = await fill(tier, "a", content_of("a", 3 * chunk_size))
        async with tier.blobs.using(generation) as blob:
            blob.backing_id = 7
            os.truncate(blob_files(cache)[0], chunk_size)
            async with tier.blobs.using(generation) as again:
                assert again is blob
            assert doubted == [blob]
            blob.backing_id = 0


@pytest.mark.parametrize("in_use", [False, True])
async def test_bytes_that_do_not_reach_the_disk_are_not_believed(
    cache: Path, chunk_size: int, in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes them for written, and gives others once they have left its memory."""

    def fdatasync(_descriptor: int) -> None:
        raise OSError(errno.EIO, "as told")

    monkeypatch.setattr("trimsfs.tiers.blob.os.fdatasync", fdatasync)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content_of("a", 3 * chunk_size))
        blob = await tier.blobs.acquire(generation)
        if not in_use:
            tier.blobs.release(blob)
        await tier.journal.sync()
        async with tier.blobs.using(generation) as found:
            assert (found is blob) == in_use
            assert found.present_bytes == 0
        if in_use:
            tier.blobs.release(blob)
        assert tier.statistics().used_bytes == 0 == await recorded_bytes(tier)


async def test_bytes_that_do_not_reach_the_disk_and_that_the_kernel_reads_are_written_anew(
    cache: Path, chunk_size: int
) -> None:
    content = content_of("a", 2 * chunk_size)
    async with doubting(cache) as (tier, doubted):
        generation = await fill(tier, "a", content)
        async with tier.blobs.using(generation) as blob:
            blob.backing_id = 7
            await fail_to_sync(tier, blob)
            assert doubted == [blob]
            assert blob.health.lost == {0, 1}
            assert tier.statistics().used_bytes == 0 == await recorded_bytes(tier)  # what a successor may believe
            assert not await tier.journal.sync_blob(blob)
            for chunk in range(2):
                tier.damage.repaired(blob, written(blob, chunk, piece(content, chunk)))
            assert await tier.journal.sync_blob(blob)
            assert tier.statistics().used_bytes == len(content) == await recorded_bytes(tier)
            blob.backing_id = 0


async def test_an_eviction_that_fails_is_told(cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content_of("a", chunk_size))
        with monkeypatch.context() as patch:
            patch.setattr(tier.index, "remove", failing(sqlite3.SQLITE_IOERR))
            with pytest.raises(CacheUnusableError):
                await tier.residencies.evict(generation)
        assert await tier.residencies.evict(generation) == chunk_size
        assert tier.statistics().used_bytes == 0


# No room


async def test_a_disk_that_is_full_to_the_brim_still_makes_room(tmp_path: Path, chunk_size: int) -> None:
    """To be told that a blob is gone takes the index some room, too."""
    with tmpfs(tmp_path / "disk", 4 << 20) as directory:
        async with opened(directory / "cache") as tier:
            await fill(tier, "a", content_of("a", 40 * chunk_size))
            await tier.journal.flush()
            with (directory / "filler").open("wb", buffering=0) as file:
                for size in (chunk_size, 1):
                    try:
                        while file.write(bytes(size)):
                            pass
                    except OSError:
                        continue
            await fill(tier, "b", content_of("b", 2 * chunk_size))
            assert list(await here(tier)) == ["b"]


async def test_no_more_blobs_are_open_than_there_are_descriptors_for(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    generations = [generation_of(f"k{number}", content_of(f"k{number}", chunk_size)) for number in range(12)]
    async with opened(cache) as tier:
        blobs = [await tier.blobs.acquire(generation) for generation in generations]
        assert [blob.attached for blob in blobs] == [True] * 4 + [False] * 8
        for blob in blobs:
            tier.blobs.release(blob)
        async with tier.blobs.using(generations[-1]) as blob:
            assert blob.attached
